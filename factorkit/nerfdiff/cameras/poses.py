"""Where cameras can stand: directions, the poses they stand for, and a pose for each view as a parameter.

Object scenes lie in the box [-1, 1]^3 with z up, and cameras look at it from around; a camera's *direction* is the unit
vector from the origin to it. Forward-facing scenes are seen by cameras near the origin that look along -z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import roma
import torch
from torch import Tensor, nn

from factorkit.rendering import look_at

CONVERGENCE = 4.0  # how far away forward-facing cameras look at one point, in units of the nearest plane's distance

#: what a view's pose may have beyond its direction, and how many numbers each takes
FREEDOMS = {"roll": 1, "aim": 2, "distance": 1}


def directions(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit vectors [..., 3] of azimuths (about z, from x) and elevations (above the horizon) in degrees."""
    azimuth, elevation = azimuth.deg2rad(), elevation.deg2rad()
    flat = elevation.cos()
    return torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], dim=-1)


def azimuths(direction: Tensor) -> Tensor:
    """Degrees in [0, 360) of directions [..., 3]."""
    return torch.atan2(direction[..., 1], direction[..., 0]).rad2deg() % 360


def dictionary(count: int, elevations: Sequence[float]) -> Tensor:
    """``count`` azimuths on each circle of elevation: directions [count * len(elevations), 3]."""
    rings = torch.tensor(elevations, dtype=torch.float32).repeat_interleave(count)
    return directions((torch.arange(count) * (360 / count)).repeat(len(elevations)), rings)


def turned(direction: Tensor, degrees: Tensor | float) -> Tensor:
    """Directions [..., 3] turned about z."""
    turn = torch.as_tensor(degrees, dtype=direction.dtype, device=direction.device).deg2rad()
    x, y, z = direction.unbind(-1)
    return torch.stack([turn.cos() * x - turn.sin() * y, turn.sin() * x + turn.cos() * y, z.expand_as(x)], dim=-1)


def turned_poses(poses: Tensor, degrees: float) -> Tensor:
    """Camera-to-world poses [..., 4, 4] turned about the world's z axis."""
    rotation = torch.eye(4).to(poses)
    rotation[:3, :3] = turned(torch.eye(3).to(poses), degrees).T
    return rotation @ poses


def raised(direction: Tensor, angle: Tensor) -> Tensor:
    """Unit vectors [..., 3], none along z, moved up the circle through the zenith by ``angle`` [...] in radians."""
    x, y, z = direction.unbind(-1)
    flat = torch.hypot(x, y)
    tangent = torch.stack([-x / flat * z, -y / flat * z, flat], dim=-1)
    return angle.cos()[..., None] * direction + angle.sin()[..., None] * tangent


def orbit_poses(direction: Tensor, distance: Tensor | float, freedom: dict[str, Tensor] | None = None) -> Tensor:
    """Cameras that look at the origin from ``distance`` times ``direction`` [..., 3], z upwards: poses [..., 4, 4].

    Args:
        distance: of the origin, broadcasting against [...].
        freedom: departures by name: "roll" [...] in radians about the viewing axis, "aim" [..., 2], the camera's
            place along its own right and up in units of the distance, "distance" [...], a natural logarithm.

    Raises:
        ValueError: a direction along z, which leaves no sideways.
    """
    freedom = freedom or {}
    reach = torch.as_tensor(distance, dtype=direction.dtype, device=direction.device).expand(direction.shape[:-1])
    if "distance" in freedom:
        reach = reach * freedom["distance"].exp()
    eye = torch.nn.functional.normalize(direction, dim=-1) * reach[..., None]
    pose = look_at(eye, torch.zeros_like(eye), eye.new_tensor([0.0, 0.0, 1.0]))
    if "roll" in freedom:
        pose = pose @ _rigid(roma.rotvec_to_rotmat(_along(freedom["roll"], 2)), torch.zeros_like(eye))
    if "aim" in freedom:
        moved = torch.nn.functional.pad(freedom["aim"] * reach[..., None], (0, 1))
        pose = pose @ _rigid(torch.eye(3).to(moved).expand(*moved.shape, 3), moved)
    return pose


