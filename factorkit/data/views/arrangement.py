"""Decide from where the cameras are and look what kind of scene they show, and refuse other conventions by name."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np

from factorkit.data.views.views import SceneLayout
from factorkit.utils.errors import DataError

FORWARD_COSINE = math.cos(math.radians(45))  # "forward": all cameras look within this angle of their mean direction
PARALLEL_EIGENVALUE = 1e-6  # below this the optical axes count as parallel
ROLLED_UP_LENGTH = 0.05  # mean "up" shorter than this: the cameras are rolled in all directions
MIN_CHECKED_CAMERAS = 3  # fewer cameras say nothing about a convention
CONVERGED_MISS = 0.25  # of the distance, by which the axes of cameras around an object miss its centre at most
MUCH_BETTER = 4.0  # another convention is named if the axes then meet this many times better
SAME_PLACE = 1e-5  # spread of positions, relative to their distance from the origin, that counts as one place
ROUNDED_PLACE = 3e-7  # the same if the axes seem to meet: float32's rounding of world-to-camera matrices does so too
MAX_SAME_PLACE_DISTANCE = 100.0  # beyond it that spread is not larger: geographic coordinates have a distant origin
SAME_PLACE_EXACTLY = 1e-9  # the same for cameras that look in parallel directions
OUTWARD_DEGREES = 3.0  # spread of directions below which diverging axes say nothing about the convention
MAX_ADVANCE = 2.0  # spread of positions along the viewing direction over that across it, beyond which cameras walk
FAR_ORIGIN = 1000.0  # positions this many times further away than they spread are centred: float32 loses their digits
# The nearest point is scaled to a distance of 1 / NEAR_BOUND_FACTOR, a little beyond the near plane of NDC at 1.
NEAR_BOUND_FACTOR = 0.75
NEAR_MARGIN = 0.9  # `near` lies at this fraction of the nearest bound

OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenCV: x right, y down, looking along z
WAY_OUT = 'To read the poses as they are, give layout="object" or "forward" (--layout).'


@dataclass(frozen=True)
class Arrangement:
    """World coordinates and layout of a scene.

    Attributes:
        transform: [4, 4], a similarity that maps the positions of the files to those of `Views`.
        scale: its scale.
        layout: "object" or "forward".
        near, far: range of depths in the new coordinates, or None.
        origin: the position in the files that was moved to the origin because it was far away, or zeros.
    """

    transform: np.ndarray
    scale: float
    layout: SceneLayout
    near: float | None
    far: float | None
    origin: tuple[float, float, float]

    def apply(self, pose: np.ndarray) -> np.ndarray:
        """Map one pose [4, 4] of the files."""
        moved = self.transform @ pose
        moved[:3, 3] *= self.scale
        return moved

    def apply_to_points(self, points: np.ndarray) -> np.ndarray:
        """Map positions [P, 3] of the files."""
        return self.scale * (points @ self.transform[:3, :3].T + self.transform[:3, 3])


def arrange(
    poses: np.ndarray, bounds: tuple[float, float] | None, layout: SceneLayout | None, where: str
) -> Arrangement:
    """Choose world coordinates, layout and depth range for the cameras [F, 4, 4] of a whole scene.

    Forward-facing cameras with a known depth range are brought to their mean pose, scaled so that the nearest point has
    the distance 1 / 0.75, as needed for normalised device coordinates with their near plane at 1
    (:func:`factorkit.rendering.ndc_rays`).

    Args:
        poses: camera to world, OpenGL axes, float64.
        bounds: nearest and farthest depth of the scene if the files say so.
        layout: what the user says; None: by the cameras.
        where: file or folder for messages.

    Raises:
        DataError: without a given layout, cameras that look as if their matrices follow another convention, that are
            all in one place, or that do not look at one object.
    """
    transform, origin = np.eye(4), np.zeros(3)
    centre = poses[:, :3, 3].mean(0)
    spread = _spread(poses)
    if np.linalg.norm(centre) > FAR_ORIGIN * spread > 0:
        origin = centre
        transform[:3, 3] = -centre
        poses = transform @ poses
        warnings.warn(
            f"{where}: the cameras are {np.linalg.norm(centre):.4g} away from the origin of their coordinates, but "
            f"only {spread:.4g} apart: their positions are counted from {', '.join(f'{x:.8g}' for x in centre)}.",
            stacklevel=3,
        )
    if problem := find_convention_problem(poses, in_files=poses + _translation(origin)):
        if layout is None:
            raise DataError(f"{where}: {problem} {WAY_OUT}")
        warnings.warn(f"{where}: {problem}", stacklevel=3)
    layout = detect_layout(poses) if layout is None else layout
    if layout == "forward" and (lengths := _measure_advance(poses))[0] > MAX_ADVANCE * lengths[1]:
        warnings.warn(
            f"{where}: the cameras advance along their viewing direction, as on a walk. A forward-facing scene has all "
            "of its content in front of all cameras: what they pass is not modelled.",
            stacklevel=3,
        )
    place = (float(origin[0]), float(origin[1]), float(origin[2]))
    if layout == "object":
        near, far = bounds or estimate_depth_range(poses)
        return Arrangement(transform, 1.0, layout, near if bounds is None else NEAR_MARGIN * bounds[0], far, place)
    if bounds is None:
        return Arrangement(transform, 1.0, layout, None, None, place)
    scale = 1 / (NEAR_BOUND_FACTOR * bounds[0])
    transform = np.linalg.inv(compute_mean_pose(poses)) @ transform
    return Arrangement(
        transform, scale, layout, float(NEAR_MARGIN * bounds[0] * scale), float(bounds[1] * scale), place
    )


def find_convention_problem(poses: np.ndarray, in_files: np.ndarray | None = None) -> str | None:
    """Return a sentence if cameras [V, 4, 4] look at nothing in common, and would in another convention.

    Args:
        poses: camera to world, OpenGL axes, near the origin.
        in_files: the same in the coordinates of the files, which alone can be inverted.
    """
    count = len(poses)
    if count < MIN_CHECKED_CAMERAS:
        return None
    in_files = poses if in_files is None else in_files
    inverse = np.linalg.inv(in_files)
    miss, front = _measure_convergence(poses)
    one_place = _is_one_place(in_files)
    is_orbit = front > 0.5 and miss < CONVERGED_MISS
    likely = []
    for convention, matrices in (
        ("world-to-camera matrices: invert each of them", inverse),
        (
            "world-to-camera matrices with OpenCV axes (x right, y down, looking along z): invert each of them, and "
            "then negate its second and third column",
            inverse @ OPENCV_TO_OPENGL,
        ),
    ):
        other_miss, other_front = _measure_convergence(matrices)
        converges = other_front == 1 and other_miss < CONVERGED_MISS and MUCH_BETTER * other_miss < miss
        if converges and (one_place or detect_layout(matrices) == "object"):
            likely.append((other_miss, convention))
    if likely and (one_place or not is_orbit):
        at = "all in one place" if one_place else "not around what they look at"
        return f"these look like {min(likely)[1]}. As they are, the {count} cameras are {at}."
    if one_place:
        return (
            f"all {count} cameras are in one place: views without parallax show no depth. If these are world-to-camera "
            "matrices, invert each of them."
        )
    if front == 0 and miss < CONVERGED_MISS and _direction_spread_degrees(poses) > OUTWARD_DEGREES:
        return (
            f"these look like camera axes of OpenCV (x right, y down, looking along z) instead of OpenGL's: all "
            f"{count} cameras look away from the point between them. Negate the second and third column of each "
            "matrix. If the cameras do look outwards, as in a room, this program cannot model the scene."
        )
    if front < 0.5 and detect_layout(poses) == "object":
        return (
            f"only {round(front * count)} of {count} cameras look towards the point closest to all optical axes, "
            "so they are not around one object. Check that the matrices are camera to world with OpenGL axes (x right, "
            "y up, looking along -z)."
        )
    return None


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


def _measure_advance(poses: np.ndarray) -> tuple[float, float]:
    """Return the spread of the positions along the mean viewing direction, and across it."""
    offsets = poses[:, :3, 3] - poses[:, :3, 3].mean(0)
    along = offsets @ _normalize(poses[:, :3, 2].sum(0))
    total = float((offsets**2).sum(1).mean())
    return float(np.sqrt((along**2).mean())), float(np.sqrt(max(0.0, total - (along**2).mean())))


def _normalize(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _translation(origin: np.ndarray) -> np.ndarray:
    """Return what is added to poses [V, 4, 4] to move them by `origin`."""
    offset = np.zeros((4, 4))
    offset[:3, 3] = origin
    return offset


def _spread(poses: np.ndarray) -> float:
    """Return the root mean square distance of the positions from their centre."""
    offsets = poses[:, :3, 3] - poses[:, :3, 3].mean(0)
    return float(np.sqrt((offsets**2).sum(1).mean()))


def _measure_convergence(poses: np.ndarray) -> tuple[float, float]:
    """Measure how well the optical axes meet.

    Returns:
        The root mean square distance of the axes from the point closest to all of them, relative to the median distance
        of the cameras from it; and the fraction of cameras that have it in front of them. For parallel axes infinity
        and 1: nothing speaks against them.
    """
    poses = poses @ np.eye(4)
    poses[:, :3, 3] -= poses[:, :3, 3].mean(0)
    centre = closest_point_to_axes(poses)
    if centre is None:
        return math.inf, 1.0
    offsets = centre - poses[:, :3, 3]
    depth = -np.einsum("vi,vi->v", offsets, poses[:, :3, 2])
    missed = offsets + depth[:, None] * poses[:, :3, 2]
    distance = float(np.median(np.linalg.norm(offsets, axis=1)))
    miss = float(np.sqrt((missed**2).sum(1).mean())) / distance if distance > 0 else math.inf
    return miss, float((depth > 0).mean())


def _is_one_place(poses: np.ndarray) -> bool:
    """Return whether positions differ by less than rounding explains, while the axes do not meet at another point."""
    size, spread = float(np.linalg.norm(poses[:, :3, 3].mean(0))), _spread(poses)
    if spread <= SAME_PLACE_EXACTLY * max(1.0, size):
        return True
    miss, front = _measure_convergence(poses)
    meets_elsewhere = math.isinf(miss) or (miss < CONVERGED_MISS and front in (0.0, 1.0))
    tolerance = ROUNDED_PLACE if meets_elsewhere else SAME_PLACE
    return spread <= tolerance * min(size, MAX_SAME_PLACE_DISTANCE)


def _direction_spread_degrees(poses: np.ndarray) -> float:
    """Return the root mean square angle between viewing directions and their mean."""
    back = poses[:, :3, 2]
    mean = back.mean(0)
    angles = np.arccos(np.clip(back @ mean / max(float(np.linalg.norm(mean)), 1e-9), -1, 1))
    return float(np.degrees(np.sqrt((angles**2).mean())))
