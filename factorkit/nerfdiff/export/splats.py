"""Gaussians as the .ply file of 3DGS, which splat viewers and editors open."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.ops.spherical_harmonics import MAX_DEGREE, harmonic_basis

NUM_DIRECTIONS = 64  # that determine the 16 coefficients of rotated harmonics; they are exact from 16 on


@torch.no_grad()
def save_splats(path: Path, field: GaussianField, moved: Similarity | None) -> None:
    """Write the Gaussians: f_dc_*, f_rest_* (by channel), opacity (logit), scale_* (log), rot_* (w, x, y, z).

    Viewers draw no background behind them, and the appearance is the mean one.

    Args:
        path: the file.
        field: the Gaussians.
        moved: from the field's coordinates to those of the file; None: the same.
    """
    means, log_scales = field.means.cpu().double(), field.log_scales.cpu().double()
    quaternions = torch.nn.functional.normalize(field.quaternions.cpu().double(), dim=1)
    harmonics = torch.cat([field.colors, field.directional], dim=1).cpu().double()
    if moved is not None:
        import roma

        turn = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(moved.rotation.cpu()))
        quaternions = roma.quat_product(turn.expand_as(quaternions).roll(-1, 1), quaternions.roll(-1, 1)).roll(1, 1)
        harmonics = rotation_of_harmonics(moved.rotation.cpu()) @ harmonics
        means, log_scales = moved.apply_points(means), log_scales + moved.scale.cpu().log()
    columns = {
        "xyz": means,
        **{f"n{axis}": torch.zeros(len(means), 1) for axis in "xyz"},
        "f_dc_": harmonics[:, 0],
        "f_rest_": harmonics[:, 1:].transpose(1, 2).flatten(1),
        "opacity": field.opacities.cpu()[:, None],
        "scale_": log_scales,
        "rot_": quaternions,
    }
    names: list[str] = []
    for name, values in columns.items():
        count = values.shape[1]
        names += list(name) if name == "xyz" else [name] if count == 1 else [f"{name}{i}" for i in range(count)]
    table = torch.cat([values.float() for values in columns.values()], dim=1).numpy().astype("<f4")
    properties = "".join(f"property float {name}\n" for name in names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{properties}end_header\n"
    path.write_bytes(header.encode("ascii") + np.ascontiguousarray(table).tobytes())


def rotation_of_harmonics(rotation: Tensor) -> Tensor:
    """Return the matrix [16, 16] that turns the coefficients of a function on the sphere with it."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(NUM_DIRECTIONS, 3, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=1)
    return torch.linalg.pinv(harmonic_basis(directions, MAX_DEGREE)) @ harmonic_basis(directions @ rotation, MAX_DEGREE)
