"""Editing by regions: kept pixels stay, the others are painted by the branches of their region."""

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
def make_split_run(make_random_run, monkeypatch):
    """make_split_run(**changes): a run with region 0 on the left, the last one on the right, and a soft edge between.
    make_split_run(**changes): a run with region 0 on the left, the last one on the right, and a soft edge between.
    """

    def make(**changes):
        run = make_random_run(**changes)
        propose = run.model.masks.forward

        def propose_split(x_t, encoding, within=None, t=None):
            logits = 0.1 * propose(x_t, encoding, within, t).logits
            brightness = encoding.skips[0].mean((1, 2, 3))[:, None, None]
            across = torch.linspace(-12, 12, logits.shape[-1])[None, None] + 4 * brightness
            logits[:, 0] -= across
            logits[:, -1] += across
            return MaskProposal(logits)

        monkeypatch.setattr(run.model.masks, "forward", propose_split)
        return run

    return make


@KINDS
@pytest.mark.parametrize("mode", ["anew", "from", "remove"])
def test_recompose_keeps_pixels_exactly_and_changes_the_rest(make_split_run, make_images, changes, mode):
    run = make_split_run(**changes)
    options = {"anew": {}, "remove": {"remove": True}, "from": {"from_": make_images(2, 7)}}[mode]
    edit = run.recompose(make_images(2), 0, steps=3, seed=1, **options)
    regions = changes.get("regions", 3)
    assert edit.images.shape == edit.originals.shape == (2, 3, 16, 16) and edit.kept.shape == (2, 16, 16)
    assert edit.masks.shape == (2, regions, 16, 16) and torch.equal(edit.labels, edit.masks.argmax(1))
    torch.testing.assert_close(edit.originals, torch.from_numpy(make_images(2)).movedim(-1, 1) / 255)
    whole, none, edge = edit.kept == 1, edit.kept == 0, (edit.kept > 0) & (edit.kept < 1)
    assert 0.2 < whole.float().mean() < 0.8 and none.float().mean() > 0.2 and edge.any()
    change = (edit.images - edit.originals).abs()
    assert change.movedim(1, -1)[whole].max() == 0
    assert change.movedim(1, -1)[none].mean() > 0.05
    assert (change <= 1 - edit.kept[:, None] + 1e-6).all(), "an edge pixel changes by more than its free share"


@KINDS
def test_recompose_depends_on_seed_and_its_own_image_only(make_split_run, make_images, changes):
    run = make_split_run(**changes)
    first, again, other = (run.recompose(make_images(3), 0, steps=3, seed=seed).images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=0.02)
    alone = run.recompose(make_images(3)[2], 0, steps=3, seed=1).images
    torch.testing.assert_close(alone[0], first[2], atol=1e-3, rtol=0)


def test_recompose_many_images_runs_in_batches(make_split_run, make_images, monkeypatch):
    run = make_split_run()
    whole = run.recompose(make_images(3), 0, from_=make_images(3, 7), steps=2)
    monkeypatch.setattr("factorkit.segdiff.editing.recompose.SAMPLE_BATCH_SIZE", 2)
    for together, in_pieces in zip(
        whole, run.recompose(make_images(3), 0, from_=make_images(3, 7), steps=2), strict=True
    ):
        torch.testing.assert_close(in_pieces, together, atol=1e-3, rtol=0)


def test_recompose_level_zero_pastes_and_higher_levels_repaint(make_split_run, make_images):
    run = make_split_run()
    source = make_images(2, 7)
    share = region_share(run.segment(source).masks, 0)[:, 0]
    source_images = torch.from_numpy(source).movedim(-1, 1) / 255
    pasted = run.recompose(make_images(2), 0, from_=source, t=0, steps=4)
    torch.testing.assert_close(pasted.sources, source_images)
    torch.testing.assert_close(pasted.images.movedim(1, -1)[share == 1], source_images.movedim(1, -1)[share == 1])
    fitted = run.recompose(make_images(2), 0, from_=source, t=500, steps=4)
    assert (fitted.images - source_images).abs().movedim(1, -1)[share == 1].mean() > 0.02
    assert run.recompose(make_images(2), 0, from_=source[0], steps=2).images.shape == (2, 3, 16, 16)
    assert run.recompose(make_images(1), 0, from_=source, steps=2).images.shape == (2, 3, 16, 16)


def test_recompose_own_region_changes_more_at_higher_levels(make_split_run, make_images):
    run = make_split_run()
    held = run.recompose(make_images(2), 0, t=0, steps=6)
    share = region_share(run.segment(make_images(2)).masks, 0)[:, 0]
    change = lambda edit: (edit.images - edit.originals).abs().movedim(1, -1)[share == 1].mean()  # noqa: E731
    assert change(held) < 1e-6
    assert change(run.recompose(make_images(2), 0, t=10, steps=6)) > 0
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
    source_masks = masks.roll(2, dims=-1)
    keep, region, hole = edit_weights(masks, source_masks, 0)
    torch.testing.assert_close(keep + region + hole, torch.ones(1, 1, 5, 5))
    assert region.sum() == 1 and region[0, 0, 2, 4] == 1
    assert hole.sum() == 9 and hole[0, 0, 1:4, 1:4].all(), "the area it leaves, one pixel larger"
    keep, region, hole = edit_weights(masks, masks, 0)
    assert (region.sum(), hole.sum(), keep.sum()) == (1, 8, 16), "regenerated in place"
    keep, region, hole = edit_weights(masks, None, 0)
    assert (region.sum(), hole.sum(), keep.sum()) == (0, 9, 16)


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


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": 3}, "region=3: this run has regions 0 to 2"),
        ({"region": -1}, "region=-1"),
        ({"t": 1000}, "t=1000"),
        ({"steps": 0}, "steps=0"),
        ({"sampler": "magic"}, "sampler='magic'"),
        ({"remove": True, "t": 5}, "not both"),
    ],
)
def test_recompose_invalid_settings_raise(make_random_run, make_images, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_random_run().recompose(make_images(1), **{"region": 0, **changes})


def test_recompose_uneditable_input_raises(make_random_run, make_images):
    with pytest.raises(ConfigError, match="regions=1, the plain DDPM"):
        make_random_run(regions=1).recompose(make_images(1), 0)
    with pytest.raises(ConfigError, match="not both"):
        make_random_run().recompose(make_images(1), 0, from_=make_images(1), remove=True)
    with pytest.raises(DataError, match="2 images cannot be paired with 3"):
        make_random_run().recompose(make_images(2), 0, from_=make_images(3))
    with pytest.raises(DataError, match="no such file"):
        make_random_run().recompose("nowhere.png", 0)
