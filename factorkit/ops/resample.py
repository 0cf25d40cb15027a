"""New steps along rays, where a coarse pass found weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops import reference_rendering as reference
from factorkit.ops.checks import check_alike, check_offsets, check_seed
from factorkit.ops.launch import call, plain


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
    """Edges [N, count + 1] of ``count`` new steps a ray: the quantiles of the weights, each spread evenly over its
    interval (Mildenhall et al. 2020, 5.2).

    They rise from where the first weight begins to where the last ends; a step may span a gap between packed intervals.
    A ray without weight is divided by length; one without intervals has all its edges at 0. Not differentiable.

    Args:
        t_start, t_end, weights: [N, S] dense, or packed [M] with ray_offsets, in order along each ray; weights below 0
            count as 0.
        count: at least 1.
        ray_offsets: [N + 1] int64.
        seed: moves each inner quantile by up to half a step either way, as in :func:`march_rays`; None leaves them
            even.
        first_ray: dense, the number of the first ray: rays in parts move as they do in one.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, count below 1, offsets out of order (looked at on the CPU
            only).
    """
    if t_start.dtype not in (torch.float32, torch.float64) or t_start.dim() != (2 if ray_offsets is None else 1):
        form = "[rays, samples]" if ray_offsets is None else "[samples], packed as ray_offsets say"
        raise ValueError(f"t_start must be float32 or float64 {form}; got {t_start.dtype} {tuple(t_start.shape)}")
    check_alike("t_end", t_end, "t_start", t_start)
    check_alike("weights", weights, "t_start", t_start)
    check_seed(seed)
    if count < 1:
        raise ValueError(f"count={count}; at least one step is needed")
    if ray_offsets is not None:
        check_offsets(ray_offsets, t_start.shape[0], t_start.device)
    given = (t_start.detach(), t_end.detach(), weights.detach(), ray_offsets, count, seed)
    if seed is not None and first_ray:  # kernels number rays from 0: empty ones go before them
        if ray_offsets is not None:
            raise ValueError(f"first_ray={first_ray} goes with dense weights only")
        given = (*(F.pad(x, (0, 0, first_ray, 0)) for x in given[:3]), *given[3:])
    edges = reference.sample_pdf(*given) if plain(t_start) else torch.ops.factorkit.sample_pdf(*given)
    return edges[len(edges) - len(t_start) :] if ray_offsets is None else edges


@torch.library.custom_op("factorkit::sample_pdf", mutates_args=(), device_types=("cpu", "cuda"))
def _sample_pdf(
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: int | None
) -> Tensor:
    rays = t_start.shape[0] if offsets is None else offsets.shape[0] - 1
    edges = t_start.new_empty(rays, count + 1)
    given = tuple(x if x is None else x.contiguous() for x in (t_start, t_end, weights, offsets))
    sizes = (rays, t_start.numel(), 0 if offsets is not None else t_start.shape[1], count)
    call("resample", t_start, (*given, edges), sizes, seed is not None, seed or 0)
    return edges


@_sample_pdf.register_fake
def _(t_start, t_end, weights, offsets, count, seed):
    return t_start.new_empty(t_start.shape[0] if offsets is None else offsets.shape[0] - 1, count + 1)
