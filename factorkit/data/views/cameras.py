"""Camera models: intrinsics, lens distortion, and what the poses of a set of cameras have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.views import SceneLayout
from factorkit.utils.errors import DataError

ASPECT_TOLERANCE = 0.01  # relative difference between the aspect ratios of an image and its camera
FORWARD_COSINE = math.cos(math.radians(45))  # "forward": all cameras look within this angle of their mean direction
PARALLEL_EIGENVALUE = 1e-6  # below this the optical axes count as parallel
ROLLED_UP_LENGTH = 0.05  # mean "up" shorter than this: the cameras are rolled in all directions

# Returns K [3, 3] for an image of a given height and width.
IntrinsicsFunction = Callable[[int, int], np.ndarray]


def make_intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """Return K [3, 3] without skew, in pixels."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def scale_intrinsics(k: np.ndarray, height: float, width: float, name: str) -> IntrinsicsFunction:
    """Scale K of an image of this size to other sizes of the same image.

    Raises:
        DataError: the size is not positive and finite, or, when called, the aspect ratio differs.
    """
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise DataError(f"{name}: the image size of its camera is {width:g} x {height:g} pixels")

    def intrinsics(actual_height: int, actual_width: int) -> np.ndarray:
        x, y = actual_width / width, actual_height / height
        if abs(x / y - 1) > ASPECT_TOLERANCE:
            raise DataError(
                f"{name}: {actual_width} x {actual_height} pixels, but its camera is for {width:g} x {height:g} "
                "pixels. Provide the original image, or a copy of it at another scale."
            )
        return k * np.array([x, y, 1.0])[:, None]

    return intrinsics


def fov_intrinsics(
    fov_x: float, fov_y: float | None = None, cx: float | None = None, cy: float | None = None
) -> Callable[[float, float], np.ndarray]:
    """Return K for a field of view in radians.

    The angles are defined as in nerfstudio and instant-ngp, 2 atan(side / 2f), wherever the optical axis is.

    Args:
        fov_x: horizontal field of view.
        fov_y: vertical field of view; None: square pixels.
        cx: principal point in pixels; None: the image centre.
        cy: the same, vertically.
    """

    def intrinsics(height: float, width: float) -> np.ndarray:
        fx = width / (2 * math.tan(fov_x / 2))
        fy = fx if fov_y is None else height / (2 * math.tan(fov_y / 2))
        return make_intrinsics(fx, fy, width / 2 if cx is None else cx, height / 2 if cy is None else cy)

    return intrinsics


@dataclass(frozen=True)
class Distortion:
    """Brown's lens distortion: radial k1, k2, k3 and tangential p1, p2 as in OpenCV, COLMAP and nerfstudio."""

    k1: float = 0.0
    k2: float = 0.0
    k3: float = 0.0
    p1: float = 0.0
    p2: float = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map undistorted to distorted image coordinates, in units of the focal length (x right, y down)."""
        r2 = x * x + y * y
        radial = 1 + r2 * (self.k1 + r2 * (self.k2 + r2 * self.k3))
        tangential_x = 2 * self.p1 * x * y + self.p2 * (r2 + 2 * x * x)
        tangential_y = self.p1 * (r2 + 2 * y * y) + 2 * self.p2 * x * y
        return x * radial + tangential_x, y * radial + tangential_y


def undistort(image: Tensor, k: np.ndarray, distortion: Distortion) -> Tensor:
    """Resample an image [C, H, W] as a pinhole camera with the same K [3, 3] sees it; edge pixels are repeated."""
    height, width = image.shape[1:]
    fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - cx) / fx
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - cy) / fy
    distorted_x, distorted_y = distortion(*torch.meshgrid(x, y, indexing="xy"))
    # grid_sample without aligned corners counts from -1 to 1 between the outer edges of the image.
    grid = torch.stack([2 * (distorted_x * fx + cx) / width - 1, 2 * (distorted_y * fy + cy) / height - 1], dim=-1)
    sample = torch.nn.functional.grid_sample
    return sample(image[None], grid[None].to(image), padding_mode="border", align_corners=False)[0]


def detect_layout(poses: np.ndarray) -> SceneLayout:
    """Return "forward" if all cameras [V, 4, 4] look in similar directions, else "object"; "object" for one camera."""
    back = poses[:, :3, 2]
    mean = back.mean(0)
    within = back @ mean >= FORWARD_COSINE * np.linalg.norm(mean)
    return "forward" if len(poses) > 1 and within.all() else "object"


def estimate_depth_range(poses: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Estimate near and far for cameras [V, 4, 4] around an object.

    Returns:
        0.5 and 1.5 times the median distance to the point closest to all optical axes; (None, None) if there is no such
        point in front of the cameras.
    """
    centre = closest_point_to_axes(poses)
    if centre is None:
        return None, None
    distances = np.einsum("vi,vi->v", poses[:, :3, 3] - centre, poses[:, :3, 2])
    distance = float(np.median(distances))
    return (0.5 * distance, 1.5 * distance) if distance > 0 else (None, None)


def closest_point_to_axes(poses: np.ndarray) -> np.ndarray | None:
    """Return the point [3] with the least mean squared distance to the optical axes; None if they are parallel."""
    axes, positions = poses[:, :3, 2], poses[:, :3, 3]
    projections = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    mean_projection = projections.mean(0)
    if np.linalg.eigvalsh(mean_projection)[0] < PARALLEL_EIGENVALUE:
        return None
    return np.linalg.solve(mean_projection, (projections @ positions[..., None]).mean(0)[:, 0])


def compute_mean_pose(poses: np.ndarray) -> np.ndarray:
    """Average poses [V, 4, 4] to one pose [4, 4].

    It has the mean position and viewing direction, and the mean up vector (the first camera's if the cameras are rolled
    in all directions).
    """
    back = _normalize(poses[:, :3, 2].sum(0))
    right = np.cross(poses[:, :3, 1].sum(0), back)
    if np.linalg.norm(right) < ROLLED_UP_LENGTH * len(poses):
        right = np.cross(poses[0, :3, 1], back)
    right = _normalize(right)
    mean = np.eye(4)
    mean[:3] = np.stack([right, np.cross(back, right), back, poses[:, :3, 3].mean(0)], axis=1)
    return mean


def _normalize(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
