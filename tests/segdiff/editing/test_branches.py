"""What each branch makes of a picture."""

from __future__ import annotations

import pytest
import torch

from factorkit.segdiff.task import add_noise
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed


@pytest.mark.parametrize("changes", [{}, {"form": "thesis"}, {"regions": 5}, {"regions": 1}, {"decoding": "unshared"}])
def test_decompose_branches_weighted_by_masks_equal_the_estimate(stirred_run, pictures, changes):
    run = stirred_run(**changes)
    apart = run.branches(pictures(3), t=200)
    regions = changes.get("regions", 3)
    assert apart.images.shape == apart.noisy.shape == (3, 3, 16, 16)
    assert apart.masks.shape == (3, regions, 16, 16) and apart.branches.shape == (3, regions, 3, 16, 16)
    torch.testing.assert_close(apart.masks.sum(1), torch.ones(3, 16, 16))
    inside = ((apart.branches > 0) & (apart.branches < 1)).all(1)  # where none of them is clipped
    assert inside.float().mean() > 0.05
    whole = (apart.masks[:, :, None] * apart.branches).sum(1)
    torch.testing.assert_close(whole[inside], apart.images[inside], atol=1e-5, rtol=1e-4)
    if regions > 1:
        assert not torch.allclose(apart.branches[:, 0], apart.branches[:, 1], atol=1e-2)


def test_decompose_masks_equal_segment(stirred_run, pictures):
    run = stirred_run()
    x = pixels_to_signed(torch.from_numpy(pictures(2)))
    x_t, _t = add_noise(x, 30, run.schedule)
    apart = run.branches(pictures(2), t=30)
    torch.testing.assert_close(apart.masks, run.segment(pictures(2), t=30).masks)
    torch.testing.assert_close(apart.noisy, (x_t / 2 + 0.5).clamp(0, 1))


def test_decompose_many_images_runs_in_batches_at_the_default_level(stirred_run, pictures, monkeypatch):
    run = stirred_run()
    whole = run.branches(pictures(3))
    assert torch.equal(whole.noisy, run.branches(pictures(3), t=250).noisy)
    monkeypatch.setattr("factorkit.segdiff.editing.branches.SAMPLE_BATCH_SIZE", 2)
    for together, in_pieces in zip(whole, run.branches(pictures(3)), strict=True):
        torch.testing.assert_close(in_pieces, together, atol=1e-5, rtol=1e-4)


def test_decompose_without_branches_or_level_raises(stirred_run, pictures):
    with pytest.raises(ConfigError, match="decoding='concat'"):
        stirred_run(decoding="concat").branches(pictures(1))
    with pytest.raises(ConfigError, match="t=1000"):
        stirred_run().branches(pictures(1), t=1000)
