"""From the encoder's raw numbers to candidate cameras."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nerfdiff.cameras.poses import FREEDOMS, band_anchors, orbit_poses, rodrigues_poses
from factorkit.utils.errors import ConfigError


class Candidates(nn.Module):
    """N candidate cameras; ``width`` raw numbers each, which :meth:`forward` turns into poses."""

    count: int
    width: int

    def forward(self, raw: Tensor) -> Tensor:
        """Poses [B, N, 4, 4] of raw numbers [B, N, width]."""
        raise NotImplementedError


class LookAtCandidates(Candidates):
    """Cameras that look at the origin from unit(anchor + offset): cells that overlap, distinct from the first step on.

    Args:
        anchors: directions [N, 3].
        distance: of the cameras.
        freedom: departures that are predicted too, some of :data:`factorkit.nerfdiff.cameras.poses.FREEDOMS`.
    """

    def __init__(self, anchors: Tensor, distance: float, freedom: Sequence[str] = ()):
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.distance, self.freedom = distance, tuple(freedom)
        self.count, self.width = len(anchors), 3 + sum(FREEDOMS[name] for name in freedom)

    def forward(self, raw: Tensor) -> Tensor:
        direction = self.anchors + raw[..., :3]
        rest, freedom = raw[..., 3:], {}
        for name in self.freedom:
            numbers, rest = rest[..., : FREEDOMS[name]], rest[..., FREEDOMS[name] :]
            freedom[name] = numbers if FREEDOMS[name] > 1 else numbers[..., 0]
        return orbit_poses(direction, self.distance, freedom)

    def nearest(self, poses: Tensor) -> Tensor:
        """The candidate [B] whose anchor is nearest to where cameras [B, 4, 4] stand."""
        return (F.normalize(poses[:, :3, 3], dim=-1) @ self.anchors.T).argmax(1)


class OctantCandidates(LookAtCandidates):
    """The thesis' cells (code 3.3): unit(sigmoid(raw) * signs), each in an octant of its own; equal signs start equal.

    With upper_half the four octants above the horizon are dealt out in turn, else all eight.
    """

    def __init__(self, count: int, distance: float, upper_half: bool):
        octants = [(x, y, z) for z in ((1,) if upper_half else (1, -1)) for x in (1, -1) for y in (1, -1)]
        signs = torch.tensor([octants[i % len(octants)] for i in range(count)], dtype=torch.float32)
        super().__init__(F.normalize(signs, dim=-1), distance)
        self.register_buffer("signs", signs)

    def forward(self, raw: Tensor) -> Tensor:
        return orbit_poses(raw.sigmoid() * self.signs, self.distance)


class SingleCandidate(Candidates):
    """One camera by Rodrigues' formula (thesis, algorithm 3), at first near the origin and looking along -z."""

    count, width = 1, 6

    def forward(self, raw: Tensor) -> Tensor:
        return rodrigues_poses(raw)


def build_candidates(
    kind: str, count: int, distance: float, elevations: tuple[float, float], freedom: Sequence[str]
) -> Candidates:
    """Candidates of a kind. Raises ConfigError for one there is not, or a freedom it does not have."""
    if kind == "single":
        return SingleCandidate()
    if kind == "look_at":
        return LookAtCandidates(band_anchors(count, elevations), distance, freedom)
    if kind == "thesis":
        if freedom:
            raise ConfigError(
                f"optimize_camera={tuple(freedom)}: the thesis' candidates look at the origin; use look_at"
            )
        return OctantCandidates(count, distance, upper_half=elevations[0] >= 0)
    raise ConfigError(f"candidate_type={kind!r} is unknown; choose look_at, thesis or single")
