"""Projection of 3D Gaussians to the image (EWA splatting; Zwicker et al. 2002, Kerbl et al. 2023, Ye et al. 2024).

A Gaussian with mean m, rotation R and scales S is, in camera coordinates t = W m + p, projected to the mean (f_x t_x /
t_z + c_x, f_y t_y / t_z + c_y) and the covariance J W R S S^T R^T W^T J^T + low_pass I, with J the Jacobian of the
projection at t. csrc/gaussians.h has the gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorkit.ops.dispatch import call_extension, check_matches, reference_gradients, register, select

LOW_PASS = 0.3  # square pixels, added to the diagonal of the 2D covariance: the value of 3DGS
MAX_EXTENT = 3.3290429  # as the constants below in csrc/gaussians.h
FRUSTUM_MARGIN = 0.15
MIN_COMPENSATION = 1e-6
GAUSSIANS_PER_BLOCK = 32
CAMERA_GRADIENTS = 16


class ProjectedGaussians(NamedTuple):
    """N Gaussians in an image. Those that are not visible are 0 everywhere, and have no gradient."""

    means: Tensor  #: [N, 2], in pixels, right and down
    conics: Tensor  #: [N, 3], a, b and c of the inverse covariance [[a, b], [b, c]]
    depths: Tensor  #: [N], along the camera's axis
    radii: Tensor  #: int32 [N, 2], half sides in pixels of the box outside of which the Gaussian is below 1/255
    compensations: Tensor  #: [N], what the low-pass term adds to each Gaussian's integral, as a factor of the opacity


def project_by_matrices(
    means: Tensor,
    quaternions: Tensor,
    scales: Tensor,
    viewmatrix: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    near: float,
    far: float,
    low_pass: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute means, conics, depths, compensations and radii in plain PyTorch: the reference."""
    camera = (viewmatrix[:3, :3] * means[:, None]).sum(-1) + viewmatrix[:3, 3]
    visible = (camera[:, 2] > near) & (camera[:, 2] < far)
    camera = torch.where(visible[:, None], camera, camera.new_tensor([0.0, 0.0, 1.0]))
    x, y, z = camera.unbind(1)
    fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]

    squared = quaternions.square().sum(1, keepdim=True)
    length = torch.where(squared > 0, squared, 1.0).sqrt()
    identity = quaternions.new_tensor([1.0, 0.0, 0.0, 0.0])
    w, i, j, k = torch.where(squared > 0, quaternions / length, identity).unbind(1)
    rotation = torch.stack(
        [
            *(1 - 2 * (j * j + k * k), 2 * (i * j - w * k), 2 * (i * k + w * j)),
            *(2 * (i * j + w * k), 1 - 2 * (i * i + k * k), 2 * (j * k - w * i)),
            *(2 * (i * k - w * j), 2 * (j * k + w * i), 1 - 2 * (i * i + j * j)),
        ],
        dim=1,
    ).unflatten(1, (3, 3))
    margin_x, margin_y = FRUSTUM_MARGIN * width, FRUSTUM_MARGIN * height
    u = torch.minimum(torch.maximum(fx * x / z, -(cx + margin_x)), width + margin_x - cx)
    v = torch.minimum(torch.maximum(fy * y / z, -(cy + margin_y)), height + margin_y - cy)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -u / z, zero, fy / z, -v / z], dim=1).unflatten(1, (2, 3))
    spread = jacobian @ viewmatrix[:3, :3] @ (rotation * scales[:, None])
    covariance = spread @ spread.mT
    a0, b0, c0 = covariance[:, 0, 0], covariance[:, 0, 1], covariance[:, 1, 1]
    det0 = torch.linalg.cross(spread[:, 0], spread[:, 1]).square().sum(1)
    det = det0 + low_pass * (a0 + c0 + low_pass)
    a, c = a0 + low_pass, c0 + low_pass
    mean_x, mean_y = fx * x / z + cx, fy * y / z + cy
    radius_x, radius_y = ((MAX_EXTENT * side.detach().sqrt()).ceil() for side in (a, c))
    visible = (
        visible & (det > 0) & squared[:, 0].isfinite() & det.isfinite() & (a0 / det).isfinite() & (c0 / det).isfinite()
    )
    visible &= (mean_x + radius_x > 0) & (mean_x - radius_x < width)
    visible &= (mean_y + radius_y > 0) & (mean_y - radius_y < height)
    visible &= (radius_x < 2**30) & (radius_y < 2**30)
    det = torch.where(visible, det, 1.0)
    compensation = (det0 / det).clamp_min(MIN_COMPENSATION).sqrt()
    outputs = (torch.stack([mean_x, mean_y], dim=1), torch.stack([c, -b0, a], dim=1) / det[:, None], z, compensation)
    shown = [torch.where(visible.reshape(-1, *[1] * (x.dim() - 1)), x, 0.0) for x in outputs]
    radii = torch.where(visible[:, None], torch.stack([radius_x, radius_y], dim=1), 0.0).to(torch.int32)
    return shown[0], shown[1], shown[2], shown[3], radii


