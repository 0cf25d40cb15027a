"""Every objective and schedule of segdiff: loss, branches, defaults and sampling."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import factorkit
from factorkit.diffusion.samplers import SAMPLERS
from factorkit.diffusion.schedule import Schedule, to_x0
from factorkit.segdiff.config import SegdiffConfig, preset_config
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.errors import ConfigError
from factorkit.utils.rng import BatchDraw

CPU = torch.device("cpu")
TINY = {
    "masks": "network",
    "resolution": 8,
    "regions": 3,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "steps": 3,
    "batch_size": 4,
    "sample_every": 0,
    "log_every": 1,
    "device": "cpu",
}
PAIRS = [(p, s) for p in ("eps", "v", "x0", "flow") for s in ("linear", "cosine", "flow") if (p, s) != ("eps", "flow")]


@pytest.fixture(autouse=True)
def isolate(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("factorkit.segdiff.task.NUM_PREVIEW_STEPS", 2)
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)


def make_images(count=6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def build_task(**changes) -> SegdiffTask:
    task = SegdiffTask(preset_config(None, **{**TINY, **changes}).resolved(), make_images(), make_images(), CPU)
    with torch.no_grad():  # away from the zero initialisation
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    task.model.eval()
    return task


def compute_levels(kind: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a and s by their formulas."""
    if kind == "flow":
        s = (t.double() + 1) / 1000
        return 1 - s, s
    if kind == "linear":
        ab = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[t]
    else:
        signal_squared = lambda t: torch.cos((t / 1000 + 0.008) / 1.008 * torch.pi / 2) ** 2  # noqa: E731
        ab = signal_squared(t.double() + 1) / signal_squared(torch.zeros((), dtype=torch.float64))
    return ab.sqrt(), (1 - ab).sqrt()