def forward_poses(place: Tensor) -> Tensor:
    """Cameras at ``place`` [..., 3], near the origin, that look at one point before them: poses [..., 4, 4]."""
    point = place.new_tensor([0.0, 0.0, -CONVERGENCE])
    return look_at(place, point, place.new_tensor([0.0, 1.0, 0.0]))


def plane_dictionary(columns: int, rows: int, reach: float = 0.3) -> Tensor:
    """Places [columns * rows, 3] of forward-facing cameras: a lattice from -reach to reach, right and up."""
    up, right = torch.meshgrid(*(torch.linspace(-reach, reach, n) for n in (rows, columns)), indexing="ij")
    return torch.stack([right, up, torch.zeros_like(up)], dim=-1).reshape(-1, 3)


def rodrigues_poses(numbers: Tensor) -> Tensor:
    """Poses [..., 4, 4] of an axis-angle vector and a place, [..., 6] (thesis, eq. 3.2)."""
    return _rigid(roma.rotvec_to_rotmat(numbers[..., :3]), numbers[..., 3:])


def _along(angle: Tensor, axis: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(axis), 3).to(angle) * angle[..., None]


def _rigid(rotation: Tensor, place: Tensor) -> Tensor:
    upper = torch.cat([rotation, place[..., None]], dim=-1)
    last = upper.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*upper.shape[:-2], 1, 4)
    return torch.cat([upper, last], dim=-2)


class OrbitPoses(nn.Module):
    """A pose for each of V views of an object, as parameters: its direction and what ``freedom`` names.

    A direction moves by two angles of its own, along its circle of elevation and up. As a vector in space it would
    hardly climb near the zenith, where going round turns the picture far more than going up moves it.

    Args:
        direction: where they start, unit vectors [V, 3].
        distance: of all cameras, which "distance" departs from.
        freedom: some of :data:`FREEDOMS`.
    """

    def __init__(self, direction: Tensor, distance: float, freedom: Sequence[str] = ()):
        super().__init__()
        self.distance = distance
        self.register_buffer("start", direction.clone())
        self.angles = nn.Parameter(torch.zeros(len(direction), 2).to(direction))  # azimuth, elevation; radians
        shapes = {name: (len(direction), 2) if name == "aim" else (len(direction),) for name in freedom}
        self.freedom = nn.ParameterDict({name: nn.Parameter(torch.zeros(s)) for name, s in shapes.items()})

    @property
    def direction(self) -> Tensor:
        """Where the views stand now, unit vectors [V, 3]."""
        azimuth, elevation = self.angles.unbind(-1)
        return turned(raised(self.start, elevation), azimuth.rad2deg())

    def at(self, direction: Tensor) -> OrbitPoses:
        """The same views with other directions [V, 3] and the same departures from them, fixed."""
        moved = OrbitPoses(direction, self.distance, tuple(self.freedom)).to(direction.device)
        for name, value in self.freedom.items():
            moved.freedom[name].data.copy_(value.detach())
        return moved.requires_grad_(False)

    def forward(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Poses [B, 4, 4] of these views."""
        found = {name: value[indices] for name, value in self.freedom.items()}
        return orbit_poses(self.direction[indices], self.distance, found)


class FreePoses(nn.Module):
    """A pose for each of V views, as an axis-angle vector and a shift from ``base`` [V, 4, 4] (Wang et al. 2021)."""

    def __init__(self, base: Tensor):
        super().__init__()
        self.register_buffer("base", base.clone())
        self.numbers = nn.Parameter(torch.zeros(len(base), 6))

    def forward(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Poses [B, 4, 4] of these views."""
        return self.base[indices] @ rodrigues_poses(self.numbers[indices])


def natural_distance(focal: float) -> float:
    """How far from the origin a camera sees a little more of the box [-1, 1]^3's middle than there is of it.

    Args:
        focal: the focal length in units of the image's side.
    """
    return 2 * focal / 0.9


def band_anchors(count: int, elevations: tuple[float, float]) -> Tensor:
    """``count`` directions spread evenly over the band of the sphere between two elevations (a Fibonacci lattice)."""
    low, high = (math.sin(math.radians(e)) for e in elevations)
    place = torch.arange(count) + 0.5
    height = low + (high - low) * place / count
    azimuth = place * (180 * (3 - math.sqrt(5)))
    return directions(azimuth, height.asin().rad2deg())
