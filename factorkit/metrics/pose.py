"""How well camera poses were found: up to what no picture can tell, in degrees and in shares of the scene's size.

Poses are camera-to-world [V, 4, 4]. Pictures alone fix a scene up to a similarity (a rotation, a translation and a
scale), so found poses are first brought over the true ones by one similarity for all views.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import roma
import torch
from torch import Tensor

from factorkit.utils.errors import DataError

ROUNDS = 50  # of reweighting; it settles within ten, but for ties
SMALLEST_RESIDUAL = 1e-6  # of the weights 1 / residual: radians and shares of the spread
NEAR_DEGREES = 10.0


class Similarity(NamedTuple):
    """x -> scale * rotation @ x + translation."""

    rotation: Tensor  #: float64 [3, 3]
    translation: Tensor  #: float64 [3]
    scale: Tensor  #: float64 scalar, above 0

    def apply(self, poses: Tensor) -> Tensor:
        """The poses [..., 4, 4] in the space that the similarity leads to; their axes stay orthonormal."""
        moved = poses.double().clone()
        moved[..., :3, :3] = self.rotation.to(moved) @ moved[..., :3, :3]
        moved[..., :3, 3] = self.apply_points(moved[..., :3, 3])
        return moved.to(poses.dtype)

    def apply_points(self, points: Tensor) -> Tensor:
        """The points [..., 3] where the similarity brings them."""
        rotation, translation, scale = (x.to(points.device) for x in self)
        return (scale * points.double() @ rotation.T + translation).to(points.dtype)

    def inverse(self) -> Similarity:
        """The similarity that leads back."""
        turned = self.rotation.T
        return Similarity(turned, -turned @ self.translation / self.scale, 1 / self.scale)


class PoseErrors(NamedTuple):
    """What is left between found and true poses after the alignment."""

    rotation_degrees: Tensor  #: float64 [V], the angle of the rotation that leads from one to the other, 0 to 180
    translation: Tensor  #: float64 [V], distance of the centres in units of the scene's size
    alignment: Similarity  #: from the found poses' space to the true ones'

    @property
    def rotation_median_deg(self) -> float:
        return float(self.rotation_degrees.median())

    @property
    def translation_median(self) -> float:
        return float(self.translation.median())

    @property
    def under_10_deg(self) -> float:
        """The share of views whose rotation is within 10 degrees."""
        return under_10_share(self.rotation_degrees)


def pose_errors(
    found: Tensor, true: Tensor, motion: Literal["similarity", "rotation"] = "similarity", size: float | None = None
) -> PoseErrors:
    """Align found poses to true ones, both [V, 4, 4], and measure what is left.

    Args:
        found, true: camera-to-world matrices of the same views in the same order.
        motion: see :func:`align`.
        size: of the scene, in the true poses' unit; None: :func:`scene_size`.

    Raises:
        DataError: as :func:`align` does.
    """
    alignment = align(found, true, motion)
    moved, true = alignment.apply(found.double()).cpu(), true.double().cpu()
    apart = (moved[:, :3, 3] - true[:, :3, 3]).norm(dim=1)
    return PoseErrors(rotation_errors_degrees(moved, true), apart / (size or scene_size(true)), alignment)


def align(found: Tensor, true: Tensor, motion: Literal["similarity", "rotation"] = "similarity") -> Similarity:
    """The similarity that brings found poses over true ones, both [V, 4, 4], with the least SUM of residuals, not of
    their squares: views that went wrong altogether (a part of the scene found the other way round) do not pull it.

    A view's residual is sqrt(a^2 + d^2) with the angle a in radians between the orientations and the distance d between
    the centres in units of the true centres' spread. Reweighted least squares over :func:`roma.special_procrustes`
    start from the best of the V rotations that make one view's orientation exact. Because orientations count, one
    camera, cameras on a line and cameras in one place have an answer too; a scale that nothing tells is 1.

    Args:
        found, true: camera-to-world matrices of the same views in the same order, V at least 1.
        motion: "similarity", or "rotation" about the origin alone, for cameras that look at the origin from a known
            distance.

    Raises:
        DataError: no views, other shapes, or values that are not finite.
    """
    if found.shape != true.shape or found.shape[1:] != (4, 4) or not len(found):
        raise DataError(
            f"poses {tuple(found.shape)} and {tuple(true.shape)}: give two tensors [V, 4, 4] of the same views"
        )
    if not (found.isfinite().all() and true.isfinite().all()):
        raise DataError("poses to align hold values that are not finite")
    problem = _Alignment(found.detach().double().cpu(), true.detach().double().cpu(), motion == "rotation")
    guesses = [problem.given_rotation(rotation) for rotation in problem.relative]
    best = min(guesses, key=lambda guess: float(problem.residuals(guess).sum()))
    for _ in range(ROUNDS):
        better = problem.solve(1 / problem.residuals(best).clamp_min(SMALLEST_RESIDUAL))
        if problem.residuals(better).sum() >= problem.residuals(best).sum() - 1e-12:
            break
        best = better
    return best


def rotation_errors_degrees(found: Tensor, true: Tensor) -> Tensor:
    """The angle [V], 0 to 180, between the orientations of poses [V, 4, 4] (or rotations [V, 3, 3]), without any
    alignment; float64."""
    turns = (x[..., :3, :3].double() for x in (found, true))
    return torch.rad2deg(roma.rotmat_geodesic_distance(*turns))


def under_10_share(degrees: Tensor) -> float:
    """The share of angles below 10 degrees, 0 to 1."""
    return float((degrees < NEAR_DEGREES).double().mean())


def mirrored(found: Tensor, true: Tensor) -> bool:
    """Whether found poses [V, 4, 4] are the true ones' mirror image: the scene turned inside out along the line of
    sight, which pictures from afar cannot tell from the scene itself (Necker's ambiguity).

    Turned inside out through its middle, a scene looks as before to a camera that is turned half about its axis: so the
    poses are mirrored if they come within 10 degrees of the true ones after that turn, and at most half as far as
    without it, both in the median.

    Raises:
        DataError: as :func:`align` does.
    """
    reversed_depth = found * found.new_tensor([-1.0, -1.0, 1.0, 1.0])
    straight, turned = (pose_errors(x, true).rotation_median_deg for x in (found, reversed_depth))
    return turned < NEAR_DEGREES and turned < straight / 2


def scene_size(true: Tensor) -> float:
    """What translations are compared with: the largest distance between two of the centres of poses [V, 4, 4]; with all
    in one place, their distance from the origin, or 1 if they are there."""
    centres = true[:, :3, 3].double()
    for size in (float(torch.cdist(centres, centres).max()), float(centres.norm(dim=1).max())):
        if size > 1e-9:
            return size
    return 1.0


class _Alignment:
    """Two sets of poses with what is needed of them again and again; float64 on the CPU."""

    def __init__(self, found: Tensor, true: Tensor, about_origin: bool) -> None:
        self.turn, self.true_turn = found[:, :3, :3], true[:, :3, :3]
        self.centre, self.true_centre = found[:, :3, 3], true[:, :3, 3]
        self.about_origin = about_origin
        self.relative = self.true_turn @ self.turn.mT  #: [V, 3, 3], each makes its own view's orientation exact
        self.unit = self._spread(self.true_centre, torch.ones(len(true), dtype=torch.float64)) or 1.0

    def given_rotation(self, rotation: Tensor) -> Similarity:
        """With the medians for scale and translation, where outliers have no say."""
        if self.about_origin:
            return self._moved(rotation, torch.zeros(3), 1.0)
        turned = self.centre @ rotation.T
        middle, true_middle = turned.median(0).values, self.true_centre.median(0).values
        near, far = ((x - m).norm(dim=1).median() for x, m in ((turned, middle), (self.true_centre, true_middle)))
        scale = far / near if near > 0 and far > 0 else 1.0
        return self._moved(rotation, true_middle - scale * middle, scale)

    def solve(self, weights: Tensor) -> Similarity:
        """Weighted least squares over orientations and centres."""
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
            return self._moved(rotation, torch.zeros(3), 1.0)
        scale = 1.0
        if spread and true_spread:
            scale = float(torch.einsum("v,vi,vi->", weights, true_centre, centre @ rotation.T)) / spread**2
            scale = scale if scale > 0 else true_spread / spread
        return self._moved(rotation, true_middle - scale * (rotation @ middle), scale)

    def residuals(self, moved: Similarity) -> Tensor:
        """[V]"""
        angle = roma.rotmat_geodesic_distance(moved.rotation @ self.turn, self.true_turn)
        apart = (moved.apply_points(self.centre) - self.true_centre).norm(dim=1) / self.unit
        return torch.hypot(angle, apart)

    def _spread(self, centres: Tensor, weights: Tensor) -> float:
        """Root mean square distance from the centroid, or from the origin; 0 where that is rounding alone."""
        weights = weights / weights.sum()
        middle = torch.zeros(3, dtype=torch.float64) if self.about_origin else weights @ centres
        spread = float((weights @ (centres - middle).square().sum(1)).sqrt())
        return spread if spread > 1e-9 * float(centres.abs().max()) else 0.0

    @staticmethod
    def _moved(rotation: Tensor, translation: Tensor, scale: Tensor | float) -> Similarity:
        return Similarity(rotation, translation.double(), torch.as_tensor(scale, dtype=torch.float64))
