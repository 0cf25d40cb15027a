"""Camera models: intrinsics and lens distortion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from factorkit.utils.errors import DataError

MIN_FISHEYE_RADIUS = 1e-9  # in focal lengths; closer to the axis the scale is 1
MAX_OFF_CENTRE = 0.2  # of the image's side, of a camera whose image size is not known
ASPECT_TOLERANCE = 0.01  # relative difference between the aspect ratios of an image and its camera

# Returns K [3, 3] for an image of a given height and width.
IntrinsicsFunction = Callable[[int, int], np.ndarray]


def make_intrinsics(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """Return K [3, 3] without skew, in pixels."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def fixed_intrinsics(k: np.ndarray, name: str) -> IntrinsicsFunction:
    """Return K of files that do not say for which size of image it is: that of the image.

    Raises:
        DataError: when called, the centre of K is far from the image's, so K is for another size.
    """

    def intrinsics(height: int, width: int) -> np.ndarray:
        share = k[0, 2] / width, k[1, 2] / height
        if not all(abs(x - 0.5) <= MAX_OFF_CENTRE for x in share):
            raise DataError(
                f"{name}: {width} x {height} pixels, but the centre of its camera is at {k[0, 2]:.4g}, {k[1, 2]:.4g}: "
                f"its intrinsics seem to be for images of {2 * k[0, 2]:.0f} x {2 * k[1, 2]:.0f} pixels. Give images of "
                "that size, or intrinsics of this one."
            )
        return k

    return intrinsics


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
    """Brown's lens distortion as in OpenCV, COLMAP and nerfstudio.

    Attributes:
        k1, k2, k3, k4: radial terms of r^2, r^4, r^6 and r^8 (nerfstudio's k4, not OpenCV's).
        p1, p2: tangential terms.
        denominator: OpenCV's k4, k5, k6 (the terms of the divisor in COLMAP's FULL_OPENCV).
    """

    k1: float = 0.0
    k2: float = 0.0
    k3: float = 0.0
    p1: float = 0.0
    p2: float = 0.0
    k4: float = 0.0
    denominator: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map undistorted to distorted image coordinates, in units of the focal length (x right, y down)."""
        r2 = x * x + y * y
        a, b, c = self.denominator
        radial = 1 + r2 * (self.k1 + r2 * (self.k2 + r2 * (self.k3 + r2 * self.k4)))
        radial = radial / (1 + r2 * (a + r2 * (b + r2 * c)))
        tangential_x = 2 * self.p1 * x * y + self.p2 * (r2 + 2 * x * x)
        tangential_y = self.p1 * (r2 + 2 * y * y) + 2 * self.p2 * x * y
        return x * radial + tangential_x, y * radial + tangential_y


@dataclass(frozen=True)
class FisheyeDistortion:
    """Equidistant fisheye lens as in OpenCV's fisheye module, COLMAP's OPENCV_FISHEYE and instant-ngp's is_fisheye."""

    k1: float = 0.0
    k2: float = 0.0
    k3: float = 0.0
    k4: float = 0.0

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Map undistorted to distorted image coordinates, in units of the focal length (x right, y down)."""
        radius = torch.hypot(x, y)
        angle = torch.atan(radius)
        a2 = angle * angle
        distorted = angle * (1 + a2 * (self.k1 + a2 * (self.k2 + a2 * (self.k3 + a2 * self.k4))))
        scale = torch.where(radius > MIN_FISHEYE_RADIUS, distorted / radius.clamp_min(MIN_FISHEYE_RADIUS), 1.0)
        return x * scale, y * scale


Lens = Distortion | FisheyeDistortion


def refine_lens(lens: Lens | None, term: float, focal: float) -> Lens | None:
    """Return a lens behind a residual radial term, for another focal length.

    Args:
        lens: of the image; if ``term`` is not 0, none or one with k1 alone.
        term: x (1 + term r^2) is where the image without ``lens`` shows x, in units of the first focal length.
        focal: new focal length over the first one, whose units the result has.
    """
    if isinstance(lens, FisheyeDistortion) or (lens is None and not term):
        return lens
    lens = lens or Distortion()
    if term:  # the term of r^8, term^3 k1, is left out: COLMAP has none
        lens = Distortion(term + lens.k1, 3 * term * lens.k1, 3 * term**2 * lens.k1)
    square, (a, b, c) = focal**2, lens.denominator
    return Distortion(
        lens.k1 * square,
        lens.k2 * square**2,
        lens.k3 * square**3,
        lens.p1 * focal,
        lens.p2 * focal,
        lens.k4 * square**4,
        (a * square, b * square**2, c * square**3),
    )


def undistort(image: Tensor, k: np.ndarray, distortion: Lens) -> tuple[Tensor, Tensor]:
    """Resample an image [C, H, W] as a pinhole camera with the same K [3, 3] sees it.

    Returns:
        The image, in which edge pixels are repeated, and bool [H, W]: False where the lens did not see.
    """
    height, width = image.shape[1:]
    fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - cx) / fx
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - cy) / fy
    distorted_x, distorted_y = distortion(*torch.meshgrid(x, y, indexing="xy"))
    # grid_sample without aligned corners counts from -1 to 1 between the outer edges of the image.
    grid = torch.stack([2 * (distorted_x * fx + cx) / width - 1, 2 * (distorted_y * fy + cy) / height - 1], dim=-1)
    sample = torch.nn.functional.grid_sample
    visible = (grid.abs() <= 1).all(-1)
    return sample(image[None], grid[None].to(image), padding_mode="border", align_corners=False)[0], visible
