"""Images unlike a training set, by figures whose limits come from its own images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from factorkit.segdiff.masks.typical import Gaussian, TypicalImages, measure_appearance


def draw(count: int, cells: int, seed: int, size: int = 32, color: float = 0.0) -> torch.Tensor:
    noise = torch.randn(count, 3, cells, cells, generator=torch.Generator().manual_seed(seed))
    return 0.4 * F.interpolate(noise, size=(size, size), mode="bicubic") + color


@pytest.fixture(scope="module")
def typical() -> TypicalImages:
    model = TypicalImages()
    model.fit(0.1 + 0.02 * torch.rand(100, 2), measure_appearance(draw(100, 4, 0)))
    return model


def share_of_unlike(model: TypicalImages, images: torch.Tensor, doubt: float = 0.1) -> float:
    doubts = torch.full((len(images), 2), doubt)
    return model.find_unlike(doubts, measure_appearance(images)).float().mean().item()


def test_find_unlike_names_other_textures_colours_and_doubts_but_not_its_own_kind(typical):
    assert share_of_unlike(typical, draw(100, 4, 1)) <= 0.05
    assert share_of_unlike(typical, draw(40, 16, 2)) > 0.95  # finer
    assert share_of_unlike(typical, draw(40, 4, 3, color=1.5)) > 0.95
    assert share_of_unlike(typical, torch.zeros(2, 3, 32, 32)) == 1  # of one colour
    assert share_of_unlike(typical, draw(100, 4, 1), doubt=0.5) == 1


def test_find_unlike_is_the_same_for_larger_and_wider_copies(typical):
    images = draw(50, 4, 4)
    large = F.interpolate(images, size=(128, 128), mode="nearest")
    wide = torch.cat([images[..., :8], images, images[..., -8:]], 3)
    for copy in (large, wide):
        torch.testing.assert_close(measure_appearance(copy), measure_appearance(images), atol=1e-4, rtol=0)


def test_fit_of_few_images_sets_no_limits():
    model = TypicalImages()
    model.fit(torch.rand(19, 2), measure_appearance(draw(19, 4, 0)))
    assert model.limits.isinf().all() and share_of_unlike(model, draw(5, 16, 1), doubt=9.0) == 0


def test_gaussian_distances_of_many_values_are_those_of_the_true_covariance():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, 12, generator=generator) * torch.arange(1.0, 13)
    distances = Gaussian(12).fit(values)(values)
    assert distances.mean().item() == pytest.approx(12, abs=0.3)
