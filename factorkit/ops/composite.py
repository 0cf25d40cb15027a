"""Volume rendering of packed or dense rays, with every gradient and the distortion loss, one pass in each direction.

With tau_i = sigma_i (t_end_i - t_start_i), T_i = exp(-sum_{j<i} tau_j), w_i = T_i (1 - exp(-tau_i)) and midpoints m_i
(Max 1995): colour sum_i w_i rgb_i + T_end background, depth sum_i w_i m_i, opacity 1 - T_end, and the distortion
sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 (t_end_i - t_start_i) / 3 (Barron et al. 2022, eq. 15). csrc/composite.h has
the gradients. New steps along rays are placed where a coarse pass has weight (csrc/resample.h).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.ops.dispatch import (
    call_extension,
    check_matches,
    check_offsets,
    reference_gradients,
    register,
    seed_tensor,
    select,
)
from factorkit.ops.march import counter_uniform

MAX_CHANNELS = 32  # as in csrc/composite.h
SAMPLES = "Tensor sigma, Tensor rgb, Tensor t_start, Tensor t_end, Tensor? offsets, Tensor? background"


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
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: int | Tensor | None
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
    seed: int | Tensor | None = None,
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
    seed = seed_tensor(seed, t_start.device)
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


def _resample_forward(
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: Tensor | None
) -> Tensor:
    edges = _resample_fake(t_start, t_end, weights, offsets, count, seed)
    tensors = [x if x is None else x.contiguous() for x in (t_start, t_end, weights, offsets)]
    sizes = (edges.shape[0], t_start.numel(), 0 if offsets is not None else t_start.shape[1], count)
    call_extension("resample", t_start, (*tensors, seed, edges), sizes)
    return edges


def _resample_fake(
    t_start: Tensor, t_end: Tensor, weights: Tensor, offsets: Tensor | None, count: int, seed: Tensor | None
) -> Tensor:
    return t_start.new_empty(t_start.shape[0] if offsets is None else offsets.shape[0] - 1, count + 1)


register("sample_pdf", _resample_forward, _resample_fake, needs_extension=True)


class Rendering(NamedTuple):
    """Volume rendering of N rays; fp32, or fp64 for fp64 inputs."""

    color: Tensor  #: [N, C]
    depth: Tensor  #: [N], the expected depth sum w_i m_i, in units of t, not divided by the opacity
    opacity: Tensor  #: [N], 0 to 1
    weights: Tensor | None  #: of each sample, shaped like sigma
    distortion: Tensor | None  #: [N], in units of t


def composite_by_sums(
    sigma: Tensor,
    rgb: Tensor,
    t_start: Tensor,
    t_end: Tensor,
    offsets: Tensor | None,
    background: Tensor | None,
    early_stop: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute color [N, C], depth [N], opacity [N], weights and distortion [N] in plain PyTorch: the reference."""
    wide = torch.promote_types(sigma.dtype, torch.float32)
    samples = sigma.shape[0]
    valid = torch.ones_like(sigma, dtype=torch.bool)
    if offsets is not None:
        _, valid = pad_rays(sigma, offsets)
        sigma, rgb, t_start, t_end = (pad_rays(x, offsets)[0] for x in (sigma, rgb, t_start, t_end))
    sigma, rgb = sigma.to(wide), rgb.to(wide)

    length, middle = t_end - t_start, (t_start + t_end) / 2
    length = torch.where(sigma.isinf(), length.detach(), length)  # infinite density is opaque over any length
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


