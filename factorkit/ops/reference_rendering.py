"""What the rendering ops mean, in plain PyTorch and any float dtype, written from the equations for reading and
checking.

    N rays, S samples of a dense ray, M packed samples, C channels
    packed samples of ray r are those from offsets[r] to offsets[r + 1]; offsets=None: dense, [N, S]

Nothing here runs unless FACTORKIT_REFERENCE=1 is set or factorkit._C has no kernel for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

INFINITY = math.inf


def intersect_box(origins: Tensor, directions: Tensor, lower: list[float], upper: list[float]) -> tuple[Tensor, Tensor]:
    """Near and far of each ray, [N]: the slab method, a parallel ray being between its two faces always or never."""
    low, high = origins.new_tensor(lower), origins.new_tensor(upper)
    parallel = directions == 0
    safe = torch.where(parallel, 1.0, directions)
    first = torch.where(parallel, -INFINITY, (torch.where(directions > 0, low, high) - origins) / safe)
    second = torch.where(parallel, INFINITY, (torch.where(directions > 0, high, low) - origins) / safe)
    between = ~parallel | ((origins >= low) & (origins <= high))
    return _interval(first.amax(1), second.amin(1), between.all(1) & ~parallel.all(1))


def intersect_sphere(origins: Tensor, directions: Tensor, centre: list[float], radius: float) -> tuple[Tensor, Tensor]:
    """Near and far of each ray, [N]: the roots of |o + t d - centre|^2 = radius^2."""
    x = origins - origins.new_tensor(centre)
    a = directions.square().sum(1)
    usable = a > 0
    a = torch.where(usable, a, 1.0)
    middle = -(x * directions).sum(1) / a
    square = (radius**2 - (x + middle[:, None] * directions).square().sum(1)) / a
    hit = usable & (square >= 0)
    half = torch.where(square > 0, square, 1.0).sqrt() * (square > 0)
    middle = torch.where(square > 0, middle, middle.detach())  # the roots of a ray that only touches have no slope
    return _interval(middle - half, middle + half, hit)


def _interval(near: Tensor, far: Tensor, hit: Tensor) -> tuple[Tensor, Tensor]:
    hit = hit & (near <= far) & (far >= 0)
    return torch.where(hit, near.clamp_min(0), 0.0), torch.where(hit, far, 0.0)


def counter_uniform(seed: int, ray: Tensor, step: Tensor) -> Tensor:
    """pcg4d (Jarzynski & Olano 2020) of (ray, step, seed), as fp64 multiples of 2^-24 in [0, 1); integers wrap at
    2^32."""
    mask = 0xFFFFFFFF
    ray, step = torch.broadcast_tensors(ray, step)
    words = [ray & mask, step & mask, torch.full_like(ray, seed & mask), torch.full_like(ray, seed >> 32)]
    v = [(w * 1664525 + 1013904223) & mask for w in words]
    for mix in (True, False):
        for a, b, c in ((0, 1, 3), (1, 2, 0), (2, 0, 1), (3, 1, 2)):
            v[a] = (v[a] + v[b] * v[c]) & mask
        if mix:
            v = [w ^ (w >> 16) for w in v]
    return (v[0] >> 8).double() * 2.0**-24


def march_rays(
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupancy: Tensor,
    lower: list[float],
    upper: list[float],
    step: float,
    max_step: float,
    cone_angle: float,
    seed: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """t_start [M], t_end [M], offsets [N + 1], ray of each sample [M]: every step of every ray is asked for, none leapt
    over."""
    low, high = origins.new_tensor(lower), origins.new_tensor(upper)
    centre, half = (low + high) / 2, (high - low) / 2
    levels, resolution = occupancy.shape[0], round((occupancy.shape[1] * 8) ** (1 / 3))
    reach = 2 ** (levels - 1) * half
    _, leave = intersect_box(origins, directions, (centre - reach).tolist(), (centre + reach).tolist())
    edges = _step_edges(near, torch.minimum(far, leave), step, max_step, cone_angle)
    size = edges.diff(dim=1)

    moved = edges.clone()
    if seed is not None and edges.shape[1] > 2:
        n, k = edges.shape
        ray, index = (torch.arange(count, device=edges.device) for count in (n, k))
        u = counter_uniform(seed, ray[:, None], index[None, 1:]).to(edges.dtype)
        moved[:, 1:] += (u - 0.5) * size
    moved = torch.where(edges < far[:, None], torch.minimum(moved, far[:, None]), far[:, None])
    start, end = moved[:, :-1], moved[:, 1:]

    points = origins[:, None] + (start + end)[..., None] / 2 * directions[:, None]
    place = (points - centre) / half
    cell_size = (2 * half / resolution).amin()
    length = size * directions.norm(dim=1)[:, None]
    scale = torch.ones_like(length)
    for _ in range(levels - 1):
        coarser = (place.abs().amax(-1) >= scale) | (cell_size * scale < length)
        scale = torch.where(coarser & (scale < 2 ** (levels - 1)), scale * 2, scale)
    cell = (place / scale[..., None] + 1) * (resolution / 2)
    inside = ((cell >= 0) & (cell < resolution)).all(-1)
    x, y, z = torch.where(inside[..., None], cell, 0.0).long().unbind(-1)
    bit = ((scale.log2().round().long() * resolution + x) * resolution + y) * resolution + z
    occupied = (occupancy.flatten()[bit >> 3] >> (bit & 7)) & 1
    keep = inside & (occupied == 1) & (start < end) & (leave > 0)[:, None]
    offsets = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.sum(1).cumsum(0)])
    return start[keep], end[keep], offsets, keep.nonzero()[:, 0]


def _step_edges(near: Tensor, last: Tensor, step: float, max_step: float, cone_angle: float) -> Tensor:
    """Edges [N, K + 1] from near to beyond ``last``, before jitter; the spacing follows clamp(cone_angle t, step,
    max_step)."""
    if near.numel() == 0:
        return near.new_zeros(0, 1)
    if cone_angle == 0:
        count = max(0, math.ceil(((last - near).amax() / step).item())) + 1
        return near[:, None] + torch.arange(count + 1, device=near.device, dtype=near.dtype) * step
    edges = [near]
    while len(edges) < 2 or (edges[-1] < last).any():
        edges.append(edges[-1] + (cone_angle * edges[-1]).clamp(step, max_step))
    return torch.stack(edges, dim=1)


def pad(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Packed [M, ...] as [N, longest ray, ...] with zeros behind each ray, and which entries are samples."""
    counts = offsets.diff()
    longest = int(counts.amax()) if counts.numel() else 0
    steps = torch.arange(longest, device=x.device)
    valid = steps < counts[:, None]
    out = x.new_zeros(*valid.shape, *x.shape[1:])
    out[valid] = x[: int(offsets[-1])]
    return out, valid


