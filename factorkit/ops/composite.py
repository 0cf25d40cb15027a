"""Volume rendering of packed or dense rays, with every gradient and the distortion loss in one pass each way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.ops import reference_rendering as reference
from factorkit.ops.checks import check_alike, check_offsets
from factorkit.ops.launch import call, plain

MAX_CHANNELS = 32


class Rendering(NamedTuple):
    """What N rays saw; fp32, or fp64 for fp64 inputs."""

    color: Tensor  #: [N, C]
    depth: Tensor  #: [N], the expected depth sum w_i m_i, in units of t, not divided by the opacity
    opacity: Tensor  #: [N], 0 to 1
    weights: Tensor | None  #: of each sample, shaped like sigma
    distortion: Tensor | None  #: [N], in units of t


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
    """Render samples: with tau_i = sigma_i (t_end_i - t_start_i), T_i = exp(-sum_{j<i} tau_j) and w_i = T_i (1 -
    exp(-tau_i)), colour sum w_i rgb_i + T_end background, depth sum w_i m_i over midpoints, opacity 1 - T_end (Max
    1995), and on request the distortion sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 (t_end_i - t_start_i) / 3 (Barron et
    al. 2022, eq. 15).

    Gradients reach sigma, rgb, t_start, t_end and background from all outputs. Intervals of zero length are nothing.

    Args:
        sigma: density, >= 0: dense [N, S], or packed [M] with ray_offsets; fp32, bf16, fp16 (summed in fp32) or fp64.
        rgb: [N, S, C] or [M, C], 1 to 32 channels of anything.
        t_start, t_end: shaped like sigma, in order along each ray; fp32, or fp64 with fp64.
        ray_offsets: [N + 1] int64: ray r owns the samples from ray_offsets[r] to ray_offsets[r + 1]. Samples after the
            last ray's, as a capacity leaves them, belong to none and get zeros.
        background: [C] or [N, C], black if None.
        early_stop: samples with T_i below it contribute nothing, forward and backward; from 0 to below 1.
        weights, distortion: whether to answer these.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, channels outside 1..32, early_stop outside [0, 1),
            offsets out of order (looked at on the CPU only).
    """
    _check(sigma, rgb, t_start, t_end, ray_offsets)
    if not 0 <= early_stop < 1:
        raise ValueError(f"early_stop={early_stop}; it is a transmittance, from 0 (never) to below 1")
    dtype = torch.promote_types(sigma.dtype, rgb.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    rays = sigma.shape[0] if ray_offsets is None else ray_offsets.shape[0] - 1
    if background is not None:
        if background.shape not in ((rgb.shape[-1],), (rays, rgb.shape[-1])) or background.device != sigma.device:
            fit = f"[{rgb.shape[-1]}] or [{rays}, {rgb.shape[-1]}] on {sigma.device}"
            raise ValueError(f"background must be {fit}; got {tuple(background.shape)} on {background.device}")
        background = background.to(wide)
    given = (
        sigma.to(dtype),
        rgb.to(dtype),
        t_start.to(wide),
        t_end.to(wide),
        ray_offsets,
        background,
        float(early_stop),
    )
    if plain(sigma):
        found = reference.composite(*given)
    else:
        found = torch.ops.factorkit.composite(*given, weights, distortion)
    color, depth, opacity, each, spread = found[:5]
    return Rendering(color, depth, opacity, each if weights else None, spread if distortion else None)


def _check(sigma: Tensor, rgb: Tensor, t_start: Tensor, t_end: Tensor, ray_offsets: Tensor | None) -> None:
    for name, x in (("sigma", sigma), ("rgb", rgb), ("t_start", t_start), ("t_end", t_end)):
        if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64; got {x.dtype}")
        if x.device != sigma.device:
            raise ValueError(f"{name} is on {x.device} but sigma is on {sigma.device}")
    if sigma.dim() != (2 if ray_offsets is None else 1):
        form = "[rays, samples]" if ray_offsets is None else "[samples], packed as ray_offsets say"
        raise ValueError(f"sigma must be {form}; got {tuple(sigma.shape)}")
    if rgb.shape[:-1] != sigma.shape or not 1 <= rgb.shape[-1] <= MAX_CHANNELS:
        raise ValueError(
            f"rgb must be sigma's {tuple(sigma.shape)} and 1 to {MAX_CHANNELS} channels; got {tuple(rgb.shape)}"
        )
    for name, x in (("t_start", t_start), ("t_end", t_end)):
        if x.shape != sigma.shape:
            raise ValueError(f"{name} must be shaped like sigma, {tuple(sigma.shape)}; got {tuple(x.shape)}")
    check_alike("t_end", t_end, "t_start", t_start)
    if ray_offsets is not None:
        check_offsets(ray_offsets, sigma.shape[0], sigma.device)


def _layout(sigma: Tensor, rgb: Tensor, offsets: Tensor | None) -> tuple[int, list[int]]:
    """Number of rays, and (rays, samples, per_ray, channels) of csrc/composite.h."""
    rays = sigma.shape[0] if offsets is None else offsets.shape[0] - 1
    return rays, [rays, sigma.numel(), 0 if offsets is not None else sigma.shape[1], rgb.shape[-1]]


@torch.library.custom_op("factorkit::composite", mutates_args=(), device_types=("cpu", "cuda"))
def _composite(
    sigma: Tensor,
    rgb: Tensor,
    t_start: Tensor,
    t_end: Tensor,
    offsets: Tensor | None,
    background: Tensor | None,
    early_stop: float,
    weights: bool,
    distortion: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = [x if x is None else x.contiguous() for x in (sigma, rgb, t_start, t_end, offsets, background)]
    found = _like_outputs(sigma, rgb, t_start, offsets, weights, distortion)
    _, sizes = _layout(sigma, rgb, offsets)
    asked = [*found[:3], found[3] if weights else None, found[4] if distortion else None, found[5]]
    call("composite_forward", sigma, given, sizes, background is not None and background.dim() == 1, early_stop, asked)
    return found


def _like_outputs(sigma, rgb, t_start, offsets, weights, distortion):
    rays, _ = _layout(sigma, rgb, offsets)
    new = t_start.new_empty
    each, spread = new(sigma.shape if weights else 0), new(rays if distortion else 0)
    return new(rays, rgb.shape[-1]), new(rays), new(rays), each, spread, new(rays, dtype=torch.int64)


@_composite.register_fake
def _(sigma, rgb, t_start, t_end, offsets, background, early_stop, weights, distortion):
    return _like_outputs(sigma, rgb, t_start, offsets, weights, distortion)


@torch.library.custom_op("factorkit::composite_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _composite_backward(
    d_color: Tensor | None,
    d_depth: Tensor | None,
    d_opacity: Tensor | None,
    d_weights: Tensor | None,
    d_distortion: Tensor | None,
    used: Tensor,
    sigma: Tensor,
    rgb: Tensor,
    t_start: Tensor,
    t_end: Tensor,
    offsets: Tensor | None,
    background: Tensor | None,
    for_rgb: bool,
    for_t: bool,
    for_background: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dense = lambda x: x if x is None else x.contiguous()  # noqa: E731
    given = [dense(x) for x in (sigma, rgb, t_start, t_end, offsets, background)]
    upstream = [dense(x) for x in (d_color, d_depth, d_opacity, d_weights, d_distortion, used)]
    rays, sizes = _layout(sigma, rgb, offsets)
    found = _like_gradients(sigma, rgb, t_start, for_rgb, for_t)
    d_background = t_start.new_empty((rays, rgb.shape[-1]) if for_background else 0)
    shared = background is not None and background.dim() == 1
    wanted = (True, for_rgb, for_t, for_t, for_background)
    answers = [x if want else None for x, want in zip((*found, d_background), wanted, strict=True)]
    call("composite_backward", sigma, given, sizes, shared, upstream + answers)
    return *found, d_background.sum(0) if for_background and shared else d_background


def _like_gradients(sigma, rgb, t_start, for_rgb, for_t):
    time = lambda: t_start.new_empty(t_start.shape if for_t else 0)  # noqa: E731
    return sigma.new_empty(sigma.shape), rgb.new_empty(rgb.shape if for_rgb else 0), time(), time()


@_composite_backward.register_fake
def _(
    d_color,
    d_depth,
    d_opacity,
    d_weights,
    d_distortion,
    used,
    sigma,
    rgb,
    t_start,
    t_end,
    offsets,
    background,
    for_rgb,
    for_t,
    for_background,
):
    d_background = t_start.new_empty(background.shape if for_background else 0)
    return *_like_gradients(sigma, rgb, t_start, for_rgb, for_t), d_background


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[5])
    ctx.save_for_backward(output[5], *inputs[:6])


def _autograd(ctx, *grads):
    used, *inputs = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grads = list(grads[:5])
    if all(g is None for g in grads):
        return (None,) * 9
    d_sigma, d_rgb, d_start, d_end, d_background = torch.ops.factorkit.composite_backward(
        *grads, used, *inputs, needs[1], needs[2] or needs[3], needs[5]
    )
    found = (d_sigma, d_rgb, d_start, d_end, None, d_background)
    return *(g if need else None for g, need in zip(found, needs, strict=False)), None, None, None


_composite.register_autograd(_autograd, setup_context=_setup)
