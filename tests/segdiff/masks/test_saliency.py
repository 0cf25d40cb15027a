"""The saliency cue against a direct computation, image by image, with loops and lists."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
import torch

from factorkit.segdiff.masks import saliency as module
from factorkit.segdiff.masks.saliency import find_neighbours, saliency, saliency_cue, shortest_paths
from factorkit.utils.images import signed_to_lab


@pytest.fixture(autouse=True)
def few_cells(monkeypatch):
    monkeypatch.setattr(module, "CELLS", 4)


def draw_square(size=16, offset=0):
    """Draw a noisy bright square on a noisy dark ground, [1, 3, size, size] in [-1, 1]."""
    image = torch.full((1, 3, size, size), -0.6)
    image[:, :, 5 + offset : 11 + offset, 5:11] = torch.tensor([0.8, 0.2, -0.4])[:, None, None]
    return (image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def compute_directly(image):
    """Compute :func:`saliency` of one image with loops over the cells."""
    height, width = image.shape[2:]
    rows, columns = height // 4, width // 4
    colors = signed_to_lab(image)[0].unflatten(1, (rows, 4)).unflatten(3, (columns, 4)).mean((2, 4)).flatten(1).mT
    colors, names = colors.double().numpy(), range(rows * columns)
    centers = {n: ((n // columns + 0.5) / rows, (n % columns + 0.5) / columns) for n in names}
    touching = {
        n: {m for m in names if abs(n // columns - m // columns) + abs(n % columns - m % columns) == 1} for n in names
    }
    border = {n for n in names if n // columns in (0, rows - 1) or n % columns in (0, columns - 1)}
    linked = {n: touching[n] | (border - {n} if n in border else set()) for n in names}
    distance = {(a, b): math.dist(colors[a], colors[b]) for a in names for b in names}
    nearest = sorted(min(distance[n, m] for m in touching[n]) for n in names if touching[n])
    usual = nearest[(len(nearest) - 1) // 2]
    ground = {}
    for n in names:
        path, queue = {n: 0.0}, [(0.0, n)]
        while queue:  # Dijkstra
            length, at = heapq.heappop(queue)
            for m in linked[at] if length <= path[at] else ():
                via = length + max(distance[at, m] - usual, 1e-6)
                if via < path.get(m, math.inf):
                    path[m] = via
                    heapq.heappush(queue, (via, m))
        alike = {m: math.exp(-(path[m] ** 2) / 98) for m in path}
        on_border = sum(value for m, value in alike.items() if m in border)
        ground[n] = 1 - math.exp(-(on_border**2) / sum(alike.values()) / 2)
    contrast = {
        n: sum(distance[n, m] * math.exp(-(math.dist(centers[n], centers[m]) ** 2) / 0.32) * ground[m] for m in names)
        for n in names
    }
    low, high = min(contrast.values()), max(contrast.values())
    contrast = {n: (value - low) / (high - low) for n, value in contrast.items()}
    index = {n: i for i, n in enumerate(names)}
    system, right = np.zeros((len(names), len(names))), np.zeros(len(names))
    for n in names:
        second = set().union(*(touching[m] for m in touching[n])) | linked[n]
        for m in second - {n}:
            weight = math.exp(-(distance[n, m] ** 2) / 98) + 0.1 * (m in touching[n])
            system[index[n], index[n]] += weight
            system[index[n], index[m]] -= weight
        system[index[n], index[n]] += 5 * ground[n] + contrast[n] + 1e-6
        right[index[n]] = contrast[n]
    smooth = np.linalg.solve(system, right)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    smooth = torch.from_numpy(smooth).view(1, 1, rows, columns)
    return torch.nn.functional.interpolate(smooth, size=(height, width), mode="bilinear")[0, 0].numpy()


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_saliency_equals_direct_computation(size):
    image = draw_square()[:, :, : size[0], : size[1]]
    image = torch.nn.functional.interpolate(image, size=size)
    np.testing.assert_allclose(saliency(image)[0].numpy(), compute_directly(image), atol=2e-3)


def test_saliency_of_a_batch_equals_each_image():
    images = torch.cat([draw_square(offset=k) for k in (-2, 0, 3)])
    together, apart = saliency(images), torch.cat([saliency(image[None]) for image in images])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_saliency_is_higher_on_the_object():
    cue = saliency_cue(draw_square())[0]
    assert cue[6:10, 6:10].min() > 1 > cue[:3].max() + 1
    assert cue.mean().abs() < 1e-4 and cue.std(correction=0) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 3), (40, 5)])
def test_saliency_cue_of_any_size_is_finite(shape):
    image = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cue = saliency_cue(image)
    assert cue.shape == (2, *shape) and cue.isfinite().all()


def test_saliency_cue_of_one_colour_is_zero():
    cue = saliency_cue(torch.full((1, 3, 16, 16), 0.3))
    assert cue.abs().max() < 1e-2
    assert saliency_cue(torch.zeros(0, 3, 8, 8)).shape == (0, 8, 8)


def test_saliency_cue_of_faint_noise_is_weak():
    noise = 0.01 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert 0 < saliency_cue(noise).abs().max() < 1 < saliency_cue(30 * noise).abs().max()


def test_shortest_paths_without_a_path_are_infinite():
    lengths = torch.full((1, 4, 4), torch.inf)
    lengths[0, 0, 1] = lengths[0, 1, 0] = 1.0
    lengths[0, 1, 2] = lengths[0, 2, 1] = 2.0
    lengths[0, 0, 2] = lengths[0, 2, 0] = 5.0
    paths = shortest_paths(lengths)
    assert paths[0, 0].tolist() == [0, 1, 3, torch.inf] and paths[0, 3, 3] == 0


def test_find_neighbours_of_three_by_three_cells():
    touching, border = find_neighbours(3, 3)
    assert [touching[n].nonzero().flatten().tolist() for n in (0, 4, 5)] == [[1, 3], [1, 3, 5, 7], [2, 4, 8]]
    assert border.tolist() == [True] * 4 + [False] + [True] * 4


def test_saliency_cue_blurs_the_border_of_the_object():
    """The colours of the pixels find the border, so the cue must not set it at single pixels."""
    cue = saliency_cue(draw_square())[0]
    assert (cue.diff(dim=0).abs().max() < 0.5 * (cue.max() - cue.min())) and cue.unique().numel() > 100