@torch.no_grad()
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("form", ["regional", "thesis"])
@pytest.mark.parametrize(("prediction", "kind"), PAIRS)
def test_loss_of_every_objective_equals_its_formula(form, prediction, kind, weighting):
    task = build_task(
        form=form, prediction=prediction, schedule=kind, loss_weighting=weighting, t_max=900, high_noise_fraction=0.0
    )
    draw, indices = BatchDraw(3, 0, 4, slice(0, 4), CPU), torch.arange(4)
    result = task.loss(task.model, indices, draw, torch.tensor(999))  # long after the coarse-to-fine phase

    draw = BatchDraw(3, 0, 4, slice(0, 4), CPU)
    x0 = torch.from_numpy(task.images[:4]).movedim(3, 1).float() / 127.5 - 1
    x0 = torch.where((draw.uniform() < 0.5)[:, None, None, None], x0.flip(3), x0)
    t = draw.integers(0, 900)
    eps = draw.normal(3, 8, 8)
    a, s = compute_levels(kind, t)
    expand = lambda v: v.float()[:, None, None, None]  # noqa: E731
    target = {"eps": eps, "v": expand(a) * eps - expand(s) * x0, "x0": x0, "flow": eps - x0}[prediction]
    out = task.model(expand(a) * x0 + expand(s) * eps, t).prediction
    loss = (out - target).square().mean((1, 2, 3))
    weight = torch.ones(4)
    if weighting == "min_snr":
        snr = (a / s) ** 2
        per_error = {"eps": snr, "v": snr + 1, "x0": 1, "flow": 1 / s**2}[prediction]  # Hang et al. 2023, section 3.4
        if prediction == "v" and kind == "flow":
            per_error = ((a**2 + s**2) / s) ** 2
        elif prediction == "flow":
            per_error = ((a + s) / s) ** 2
        weight = (snr.clamp_max(5) / per_error).float()
    torch.testing.assert_close(result.loss, loss, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.objective, loss * weight, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", ["regional", "thesis"])
@pytest.mark.parametrize(("prediction", "kind"), PAIRS)
def test_branch_images_of_every_objective_blend_to_the_whole(form, prediction, kind):
    task = build_task(form=form, prediction=prediction, schedule=kind)
    t = torch.tensor([20, 400, 900])
    x_t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = task.model(x_t, t)
    masks, branches = out.bottleneck.masks, out.bottleneck.branches
    assert masks.std((0, 2, 3)).min() > 1e-3
    whole = to_x0(prediction, task.schedule, x_t, out.prediction, t)
    each = torch.stack([to_x0(prediction, task.schedule, x_t, b.float(), t) for b in branches.unbind(1)], 1)
    torch.testing.assert_close((masks[:, :, None] * each).sum(1), whole, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("prediction", "kind"), [("eps", "linear"), ("v", "cosine"), ("x0", "linear"), ("flow", None)])
@pytest.mark.parametrize("form", ["regional", "thesis"])
def test_every_objective_trains_segments_and_samples(form, prediction, kind, tmp_path):
    settings = {**TINY, "form": form, "prediction": prediction, "schedule": kind, "loss_weighting": "min_snr"}
    run = factorkit.train_segdiff(make_images(), out=tmp_path / "run", preset="demo", progress=False, **settings)
    assert run.config.schedule == (kind or "flow") == run.schedule.kind
    again = factorkit.load(tmp_path / "run", device="cpu")
    assert again.config == run.config
    assert run.segment(make_images()).masks.shape == (6, 3, 8, 8)
    recorded = [again.generate(2, sampler=sampler, steps=4).images for sampler in SAMPLERS]
    assert all(images.isfinite().all() and images.std() > 0 for images in recorded)
    assert not torch.equal(recorded[SAMPLERS.index("heun")], recorded[SAMPLERS.index("ddim")])


def test_default_levels_have_the_noise_of_the_linear_schedule():
    reference = Schedule()
    noise_ratio = lambda path, t: (path.sigmas[t] / path.signals[t]).item()  # noqa: E731
    for preset, most in (("fast32", 600), ("fast64", 720)):
        config = preset_config(preset, masks="network").resolved()
        assert config.t_max == most and config.segment_t == 30
    cases = ({"schedule": "cosine"}, {"prediction": "flow"}, {"schedule": "flow", "timesteps": 500})
    for changes, (preset, most) in itertools.product(cases, (("fast32", 600), ("fast64", 720))):
        config = preset_config(preset, masks="network", **changes).resolved()
        assert noise_ratio(config.build_schedule(), config.t_max) == pytest.approx(
            noise_ratio(reference, most), rel=0.02
        )
        assert noise_ratio(config.build_schedule(), config.segment_t) == pytest.approx(
            noise_ratio(reference, 30), rel=0.02
        )
        assert config.high_noise_fraction == 0.1
        thesis = SegdiffConfig(form="thesis", **{"prediction": "v", **changes}).resolved()
        assert thesis.t_max == thesis.timesteps and thesis.high_noise_fraction == 0
    assert SegdiffConfig(schedule="cosine", segment_t=5, t_max=77).resolved().segment_t == 5


def test_schedules_other_than_linear_may_be_short():
    for kind in ("cosine", "flow"):
        config = SegdiffConfig(schedule=kind, timesteps=4).resolved()
        assert 1 <= config.t_max <= 4 and 0 <= config.segment_t < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "eps", "schedule": "flow"}, "'eps'.*schedule='flow'.*pure noise"),
        ({"prediction": "score"}, "prediction='score'.*eps, v, x0, flow"),
        ({"schedule": "sigmoid"}, "schedule='sigmoid'.*linear, cosine, flow"),
        ({"loss_weighting": "snr"}, "loss_weighting='snr'.*min_snr"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma=0"),
        ({"label_dropout": 1.0}, "label_dropout=1"),
        ({"timesteps": 20, "schedule": "linear"}, "timesteps=20.*more than 20"),
        ({"timesteps": 0, "schedule": "flow"}, "0 steps"),
    ],
)
def test_config_invalid_objective_raises(changes, message):
    with pytest.raises(ConfigError, match=message):
        SegdiffConfig(**changes).resolved()
