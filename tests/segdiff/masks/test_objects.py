"""Object masks: the pieces of the last EM, the network at any size, and one proposer for every use."""

from __future__ import annotations

import pytest
import torch

from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.masks import spatial_mixture
from factorkit.segdiff.masks.objects import (
    MaskNetwork,
    ObjectMasks,
    fit_colors,
    measure_cue,
    pool_masks,
    resize,
    scale_lab,
)
from factorkit.segdiff.masks.spatial_mixture import SpatialMixture, fit_mixture
from factorkit.utils.errors import ConfigError

TINY = {"resolution": 8, "model_channels": 8, "channel_mult": (1, 2), "norm_groups": 2, "steps": 4}


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


def log_likelihood(x, prior, masks):
    """Return the log-likelihood [B] of pixels [B, P, 3] under the Gaussians that ``masks`` measure, and ``prior``."""
    squares = (x[..., :, None] * x[..., None, :]).flatten(2)
    evidence, _ = spatial_mixture.colour_evidence(x, squares, masks, 1e-6)
    return (prior.log() + evidence).logsumexp(1).sum(1)


def test_em_never_lowers_the_likelihood(monkeypatch):
    monkeypatch.setattr(spatial_mixture, "PSEUDO_PIXELS", 0.0)  # without the prior of the covariance, plain EM
    x = torch.cat([torch.randn(2, 60, 3) * 0.3 + shift for shift in (-0.5, 0.0, 0.6)], 1).double()
    prior = torch.rand(2, 3, 180).double().softmax(1)
    images, prior_maps = x.transpose(1, 2).unflatten(2, (12, 15)), prior.unflatten(2, (12, 15))
    masks, values = prior, []
    for rounds in range(1, 9):
        values.append(log_likelihood(x, prior, masks))
        masks = fit_mixture(images, prior_maps, rounds, min_variance=1e-6).logits.softmax(1).flatten(2)
    gains = torch.stack(values).diff(dim=0)
    assert gains.min() > -1e-3 and (gains.sum(0) > 1).all()


def test_cued_mixture_gradient_equals_finite_differences():
    cue = torch.randn(1, 6, 6).double()
    x = torch.randn(1, 3, 6, 6).double()

    def squared_score(logits):
        logits = torch.nn.functional.interpolate(logits[None], size=(6, 6), mode="bilinear")
        logits = torch.cat([logits[:, :1] + cue[:, None], logits[:, 1:]], 1)
        prior = spatial_mixture.share_uniformly(logits.softmax(1))
        return fit_mixture(x, prior, 3).score.square().sum()

    logits = torch.randn(2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(squared_score, (logits,), eps=1e-6, atol=1e-5)


def test_cued_prior_raises_region_0_where_the_cue_is_high():
    mixture = SpatialMixture(3, object_first=True)
    prior = mixture.prior(20, 20)
    assert prior[0, 8:12, 8:12].mean() > prior[0, :3, :3].mean() + 0.2  # starts in the centre
    cue = torch.zeros(2, 20, 20)
    cue[1, :5] = 3.0
    cued = mixture.cued_prior(cue)
    torch.testing.assert_close(cued[0], prior)
    assert (cued[1, 0, :5] > prior[0, :5] + 0.1).all()
    torch.testing.assert_close(cued.sum(1), torch.ones(2, 20, 20))


def test_pool_masks_equals_normalised_product():
    a, b = torch.rand(1, 3, 4, 4).softmax(1), torch.rand(1, 3, 4, 4).softmax(1)
    expected = a * b.sqrt()
    torch.testing.assert_close(pool_masks((1.0, a), (0.5, b)), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("shape", [(16, 16), (8, 8), (50, 30), (7, 200)])
def test_network_takes_images_of_any_size(shape):
    network = MaskNetwork(3, 32)
    torch.nn.init.normal_(network.conv_out.weight)
    x = torch.randn(2, 3, *shape)
    logits = network(x, torch.tensor([0, 900]))
    assert logits.shape == (2, 3, *shape) and logits.isfinite().all()
    torch.testing.assert_close(network(x[1:], torch.tensor([900])), logits[1:], atol=1e-4, rtol=1e-4)


def test_resize_averages_where_it_shrinks():
    x = torch.rand(1, 2, 8, 8)
    torch.testing.assert_close(resize(x, 4, 2), torch.nn.functional.avg_pool2d(x, (2, 4)))
    assert resize(x, 8, 8) is x and resize(x, 16, 4).shape == (1, 2, 16, 4)


def test_fit_colors_follows_the_edge_that_the_prior_blurs():
    images = torch.full((1, 3, 24, 24), -0.5)
    images[:, 0, 6:18, 6:18] = 0.7
    inside = images[0, 0] > 0
    prior = torch.nn.functional.avg_pool2d(inside.float()[None, None], 9, 1, 4) * 0.8 + 0.1
    prior = torch.cat([prior, 1 - prior], 1)
    for smooth in (False, True):
        masks = fit_colors(scale_lab(images), prior, smooth)
        assert ((masks[0, 0] > 0.5) == inside).float().mean() > 0.99


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_masks_of_one_colour_are_finite(value):
    model = ObjectMasks(2, 16)
    masks = model.segment(torch.full((2, 3, 16, 16), value), t=torch.zeros(2, dtype=torch.int64))
    assert masks.isfinite().all()
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 16, 16))


