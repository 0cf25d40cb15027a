"""Accuracy of estimated camera poses: rotation in degrees, translation in shares of the scene's size.

Poses are camera-to-world [V, 4, 4]. Images alone fix a scene up to a similarity (rotation, translation and scale), so
estimated poses are first aligned to the true ones by one similarity for all views.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from factorkit.utils.errors import DataError

MAX_REWEIGHTINGS = 50  # it converges within ten, except for ties
MIN_RESIDUAL = 1e-6  # of the weights 1 / residual: radians and shares of the spread
ACCURATE_DEGREES = 10.0


class Similarity(NamedTuple):
    """The map x -> scale * rotation @ x + translation."""

    rotation: Tensor  #: float64 [3, 3]
    translation: Tensor  #: float64 [3]
    scale: Tensor  #: float64 scalar, above 0

    def apply(self, poses: Tensor) -> Tensor:
        """Transform poses [..., 4, 4]; their axes stay orthonormal."""
        moved = poses.double().clone()
        moved[..., :3, :3] = self.rotation.to(moved) @ moved[..., :3, :3]
        moved[..., :3, 3] = self.apply_points(moved[..., :3, 3])
        return moved.to(poses.dtype)

    def apply_points(self, points: Tensor) -> Tensor:
        """Transform points [..., 3]."""
        rotation, translation, scale = (x.to(points.device) for x in self)
        return (scale * points.double() @ rotation.T + translation).to(points.dtype)

    def inverse(self) -> Similarity:
        """Return the inverse similarity."""
        rotation = self.rotation.T
        return Similarity(rotation, -rotation @ self.translation / self.scale, 1 / self.scale)


class PoseErrors(NamedTuple):
    """Differences between estimated and true poses after alignment."""

    rotation_degrees: Tensor  #: float64 [V], 0 to 180
    translation: Tensor  #: float64 [V], distance of the centres in units of the scene's size
    alignment: Similarity  #: from the estimated poses' space to the true ones'

    @property
    def rotation_median_deg(self) -> float:
        """The median rotation error in degrees."""
        return float(self.rotation_degrees.median())

    @property
    def translation_median(self) -> float:
        """The median translation error in units of the scene's size."""
        return float(self.translation.median())

    @property
    def under_10_deg(self) -> float:
        """The share of views whose rotation error is below 10 degrees."""
        return share_under_10_degrees(self.rotation_degrees)


def pose_errors(
    poses: Tensor,
    true_poses: Tensor,
    motion: Literal["similarity", "rotation"] = "similarity",
    size: float | None = None,
) -> PoseErrors:
    """Align estimated poses to the true ones and measure the remaining errors.

    Args:
        poses: estimated camera-to-world matrices [V, 4, 4].
        true_poses: the true ones [V, 4, 4], in the same order.
        motion: see :func:`align_poses`.
        size: of the scene, in the unit of the true poses; None: :func:`scene_size`.

    Raises:
        DataError: as :func:`align_poses` does.
    """
    alignment = align_poses(poses, true_poses, motion)
    aligned, true_poses = alignment.apply(poses.double()).cpu(), true_poses.double().cpu()
    distance = (aligned[:, :3, 3] - true_poses[:, :3, 3]).norm(dim=1)
    angles = rotation_errors_degrees(aligned, true_poses)
    return PoseErrors(angles, distance / (size or scene_size(true_poses)), alignment)


def align_poses(
    poses: Tensor, true_poses: Tensor, motion: Literal["similarity", "rotation"] = "similarity"
) -> Similarity:
    """Return the similarity from estimated to true poses with the least SUM of residuals.

    A sum, not a sum of squares, makes it robust: grossly wrong views (part of a scene reconstructed in reverse) do not
    pull it. A view's residual is sqrt(a^2 + d^2), with the angle a in radians between the orientations and the distance
    d of the centres in units of the true centres' spread. Reweighted least squares over :func:`roma.special_procrustes`
    start from the best of the V rotations that make one view's orientation exact. Because orientations count, one
    camera, collinear cameras and coincident cameras have a solution too; a scale that nothing determines is 1.

    Args:
        poses: estimated camera-to-world matrices [V, 4, 4], V at least 1.
        true_poses: the true ones [V, 4, 4], in the same order.
        motion: "similarity", or "rotation" about the origin alone, for cameras that look at the origin from a known
            distance.

    Raises:
        DataError: no views, other shapes, or values that are not finite.
    """
    if poses.shape != true_poses.shape or poses.shape[1:] != (4, 4) or not len(poses):
        shapes = f"{tuple(poses.shape)} and {tuple(true_poses.shape)}"
        raise DataError(f"poses {shapes}: give two tensors [V, 4, 4] of the same views")
    if not (poses.isfinite().all() and true_poses.isfinite().all()):
        raise DataError("poses to align contain values that are not finite")
    problem = _Alignment(poses.detach().double().cpu(), true_poses.detach().double().cpu(), motion == "rotation")
    starts = [problem.from_rotation(rotation) for rotation in problem.relative]
    best = min(starts, key=lambda start: float(problem.residuals(start).sum()))
    for _ in range(MAX_REWEIGHTINGS):
        better = problem.solve(1 / problem.residuals(best).clamp_min(MIN_RESIDUAL))
        if problem.residuals(better).sum() >= problem.residuals(best).sum() - 1e-12:
            break
        best = better
    return best


