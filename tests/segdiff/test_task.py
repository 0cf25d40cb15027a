"""The training loss compared with its formula, and the statistics logged during training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference.segment import add_noise, predict_masks
from factorkit.segdiff.task import NUM_PROBES, SegdiffTask
from factorkit.utils.images import pixels_to_signed
from factorkit.utils.rng import BatchDraw

CPU = torch.device("cpu")
TINY = {
    "masks": "network",
    "resolution": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "steps": 400,
}


def make_images(count=6, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def build_task(images=None, probes=None, **changes) -> SegdiffTask:
    config = preset_config(None, **{**TINY, **changes}).resolved()
    images = make_images() if images is None else images
    task = SegdiffTask(config, images, images if probes is None else probes, CPU)
    with torch.no_grad():  # away from the zero initialisation
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return task


def make_draw(rows=slice(0, 16), batch=16, seed=3, images_seen=32) -> BatchDraw:
    return BatchDraw(seed, images_seen, batch, rows, CPU)


def compute_by_hand(task, indices, step):
    """Return the time steps, loss and weighted loss by the formulas, with all constants written out."""
    config, numbers = task.config, make_draw()
    x0 = torch.from_numpy(task.images[indices.numpy()].astype(np.float32)).movedim(3, 1) / 127.5 - 1
    flip = numbers.uniform() < 0.5
    x0 = torch.stack([image.flip(-1) if f else image for image, f in zip(x0, flip, strict=True)])
    t = numbers.integers(0, config.t_max)
    if config.high_noise_fraction:
        in_tail = numbers.uniform() < config.high_noise_fraction
        t = torch.where(in_tail, numbers.integers(config.t_max, 1000), t)
    eps = numbers.normal(3, 8, 8)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t].float()
    signal, noise = alpha_bar.sqrt()[:, None, None, None], (1 - alpha_bar).sqrt()[:, None, None, None]
    target = eps if config.prediction == "eps" else signal * eps - noise * x0
    out = task.model(signal * x0 + noise * eps, t).prediction
    loss = (out - target).square().mean((1, 2, 3))
    start, end = config.coarse_to_fine
    power = 0.0 if step >= end else 1.0 if step <= start else (end - step) / (end - start)
    return t, loss, loss * (1 - alpha_bar) ** power


@pytest.mark.parametrize("prediction", ["v", "eps"])
@pytest.mark.parametrize(("form", "step"), [("thesis", 1), ("regional", 1), ("regional", 100), ("regional", 390)])
def test_loss_equals_its_formula(prediction, form, step):
    task = build_task(form=form, prediction=prediction, coarse_to_fine=None if form == "thesis" else (50, 150))
    task.model.eval()
    indices = torch.arange(16) % 6
    with torch.no_grad():
        result = task.loss(task.model, indices, make_draw(), step - 1)  # steps are counted from 0
        t, loss, weighted = compute_by_hand(task, indices, step)
    torch.testing.assert_close(result.loss, loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.objective, weighted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.level, t / 1000)
    if form == "regional" and step == 1:
        assert (result.objective < result.loss).all()
    elif step > 150 or form == "thesis":
        assert torch.equal(result.objective, result.loss)


@pytest.mark.parametrize(
    ("changes", "low", "high", "beyond"),
    [
        ({"t_max": 300, "high_noise_fraction": 0.0}, 0, 300, 0.0),
        ({"t_max": 300, "high_noise_fraction": 0.25}, 0, 1000, 0.25),
        ({"form": "thesis"}, 0, 1000, 0.7),
        ({"t_max": 300, "high_noise_fraction": 1.0}, 300, 1000, 1.0),
    ],
)
def test_loss_samples_the_configured_time_steps(changes, low, high, beyond):
    task = build_task(**changes, regions=1, half_resolution_masks=False)
    recorded = []
    predict = task.model.forward
    task.model.forward = lambda x, t: (recorded.append(t), predict(x, t))[1]
    with torch.no_grad():
        task.loss(task.model, torch.zeros(2000, dtype=torch.int64), make_draw(slice(0, 2000), 2000), 0)
    t = torch.cat(recorded)
    assert low <= t.min() and t.max() < high
    assert (t >= 300).float().mean().item() == pytest.approx(beyond, abs=0.04)


def test_loss_depends_on_the_draw_and_flips_half_of_the_images():
    task, indices = build_task(), torch.zeros(400, dtype=torch.int64)
    recorded = []
    gather = task.schedule.noise
    task.schedule.noise = lambda x0, eps, t: (recorded.append(x0), gather(x0, eps, t))[1]
    rows = slice(0, 400)
    with torch.no_grad():
        first, again, other = (
            task.loss(task.model, indices, BatchDraw(seed, 0, 400, rows, CPU), 0).loss for seed in (1, 1, 2)
        )
    assert torch.equal(first, again) and not torch.equal(first, other)
    upright = pixels_to_signed(torch.from_numpy(task.images[:1]))
    mirrored = (recorded[0] == upright.flip(3)).all((1, 2, 3))
    assert (mirrored | (recorded[0] == upright).all((1, 2, 3))).all()
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_gather_any_order_returns_images_of_the_indices():
    task = build_task()
    indices = torch.tensor([5, 0, 5, 3, 1])
    np.testing.assert_array_equal(task._gather(indices).numpy(), task.images[indices.numpy()])
    task.images = torch.from_numpy(task.images)
    np.testing.assert_array_equal(task._gather(indices).numpy(), task.images[indices].numpy())


def test_watch_returns_areas_and_entropy_of_the_masks():
    task = build_task(regions=2)
    masks = torch.tensor([0.25, 0.75])[None, :, None, None].expand(3, 2, 4, 4)
    result = task._watch(masks)
    assert result["areas"].tolist() == pytest.approx([0.25, 0.75])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert result["entropy"].item() == pytest.approx(expected)
    assert build_task(regions=1)._watch(masks[:, :1]) == {}


def test_parameter_groups_only_the_mask_decoder_has_its_own_rate():
    task = build_task(mask_learning_rate=0.2)
    fast, slow = task.parameter_groups()
    assert (fast["scale"], slow["scale"]) == (1.0, 0.2)
    names = {id(p): n for n, p in task.model.named_parameters()}
    assert {names[id(p)].rpartition("masks.decoder.")[1] for p in slow["params"]} == {"masks.decoder."}
    assert len(fast["params"]) + len(slow["params"]) == len(names)
    assert [g["scale"] for g in build_task(regions=1).parameter_groups()] == [1.0]


def test_initial_weights_depend_on_the_seed_only():
    torch.manual_seed(77)
    first = build_task(seed=1).model.state_dict()
    torch.manual_seed(78)
    again, other = build_task(seed=1).model.state_dict(), build_task(seed=2).model.state_dict()
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_probes_are_bounded_and_alarms_are_repeatable():
    task = build_task(images=make_images(4), probes=make_images(NUM_PROBES + 9))
    assert len(task.probes) == NUM_PROBES
    task.probes = task.probes[:5]
    task.model.eval()
    assert task.alarms(task.model) == task.alarms(task.model)


@pytest.mark.parametrize("changes", [{"regions": 3}, {"regions": 1}, {"decoding": "concat"}])
@torch.no_grad()
def test_inspect_writes_two_grids_and_returns_alarms(changes, tmp_path, monkeypatch):
    monkeypatch.setattr("factorkit.segdiff.task.NUM_PREVIEW_STEPS", 2)
    task = build_task(**changes)
    result = task.inspect(task.model.eval(), 12, tmp_path / "samples")
    grids = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert grids == ["000012_generated.png", "000012_segmentation.png"]
    for name in grids:
        assert min(Image.open(tmp_path / "samples" / name).size) > 8
    assert ("eta_gap" in result and "failures" in result) == (changes.get("regions") != 1)


def test_add_noise_depends_only_on_shape_and_level():
    task = build_task()
    images = pixels_to_signed(torch.from_numpy(make_images()))
    x_t, t = add_noise(images, 30, task.schedule)
    assert (t == 30).all() and t.shape == (6,)
    alone, _ = add_noise(images[4:5], 30, task.schedule)
    torch.testing.assert_close(x_t[4:5], alone)
    eps = (x_t - task.schedule.signal(t) * images) / task.schedule.sigma(t)
    torch.testing.assert_close(eps, eps[:1].expand_as(eps), atol=1e-4, rtol=0)
    assert eps.std().item() == pytest.approx(1, abs=0.2)


def test_predict_masks_in_batches_equals_the_whole(monkeypatch):
    task = build_task()
    images = pixels_to_signed(torch.from_numpy(make_images(5)))
    task.model.eval()
    whole = predict_masks(task.model, images, 30, task.schedule)
    assert whole.shape == (5, 3, 8, 8) and whole.dtype == torch.float32
    monkeypatch.setattr("factorkit.segdiff.inference.segment.MASK_BATCH_SIZE", 2)
    torch.testing.assert_close(predict_masks(task.model, images, 30, task.schedule), whole)