def test_segment_aligns_clean_images_only():
    model, x = ObjectMasks(2, 16).eval(), torch.randn(2, 3, 16, 16).clamp(-1, 1)
    torch.nn.init.normal_(model.network.conv_out.weight)
    low, high = (torch.full((2,), t) for t in (0, 400))
    with torch.autocast("cpu", torch.bfloat16):
        clean, noisy = model.segment(x, t=low), model.segment(x, t=high)
    torch.testing.assert_close(noisy, model(x, t=high).logits.softmax(1))
    torch.testing.assert_close(clean, model.align_with_colors(x, model(x, t=low).logits.softmax(1)))
    assert not torch.allclose(clean, model(x, t=low).logits.softmax(1), atol=0.05)


def test_align_coarsely_heeds_place_and_cue():
    model, masks = ObjectMasks(2, 16).requires_grad_(False), torch.full((1, 2, 16, 16), 0.5)
    model.mixture.prior_logits.zero_()
    images = torch.full((1, 3, 16, 16), -0.8)
    images[:, :, 5:11, 5:11] = 0.8
    assert (model.align_coarsely(images, masks).argmax(1)[0] == 0).eq(images[0, 0] > 0).float().mean() > 0.99
    model.cue_weight.zero_()
    torch.testing.assert_close(model.align_coarsely(images, masks), masks)


def test_align_with_colors_large_images_find_the_shapes_on_a_smaller_copy(monkeypatch):
    model, seen = ObjectMasks(2, 16).requires_grad_(False), []
    images, masks = torch.full((1, 3, 130, 200), -0.8), torch.full((1, 2, 130, 200), 0.5)
    images[:, :, 40:90, 60:130] = 0.8
    align = ObjectMasks.align_coarsely

    def record(self, images, masks):
        seen.append((images.shape[2:], masks.shape[2:]))
        return align(self, images, masks)

    monkeypatch.setattr(ObjectMasks, "align_coarsely", record)
    large = model.align_with_colors(images, masks)
    small = model.align_with_colors(*(resize(x, 65, 100) for x in (images, masks)))
    assert seen == [((65, 100), (65, 100))] * 2
    assert (large.argmax(1) == resize(small, 130, 200).argmax(1)).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(16, 16), (3, 200), (90, 70)])
def test_measure_cue_of_any_size_is_finite(shape):
    cue = measure_cue(torch.randn(2, 3, *shape).clamp(-1, 1))
    assert cue.shape == (2, *shape) and cue.isfinite().all()


