"""The spatial mixture model: its closed form compared with torch's, and the regions it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference.segment import add_noise
from factorkit.segdiff.masks import spatial_mixture as module
from factorkit.segdiff.masks.spatial_mixture import (
    EM_ROUNDS,
    ERROR_TIMES,
    UNIFORM_SHARE,
    SpatialMixture,
    colour_evidence,
    invert,
    unexplained_noise,
)
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed
from factorkit.utils.rng import BatchDraw, derived_seed

TINY = {
    "resolution": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "steps": 400,
}


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


def draw_objects(count, size=16):
    """Draw an object on a background, both of random colours, uint8 [count, size, size, 3], and the mask."""
    rng = np.random.default_rng(0)
    inside = np.zeros((size, size), bool)
    inside[size // 4 : -size // 4, size // 4 : -size // 4] = True
    colours = rng.integers(0, 256, (2, count, 1, 1, 3))
    images = np.where(inside[..., None], colours[0], colours[1]) + rng.normal(0, 8, (count, size, size, 3))
    return images.clip(0, 255).astype(np.uint8), inside


def test_invert_equals_torch():
    roots = torch.randn(5, 3, 3, dtype=torch.float64)
    spread = roots @ roots.mT + 0.1 * torch.eye(3)
    inverse, determinant = invert(spread)
    torch.testing.assert_close(inverse, torch.linalg.inv(spread))
    torch.testing.assert_close(determinant, torch.linalg.det(spread))


def test_colour_evidence_equals_gaussian_log_density(monkeypatch):
    monkeypatch.setattr(module, "PSEUDO_PIXELS", 0.0)
    x, masks = torch.rand(2, 40, 3), torch.rand(2, 3, 40)
    evidence, slopes = colour_evidence(x, (x[..., :, None] * x[..., None, :]).flatten(2), masks)
    for n in range(2):
        for k in range(3):
            spread = torch.cov(x[n].T, correction=0, aweights=masks[n, k]) + module.MIN_VARIANCE * torch.eye(3)
            mean = (masks[n, k, :, None] * x[n]).sum(0) / masks[n, k].sum()
            at = x[n].clone().requires_grad_()
            expected = MultivariateNormal(mean, spread).log_prob(at)
            constant = 1.5 * np.log(2 * np.pi)
            torch.testing.assert_close(evidence[n, k], expected.detach() + constant, atol=1e-3, rtol=1e-3)
            expected.sum().backward()
            torch.testing.assert_close(slopes[n, k].T, at.grad, atol=1e-2, rtol=1e-3)


def test_score_equals_gradient_of_the_mixture(monkeypatch):
    monkeypatch.setattr(module, "EM_ROUNDS", 1)  # The colours are then those under the spatial prior.
    mixture, x = SpatialMixture(2), torch.randn(1, 3, 8, 8)
    proposal = mixture(x)
    shares = mixture.prior(8, 8).flatten(1)
    assert torch.allclose(shares.sum(0), torch.ones(64)) and shares.min() >= module.UNIFORM_SHARE / 2
    pixels = x[0].flatten(1).T
    area = shares.sum(1)
    means = shares @ pixels / (area[:, None] + 1e-3)
    spreads = []
    for k in range(2):
        away = (pixels - means[k]) * shares[k, :, None].sqrt()
        prior = module.PSEUDO_PIXELS * module.PSEUDO_VARIANCE * torch.eye(3)
        spreads.append((away.T @ away + prior) / (area[k] + module.PSEUDO_PIXELS) + module.MIN_VARIANCE * torch.eye(3))
    at = pixels.clone().requires_grad_()
    each = MultivariateNormal(means.expand(64, 2, 3), torch.stack(spreads).expand(64, 2, 3, 3))
    mixture = MixtureSameFamily(Categorical(shares.T.detach()), each)
    mixture.log_prob(at[:, :]).sum().backward()
    torch.testing.assert_close(proposal.score[0].flatten(1).T, at.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_mixture_objects_of_varying_colour_are_one_region():
    images, inside = draw_objects(24)
    mixture, x = SpatialMixture(2), pixels_to_signed(torch.from_numpy(images))
    schedule = Schedule()
    optimizer = torch.optim.Adam(mixture.parameters(), 0.03)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        t = torch.randint(0, 600, (len(x),), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        proposal = mixture(schedule.noise(x, eps, t))
        loss = (schedule.sigma(t) * proposal.score + eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = mixture(add_noise(x, 30, schedule)[0]).logits.argmax(1).numpy() == 0
    agree = (result == inside).mean((1, 2))
    assert max(agree.mean(), 1 - agree.mean()) > 0.95  # one region for all objects, whatever their colours
    places = mixture.prior(16, 16)[int(agree.mean() < 0.5)].detach().numpy()
    assert places[inside].mean() > places[~inside].mean() + 0.5


def test_segment_with_a_mixture_uses_no_network_and_any_size():
    config = preset_config(None, **TINY, masks="mixture").resolved()
    assert not (config.normalised_logits or config.half_resolution_masks) and config.mask_learning_rate == 100
    assert config.segment_t == 0 and preset_config(None, **TINY, masks="network").resolved().segment_t == 30
    model = config.build()
    x, t = torch.randn(2, 3, 24, 16), torch.full((2,), 30)
    model.encoder = None
    with torch.autocast("cpu", torch.bfloat16):
        masks = model.segment(x, t)
    assert masks.shape == (2, 3, 24, 16) and masks.dtype == torch.float32
    torch.testing.assert_close(masks, model.segment(x, t))
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 24, 16))


@pytest.mark.parametrize("decoding", ["masked_skips", "concat"])
def test_spatial_prior_gradient_comes_from_the_mixture_loss_only(decoding):
    config = preset_config(None, **TINY, masks="mixture", decoding=decoding).resolved()
    images, _ = draw_objects(16, 8)
    task = SegdiffTask(config, images, images, torch.device("cpu"))
    torch.nn.init.normal_(task.model.decoder.conv_out.weight)  # Otherwise the branches have no gradient.
    fast = task.parameter_groups()[1]
    assert [id(p) for p in fast["params"]] == [id(task.model.masks.prior_logits)] and fast["scale"] == 100
    result = task.loss(task.model, torch.arange(16), BatchDraw(3, 32, 16, slice(0, 16), torch.device("cpu")), 399)
    numbers = BatchDraw(3, 32, 16, slice(0, 16), torch.device("cpu"))
    mirrored, t = numbers.uniform() < 0.5, numbers.integers(0, config.t_max)
    t = torch.where(numbers.uniform() < config.high_noise_fraction, numbers.integers(config.t_max, 1000), t)
    eps = numbers.normal(3, 8, 8)
    x0 = pixels_to_signed(torch.from_numpy(images))
    x_t = task.schedule.noise(torch.where(mirrored[:, None, None, None], x0.flip(3), x0), eps, t)
    score = task.model.masks(x_t).score
    own = (task.schedule.sigma(t) * score + eps).square().mean((1, 2, 3))
    torch.testing.assert_close(result.objective, result.loss + own, atol=1e-5, rtol=1e-4)
    (expected,) = torch.autograd.grad(own.sum(), task.model.masks.prior_logits)
    result.objective.sum().backward()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(task.model.masks.prior_logits.grad, expected, atol=1e-6, rtol=1e-4)


def test_loss_without_random_flip_keeps_orientation():
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[:, :, :4] = 255
    recorded = {}
    for flip in (True, False):
        config = preset_config(
            None, **TINY, masks="mixture", random_flip=flip, t_max=1, high_noise_fraction=0.0
        ).resolved()
        task = SegdiffTask(config, images, images, torch.device("cpu"))
        forward = task.model.forward
        task.model.forward = lambda x_t, t, forward=forward, flip=flip: (recorded.update({flip: x_t}), forward(x_t, t))[
            1
        ]
        task.loss(task.model, torch.arange(16) % 4, BatchDraw(3, 32, 16, slice(0, 16), torch.device("cpu")), 399)
    left = {flip: x[:, :, :, :4].mean((1, 2, 3)) > 0 for flip, x in recorded.items()}
    assert left[False].all() and 0 < left[True].sum() < 16


@pytest.mark.parametrize("changes", [{"normalised_logits": True}, {"half_resolution_masks": True}])
def test_config_mixture_with_mask_generator_settings_raises(changes):
    with pytest.raises(ConfigError, match="no mask generator"):
        preset_config(None, **TINY, masks="mixture", **changes).resolved()


def test_config_unknown_masks_raise():
    with pytest.raises(ConfigError, match="choose one of auto, network, mixture"):
        preset_config(None, **TINY, masks="colours").resolved()


def test_spatial_prior_keeps_a_minimum_share():
    mixture = SpatialMixture(3)
    mixture.prior_logits.data[0] = 100.0
    places = mixture.prior(20, 24)
    assert places.min() >= UNIFORM_SHARE / 3 - 1e-6 and torch.allclose(places.sum(0), torch.ones(20, 24), atol=1e-6)


def test_mixture_colours_are_updated_every_round():
    torch.manual_seed(0)
    mixture, x = SpatialMixture(2), torch.rand(2, 3, 12, 12) * 2 - 1
    pixels = x.flatten(2).transpose(1, 2)
    squares = (pixels[..., :, None] * pixels[..., None, :]).flatten(2)
    prior = mixture.prior(12, 12).log().flatten(1).expand(2, -1, -1)
    masks = prior.softmax(1)
    for _ in range(EM_ROUNDS):
        logits = prior + colour_evidence(pixels, squares, masks)[0]
        masks = logits.softmax(1)
    assert torch.allclose(mixture(x).logits.flatten(2), logits, atol=1e-4)
    once = (prior + colour_evidence(pixels, squares, prior.softmax(1))[0]).softmax(1)
    assert not torch.allclose(masks, once, atol=1e-2)


def test_unexplained_noise_equals_its_formula():
    torch.manual_seed(0)
    mixture, schedule = SpatialMixture(2), Schedule()
    images = torch.rand(40, 3, 8, 8) * 2 - 1  # more than one batch
    expected = []
    for level in ERROR_TIMES:
        eps = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(derived_seed("judge", level)))
        share = schedule.alpha_bar(torch.tensor([level])).sqrt()
        x_t, sigma = share * images + (1 - share**2).sqrt() * eps, (1 - share**2).sqrt()
        denoised = (x_t + sigma**2 * mixture(x_t).score) / share  # Tweedie
        expected.append((((x_t - share * denoised) / sigma - eps) ** 2).mean().item())
    result = unexplained_noise(mixture, images, schedule)
    assert result == pytest.approx(np.mean(expected), rel=1e-4)
    assert result == unexplained_noise(mixture, images, schedule)
    cues = torch.zeros(40, 8, 8)
    assert unexplained_noise(mixture, images, schedule, cues) == pytest.approx(result, rel=1e-5)
    assert unexplained_noise(mixture, images, schedule, cues + torch.randn(8, 8)) != pytest.approx(result, rel=1e-3)
