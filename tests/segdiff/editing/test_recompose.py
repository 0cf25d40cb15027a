"""Editing by regions: what is kept stays, what is not is painted by the branches of its region."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from factorkit.diffusion.denoiser import Denoised
from factorkit.diffusion.schedule import Schedule
from factorkit.segdiff.editing.recompose import Recomposer, Weights, edit_weights, region_share
from factorkit.segdiff.masks.proposal import MaskProposal
from factorkit.segdiff.network import Regions
from factorkit.utils.errors import ConfigError, DataError

KINDS = pytest.mark.parametrize(
    "changes", [{}, {"form": "thesis"}, {"regions": 2}, {"regions": 5, "form": "thesis"}, {"decoding": "concat"}]
)


@pytest.fixture
def parted(stirred_run, monkeypatch):
    """parted(**changes): a run whose masks say where things are: region 0 left, the last one right, soft between.

    A network that was never trained has an edge everywhere, so its logits get the picture's position added; brighter
    pictures have their edge further to the right.
    """

    def make(**changes):
        run = stirred_run(**changes)
        propose = run.model.masks.forward

        def placed(x_t, encoding, within=None):
            logits = 0.1 * propose(x_t, encoding, within).logits
            brightness = encoding.skips[0].mean((1, 2, 3))[:, None, None]
            across = torch.linspace(-12, 12, logits.shape[-1])[None, None] + 4 * brightness
            logits[:, 0] -= across
            logits[:, -1] += across
            return MaskProposal(logits)

        monkeypatch.setattr(run.model.masks, "forward", placed)
        return run

    return make


@KINDS
@pytest.mark.parametrize("mode", ["anew", "from", "remove"])
def test_recompose_keeps_pixels_exactly_and_changes_the_rest(parted, pictures, changes, mode):
    run = parted(**changes)
    options = {"anew": {}, "remove": {"remove": True}, "from": {"from_": pictures(2, 7)}}[mode]
    done = run.recompose(pictures(2), 0, steps=3, seed=1, **options)
    regions = changes.get("regions", 3)
    assert done.images.shape == done.originals.shape == (2, 3, 16, 16) and done.kept.shape == (2, 16, 16)
    assert done.masks.shape == (2, regions, 16, 16) and torch.equal(done.labels, done.masks.argmax(1))
    torch.testing.assert_close(done.originals, torch.from_numpy(pictures(2)).movedim(-1, 1) / 255)
    whole, none, edge = done.kept == 1, done.kept == 0, (done.kept > 0) & (done.kept < 1)
    assert 0.2 < whole.float().mean() < 0.8 and none.float().mean() > 0.2 and edge.any()
    change = (done.images - done.originals).abs()
    assert change.movedim(1, -1)[whole].max() == 0
    assert change.movedim(1, -1)[none].mean() > 0.05
    assert (change <= 1 - done.kept[:, None] + 1e-6).all(), "an edge changes by more than its free share"


@KINDS
def test_recompose_depends_on_seed_and_its_own_image_only(parted, pictures, changes):
    run = parted(**changes)
    first, again, other = (run.recompose(pictures(3), 0, steps=3, seed=seed).images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.02)
    alone = run.recompose(pictures(3)[2], 0, steps=3, seed=1).images
    torch.testing.assert_close(alone[0], first[2], atol=1e-3, rtol=0)


def test_recompose_many_images_runs_in_batches(parted, pictures, monkeypatch):
    run = parted()
    whole = run.recompose(pictures(3), 0, from_=pictures(3, 7), steps=2)
    monkeypatch.setattr("factorkit.segdiff.editing.recompose.SAMPLE_BATCH_SIZE", 2)
    for together, in_pieces in zip(whole, run.recompose(pictures(3), 0, from_=pictures(3, 7), steps=2), strict=True):
        torch.testing.assert_close(in_pieces, together, atol=1e-3, rtol=0)


def test_recompose_level_zero_pastes_and_higher_levels_repaint(parted, pictures):
    run = parted()
    source = pictures(2, 7)
    brought = region_share(run.segment(source).masks, 0)[:, 0]
    there = torch.from_numpy(source).movedim(-1, 1) / 255
    pasted = run.recompose(pictures(2), 0, from_=source, t=0, steps=4)
    torch.testing.assert_close(pasted.sources, there)
    torch.testing.assert_close(pasted.images.movedim(1, -1)[brought == 1], there.movedim(1, -1)[brought == 1])
    fitted = run.recompose(pictures(2), 0, from_=source, t=500, steps=4)
    assert (fitted.images - there).abs().movedim(1, -1)[brought == 1].mean() > 0.02
    assert run.recompose(pictures(2), 0, from_=source[0], steps=2).images.shape == (2, 3, 16, 16)
    assert run.recompose(pictures(1), 0, from_=source, steps=2).images.shape == (2, 3, 16, 16)


def test_recompose_own_region_changes_more_at_higher_levels(parted, pictures):
    run = parted()
    held = run.recompose(pictures(2), 0, t=0, steps=6)
    share = region_share(run.segment(pictures(2)).masks, 0)[:, 0]
    change = lambda done: (done.images - done.originals).abs().movedim(1, -1)[share == 1].mean()  # noqa: E731
    assert change(held) < 1e-6
    assert change(run.recompose(pictures(2), 0, t=10, steps=6)) > 0
    assert held.sources is None


# --- the formulas ---


def test_region_share_equals_hand_computed_values():
    masks = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.2, 0.4], [0.8, 0.1, 0.1], [0.1, 0.6, 0.3], [0.64, 0.32, 0.04]])
    share = region_share(masks[:, :, None, None], 0).flatten()
    expected = [0.5, 0.5, 1.0, 0.0, 0.5 + math.log(2) / (2 * math.log(4))]
    torch.testing.assert_close(share, torch.tensor(expected))
    assert region_share(torch.tensor([1.0, 0.0])[None, :, None, None], 1).item() == 0, "log of 0"


def test_edit_weights_sum_to_one_and_cover_the_hole():
    masks = torch.zeros(1, 2, 5, 5)
    masks[:, 0, 2, 2] = 1
    masks[:, 1] = 1 - masks[:, 0]
    brought = masks.roll(2, dims=-1)
    kept, region, hole = edit_weights(masks, brought, 0)
    torch.testing.assert_close(kept + region + hole, torch.ones(1, 1, 5, 5))
    assert region.sum() == 1 and region[0, 0, 2, 4] == 1
    assert hole.sum() == 9 and hole[0, 0, 1:4, 1:4].all(), "the place it leaves, one pixel larger"
    kept, region, hole = edit_weights(masks, masks, 0)
    assert (region.sum(), hole.sum(), kept.sum()) == (1, 8, 16), "made anew where it was"
    kept, region, hole = edit_weights(masks, None, 0)
    assert (region.sum(), hole.sum(), kept.sum()) == (0, 9, 16)


class ConstantModel(nn.Module):
    """Returns x0 = -0.6, 0.2 and 0.8 in its three branches, with masks 0.5, 0.1 and 0.4, for any input."""

    def __init__(self, branches=True):
        super().__init__()
        self.branches = branches

    def forward(self, x_t, t, cond=None):
        values, masks = torch.tensor([-0.6, 0.2, 0.8]), torch.tensor([0.5, 0.1, 0.4])
        each = values[:, None, None, None].expand(len(x_t), 3, *x_t.shape[1:])
        whole = torch.full_like(x_t, (values * masks).sum())
        masks = masks[:, None, None].expand(len(x_t), 3, *x_t.shape[2:])
        return Denoised(whole, Regions(masks, each if self.branches else None))


@pytest.mark.parametrize(("branches", "mine", "others"), [(True, 0.2, 0.02 / 0.9), (False, 0.04, 0.04)])
def test_recomposer_paints_each_pixel_with_its_branches(branches, mine, others):
    weights = Weights(*torch.rand(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0)).softmax(0))
    original, source = torch.full((2, 3, 4, 4), -1.0), torch.full((2, 3, 4, 4), 1.0)
    edited = Recomposer(
        ConstantModel(branches),
        "x0",
        Schedule(100),
        region=1,
        weights=weights,
        original=original,
        source=source,
        t_free=50,
    )
    for level, painted in ((49, mine), (50, 1.0)):
        prediction, _ = edited(torch.zeros(2, 3, 4, 4), torch.full((2,), level))
        expected = -weights.kept + weights.region * painted + weights.hole * others
        torch.testing.assert_close(prediction, expected.expand(2, 3, 4, 4))


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"region": 3}, "region=3: this run has regions 0 to 2"),
        ({"region": -1}, "region=-1"),
        ({"t": 1000}, "t=1000"),
        ({"steps": 0}, "steps=0"),
        ({"sampler": "magic"}, "sampler='magic'"),
        ({"remove": True, "t": 5}, "not both"),
    ],
)
def test_recompose_invalid_settings_raise(stirred_run, pictures, changes, says):
    with pytest.raises(ConfigError, match=says):
        stirred_run().recompose(pictures(1), **{"region": 0, **changes})


def test_recompose_uneditable_input_raises(stirred_run, pictures):
    with pytest.raises(ConfigError, match="regions=1, the plain DDPM"):
        stirred_run(regions=1).recompose(pictures(1), 0)
    with pytest.raises(ConfigError, match="not both"):
        stirred_run().recompose(pictures(1), 0, from_=pictures(1), remove=True)
    with pytest.raises(DataError, match="2 images cannot be paired with 3"):
        stirred_run().recompose(pictures(2), 0, from_=pictures(3))
    with pytest.raises(DataError, match="no such file"):
        stirred_run().recompose("nowhere.png", 0)