def test_model_with_object_masks_denoises_by_the_masks_of_the_network():
    config = preset_config(None, **TINY, masks="auto").resolved()
    assert (config.segment_t, config.normalised_logits, config.half_resolution_masks) == (0, False, False)
    model = config.build()
    torch.nn.init.normal_(model.masks.network.conv_out.weight)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 500])
    masks = model(x, t).bottleneck.masks
    torch.testing.assert_close(masks, model.masks.network(x, t).softmax(1))
    assert model.mask_parameters() == [] and not any(p.requires_grad for p in model.masks.parameters())


def test_object_masks_explain_noise_by_the_colours_of_their_regions():
    model, x, schedule = ObjectMasks(2, 16).eval(), torch.full((2, 3, 16, 16), -0.8), Schedule()
    x[:, :, 4:12, 4:12] = 0.8
    t, eps = torch.tensor([100, 100]), torch.randn(2, 3, 16, 16)
    x_t = schedule.noise(x, eps, t)
    score = model.explain(x_t, t)
    prior = spatial_mixture.share_uniformly(model(x_t, t=t).logits.softmax(1))
    torch.testing.assert_close(score, fit_mixture(x_t, prior, 3).score)
    value = spatial_mixture.unexplained_noise(model, x, schedule)
    assert 0 < value < 1 and value == spatial_mixture.unexplained_noise(model, x, schedule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "thesis"}, "not in the thesis"),
        ({"regions": (2, 2)}, "measures whole images"),
        ({"distil_steps": 0}, "distil_steps=0"),
        ({"cue_weight": -1.0}, "cue_weight=-1.0"),
        ({"normalised_logits": True}, "no mask generator"),
    ],
)
def test_config_object_masks_with_unsuitable_settings_raises(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset_config(None, **TINY, masks="auto", **changes).resolved()


def test_align_with_colors_where_all_is_one_color_follows_the_network():
    masks = torch.full((1, 2, 16, 16), 0.1)
    masks[:, 0, :, :8], masks[:, 1, :, 8:] = 0.9, 0.9
    model = ObjectMasks(2, 16).requires_grad_(False)  # not fitted: the shapes are uniform
    model.mixture.prior_logits.zero_()
    aligned = model.align_with_colors(torch.randn(1, 3, 16, 16) * 0.01, masks)
    assert (aligned.argmax(1) == masks.argmax(1)).float().mean() > 0.9


def test_smooth_fit_colors_keeps_a_thin_line_of_its_own_colour():
    inside = torch.zeros(1, 1, 24, 24)
    inside[..., 4:12, 4:20], inside[..., 12:22, 15] = 1, 1  # a body and a leg of one pixel
    image = (0.4 * inside).expand(1, 3, 24, 24) + 0.01 * torch.randn(1, 3, 24, 24)
    prior = (0.4 + 0.3 * inside) / 1.1
    masks = fit_colors(scale_lab(image), torch.cat([prior, 1 - prior], 1), smooth=True)
    assert masks[0, 0, 13:21, 15].min() > 0.95 and masks[0, 0, 13:21, 18:].max() < 0.05


def test_find_unlike_flags_disagreement_and_doubt():
    model, images = ObjectMasks(2, 16).requires_grad_(False), torch.zeros(1, 3, 16, 16)
    model.network.conv_out.bias[:4] = 6.0
    masks = torch.full((1, 2, 16, 16), 0.001)
    masks[:, 0] = 0.999
    assert not model.find_unlike(images, images, 1 - masks)  # there are no limits yet
    model.typical.limits[:2] = 0.22
    assert not model.find_unlike(images, images, masks) and model.find_unlike(images, images, 1 - masks)
    model.network.conv_out.bias.zero_()  # the network does not know, and no masks are far from that
    assert model.find_unlike(images, images, torch.full((1, 2, 16, 16), 0.5))