def sample_pdf(
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: int | None
) -> Tensor:
    """Edges [N, count + 1] at the quantiles of the weights, each spread evenly over its interval."""
    if offsets is not None:
        t_start, t_end, weights = (pad(x, offsets)[0] for x in (t_start, t_end, weights))
    n = t_start.shape[0]
    if t_start.shape[1] == 0:
        return t_start.new_zeros(n, count + 1)
    weights, lengths = weights.clamp_min(0), (t_end - t_start).clamp_min(0)
    mass = torch.where(weights.sum(1, keepdim=True) > 0, weights, lengths)
    upper = mass.cumsum(1)
    quantile = torch.arange(count + 1, device=mass.device, dtype=mass.dtype).expand(n, -1).clone()
    if seed is not None and count > 1:
        ray, index = torch.arange(n, device=mass.device)[:, None], torch.arange(1, count, device=mass.device)
        quantile[:, 1:-1] += counter_uniform(seed, ray, index).to(mass.dtype) - 0.5
    target = quantile / count * upper[:, -1:]
    has = mass > 0
    first, last = has.long().argmax(1, keepdim=True), mass.shape[1] - 1 - has.flip(1).long().argmax(1, keepdim=True)
    i = torch.searchsorted(upper, target).clamp(first, last)
    share = (target - (upper - mass).gather(1, i)) / torch.where(has, mass, 1.0).gather(1, i)
    edges = t_start.gather(1, i) + share.clamp(0, 1) * (t_end - t_start).gather(1, i)
    edges[:, :1], edges[:, -1:] = t_start.gather(1, first), t_end.gather(1, last)
    return torch.where(has.any(1, keepdim=True), edges, 0.0)


def composite(
    sigma: Tensor,
    rgb: Tensor,
    t_start: Tensor,
    t_end: Tensor,
    offsets: Tensor | None,
    background: Tensor | None,
    early_stop: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Color [N, C], depth [N], opacity [N], weights as sigma, distortion [N]; the equations are in csrc/composite.h."""
    wide = torch.promote_types(sigma.dtype, torch.float32)
    samples = sigma.shape[0]
    valid = torch.ones_like(sigma, dtype=torch.bool)
    if offsets is not None:
        _, valid = pad(sigma, offsets)
        sigma, rgb, t_start, t_end = (pad(x, offsets)[0] for x in (sigma, rgb, t_start, t_end))
    sigma, rgb = sigma.to(wide), rgb.to(wide)

    length, middle = t_end - t_start, (t_start + t_end) / 2
    tau = torch.where(sigma.isinf() & (length == 0), 0.0, sigma) * length
    before = torch.cat([torch.zeros_like(tau[:, :1]), tau.cumsum(1)[:, :-1]], dim=1)
    if early_stop > 0:
        tau = torch.where(before <= -math.log(early_stop), tau, 0.0)
    weights = (-before).exp() * -torch.expm1(-tau)
    total = tau.sum(1)

    color = (weights[..., None] * rgb).sum(1)
    if background is not None:
        color = color + (-total).exp()[:, None] * background
    depth, opacity = (weights * middle).sum(1), -torch.expm1(-total)
    below, moment = weights.cumsum(1) - weights, (weights * middle).cumsum(1) - weights * middle
    distortion = (2 * weights * (middle * below - moment) + weights.square() * length / 3).sum(1)
    if offsets is not None:
        weights = torch.cat([weights[valid], weights.new_zeros(samples - int(offsets[-1]))])
    return color, depth, opacity, weights, distortion