def composite(
    sigma: Tensor,
    rgb: Tensor,
    t_start: Tensor,
    t_end: Tensor,
    ray_offsets: Tensor | None = None,
    *,
    background: Tensor | None = None,
    early_stop: float = 0.0,
    weights: bool = False,
    distortion: bool = False,
) -> Rendering:
    """Render samples by the equations of :mod:`factorkit.ops.composite`.

    Gradients reach sigma, rgb, t_start, t_end and background from all outputs, of second order too: those are computed
    by the slower PyTorch reference. Intervals of zero length add nothing.

    Args:
        sigma: density, >= 0: dense [N, S], or packed [M] with ray_offsets; fp32, bf16, fp16 (summed in fp32) or fp64.
        rgb: [N, S, C] or [M, C], 1 to 32 channels of anything.
        t_start: shaped like sigma, in order along each ray; fp32, or fp64 with fp64.
        t_end: like t_start.
        ray_offsets: [N + 1] int64: ray r owns the samples from ray_offsets[r] to ray_offsets[r + 1]. Samples after the
            last ray's, as a capacity leaves them, belong to none and get zeros.
        background: [C] or [N, C], black if None.
        early_stop: samples with T_i below it contribute nothing, forward and backward; from 0 to below 1.
        weights: whether to return the samples' weights.
        distortion: whether to return the distortion.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, channels outside 1..32, early_stop outside [0, 1),
            offsets out of order (checked on the CPU only).
    """
    _check(sigma, rgb, t_start, t_end, ray_offsets)
    if not 0 <= early_stop < 1:
        raise ValueError(f"early_stop={early_stop}; it is a transmittance, from 0 (never) to below 1")
    dtype = torch.promote_types(sigma.dtype, rgb.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if background is not None:
        rays, channels = _count_rays(sigma, ray_offsets), rgb.shape[-1]
        if background.shape not in ((channels,), (rays, channels)) or background.device != sigma.device:
            wanted = f"[{channels}] or [{rays}, {channels}] on {sigma.device}"
            raise ValueError(f"background must be {wanted}; got {tuple(background.shape)} on {background.device}")
        background = background.to(wide)
    tensors = (sigma.to(dtype), rgb.to(dtype), t_start.to(wide), t_end.to(wide), ray_offsets, background)
    run = select("composite", composite_by_sums, sigma)
    flags = () if run is composite_by_sums else (weights, distortion)
    color, depth, opacity, sample_weights, spread = run(*tensors, float(early_stop), *flags)[:5]
    return Rendering(color, depth, opacity, sample_weights if weights else None, spread if distortion else None)


def _check(sigma: Tensor, rgb: Tensor, t_start: Tensor, t_end: Tensor, ray_offsets: Tensor | None) -> None:
    for name, x in (("sigma", sigma), ("rgb", rgb), ("t_start", t_start), ("t_end", t_end)):
        if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64; got {x.dtype}")
        if x.device != sigma.device:
            raise ValueError(f"{name} is on {x.device} but sigma is on {sigma.device}")
    if sigma.dim() != (2 if ray_offsets is None else 1):
        form = "[rays, samples]" if ray_offsets is None else "[samples], packed by ray_offsets"
        raise ValueError(f"sigma must be {form}; got {tuple(sigma.shape)}")
    if rgb.shape[:-1] != sigma.shape or not 1 <= rgb.shape[-1] <= MAX_CHANNELS:
        raise ValueError(
            f"rgb must be sigma's {tuple(sigma.shape)} and 1 to {MAX_CHANNELS} channels; got {tuple(rgb.shape)}"
        )
    for name, x in (("t_start", t_start), ("t_end", t_end)):
        if x.shape != sigma.shape:
            raise ValueError(f"{name} must be shaped like sigma, {tuple(sigma.shape)}; got {tuple(x.shape)}")
    check_matches("t_end", t_end, "t_start", t_start)
    if ray_offsets is not None:
        check_offsets(ray_offsets, sigma.shape[0], sigma.device)


# --- implementations ---


def _count_rays(sigma: Tensor, offsets: Tensor | None) -> int:
    return sigma.shape[0] if offsets is None else offsets.shape[0] - 1


def _contiguous(tensors: Any) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def _layout(sigma: Tensor, rgb: Tensor, offsets: Tensor | None, background: Tensor | None) -> tuple[list[int], bool]:
    """Return (rays, samples, samples per ray, channels) of csrc/composite.h, and whether the background is shared."""
    per_ray = 0 if offsets is not None else sigma.shape[1]
    sizes = [_count_rays(sigma, offsets), sigma.numel(), per_ray, rgb.shape[-1]]
    return sizes, background is not None and background.dim() == 1


def _forward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, early_stop, weights, distortion = args
    sigma, rgb, _, _, offsets, background = tensors
    outputs = _fake(*args)
    wanted = (True, True, True, weights, distortion, True)
    addressed = [x if want else None for x, want in zip(outputs, wanted, strict=True)]
    layout = _layout(sigma, rgb, offsets, background)
    call_extension("composite_forward", sigma, _contiguous(tensors), *layout, early_stop, addressed)
    return outputs


def _fake(*args: Any) -> tuple[Tensor, ...]:
    """Allocate color, depth, opacity, weights, distortion and the number of samples used; empty where not wanted."""
    sigma, rgb, t_start, _, offsets, _, _, weights, distortion = args
    rays, new = _count_rays(sigma, offsets), t_start.new_empty
    per_sample, per_ray = new(sigma.shape if weights else 0), new(rays if distortion else 0)
    return new(rays, rgb.shape[-1]), new(rays), new(rays), per_sample, per_ray, new(rays, dtype=torch.int64)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    upstream, (sigma, rgb, _, _, offsets, background), (for_rgb, for_t, for_background) = _split_backward(args)
    *found, d_background = _allocate_gradients(args, _count_rays(sigma, offsets))
    wanted = (True, for_rgb, for_t, for_t, for_background)
    outputs = [x if want else None for x, want in zip((*found, d_background), wanted, strict=True)]
    sizes, shared = _layout(sigma, rgb, offsets, background)
    tensors = _contiguous(args[6:12])
    call_extension("composite_backward", sigma, tensors, sizes, shared, _contiguous(upstream) + outputs)
    return *found, d_background.sum(0) if for_background and shared else d_background


def _split_backward(args: tuple) -> tuple[tuple, tuple, tuple]:
    return args[:6], args[6:12], args[12:]


def _allocate_gradients(args: tuple, background_rows: int | None) -> tuple[Tensor, ...]:
    """Allocate the gradients of sigma, rgb, t_start, t_end and background; empty where not wanted."""
    _, (sigma, rgb, t_start, _, _, background), (for_rgb, for_t, for_background) = _split_backward(args)
    d_start, d_end = (t_start.new_empty(t_start.shape if for_t else 0) for _ in range(2))
    shape: Any = 0
    if for_background:
        shape = background.shape if background_rows is None else (background_rows, rgb.shape[-1])
    d_rgb = rgb.new_empty(rgb.shape if for_rgb else 0)
    return sigma.new_empty(sigma.shape), d_rgb, d_start, d_end, t_start.new_empty(shape)


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return _allocate_gradients(args, None)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[5])
    ctx.save_for_backward(output[5], *inputs[:6])
    ctx.early_stop = inputs[6]


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple:
    used, *inputs = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if all(g is None for g in grads[:5]):
        return (None,) * 9
    if torch.is_grad_enabled():
        return *reference_gradients(composite_by_sums, (*inputs, ctx.early_stop), grads[:5]), None, None
    d_sigma, d_rgb, d_start, d_end, d_background = torch.ops.factorkit.composite_backward(
        *grads[:5], used, *inputs, needs[1], needs[2] or needs[3], needs[5]
    )
    found = (d_sigma, d_rgb, d_start, d_end, None, d_background)
    return *(g if need else None for g, need in zip(found, needs, strict=False)), None, None, None


register(
    "composite",
    _forward,
    _fake,
    schema=f"({SAMPLES}, float early_stop, bool weights, bool distortion) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    autograd=(_setup_context, _autograd),
    needs_extension=True,
)
register(
    "composite_backward",
    _backward,
    _backward_fake,
    schema="(Tensor? d_color, Tensor? d_depth, Tensor? d_opacity, Tensor? d_weights, Tensor? d_distortion, Tensor used,"
    f" {SAMPLES}, bool for_rgb, bool for_t, bool for_background) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    needs_extension=True,
)
