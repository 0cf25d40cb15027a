"""How much each pixel stands out from what is connected to the border of its image: a cue for objects, not learned.

Robust background detection (Zhu, Liang, Wei and Sun 2014, "Saliency optimization from robust background detection"):
the image is cut into superpixels (SLIC, Achanta et al. 2012). A superpixel whose similar neighbours lie largely on the
border is ground. What contrasts with the ground stands out, smoothed over similar neighbours. All images of a batch
have the same number of superpixels, so that every step runs on the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.utils.images import signed_to_lab

CELLS = 14  # superpixels along the short side; 200 in all is usual
MIN_CELL = 4  # pixels along a side of a superpixel in a small image
COMPACTNESS = 12.0  # a step to the next superpixel weighs as much as this difference of Lab colours
SLIC_ROUNDS = 5
COLOR_SCALE = 7.0  # Lab difference at which colours are no longer alike (Zhu et al.)
PLACE_SCALE = 0.4  # of the image's side, over which contrasts count (Zhu et al.)
GROUND_WEIGHT = 5.0  # of the ground against contrast in the final smoothing (Zhu et al.)
MIN_SMOOTHNESS = 0.1  # between neighbours of different colours (Zhu et al.)
BATCH_SIZE = 32


class Superpixels(NamedTuple):
    """Superpixels of images; some may be empty.

    Attributes:
        labels: int64 [B, H, W], in [0, N).
        colors: mean Lab colours [B, N, 3].
        centers: mean positions [B, N, 2] as fractions of height and width.
        areas: numbers of pixels [B, N].
    """

    labels: Tensor
    colors: Tensor
    centers: Tensor
    areas: Tensor


@torch.no_grad()
def saliency_cue(images: Tensor) -> Tensor:
    """Return :func:`saliency` of images [N, 3, H, W], standardised: [N, H, W] of mean 0 and deviation 1 per image.

    An image without contrast has a cue of 0. Computed on the CPU, in batches.
    """
    if not len(images):
        return images.new_zeros(0, *images.shape[2:])
    parts = [saliency(part) for part in images.float().cpu().split(BATCH_SIZE)]
    values = torch.cat(parts)
    deviation = values.std((1, 2), correction=0, keepdim=True)
    return (values - values.mean((1, 2), keepdim=True)) / (deviation + 1e-3)


def saliency(images: Tensor) -> Tensor:
    """Return how much each pixel of images [B, 3, H, W] in [-1, 1] stands out from the ground, [B, H, W] in [0, 1]."""
    parts = find_superpixels(images)
    used = parts.areas > 0
    color_distance = torch.cdist(parts.colors, parts.colors)
    place_distance = torch.cdist(parts.centers, parts.centers)
    touching, border = find_neighbours(parts.labels, used.shape[1])
    connected = touching | (border[:, :, None] & border[:, None])
    ground = border_connectivity(color_distance, touching, connected, border)
    contrast = color_distance * torch.exp(-place_distance.square() / (2 * PLACE_SCALE**2))
    contrast = _stretch((contrast @ ground[..., None])[..., 0], used)
    # Second neighbours smooth as well, and border superpixels among each other.
    second = (touching.float() @ touching.float() > 0) | connected
    second &= ~torch.eye(used.shape[1], dtype=torch.bool)
    weights = torch.exp(-color_distance.square() / (2 * COLOR_SCALE**2)) * second + MIN_SMOOTHNESS * touching
    total = weights.sum(2) + GROUND_WEIGHT * ground + contrast + 1e-6
    smooth = torch.linalg.solve(torch.diag_embed(total) - weights, contrast[..., None])[..., 0]
    values = _stretch(smooth, used)
    return values.gather(1, parts.labels.flatten(1)).view(parts.labels.shape)


def border_connectivity(color_distance: Tensor, touching: Tensor, connected: Tensor, border: Tensor) -> Tensor:
    """Return the probability [B, N] that each superpixel is ground: similar ones lie on the border.

    Args:
        color_distance: Lab differences [B, N, N].
        touching: which superpixels share an edge, bool [B, N, N].
        connected: the same and all pairs on the border, between which paths lead.
        border: bool [B, N].
    """
    infinite = torch.tensor(torch.inf)
    nearest = torch.where(touching, color_distance, infinite).amin(2)
    # A difference as small as that of the usual most similar neighbours counts as none.
    nearest = torch.where(nearest.isfinite(), nearest, torch.nan)
    usual = nearest.nanmedian(1).values.nan_to_num()
    steps = (color_distance - usual[:, None, None]).clamp_min(1e-6)
    paths = shortest_paths(torch.where(connected, steps, infinite))
    similarity = torch.exp(-paths.square() / (2 * COLOR_SCALE**2))
    on_border = (similarity * border[:, None]).sum(2)
    return 1 - torch.exp(-on_border.square() / similarity.sum(2) / 2)


def shortest_paths(lengths: Tensor) -> Tensor:
    """Return the lengths [B, N, N] of shortest paths over edges of these lengths, infinite where there is none."""
    count = lengths.shape[1]
    paths = lengths.masked_fill(torch.eye(count, dtype=torch.bool), 0.0).contiguous()
    for via in range(count):  # Floyd and Warshall
        torch.minimum(paths, paths[:, :, via, None] + paths[:, None, via], out=paths)
    return paths


def find_superpixels(images: Tensor) -> Superpixels:
    """Cut images [B, 3, H, W] in [-1, 1] into about CELLS superpixels along the short side (SLIC).

    Each pixel belongs to one of the 9 superpixels that start nearest to it.
    """
    batch, _, height, width = images.shape
    side = max(MIN_CELL, min(height, width) / CELLS)
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    count = rows * columns
    color = signed_to_lab(images).flatten(2).transpose(1, 2)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place = torch.stack([(y.flatten() + 0.5) / height, (x.flatten() + 0.5) / width], 1)
    row, column = (y * rows // height).flatten(), (x * columns // width).flatten()
    # Distances in cells, weighed against colour.
    scale = COMPACTNESS * torch.tensor([rows, columns])
    features = torch.cat([color, (place * scale).expand(batch, -1, -1)], 2)
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    candidates = torch.stack(
        [(row + i).clamp(0, rows - 1) * columns + (column + j).clamp(0, columns - 1) for i, j in shifts]
    )
    labels = (row * columns + column).expand(batch, -1)
    centers = features.new_zeros(batch, count, 5)
    for round_number in range(SLIC_ROUNDS + 1):
        index = labels[..., None].expand(-1, -1, 5)
        areas = features.new_zeros(batch, count).scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float))
        sums = torch.zeros_like(centers).scatter_add_(1, index, features)
        centers = torch.where(areas[..., None] > 0, sums / areas[..., None].clamp_min(1), centers)
        if round_number < SLIC_ROUNDS:
            nearest = torch.full(labels.shape, torch.inf)
            for candidate in candidates:
                distance = (features - centers[:, candidate]).square().sum(2)
                labels = torch.where(distance < nearest, candidate, labels)
                nearest = torch.minimum(nearest, distance)
    return Superpixels(labels.view(batch, height, width), centers[..., :3], centers[..., 3:] / scale, areas)


def find_neighbours(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return which superpixels share an edge, bool [B, N, N], and which lie on the border of the image, bool [B, N]."""
    batch = len(labels)
    touching = torch.zeros(batch, count, count, dtype=torch.bool)
    image = torch.arange(batch)[:, None]
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1])):
        a, b = a.flatten(1), b.flatten(1)
        touching[image, a, b] = touching[image, b, a] = True
    touching &= ~torch.eye(count, dtype=torch.bool)
    border = torch.zeros(batch, count, dtype=torch.bool)
    edges = torch.cat([labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]], 1)
    border[image, edges] = True
    return touching, border


def _stretch(values: Tensor, used: Tensor) -> Tensor:
    """Scale values [B, N] linearly so that those ``used`` span [0, 1]; the others become 0."""
    low = torch.where(used, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(used, values, -torch.inf).amax(1, keepdim=True)
    return torch.where(used, (values - low) / (high - low + 1e-9), 0.0)