def project_gaussians(
    means: Tensor,
    quaternions: Tensor,
    scales: Tensor,
    viewmatrix: Tensor,
    intrinsics: Tensor,
    size: tuple[int, int],
    *,
    near: float = 0.01,
    far: float = float("inf"),
    low_pass: float = LOW_PASS,
) -> ProjectedGaussians:
    """Project Gaussians to an image by the equations of :mod:`factorkit.ops.project_gaussians`.

    Gradients reach all five tensors, of second order too: those are computed by the slower PyTorch reference. Not
    visible are Gaussians that are not between the near and the far plane (so also those behind the camera), lie outside
    the image, or have a number that is not finite, as all have in a camera that is not; their outputs and gradients are
    0. A quaternion of zero length (or whose square is) is no rotation and has no gradient. Scales may be 0 or
    negative; a Gaussian of two zero scales is as large as the low-pass term, and not visible without it.

    Args:
        means: [N, 3] in world coordinates, fp32 or fp64, as all tensors.
        quaternions: [N, 4] as (w, x, y, z), of any length.
        scales: [N, 3], standard deviations along the Gaussian's axes.
        viewmatrix: [4, 4], world to camera, whose axes are right, down and forward (OpenCV).
        intrinsics: [3, 3] in pixels; without skew.
        size: height and width of the image.
        near: depth of the near plane, above 0.
        far: depth of the far plane.
        low_pass: added to the variances in the image, in square pixels.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or near <= 0, far <= near or low_pass < 0.
    """
    count = len(means) if means.dim() else 0
    if means.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"means must be float32 or float64; got {means.dtype}")
    shapes = {"means": (count, 3), "quaternions": (count, 4), "scales": (count, 3)}
    tensors = (means, quaternions, scales, viewmatrix, intrinsics)
    for (name, shape), x in zip({**shapes, "viewmatrix": (4, 4), "intrinsics": (3, 3)}.items(), tensors, strict=True):
        check_matches(name, x, "means", means, torch.Size(shape))
    if not 0 < near < far or not 0 <= low_pass < float("inf"):
        raise ValueError(f"need 0 < near < far and low_pass >= 0; got {near}, {far} and {low_pass}")
    if min(size) < 1:
        raise ValueError(f"size={size}; give height and width, at least 1 each")
    run = select("project_gaussians", project_by_matrices, means)
    outputs = run(*tensors, size[1], size[0], float(near), float(far), float(low_pass))
    return ProjectedGaussians(outputs[0], outputs[1], outputs[2], outputs[4], outputs[3])


# --- implementations ---

INPUTS = (
    "Tensor means, Tensor quaternions, Tensor scales, Tensor viewmatrix, Tensor intrinsics, int width, int height, "
    "float near, float far, float low_pass"
)


def _problem(arguments: tuple) -> tuple:
    """Return the arguments of csrc/gaussians.h, with contiguous tensors."""
    *tensors, width, height, near, far, low_pass = arguments
    return [x.contiguous() for x in tensors], [len(tensors[0]), width, height], [near, far, low_pass]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    outputs = _fake(*arguments)
    call_extension("project_gaussians", arguments[0], *_problem(arguments), outputs)
    return outputs


def _fake(means: Tensor, *_: Any) -> tuple[Tensor, ...]:
    count, new = means.shape[0], means.new_empty
    return new(count, 2), new(count, 3), new(count), new(count), new(count, 2, dtype=torch.int32)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    radii, *problem, for_camera = arguments[4:]
    means, quaternions, scales = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem[:3])
    blocks = -(-len(means) // GAUSSIANS_PER_BLOCK)
    camera = means.new_empty(blocks, CAMERA_GRADIENTS) if for_camera else None
    upstream = [x if x is None else x.contiguous() for x in arguments[:4]]
    addresses = [radii, *upstream, means, quaternions, scales, camera]
    call_extension("project_gaussians_backward", means, *_problem(tuple(problem)), addresses)
    viewmatrix, intrinsics = means.new_zeros(4, 4), means.new_zeros(3, 3)
    if camera is not None:
        total = camera.double().sum(0).to(camera)
        viewmatrix[:3, :3], viewmatrix[:3, 3] = total[:9].unflatten(0, (3, 3)), total[9:12]
        intrinsics[0, 0], intrinsics[1, 1], intrinsics[:2, 2] = total[12], total[13], total[14:]
    return means, quaternions, scales, viewmatrix, intrinsics


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    tensors = arguments[5:10]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[4])
    ctx.save_for_backward(output[4], *inputs[:5])
    ctx.settings = inputs[5:]


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple:
    radii, *tensors = ctx.saved_tensors
    arguments, needs = (*tensors, *ctx.settings), ctx.needs_input_grad
    if all(g is None for g in grads[:4]):
        return (None,) * 10
    if torch.is_grad_enabled():
        return reference_gradients(project_by_matrices, arguments, grads[:4])
    for_camera = needs[3] or needs[4]
    found = torch.ops.factorkit.project_gaussians_backward(*grads[:4], radii, *arguments, for_camera)
    return *(g if need else None for g, need in zip(found, needs[:5], strict=True)), *[None] * 5


register(
    "project_gaussians",
    _forward,
    _fake,
    schema=f"({INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    autograd=(_setup_context, _autograd),
    needs_extension=True,
)
register(
    "project_gaussians_backward",
    _backward,
    _backward_fake,
    schema="(Tensor? d_means, Tensor? d_conics, Tensor? d_depths, Tensor? d_compensations, Tensor radii, "
    f"{INPUTS}, bool for_camera) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    needs_extension=True,
)
