"""The guided filter: around each pixel, values become a linear function of an image's colours.

It makes soft masks follow the edges of their image (He, Sun and Tang 2013, "Guided image filtering"). The coefficients
may be fitted on a coarser grid than they are applied on (He and Sun 2015, "Fast guided filter").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PIXELS_PER_BAND = 1 << 16  # processed at a time, so that intermediate results stay in the processor's cache


class GuidedCoefficients(NamedTuple):
    """The coefficients of ``values = slope . colour + offset`` around each point of a grid.

    Attributes:
        slope: fp64 [B, K, C, h, w].
        offset: fp64 [B, K, h, w].
    """

    slope: Tensor
    offset: Tensor


def fit_guided_filter(guide: Tensor, values: Tensor, radius: int, eps: float) -> GuidedCoefficients:
    """Fit linear functions of the guide's channels to ``values`` in windows and average them over each pixel's windows.

    He et al. 2013, eqs. 14 and 15 and the averaging of eq. 16. Values that sum to 1 over K still do when the result is
    applied. Differentiable.

    Args:
        guide: [B, C, h, w], C at most 3.
        values: [B, K, h, w].
        radius: windows are squares of 2 radius + 1 pixels, cropped at the border; at least 1.
        eps: ridge penalty on the slopes, in squared units of the guide: where colours vary less, values are averaged.

    Raises:
        ValueError: shapes that do not fit, radius or eps out of range.
    """
    if guide.dim() != 4 or values.dim() != 4 or guide[:, 0].shape != values[:, 0].shape:
        shapes = f"{tuple(guide.shape)} and {tuple(values.shape)}"
        raise ValueError(f"guide and values are {shapes}; give [B, C, h, w] and [B, K, h, w] of one grid")
    if not 1 <= guide.shape[1] <= 3:
        raise ValueError(f"the guide has {guide.shape[1]} channels; give 1 to 3")
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
    cross = _box_mean(guide[:, None] * values[:, :, None], radius) - mean[:, None] * mean_values[:, :, None]
    slope = torch.stack(_solve(covariance, list(cross.unbind(2))), 2)
    offset = mean_values - (slope * mean[:, None]).sum(2)
    return GuidedCoefficients(_box_mean(slope, radius), _box_mean(offset, radius))


def apply_guided_filter(
    fitted: GuidedCoefficients, guide: Tensor, rows: slice | None = None, height: int | None = None
) -> Tensor:
    """Apply coefficients, interpolated bilinearly to the guide's grid, to its colours: [B, K, H, W] in its dtype.

    Args:
        fitted: of the same image on any grid.
        guide: [B, C, H, W] of any size.
        rows: the guide is only these rows of an image of ``height`` rows, and so is the result: a large image need not
            be in memory as floats.

    Raises:
        ValueError: a guide with another batch or other channels than the coefficients.
    """
    batch, regions, channels = fitted.slope.shape[:3]
    if guide.shape[:2] != (batch, channels):
        raise ValueError(f"the guide is {tuple(guide.shape)}, the coefficients are of [{batch}, {channels}, ...]")
    height = guide.shape[2] if height is None else height
    rows = slice(0, height) if rows is None else rows
    coefficients = torch.cat([fitted.slope.flatten(1, 2), fitted.offset], 1).to(guide.dtype)
    bands = []
    for low in range(rows.start, rows.stop, step := max(1, PIXELS_PER_BAND // guide.shape[3])):
        band = slice(low, min(low + step, rows.stop))
        resized = resize_rows(coefficients, height, band, guide.shape[3])
        result, colours = resized[:, regions * channels :], guide[:, :, low - rows.start : band.stop - rows.start]
        for c in range(channels):
            result = torch.addcmul(result, resized[:, c : regions * channels : channels], colours[:, c : c + 1])
        bands.append(result)
    return torch.cat(bands, 2)


def guided_filter(guide: Tensor, values: Tensor, radius: int, eps: float) -> Tensor:
    """Filter values on the guide's grid: [B, K, H, W] in the dtype of the guide; see :func:`fit_guided_filter`."""
    return apply_guided_filter(fit_guided_filter(guide, values, radius, eps), guide)


def resize_rows(x: Tensor, height: int, rows: slice, width: int) -> Tensor:
    """Return only ``rows`` of x [B, C, h, w] resized bilinearly to [B, C, height, width].

    Equals ``torch.nn.functional.interpolate`` without aligned corners.
    """
    old_height = x.shape[2]
    source = torch.arange(rows.start, rows.stop, device=x.device, dtype=torch.float64)
    source = ((source + 0.5) * (old_height / height) - 0.5).clamp(0, old_height - 1)
    low = source.floor().long()
    share = (source - low).to(x.dtype)[:, None]
    lines = torch.lerp(x.index_select(2, low), x.index_select(2, (low + 1).clamp_max(old_height - 1)), share)
    return F.interpolate(lines, size=(lines.shape[2], width), mode="bilinear", align_corners=False)


def _box_mean(x: Tensor, radius: int) -> Tensor:
    """Average over windows of the last two axes, cropped at the border."""
    planes = max(1, PIXELS_PER_BAND // max(1, x.shape[-2] * x.shape[-1]))
    parts = x.flatten(0, -3).split(planes)
    return torch.cat([_line_mean(_line_mean(part, radius).mT.contiguous(), radius).mT for part in parts]).view(x.shape)


def _line_mean(x: Tensor, radius: int) -> Tensor:
    """Average along the last axis by prefix sums, whose cost does not depend on the radius."""
    size = x.shape[-1]
    sums = F.pad(x.cumsum(-1), (1, 0))
    left, right = sums[..., :1], sums[..., -1:]
    sums = torch.cat([left.expand(*left.shape[:-1], radius), sums, right.expand(*right.shape[:-1], radius)], -1)
    index = torch.arange(size, device=x.device)
    count = (index + radius + 1).clamp_max(size) - (index - radius).clamp_min(0)
    return (sums[..., 2 * radius + 1 :] - sums[..., :size]) / count.to(x.dtype)


def _solve(matrix: list[list[Tensor]], right: list[Tensor]) -> list[Tensor]:
    """Solve symmetric positive definite systems of size at most 3 for all pixels by Gaussian elimination.

    matrix: n x n of [B, h, w]; right: n of [B, K, h, w].
    """
    matrix, right = [list(row) for row in matrix], list(right)
    size = len(right)
    for i in range(size):
        for j in range(i + 1, size):
            factor = matrix[j][i] / matrix[i][i]
            matrix[j] = [matrix[j][k] - factor * matrix[i][k] for k in range(size)]
            right[j] = right[j] - factor[:, None] * right[i]
    solution: list[Tensor] = [right[0]] * size
    for i in reversed(range(size)):
        rest = sum((matrix[i][k][:, None] * solution[k] for k in range(i + 1, size)), torch.zeros_like(right[i]))
        solution[i] = (right[i] - rest) / matrix[i][i][:, None]
    return solution
