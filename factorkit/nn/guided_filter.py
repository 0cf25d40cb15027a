"""The guided filter: values on a grid become, around each pixel, a linear function of a picture's colours.

So soft masks take over the edges of the photograph they belong to (He, Sun and Tang 2013, "Guided image filtering").
The coefficients may be found on a coarser grid than they are applied on (He and Sun 2015, "Fast guided filter").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BAND = 1 << 16  # pixels at a time: what is made of them stays in the processor's cache


class Guidance(NamedTuple):
    """``values = slope . colour + offset`` around each point of a grid.

    Attributes:
        slope: fp64 [B, K, C, h, w].
        offset: fp64 [B, K, h, w].
    """

    slope: Tensor
    offset: Tensor


def fit_guidance(guide: Tensor, values: Tensor, radius: int, eps: float) -> Guidance:
    """The linear functions of the guide's channels nearest to ``values`` in windows, averaged over the windows of each
    pixel (He et al. 2013, eqs. 14 and 15 and the averaging of eq. 16).

    Values that sum to 1 over K keep doing so when the answer is applied. Differentiable.

    Args:
        guide: [B, C, h, w], C at most 3.
        values: [B, K, h, w].
        radius: windows are squares of 2 radius + 1 pixels, cut off at the border; at least 1.
        eps: ridge on the slopes, in squared units of the guide: where colours vary less, values are averaged.

    Raises:
        ValueError: shapes that do not fit, radius or eps out of range.
    """
    if guide.dim() != 4 or values.dim() != 4 or guide[:, 0].shape != values[:, 0].shape:
        shapes = f"{tuple(guide.shape)} and {tuple(values.shape)}"
        raise ValueError(f"guide and values must be [B, C, h, w] and [B, K, h, w] of one grid; they are {shapes}")
    if not 1 <= guide.shape[1] <= 3:
        raise ValueError(f"the guide has {guide.shape[1]} channels; it may have 1 to 3")
    if radius < 1 or not eps > 0:
        raise ValueError(f"radius={radius} must be at least 1, eps={eps} above 0")
    guide, values = guide.double(), values.double()  # variances are differences of almost equal numbers
    mean, mean_values = _box_mean(guide, radius), _box_mean(values, radius)
    channels = range(guide.shape[1])
    pairs = [(i, j) for i in channels for j in channels if i <= j]
    products = _box_mean(torch.stack([guide[:, i] * guide[:, j] for i, j in pairs], 1), radius).unbind(1)
    covariance = [[torch.empty(0)] * len(channels) for _ in channels]
    for (i, j), product in zip(pairs, products, strict=True):
        covariance[i][j] = covariance[j][i] = product - mean[:, i] * mean[:, j] + eps * (i == j)
    shared = _box_mean(guide[:, None] * values[:, :, None], radius) - mean[:, None] * mean_values[:, :, None]
    slope = torch.stack(_solve(covariance, list(shared.unbind(2))), 2)
    offset = mean_values - (slope * mean[:, None]).sum(2)
    return Guidance(_box_mean(slope, radius), _box_mean(offset, radius))


def apply_guidance(found: Guidance, guide: Tensor, rows: slice | None = None, height: int | None = None) -> Tensor:
    """The linear functions, brought bilinearly to the guide's own grid, of its colours: [B, K, H, W] in its dtype.

    Args:
        guide: [B, C, H, W] of any size; with ``rows``, only these rows of a picture of ``height`` rows, which gives
            the same rows of the answer: a large picture need not be in memory as floats.

    Raises:
        ValueError: a guide of other channels than the functions'.
    """
    batch, regions, channels = found.slope.shape[:3]
    if guide.shape[:2] != (batch, channels):
        raise ValueError(f"the guide is {tuple(guide.shape)}, the functions are of [{batch}, {channels}, ...]")
    height = guide.shape[2] if height is None else height
    rows = slice(0, height) if rows is None else rows
    coefficients = torch.cat([found.slope.flatten(1, 2), found.offset], 1).to(guide.dtype)
    bands = []
    for low in range(rows.start, rows.stop, step := max(1, BAND // guide.shape[3])):
        band = slice(low, min(low + step, rows.stop))
        stretched = stretch(coefficients, height, band, guide.shape[3])
        answer, colours = stretched[:, regions * channels :], guide[:, :, low - rows.start : band.stop - rows.start]
        for c in range(channels):
            answer = torch.addcmul(answer, stretched[:, c : regions * channels : channels], colours[:, c : c + 1])
        bands.append(answer)
    return torch.cat(bands, 2)


def guided_filter(guide: Tensor, values: Tensor, radius: int, eps: float) -> Tensor:
    """The guided filter on one grid: [B, K, H, W] in the dtype of the guide; see :func:`fit_guidance`."""
    return apply_guidance(fit_guidance(guide, values, radius, eps), guide)


def _box_mean(x: Tensor, radius: int) -> Tensor:
    """Means over windows of the last two axes, cut off at the border."""
    at_once = max(1, BAND // max(1, x.shape[-2] * x.shape[-1]))
    parts = x.flatten(0, -3).split(at_once)
    return torch.cat([_line_mean(_line_mean(part, radius).mT.contiguous(), radius).mT for part in parts]).view(x.shape)


def _line_mean(x: Tensor, radius: int) -> Tensor:
    """Means along the last axis, by prefix sums: the radius costs nothing."""
    size = x.shape[-1]
    sums = F.pad(x.cumsum(-1), (1, 0))
    left, right = sums[..., :1], sums[..., -1:]
    sums = torch.cat([left.expand(*left.shape[:-1], radius), sums, right.expand(*right.shape[:-1], radius)], -1)
    at = torch.arange(size, device=x.device)
    count = (at + radius + 1).clamp_max(size) - (at - radius).clamp_min(0)
    return (sums[..., 2 * radius + 1 :] - sums[..., :size]) / count.to(x.dtype)


def _solve(matrix: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Gaussian elimination for symmetric positive definite systems of at most 3, all pixels at once.

    matrix: n x n of [B, h, w]; right: n of [B, K, h, w].
    """
    matrix, right = [list(row) for row in matrix], list(right)
    size = len(right)
    for i in range(size):
        for j in range(i + 1, size):
            factor = matrix[j][i] / matrix[i][i]
            matrix[j] = [matrix[j][k] - factor * matrix[i][k] for k in range(size)]
            right[j] = right[j] - factor[:, None] * right[i]
    found: list[Tensor] = [right[0]] * size
    for i in reversed(range(size)):
        rest = sum((matrix[i][k][:, None] * found[k] for k in range(i + 1, size)), torch.zeros_like(right[i]))
        found[i] = (right[i] - rest) / matrix[i][i][:, None]
    return found


def stretch(x: Tensor, height: int, rows: slice, width: int) -> Tensor:
    """The ``rows`` of what bilinear interpolation makes of x [B, C, h, w] at [B, C, height, width], pixel centres kept,
    as ``torch.nn.functional.interpolate`` does."""
    old = x.shape[2]
    at = torch.arange(rows.start, rows.stop, device=x.device, dtype=torch.float64)
    at = ((at + 0.5) * (old / height) - 0.5).clamp(0, old - 1)
    low = at.floor().long()
    share = (at - low).to(x.dtype)[:, None]
    lines = torch.lerp(x.index_select(2, low), x.index_select(2, (low + 1).clamp_max(old - 1)), share)
    return F.interpolate(lines, size=(lines.shape[2], width), mode="bilinear", align_corners=False)