def rotation_errors_degrees(poses: Tensor, true_poses: Tensor) -> Tensor:
    """Return the angles [V] in float64, 0 to 180, between the orientations of two sets of poses, without alignment.

    Poses are [V, 4, 4], or rotations [V, 3, 3].
    """
    import roma  # compiles functions, which takes a second

    rotations = (x[..., :3, :3].double() for x in (poses, true_poses))
    return torch.rad2deg(roma.rotmat_geodesic_distance(*rotations))


def share_under_10_degrees(degrees: Tensor) -> float:
    """Return the share of angles below 10 degrees, 0 to 1."""
    return float((degrees < ACCURATE_DEGREES).double().mean())


def is_mirrored(poses: Tensor, true_poses: Tensor) -> bool:
    """Return whether estimated poses [V, 4, 4] are the depth-reversed mirror image of the true ones.

    Images from far away cannot distinguish a scene from its mirror image along the line of sight (Necker's ambiguity).
    A depth-reversed scene looks the same to a camera turned by 180 degrees about its axis. Poses count as mirrored if
    this turn brings them within 10 degrees of the true ones, and to less than half the error without it (medians).

    Raises:
        DataError: as :func:`align_poses` does.
    """
    reversed_depth = poses * poses.new_tensor([-1.0, -1.0, 1.0, 1.0])
    error, reversed_error = (pose_errors(x, true_poses).rotation_median_deg for x in (poses, reversed_depth))
    return reversed_error < ACCURATE_DEGREES and reversed_error < error / 2


def scene_size(poses: Tensor) -> float:
    """Return the unit of translation errors: the largest distance between two camera centres of poses [V, 4, 4].

    If all centres coincide: their distance from the origin, or 1 if they are at the origin.
    """
    centres = poses[:, :3, 3].double()
    for size in (float(torch.cdist(centres, centres).max()), float(centres.norm(dim=1).max())):
        if size > 1e-9:
            return size
    return 1.0


class _Alignment:
    """Two sets of poses and the quantities that each iteration needs; float64 on the CPU."""

    def __init__(self, poses: Tensor, true_poses: Tensor, about_origin: bool) -> None:
        self.rotation, self.true_rotation = poses[:, :3, :3], true_poses[:, :3, :3]
        self.centre, self.true_centre = poses[:, :3, 3], true_poses[:, :3, 3]
        self.about_origin = about_origin
        self.relative = self.true_rotation @ self.rotation.mT  #: [V, 3, 3], each makes its view's orientation exact
        self.unit = self._spread(self.true_centre, torch.ones(len(poses), dtype=torch.float64)) or 1.0

    def from_rotation(self, rotation: Tensor) -> Similarity:
        """Complete a rotation; scale and translation are medians, which outliers do not affect."""
        if self.about_origin:
            return _similarity(rotation, torch.zeros(3), 1.0)
        rotated = self.centre @ rotation.T
        middle, true_middle = rotated.median(0).values, self.true_centre.median(0).values
        spread, true_spread = (
            (x - m).norm(dim=1).median() for x, m in ((rotated, middle), (self.true_centre, true_middle))
        )
        scale = true_spread / spread if spread > 0 and true_spread > 0 else 1.0
        return _similarity(rotation, true_middle - scale * middle, scale)

    def solve(self, weights: Tensor) -> Similarity:
        """Solve the weighted least squares problem over orientations and centres."""
        import roma

        weights = weights / weights.sum()
        middle, true_middle = (
            torch.zeros(3, dtype=torch.float64) if self.about_origin else weights @ x
            for x in (self.centre, self.true_centre)
        )
        centre, true_centre = self.centre - middle, self.true_centre - true_middle
        spread, true_spread = (self._spread(x, weights) for x in (self.centre, self.true_centre))
        moments = torch.einsum("v,vij->ij", weights, self.relative)
        if spread and true_spread:
            moments = moments + torch.einsum("v,vi,vj->ij", weights, true_centre, centre) / (spread * true_spread)
        rotation = roma.special_procrustes(moments)
        if self.about_origin:
            return _similarity(rotation, torch.zeros(3), 1.0)
        scale = 1.0
        if spread and true_spread:
            scale = float(torch.einsum("v,vi,vi->", weights, true_centre, centre @ rotation.T)) / spread**2
            scale = scale if scale > 0 else true_spread / spread
        return _similarity(rotation, true_middle - scale * (rotation @ middle), scale)

    def residuals(self, similarity: Similarity) -> Tensor:
        """Return the residual [V] of each view."""
        import roma

        angle = roma.rotmat_geodesic_distance(similarity.rotation @ self.rotation, self.true_rotation)
        distance = (similarity.apply_points(self.centre) - self.true_centre).norm(dim=1) / self.unit
        return torch.hypot(angle, distance)

    def _spread(self, centres: Tensor, weights: Tensor) -> float:
        """Return the RMS distance from the centroid or the origin; 0 where it is rounding error."""
        weights = weights / weights.sum()
        middle = torch.zeros(3, dtype=torch.float64) if self.about_origin else weights @ centres
        spread = float((weights @ (centres - middle).square().sum(1)).sqrt())
        return spread if spread > 1e-9 * float(centres.abs().max()) else 0.0


def _similarity(rotation: Tensor, translation: Tensor, scale: Tensor | float) -> Similarity:
    return Similarity(rotation, translation.double(), torch.as_tensor(scale, dtype=torch.float64))
