"""How much each cell of an image contrasts with what is connected to the border: a cue for objects, not learned.

Robust background detection (Zhu, Liang, Wei and Sun 2014, "Saliency optimization from robust background detection") on
square cells. A cell whose similar neighbours lie largely on the border is ground. What contrasts with the ground is
out, smoothed over similar neighbours. Zhu et al. use superpixels. Their exact borders mislead here: the cue belongs to
the prior, and the colours of the pixels find the border. With them the masks of horses lose .01 to .03 IoU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.utils.images import signed_to_lab

CELLS = 14  # along the short side; 200 superpixels in all are usual
MIN_CELL = 4  # pixels along a side of a cell in a small image
COLOR_SCALE = 7.0  # Lab difference at which colours are no longer alike (Zhu et al.)
PLACE_SCALE = 0.4  # of the image's side, over which contrasts count (Zhu et al.)
GROUND_WEIGHT = 5.0  # of the ground against contrast in the final smoothing (Zhu et al.)
MIN_SMOOTHNESS = 0.1  # between neighbours of different colours (Zhu et al.)
MIN_DEVIATION = 0.05  # of the saliency of an image whose colours differ clearly
BATCH_SIZE = 32


@torch.no_grad()
def saliency_cue(images: Tensor) -> Tensor:
    """Return :func:`saliency` of images [N, 3, H, W], standardised: [N, H, W] of mean 0 and deviation 1 per image.

    The deviation is less in an image with hardly any contrast. Computed on the CPU, in batches.
    """
    if not len(images):
        return images.new_zeros(0, *images.shape[2:])
    parts = [saliency(part) for part in images.float().cpu().split(BATCH_SIZE)]
    values = torch.cat(parts)
    deviation = values.std((1, 2), correction=0, keepdim=True)
    return (values - values.mean((1, 2), keepdim=True)) / deviation.clamp_min(MIN_DEVIATION)


def saliency(images: Tensor) -> Tensor:
    """Return how much each pixel of images [B, 3, H, W] in [-1, 1] contrasts with the ground, [B, H, W] in [0, 1].

    The most salient pixel is 1, less where no two cells differ by COLOR_SCALE.
    """
    size = images.shape[2:]
    side = max(MIN_CELL, min(size) / CELLS)
    rows, columns = (max(1, round(length / side)) for length in size)
    colors = F.adaptive_avg_pool2d(signed_to_lab(images), (rows, columns)).flatten(2).mT.contiguous()
    cells = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    centers = (cells + 0.5) / torch.tensor([rows, columns])
    touching, border = find_neighbours(rows, columns)
    connected = touching | (border[:, None] & border)
    color_distance, place_distance = torch.cdist(colors, colors), torch.cdist(centers, centers)
    ground = border_connectivity(color_distance, touching, connected, border)
    contrast = color_distance * torch.exp(-place_distance.square() / (2 * PLACE_SCALE**2))
    contrast = _stretch((contrast @ ground[..., None])[..., 0])
    # Second neighbours smooth as well, and border cells among each other.
    second = (touching.float() @ touching.float() > 0) | connected
    second &= ~torch.eye(len(cells), dtype=torch.bool)
    weights = torch.exp(-color_distance.square() / (2 * COLOR_SCALE**2)) * second + MIN_SMOOTHNESS * touching
    total = weights.sum(2) + GROUND_WEIGHT * ground + contrast + 1e-6
    factor = torch.linalg.cholesky(torch.diag_embed(total) - weights)  # symmetric, and its diagonal dominates
    smooth = torch.cholesky_solve(contrast[..., None], factor)[..., 0]
    strength = (color_distance.amax((1, 2)) / COLOR_SCALE).clamp_max(1)
    values = (strength[:, None] * _stretch(smooth)).unflatten(1, (1, rows, columns))
    return F.interpolate(values, size=size, mode="bilinear", align_corners=False)[:, 0]


def border_connectivity(color_distance: Tensor, touching: Tensor, connected: Tensor, border: Tensor) -> Tensor:
    """Return the probability [B, N] that each cell is ground: similar ones lie on the border.

    Args:
        color_distance: Lab differences [B, N, N].
        touching: which cells share an edge, bool [N, N].
        connected: the same and all pairs on the border, between which paths lead.
        border: bool [N].
    """
    infinite = torch.tensor(torch.inf)
    nearest = torch.where(touching, color_distance, infinite).amin(2)
    # A difference as small as that of the usual most similar neighbours counts as none.
    usual = nearest.median(1).values
    usual = torch.where(usual.isfinite(), usual, 0.0)  # a single cell has no neighbour
    steps = (color_distance - usual[:, None, None]).clamp_min(1e-6)
    paths = shortest_paths(torch.where(connected, steps, infinite))
    similarity = torch.exp(-paths.square() / (2 * COLOR_SCALE**2))
    on_border = (similarity * border).sum(2)
    return 1 - torch.exp(-on_border.square() / similarity.sum(2) / 2)


def shortest_paths(lengths: Tensor) -> Tensor:
    """Return the lengths [B, N, N] of shortest paths over edges of these lengths, infinite where there is none."""
    count = lengths.shape[1]
    paths = lengths.masked_fill(torch.eye(count, dtype=torch.bool), 0.0).contiguous()
    for via in range(count):  # Floyd and Warshall
        torch.minimum(paths, paths[:, :, via, None] + paths[:, None, via], out=paths)
    return paths


def find_neighbours(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return which of N = rows * columns cells share an edge, bool [N, N], and which are on the border, bool [N]."""
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    touching = (row[:, None] - row).abs() + (column[:, None] - column).abs() == 1
    return touching, (row == 0) | (row == rows - 1) | (column == 0) | (column == columns - 1)


def _stretch(values: Tensor) -> Tensor:
    """Scale values [B, N] linearly to [0, 1]."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - low) / (high - low + 1e-9)
