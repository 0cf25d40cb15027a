"""Candidate cameras: from the encoder's raw outputs to poses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nerfdiff.cameras.poses import POSE_PARAMETERS, fibonacci_band, orbit_poses, rodrigues_poses
from factorkit.utils.errors import ConfigError


class Candidates(nn.Module):
    """``count`` candidate cameras, each from ``raw_size`` raw outputs of the encoder."""

    count: int
    raw_size: int

    def forward(self, raw: Tensor) -> Tensor:
        """Return poses [B, N, 4, 4] of raw outputs [B, N, raw_size]."""
        raise NotImplementedError


class LookAtCandidates(Candidates):
    """Cameras at unit(anchor + offset) that look at the origin: distinct from the start, with overlapping cells.

    Args:
        anchors: directions [N, 3].
        distance: of the cameras from the origin.
        parameters: further predicted parameters, names of :data:`factorkit.nerfdiff.cameras.poses.POSE_PARAMETERS`.
    """

    anchors: Tensor

    def __init__(self, anchors: Tensor, distance: float, parameters: Sequence[str] = ()):
        super().__init__()
        self.register_buffer("anchors", anchors)
        self.distance, self.parameter_names = distance, tuple(parameters)
        self.count, self.raw_size = len(anchors), 3 + sum(POSE_PARAMETERS[name] for name in parameters)

    def forward(self, raw: Tensor) -> Tensor:
        """Return poses [B, N, 4, 4] of raw outputs [B, N, raw_size]."""
        direction, rest, offsets = self.anchors + raw[..., :3], raw[..., 3:], {}
        for name in self.parameter_names:
            size = POSE_PARAMETERS[name]
            values, rest = rest[..., :size], rest[..., size:]
            offsets[name] = values if size > 1 else values[..., 0]
        return orbit_poses(direction, self.distance, offsets)


class OctantCandidates(LookAtCandidates):
    """The thesis' cells (code 3.3): unit(sigmoid(raw) * signs), one octant each.

    Args:
        count: number of candidates; beyond the number of octants, several candidates share one and start equal.
        distance: of the cameras from the origin.
        upper_half: use only the four octants above the horizon.
    """

    signs: Tensor

    def __init__(self, count: int, distance: float, upper_half: bool):
        octants = [(x, y, z) for z in ((1,) if upper_half else (1, -1)) for x in (1, -1) for y in (1, -1)]
        signs = torch.tensor([octants[i % len(octants)] for i in range(count)], dtype=torch.float32)
        super().__init__(F.normalize(signs, dim=-1), distance)
        self.register_buffer("signs", signs)

    def forward(self, raw: Tensor) -> Tensor:
        """Return poses [B, N, 4, 4] of raw outputs [B, N, raw_size]."""
        return orbit_poses(raw.sigmoid() * self.signs, self.distance)


class SingleCandidate(Candidates):
    """One camera by Rodrigues' formula (thesis, algorithm 3), initially near the origin and looking along -z."""

    count, raw_size = 1, 6

    def forward(self, raw: Tensor) -> Tensor:
        """Return poses [B, N, 4, 4] of raw outputs [B, N, raw_size]."""
        return rodrigues_poses(raw)


def build_candidates(
    kind: str, count: int, distance: float, elevations: tuple[float, float], parameters: Sequence[str]
) -> Candidates:
    """Build candidates of a kind: "look_at", "thesis" or "single".

    Raises:
        ConfigError: unknown kind, or parameters that the kind does not predict.
    """
    if kind == "single":
        return SingleCandidate()
    if kind == "look_at":
        return LookAtCandidates(fibonacci_band(count, elevations), distance, parameters)
    if kind == "thesis":
        if parameters:
            raise ConfigError(
                f'optimize_camera={tuple(parameters)} is not supported by candidate_type="thesis"; use "look_at"'
            )
        return OctantCandidates(count, distance, upper_half=elevations[0] >= 0)
    raise ConfigError(f"candidate_type={kind!r} is unknown; choose look_at, thesis or single")
