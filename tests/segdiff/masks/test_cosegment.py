"""Masks of one object in several views by the colours that it has in all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.segdiff.masks.cosegment import Mixture, cosegment

COUNT, SIDE = 12, 64


def draw_views(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw a box of two colours at places that differ, before another texture of random colours in each view."""
    generator = torch.Generator().manual_seed(seed)
    fields = 2 * torch.rand(COUNT, 3, 4, 4, generator=generator) - 1
    textures = F.interpolate(fields, size=(SIDE, SIDE), mode="bicubic")
    colors, masks = textures + 0.05 * torch.randn(textures.shape, generator=generator), torch.zeros(COUNT, SIDE, SIDE)
    for view, mask in zip(colors, masks, strict=True):
        top, left = torch.randint(8, 28, (2,), generator=generator).tolist()
        mask[top : top + 28, left : left + 28] = 1
        for part, color in (
            (slice(left, left + 14), (0.2, 0.9, 0.7)),
            (slice(left + 14, left + 28), (-0.5, -0.6, 0.1)),
        ):
            view[:, top : top + 28, part] = torch.tensor(color)[:, None, None]
    return colors, masks > 0.5


def measure_ious(masks: Tensor, true: Tensor) -> Tensor:
    return (masks & true).sum((1, 2)) / (masks | true).sum((1, 2))


@pytest.fixture(scope="module")
def center() -> Tensor:
    """The same mask of every view: a disc in the centre."""
    squares = torch.linspace(-1, 1, SIDE).square()
    return (squares[:, None] + squares < 0.5).float().expand(COUNT, -1, -1)


def test_cosegment_object_before_changing_textures_is_separated(center):
    colors, true = draw_views()
    assert measure_ious(center > 0.5, true).mean() < 0.5
    ious = measure_ious(cosegment(colors, center) > 0.5, true)
    assert ious.mean() > 0.85 and ious.min() > 0.7


def test_cosegment_same_views_again_gives_the_same_masks(center):
    colors, _ = draw_views(1)
    assert torch.equal(cosegment(colors, center), cosegment(colors, center))


def test_mixture_of_two_clusters_prefers_their_values_and_ignores_weight_0():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([-1.0, 0.0, 1.0]).repeat_interleave(200)
    x = (means + 0.02 * torch.randn(600, generator=generator))[None, :, None].expand(-1, -1, 2)
    mixture = Mixture(x, (means != 0).float()[None], 2, generator)
    assert sorted(mixture.means[0, :, 0].round(decimals=1).tolist()) == [-1.0, 1.0]
    assert torch.allclose(mixture.shares, torch.tensor(0.5), atol=0.02)
    density = mixture.log_density(x)[0]
    assert density[means != 0].min() > density[means == 0].max() + 3
