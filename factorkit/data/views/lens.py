"""Lenses that bend straight lines, and pictures straightened again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Distortion:
    """Radial k1, k2, k3 and tangential p1, p2 of Brown's model, as OpenCV, COLMAP and nerfstudio number them."""

    k1: float = 0.0
    k2: float = 0.0
    k3: float = 0.0
    p1: float = 0.0
    p2: float = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Where the lens puts what a pinhole would put at (x, y), in units of the focal length, right and down."""
        r2 = x * x + y * y
        radial = 1 + r2 * (self.k1 + r2 * (self.k2 + r2 * self.k3))
        tangential_x = 2 * self.p1 * x * y + self.p2 * (r2 + 2 * x * x)
        tangential_y = self.p1 * (r2 + 2 * y * y) + 2 * self.p2 * x * y
        return x * radial + tangential_x, y * radial + tangential_y


def undistort(picture: Tensor, k: np.ndarray, distortion: Distortion) -> Tensor:
    """The picture [C, H, W] that a pinhole camera with the same K [3, 3] would have taken, interpolated linearly;
    beyond the picture's edge its outermost pixels go on."""
    height, width = picture.shape[1:]
    fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - cx) / fx
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - cy) / fy
    bent_x, bent_y = distortion(*torch.meshgrid(x, y, indexing="xy"))
    # grid_sample without aligned corners counts from -1 to 1 between the outer edges of the picture.
    places = torch.stack([2 * (bent_x * fx + cx) / width - 1, 2 * (bent_y * fy + cy) / height - 1], dim=-1)
    sample = torch.nn.functional.grid_sample
    return sample(picture[None], places[None].to(picture), padding_mode="border", align_corners=False)[0]
