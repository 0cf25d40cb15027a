"""Segmentation of one image: the network's input, tiles, and masks at the full size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.segdiff.config import SegdiffConfig, preset_config
from factorkit.segdiff.inference import segment
from factorkit.segdiff.inference.segment import predict_tiled, prepare_image, upsample_masks
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.errors import ConfigError, OutOfMemoryError

TINY = {
    "masks": "network",
    "resolution": 16,
    "regions": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def config():
    return preset_config("demo", **TINY).resolved()


@pytest.fixture(scope="module")
def run(config):
    torch.manual_seed(0)
    return SegdiffRun(config, config.build(), torch.device("cpu"), 0)


def segment_bright(images):
    """Masks of bright pixels: [N, 2, h, w]."""
    inside = (images.mean(1, keepdim=True) > 0).float()
    return torch.cat([1 - inside, inside], 1)


def draw_disc(width, height):
    y, x = np.mgrid[:height, :width]
    inside = (x - 0.4 * width) ** 2 + (y - 0.55 * height) ** 2 < (0.3 * min(width, height)) ** 2
    return np.where(inside[..., None], [250, 230, 40], [20, 60, 30]).astype(np.uint8), inside


# --- the network's input ---


@pytest.mark.parametrize(
    ("size", "input_size"),
    [
        ((16, 16), (16, 16)),
        ((640, 480), (22, 16)),
        ((1, 1), (16, 16)),
        ((30_000, 20), (1024, 16)),
        ((40, 1), (640, 16)),
    ],
)
def test_prepare_image_short_side_sets_the_size(config, size, input_size):
    small = prepare_image(Image.new("RGB", size), config, 16, "guided").small
    assert small.shape[1::-1] == input_size


def test_prepare_image_larger_image_has_a_guide(config):
    prepare = lambda size, upsample="guided": prepare_image(Image.new("RGB", size), config, 16, upsample)  # noqa: E731
    assert (
        prepare((16, 16)).guide is None
        and prepare((10, 7)).guide is None
        and prepare((200, 100), "bilinear").guide is None
    )
    large = prepare((200, 100))
    assert large.guide.shape == (32, 64, 3) and large.radius == 4
    assert prepare((20, 17)).guide.shape == (17, 20, 3)


# --- tiles ---


@pytest.mark.parametrize("size", [(64, 64), (64, 200), (130, 90), (66, 64)])
def test_predict_tiled_pixelwise_model_equals_the_whole(size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *size, 3), np.uint8)
    shapes = []

    def predict(part):
        shapes.append(part.shape[2:])
        return ((part + 1) / 2)[:, :2] / ((part + 1) / 2)[:, :2].sum(1, keepdim=True).clamp_min(1e-6)

    result = predict_tiled(predict, images, SegdiffConfig(resolution=16, masks="network"))
    whole = predict(segment.pixels_to_signed(torch.from_numpy(images)))
    torch.testing.assert_close(result, whole)
    assert max(max(shape) for shape in shapes[:-1]) <= 64
    assert (len(shapes) > 2) == (max(size) > 64)


def test_predict_tiled_mixture_masks_use_whole_images():
    """The spatial prior and the colours of a mixture belong to a whole image."""
    config = SegdiffConfig(resolution=16, masks="mixture")
    shapes = []

    def predict(images):
        shapes.append(tuple(images.shape[2:]))
        return images[:, :2]

    assert predict_tiled(predict, np.zeros((1, 80, 200, 3), np.uint8), config).shape == (1, 2, 80, 200)
    assert shapes == [(80, 200)]


def test_predict_tiled_tiles_blend_without_a_seam():
    """Tiles with different constant outputs blend in a ramp, not in a step."""
    count = iter(range(100))
    result = predict_tiled(
        lambda part: torch.full((1, 1, *part.shape[2:]), float(next(count))),
        np.zeros((1, 16, 112, 3), np.uint8),
        SegdiffConfig(resolution=16, masks="network"),
    )
    line = result[0, 0, 8]
    assert line[0] == 0 and line[-1] == 1 and next(count) == 2
    assert (line.diff() >= 0).all() and line.diff().max() < 0.1
    assert (line[:48] == 0).all() and (line[64:] == 1).all()


# --- full size ---


@pytest.mark.parametrize("upsample", ["guided", "bilinear"])
@pytest.mark.parametrize("size", [(161, 97), (16, 16), (9, 7), (400, 1)])
def test_full_size_bands_sum_to_one_at_any_height(config, size, upsample, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    recorded = prepare_image(Image.fromarray(pixels), config, 16, upsample)
    masks = torch.rand(3, *recorded.small.shape[:2]).softmax(0)
    whole = torch.cat([band for _, band in upsample_masks(masks, recorded)], 1)
    assert whole.shape == (3, *size[::-1]) and whole.min() >= 0 and whole.dtype == torch.float32
    torch.testing.assert_close(whole.sum(0), torch.ones(size[::-1]))
    monkeypatch.setattr(segment, "PIXELS_PER_BAND", 3 * size[0])
    bands = list(upsample_masks(masks, recorded))
    assert len(bands) > 1 or size[1] <= 3
    torch.testing.assert_close(torch.cat([band for _, band in bands], 1), whole)


def test_full_size_guided_masks_follow_the_edge(run, monkeypatch):
    pixels, inside = draw_disc(320, 240)
    monkeypatch.setattr(run.model, "segment", lambda x_t, t: segment_bright(x_t))
    wrong = {}
    for upsample in ("guided", "bilinear"):
        result = run.segment(pixels, upsample=upsample)
        wrong[upsample] = (result.labels[0].numpy() != inside).mean()
        soft = result.masks[0, 1].numpy()
        wrong[upsample, "soft"] = np.abs(soft - inside).mean()
    assert wrong["guided"] < 0.004 and wrong["guided", "soft"] < 0.03
    assert wrong["guided"] < 0.2 * wrong["bilinear"] and wrong["guided", "soft"] < 0.9 * wrong["bilinear", "soft"]


def test_full_size_guided_object_masks_are_smoothed_less(config):
    inside = draw_disc(64, 64)[1]
    faint = Image.fromarray((118 + inside[..., None] * [20, 20, 20]).astype(np.uint8))
    errors = []
    for settings in (config, preset_config("demo", **TINY | {"masks": "auto"}).resolved()):
        prepared = prepare_image(faint, settings, 16, "guided")
        small = segment_bright(torch.from_numpy(prepared.small)[None].movedim(3, 1) - 128.0)
        full = torch.cat([band for _, band in upsample_masks(small[0], prepared)], 1)
        errors.append(np.abs(full[1].numpy() - inside).mean())
    assert errors[1] < 0.7 * errors[0]


def test_segment_size_sets_the_network_input(run, monkeypatch):
    recorded = []
    monkeypatch.setattr(
        run.model, "segment", lambda x_t, t: (recorded.append(tuple(x_t.shape[2:])), segment_bright(x_t))[1]
    )
    pixels, _ = draw_disc(120, 90)
    run.segment(pixels)
    run.segment(pixels, size=40)
    assert recorded == [(16, 22), (40, 54)]
    run.segment(pixels, size=90)
    assert set(recorded[2:]) == {(64, 64)} and len(recorded) == 2 + 2 * 3, (
        "90 x 120 in tiles of four training resolutions"
    )
    for changes, message in (({"size": 0}, "size=0"), ({"upsample": "cubic"}, "upsample='cubic'")):
        with pytest.raises(ConfigError, match=message):
            run.segment(pixels, **changes)


# --- extreme sizes and memory ---


@pytest.mark.parametrize("size", [(1, 1), (30_000, 3), (2, 30_000)])
def test_segment_extreme_sizes_work(run, size):
    result = run.segment(Image.new("RGB", size, "red"))
    assert result.masks.shape == (1, 2, size[1], size[0])
    torch.testing.assert_close(result.masks.sum(1), torch.ones(1, size[1], size[0]))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
)
def test_segment_out_of_memory_error_names_the_cure(run, monkeypatch, error):
    def raise_out_of_memory(x_t, t):
        raise error

    monkeypatch.setattr(run.model, "segment", raise_out_of_memory)
    with pytest.raises(
        OutOfMemoryError, match="out of memory for 50 x 40 pixels; scale it down, or give less than size=20"
    ):
        run.segment(Image.new("RGB", (50, 40)), size=20)
    monkeypatch.setattr(run.model, "segment", lambda x_t, t: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.segment(Image.new("RGB", (50, 40)))
