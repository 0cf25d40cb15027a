"""New steps along rays where a coarse pass found weight (csrc/resample.h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.dispatch import call_extension, check_matches, check_offsets, check_seed, register, select
from factorkit.ops.march import counter_uniform


def pad_rays(x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Pad packed [M, ...] to [N, longest ray, ...] with zeros; return it and which entries are samples."""
    counts = offsets.diff()
    longest = int(counts.amax()) if counts.numel() else 0
    steps = torch.arange(longest, device=x.device)
    valid = steps < counts[:, None]
    out = x.new_zeros(*valid.shape, *x.shape[1:])
    out[valid] = x[: int(offsets[-1])]
    return out, valid


def invert_distribution(
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: int | None
) -> Tensor:
    """Compute :func:`sample_pdf` in plain PyTorch: the reference."""
    if offsets is not None:
        t_start, t_end, weights = (pad_rays(x, offsets)[0] for x in (t_start, t_end, weights))
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


def sample_pdf(
    t_start: Tensor,
    t_end: Tensor,
    weights: Tensor,
    count: int,
    ray_offsets: Tensor | None = None,
    *,
    seed: int | None = None,
    first_ray: int = 0,
) -> Tensor:
    """Compute the edges [N, count + 1] of ``count`` new steps a ray (Mildenhall et al. 2020, 5.2).

    Edges are the quantiles of the weights, each weight spread evenly over its interval. They rise from where the first
    weight begins to where the last ends; a step may span a gap between packed intervals. A ray without weight is
    divided by length; one without intervals has all its edges at 0. Not differentiable.

    Args:
        t_start: [N, S] dense, or packed [M] with ray_offsets, in order along each ray.
        t_end: like t_start.
        weights: like t_start; weights below 0 count as 0.
        count: at least 1.
        ray_offsets: [N + 1] int64.
        seed: moves each inner quantile by up to half a step either way, as in :func:`march_rays`; None leaves them
            even.
        first_ray: the number of the first ray, for dense weights: rays processed in parts move as in one call.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, count below 1, offsets out of order (checked on the CPU
            only).
    """
    if t_start.dtype not in (torch.float32, torch.float64) or t_start.dim() != (2 if ray_offsets is None else 1):
        form = "[rays, samples]" if ray_offsets is None else "[samples], packed by ray_offsets"
        raise ValueError(f"t_start must be float32 or float64 {form}; got {t_start.dtype} {tuple(t_start.shape)}")
    check_matches("t_end", t_end, "t_start", t_start)
    check_matches("weights", weights, "t_start", t_start)
    check_seed(seed)
    if count < 1:
        raise ValueError(f"count={count}; at least one step is needed")
    if ray_offsets is not None:
        check_offsets(ray_offsets, t_start.shape[0], t_start.device)
    intervals = [x.detach() for x in (t_start, t_end, weights)]
    if seed is not None and first_ray:  # kernels number rays from 0: empty rays fill the places before the first
        if ray_offsets is not None:
            raise ValueError(f"first_ray={first_ray} needs dense weights; got packed ones (ray_offsets)")
        intervals = [F.pad(x, (0, 0, first_ray, 0)) for x in intervals]
    edges = select("sample_pdf", invert_distribution, t_start)(*intervals, ray_offsets, count, seed)
    return edges[len(edges) - len(t_start) :] if ray_offsets is None else edges


def _forward(
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: int | None
) -> Tensor:
    edges = _fake(t_start, t_end, weights, offsets, count, seed)
    tensors = [x if x is None else x.contiguous() for x in (t_start, t_end, weights, offsets)]
    sizes = (edges.shape[0], t_start.numel(), 0 if offsets is not None else t_start.shape[1], count)
    call_extension("resample", t_start, (*tensors, edges), sizes, seed is not None, seed or 0)
    return edges


def _fake(
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: int | None
) -> Tensor:
    return t_start.new_empty(t_start.shape[0] if offsets is None else offsets.shape[0] - 1, count + 1)


register("sample_pdf", _forward, _fake, needs_extension=True)
