"""Methods of a loaded run, with a run of three training steps or with patched masks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import factorkit
from factorkit.data.procedural.flowers import draw_flowers
from factorkit.engine.config import autocast
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference.segment import add_noise
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.sampling import draw_images
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.images import pixels_to_signed

CPU = torch.device("cpu")
TINY = {
    "masks": "network",
    "resolution": 16,
    "regions": 3,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "steps": 3,
    "batch_size": 4,
    "ema_decay": 0.5,
    "learning_rate": 1e-3,
    "checkpoint_every": 1,
    "sample_every": 0,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run on six images without labels."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    images, _ = draw_flowers(6, 16)
    factorkit.train_segdiff(images, out=folder, preset="demo", progress=False, **TINY)
    return folder


@pytest.fixture(scope="module")
def run(trained) -> SegdiffRun:
    run = factorkit.load(trained, device="cpu")
    with torch.no_grad():  # The masks differ clearly between positions.
        run.model.masks.decoder.conv_out.weight.mul_(30)
    return run


def build_untrained_run(folder=None, **changes) -> SegdiffRun:
    config = preset_config("demo", **{**TINY, **changes}).resolved()
    torch.manual_seed(0)
    return SegdiffRun(config, config.build(), CPU, 0, folder)


def make_image(width, height, seed=0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def patch_segment(run, monkeypatch, regions_of):
    """Replace ``run.model.segment`` by regions_of(colours [B, 3, H, W] in [-1, 1]) -> labels [B, H, W]."""

    def segment(x_t, t):
        labels = regions_of(x_t / run.schedule.signal(t))
        return F.one_hot(labels, run.config.regions).movedim(-1, 1).float()

    monkeypatch.setattr(run.model, "segment", segment)


# --- segment ---


def test_segment_square_image_equals_model_masks_at_level_30(run):
    image = make_image(16, 16)
    x = pixels_to_signed(torch.from_numpy(np.array(image))[None])
    x_t, t = add_noise(x, 30, run.schedule)
    with torch.no_grad(), autocast(run.config, run.device):
        expected = run.model(x_t, t).bottleneck.masks
    seg = run.segment(image)
    assert seg.masks.std((0, 2, 3)).min() > 0.01
    torch.testing.assert_close(seg.masks, expected)
    assert torch.equal(seg.labels, seg.masks.argmax(1))
    assert seg.labels.shape == (1, 16, 16) and seg.masks.shape == (1, 3, 16, 16)
    assert not torch.equal(run.segment(image, t=800).masks, seg.masks)


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (9, 31), (7, 5), (3, 50), (1, 1), (200, 17)])
def test_segment_any_size_returns_masks_of_that_size(run, size):
    seg = run.segment(make_image(*size))
    assert seg.masks.shape == (1, 3, size[1], size[0]) and seg.labels.shape == (1, size[1], size[0])
    torch.testing.assert_close(seg.masks.sum(1), torch.ones(1, size[1], size[0]))
    assert seg.labels.min() >= 0 and seg.labels.max() < 3 and seg.labels.dtype == torch.int64


def test_segment_wide_image_keeps_its_proportions(monkeypatch):
    run = build_untrained_run(regions=2)
    recorded = []
    patch_segment(run, monkeypatch, lambda colours: (recorded.append(colours.shape), (colours[:, 0] > 0).long())[1])
    pixels = np.zeros((24, 96, 3), np.uint8)
    pixels[:, 72:, 0] = 255  # a bar at the right, outside the centred square
    pixels[:4] = 0
    labels = run.segment(Image.fromarray(pixels)).labels[0].numpy()
    assert recorded == [(1, 3, 16, 64)]
    assert (labels != (pixels[..., 0] > 0)).mean() < 0.03


def test_segment_all_input_kinds_are_equal(run, tmp_path):
    first, second = make_image(20, 16, 1), make_image(20, 16, 2)
    pixels = np.stack([np.asarray(first), np.asarray(second)])
    (tmp_path / "sub").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "sub" / "b.png"]
    first.save(paths[0])
    second.save(paths[1])
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    inputs = {
        "folder": tmp_path,
        "name of a folder": str(tmp_path),
        "paths": paths,
        "names": [*map(str, paths)],
        "PIL images": [first, second],
        "array": pixels,
        "float array": pixels.astype(np.float32) / 255,
        "tensor": channels_first,
        "float tensor": channels_first.float() / 255,
        "doubles": channels_first.double() / 255,
        "list of arrays": list(pixels),
        "list of tensors": list(channels_first),
    }
    expected = run.segment([first, second]).masks
    assert not torch.allclose(expected[0], expected[1])
    for what, images in inputs.items():
        seg = run.segment(images)
        assert torch.equal(seg.masks, expected), what
        assert len(seg.names) == 2, what
    assert run.segment(tmp_path).names == ["a.png", "sub/b.png"]
    half = run.segment((channels_first.float() / 255).bfloat16())
    assert (half.labels == expected.argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize(
    "one",
    [lambda p: p, np.asarray, lambda p: torch.from_numpy(np.array(p)).permute(2, 0, 1)],
    ids=["PIL", "array", "tensor"],
)
def test_segment_single_image_is_a_batch_of_one(run, one):
    image = make_image(18, 16)
    assert torch.equal(run.segment(one(image)).masks, run.segment([image]).masks)


def test_segment_different_sizes_returns_lists(run):
    seg = run.segment([make_image(20, 16), make_image(16, 40)])
    assert [tuple(m.shape) for m in seg.masks] == [(3, 16, 20), (3, 40, 16)]
    assert [tuple(label.shape) for label in seg.labels] == [(16, 20), (40, 16)]


def test_segment_is_deterministic_and_independent_of_other_images(run):
    images = [make_image(16, 16, seed) for seed in range(4)]
    together, again = run.segment(images).masks, run.segment(images).masks
    torch.manual_seed(5)
    assert torch.equal(together, again)
    assert torch.equal(run.segment(images[2]).masks[0], together[2])


@pytest.mark.parametrize("level", [-1, 1000])
def test_segment_and_evaluate_level_out_of_range_raise(run, level):
    images, masks = draw_flowers(4, 16)
    with pytest.raises(ConfigError, match=f"t={level} must lie between 0 and 999"):
        run.segment(make_image(16, 16), t=level)
    with pytest.raises(ConfigError, match=f"t={level} must lie between 0 and 999"):
        run.evaluate(images, masks, t=level)


def test_segment_and_evaluate_one_region_raise():
    plain = build_untrained_run(regions=1)
    images, masks = draw_flowers(4, 16)
    with pytest.raises(ConfigError, match="regions=1, the plain DDPM"):
        plain.segment(make_image(16, 16))
    with pytest.raises(ConfigError, match="regions=1, the plain DDPM"):
        plain.evaluate(images, masks)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere/at/all", "no such file or folder"),
        ([], "empty list"),
        (torch.zeros(5, 2, 8, 8), r"\(5, 2, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), "not a set of images"),
        (torch.full((1, 3, 8, 8), 200.0), "expected 0 to 1"),
    ],
)
def test_segment_invalid_images_raise(run, images, message):
    with pytest.raises(DataError, match=message):
        run.segment(images)


def test_segment_broken_file_raises_with_its_name(run, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match="broken.jpg"):
        run.segment(tmp_path)


# --- generate ---


def test_generate_depends_on_the_seed_only(run):
    first, again, other = (run.generate(3, steps=3, seed=seed) for seed in (1, 1, 2))
    assert first.images.shape == (3, 3, 16, 16) and first.masks.shape == (3, 3, 16, 16)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert first.images.min() >= 0 and first.images.max() <= 1 and first.images.std() > 0
    torch.testing.assert_close(first.masks.sum(1), torch.ones(3, 16, 16))
    assert torch.equal(first.labels, first.masks.argmax(1)) and first.trajectory is None
    with autocast(run.config, run.device):
        drawn = draw_images(run.model, run.config, 3, steps=3, seed=1, device=CPU)
        assert drawn.bottleneck.branches is None  # not requested
    assert drawn.images.min() < -0.2
    torch.testing.assert_close(first.images, drawn.images / 2 + 0.5)


def test_generate_many_images_runs_in_batches(run, monkeypatch):
    monkeypatch.setattr("factorkit.segdiff.sampling.SAMPLE_BATCH_SIZE", 2)
    drawn = run.generate(5, steps=3, seed=1, trajectory=True)
    assert len(drawn.images) == len(drawn.masks) == len(drawn.trajectory[0].images) == 5
    assert torch.equal(drawn.images[:2], run.generate(2, steps=3, seed=1).images)
    assert len({image.sum().item() for image in drawn.images}) == 5, "batches must not repeat each other"
    assert torch.equal(drawn.images, drawn.trajectory[-1].images)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_generate_trajectory_ends_at_the_images(run, sampler):
    drawn = run.generate(2, sampler=sampler, steps=4, trajectory=True)
    assert [frame.t for frame in drawn.trajectory] == [999, 666, 333, 0]
    for frame in drawn.trajectory:
        assert frame.images.shape == drawn.images.shape and 0 <= frame.images.min() <= frame.images.max() <= 1
    assert torch.equal(drawn.trajectory[-1].images, drawn.images)
    assert torch.equal(drawn.trajectory[-1].masks, drawn.masks)
    assert torch.equal(drawn.images, run.generate(2, sampler=sampler, steps=4).images)


@pytest.mark.slow
def test_generate_untrained_levels_are_skipped():
    low = build_untrained_run(high_noise_fraction=0.0, t_max=40)
    assert [frame.t for frame in low.generate(1, sampler="ddim", steps=50, trajectory=True).trajectory][:2] == [
        39,
        38,
    ], "no more steps than levels"
    assert (
        build_untrained_run(high_noise_fraction=0.1, t_max=40).generate(1, steps=2, trajectory=True).trajectory[0].t
        == 999
    )


@pytest.mark.parametrize("changes", [{"regions": 1}, {"decoding": "concat"}, {"form": "thesis"}])
def test_generate_every_kind_of_model_works(changes):
    drawn = build_untrained_run(**changes).generate(2, steps=2, trajectory=True)
    assert drawn.masks.shape == (2, changes.get("regions", 3), 16, 16)
    assert drawn.images.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"), [({"n": 0}, "n=0"), ({"steps": 0}, "steps=0"), ({"sampler": "rk4"}, "sampler='rk4'")]
)
def test_generate_invalid_arguments_raise(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        run.generate(**{"n": 1, **changes})


# --- evaluate ---


def make_squares(count=8, size=16, seed=0):
    """Return bright squares on black, visible at noise level 30, and their masks."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, size, size), np.uint8)
    for mask in masks:
        top, left = rng.integers(1, size // 2, 2)
        mask[top : top + 6, left : left + 6] = 1
    return np.repeat(masks[..., None] * np.uint8(255), 3, -1), masks


def find_bright(colours):
    return (colours.mean(1) > 0).long()


@pytest.mark.slow
def test_evaluate_perfect_masks_score_one(monkeypatch):
    run = build_untrained_run(regions=2)
    patch_segment(run, monkeypatch, lambda colours: 1 - find_bright(colours))
    scores = run.evaluate(*make_squares(), num_fit_images=3)
    assert {n: scores[n] for n in ("acc", "iou", "dice", "oracle_iou")} == pytest.approx(
        {"acc": 1, "iou": 1, "dice": 1, "oracle_iou": 1}
    )
    assert (scores["mapping"], scores["fitted_on"], scores["scored"], scores["size"]) == ([0], 3, 5, 16)
    assert scores["confidence"] == pytest.approx(1)
    json.dumps(scores)


def test_evaluate_swapped_regions_score_below_the_oracle(monkeypatch):
    run = build_untrained_run(regions=2)
    images, masks = make_squares(10)  # The two regions are swapped in every other image.
    order = iter(range(10))
    patch_segment(
        run, monkeypatch, lambda colours: torch.stack([b if next(order) % 2 else 1 - b for b in find_bright(colours)])
    )
    scores = run.evaluate(images, masks, num_fit_images=2)
    assert scores["oracle_iou"] == pytest.approx(1)
    assert scores["iou"] < 0.7


def test_evaluate_ignored_pixels_are_not_counted(monkeypatch):
    run = build_untrained_run(regions=2)
    patch_segment(run, monkeypatch, lambda colours: torch.zeros_like(colours[:, 0], dtype=torch.int64))
    images, masks = make_squares(4)
    masks[:, :, 14:] = 128
    scores = run.evaluate(images, masks, num_fit_images=1, ignore=128)
    inside = (masks[1:] == 1).sum((1, 2)) / (16 * 14)
    assert scores["mapping"] == [0], "all foreground is better than none"
    assert scores["iou"] == pytest.approx(inside.mean()) == scores["acc"]
    assert scores["dice"] == pytest.approx((2 * inside / (inside + 1)).mean())


def test_evaluate_at_another_size_scores_enlarged_masks(monkeypatch):
    run = build_untrained_run(regions=2)
    patch_segment(run, monkeypatch, find_bright)
    images, masks = make_squares(6, 64)
    scores = run.evaluate(images, masks, num_fit_images=2, size=64)
    assert scores["size"] == 64 and 0.4 < scores["iou"] < 1


@pytest.mark.slow
def test_evaluate_folders_match_by_name_and_include_baselines(monkeypatch, tmp_path):
    run = build_untrained_run(tmp_path / "run", regions=2)
    patch_segment(run, monkeypatch, find_bright)
    images, masks = make_squares(5)
    for name, stack, factor in (("images", images, 1), ("masks", masks, 255)):
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(stack):
            Image.fromarray(pixels * np.uint8(factor)).save(tmp_path / name / f"{(i * 3) % 5}.png")
    scores = run.evaluate(tmp_path / "images", tmp_path / "masks", num_fit_images=2, baselines=True)
    assert scores["iou"] == pytest.approx(1)
    assert len(scores["baselines"]) >= 3
    assert run.scores == json.loads((tmp_path / "run" / "scores.json").read_text()) == json.loads(json.dumps(scores))


def test_evaluate_fitting_on_all_images_raises(run):
    with pytest.raises(ConfigError, match="num_fit_images=4 of 4"):
        run.evaluate(*make_squares(4), num_fit_images=4)
    assert run.evaluate(*make_squares(4))["fitted_on"] == 2, "the default must be lower for a small set"


# --- files ---


def test_save_and_load_gives_identical_results(run, tmp_path):
    file = run.save(tmp_path / "model.safetensors")
    again = factorkit.load(file, device="cpu")
    assert again.config == run.config and again.step == run.step == 3 and again.folder is None and again.scores is None
    image = make_image(20, 16)
    assert torch.equal(again.segment(image).masks, run.segment(image).masks)
    assert torch.equal(again.generate(1, steps=2).images, run.generate(1, steps=2).images)


def test_load_folder_gives_config_and_averaged_weights(trained):
    run = factorkit.load(trained, device="cpu")
    assert dataclasses.asdict(run.config) == dataclasses.asdict(preset_config("demo", **TINY).resolved())
    assert run.folder == trained and not run.model.training
    stored = load_file(trained / "checkpoints" / "step_00000003.safetensors")
    weights = run.model.state_dict()
    assert all(torch.equal(v, stored[f"ema.module.{k}"]) for k, v in weights.items())
    assert any(not torch.equal(v, stored[f"model.{k}"]) for k, v in weights.items())


def test_load_single_checkpoint_works(trained):
    older = factorkit.load(trained / "checkpoints" / "step_00000002.safetensors", device="cpu")
    assert older.step == 2


@pytest.mark.parametrize("damage", ["truncated", "altered", "emptied"])
def test_load_damaged_checkpoint_warns_and_uses_the_previous(trained, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    newest = folder / "checkpoints" / "step_00000003.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes({"truncated": content[: len(content) // 2], "altered": content, "emptied": b""}[damage])
    with pytest.warns(UserWarning, match=r"step_00000003.*damaged.*step_00000002"):
        run = factorkit.load(folder, device="cpu")
    assert run.step == 2


def test_load_all_checkpoints_damaged_raises(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for path in (folder / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        factorkit.load(folder, device="cpu")


def test_load_foreign_file_or_folder_raises(trained, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        factorkit.load(tmp_path / "nowhere.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    with pytest.raises(CheckpointError, match="foreign.safetensors.*factorkit"):
        factorkit.load(foreign)
    with pytest.raises(CheckpointError, match="not a run folder"):
        factorkit.load(tmp_path)
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        factorkit.load(tmp_path)


def test_load_weights_of_another_precision_segment_as_fp32(tmp_path):
    from factorkit.engine.checkpoint import read_checkpoint, write_checkpoint

    run = build_untrained_run(masks="auto")
    tensors, meta = read_checkpoint(run.save(tmp_path / "model.safetensors"))
    assert any(".network." in name for name in tensors)
    double = write_checkpoint(tmp_path / "double.safetensors", {k: v.double() for k, v in tensors.items()}, meta)
    images = np.zeros((1, 16, 16, 3), np.uint8)
    assert torch.equal(factorkit.load(double).segment(images).masks, run.segment(images).masks)


def test_load_other_model_or_mismatched_weights_raise(run, tmp_path):
    from factorkit.engine.checkpoint import read_checkpoint, write_checkpoint

    tensors, meta = read_checkpoint(run.save(tmp_path / "model.safetensors"))
    other = write_checkpoint(tmp_path / "other.safetensors", tensors, {**meta, "model": "nerfdiff"})
    with pytest.raises(CheckpointError, match="'nerfdiff' model, not segdiff"):
        factorkit.SegdiffRun.load(other)
    with pytest.raises(CheckpointError, match="do not (fit|match)"):
        factorkit.load(other)
    wide = write_checkpoint(tmp_path / "wide.safetensors", tensors, {**meta, "model_channels": 16})
    with pytest.raises(CheckpointError, match=r"do not match .*size mismatch for .*, and \d+ more") as caught:
        factorkit.load(wide)
    assert len(str(caught.value)) < 500


def test_load_last_or_average_weights_equals_the_stored(trained, run, tmp_path):
    average, last = (factorkit.load(trained, device="cpu", weights=weights) for weights in ("average", "last"))
    stored = load_file(sorted((trained / "checkpoints").glob("step_*.safetensors"))[-1])
    for loaded, prefix in ((average, "ema.module."), (last, "model.")):
        assert all(torch.equal(value, stored[prefix + name]) for name, value in loaded.model.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(average.model.parameters(), last.model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="holds no weights of the last step"):
        factorkit.load(run.save(tmp_path / "model.safetensors"), device="cpu", weights="last")
    with pytest.raises(ConfigError, match="weights='best' is unknown"):
        factorkit.load(trained, device="cpu", weights="best")
