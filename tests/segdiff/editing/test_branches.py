"""Decomposition of images into the branches' estimates."""

from __future__ import annotations

import pytest
import torch

from factorkit.segdiff.inference.segment import add_noise
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed


@pytest.mark.parametrize("changes", [{}, {"form": "thesis"}, {"regions": 5}, {"regions": 1}, {"decoding": "unshared"}])
def test_decompose_branches_weighted_by_masks_equal_the_estimate(make_random_run, make_images, changes):
    run = make_random_run(**changes)
    result = run.branches(make_images(3), t=200)
    regions = changes.get("regions", 3)
    assert result.images.shape == result.noisy.shape == (3, 3, 16, 16)
    assert result.masks.shape == (3, regions, 16, 16) and result.branches.shape == (3, regions, 3, 16, 16)
    torch.testing.assert_close(result.masks.sum(1), torch.ones(3, 16, 16))
    inside = ((result.branches > 0) & (result.branches < 1)).all(1)  # Pixels where no branch is clipped.
    assert inside.float().mean() > 0.05
    whole = (result.masks[:, :, None] * result.branches).sum(1)
    torch.testing.assert_close(whole[inside], result.images[inside], atol=1e-5, rtol=1e-4)
    if regions > 1:
        assert not torch.allclose(result.branches[:, 0], result.branches[:, 1], atol=1e-2)


def test_decompose_masks_equal_segment(make_random_run, make_images):
    run = make_random_run()
    x = pixels_to_signed(torch.from_numpy(make_images(2)))
    x_t, _t = add_noise(x, 30, run.schedule)
    result = run.branches(make_images(2), t=30)
    torch.testing.assert_close(result.masks, run.segment(make_images(2), t=30).masks)
    torch.testing.assert_close(result.noisy, (x_t / 2 + 0.5).clamp(0, 1))


def test_decompose_many_images_runs_in_batches_at_the_default_level(make_random_run, make_images, monkeypatch):
    run = make_random_run()
    whole = run.branches(make_images(3))
    assert torch.equal(whole.noisy, run.branches(make_images(3), t=250).noisy)
    monkeypatch.setattr("factorkit.segdiff.editing.branches.SAMPLE_BATCH_SIZE", 2)
    for together, in_pieces in zip(whole, run.branches(make_images(3)), strict=True):
        torch.testing.assert_close(in_pieces, together, atol=1e-5, rtol=1e-4)


def test_decompose_without_branches_or_level_raises(make_random_run, make_images):
    with pytest.raises(ConfigError, match="decoding='concat'"):
        make_random_run(decoding="concat").branches(make_images(1))
    with pytest.raises(ConfigError, match="t=1000"):
        make_random_run().branches(make_images(1), t=1000)
