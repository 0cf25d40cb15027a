"""Real spherical harmonics of degrees 0 to 3, in the order and with the signs of 3DGS (Sloan 2013).

All in plain PyTorch: with 16 numbers a direction it is bound by memory, and autograd has the gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DEGREE = 3
C0 = 0.5 / math.sqrt(math.pi)  # the value of the harmonic of degree 0


def harmonic_basis(directions: Tensor, degree: int) -> Tensor:
    """Return the harmonics [..., (degree + 1)^2] at unit directions [..., 3]."""
    x, y, z = directions.unbind(-1)
    basis = [torch.full_like(x, C0)]
    if degree >= 1:
        c1 = math.sqrt(3 / (4 * math.pi))
        basis += [-c1 * y, c1 * z, -c1 * x]
    if degree >= 2:
        c2, c20, c22 = (math.sqrt(k / math.pi) / 4 for k in (60, 5, 15))
        xx, yy, zz = x * x, y * y, z * z
        basis += [c2 * x * y, -c2 * y * z, c20 * (2 * zz - xx - yy), -c2 * x * z, c22 * (xx - yy)]
    if degree >= 3:
        c30, c31, c32, c33 = (math.sqrt(k / math.pi) / 4 for k in (7, 10.5, 105, 17.5))
        basis += [
            -c33 * y * (3 * xx - yy),
            2 * c32 * x * y * z,
            -c31 * y * (4 * zz - xx - yy),
            c30 * z * (2 * zz - 3 * xx - 3 * yy),
            -c31 * x * (4 * zz - xx - yy),
            c32 * z * (xx - yy),
            -c33 * x * (xx - 3 * yy),
        ]
    return torch.stack(basis, dim=-1)


def spherical_harmonics(directions: Tensor, coefficients: Tensor, degree: int | None = None) -> Tensor:
    """Evaluate functions on the sphere; differentiable in directions and coefficients, of every order.

    Args:
        directions: [N, 3], of any length; of length 0: no direction, only the harmonics' value at the zero vector.
        coefficients: [N, K, C], K = 1, 4, 9 or 16.
        degree: highest degree that is used, 0 to 3; None: that of K.

    Returns:
        The functions' values [N, C].

    Raises:
        ValueError: shapes that do not fit, or a degree outside 0..3 or above that of the coefficients.
    """
    count = coefficients.shape[1] if coefficients.dim() == 3 else 0
    highest = math.isqrt(count) - 1
    if count not in (1, 4, 9, 16) or directions.shape != (len(coefficients), 3):
        shapes = f"{tuple(directions.shape)} and {tuple(coefficients.shape)}"
        raise ValueError(f"directions must be [N, 3] and coefficients [N, 1, 4, 9 or 16, C]; got {shapes}")
    degree = highest if degree is None else degree
    if not 0 <= degree <= highest:
        raise ValueError(f"degree={degree}; it must be from 0 to {highest}, that of the coefficients")
    basis = harmonic_basis(F.normalize(directions, dim=1), degree)
    return (basis[..., None] * coefficients[:, : basis.shape[1]]).sum(1)
