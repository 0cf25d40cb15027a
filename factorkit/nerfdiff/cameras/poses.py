"""Camera poses: directions around an object, positions of forward-facing cameras, poses as parameters, and paths.

Object scenes fill the box [-1, 1]^3 with z up. A camera's *direction* is the unit vector from the origin to it.
Forward-facing cameras are near the origin and look along -z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.rendering import look_at
from factorkit.utils.errors import ConfigError

CONVERGENCE_DEPTH = 4.0  # where forward-facing cameras look at one point, in near-plane depths
FRAMING = 0.9  # share of the image's side that the middle of the box fills

#: parameters of a view's camera beyond its direction -> how many numbers each has
POSE_PARAMETERS = {"roll": 1, "aim": 2, "distance": 1}
SPIRAL_DEGREES = 15.0  # by which the elevation of a spiral around an object varies
FORWARD_RADIUS = 0.6  # radius of a path in a forward-facing scene, in units of the cameras' standard deviation


def direction_vectors(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Return unit vectors [..., 3] of azimuths (about z, from x) and elevations (above the horizon) in degrees."""
    azimuth, elevation = azimuth.deg2rad(), elevation.deg2rad()
    flat = elevation.cos()
    return torch.stack([flat * azimuth.cos(), flat * azimuth.sin(), elevation.sin()], dim=-1)


def azimuth_degrees(direction: Tensor) -> Tensor:
    """Return azimuths in [0, 360) of directions [..., 3]."""
    return torch.atan2(direction[..., 1], direction[..., 0]).rad2deg() % 360


def camera_directions(poses: Tensor) -> Tensor:
    """Return unit vectors [..., 3] from the origin to cameras [..., 4, 4]."""
    return F.normalize(poses[..., :3, 3], dim=-1)


def direction_grid(azimuths: int, elevations: Sequence[float]) -> Tensor:
    """Return directions [azimuths * len(elevations), 3], with evenly spaced azimuths at each elevation."""
    rows = torch.tensor(elevations, dtype=torch.float32).repeat_interleave(azimuths)
    return direction_vectors((torch.arange(azimuths) * (360 / azimuths)).repeat(len(elevations)), rows)


def position_grid(columns: int, rows: int, extent: float = 0.3) -> Tensor:
    """Return positions [columns * rows, 3] of forward-facing cameras: a grid from -extent to extent, right and up."""
    up, right = torch.meshgrid(*(torch.linspace(-extent, extent, n) for n in (rows, columns)), indexing="ij")
    return torch.stack([right, up, torch.zeros_like(up)], dim=-1).reshape(-1, 3)


def fibonacci_band(count: int, elevations: tuple[float, float]) -> Tensor:
    """Return ``count`` evenly spread directions between two elevations in degrees (a Fibonacci lattice)."""
    low, high = (math.sin(math.radians(e)) for e in elevations)
    index = torch.arange(count) + 0.5
    height = low + (high - low) * index / count
    azimuth = index * (180 * (3 - math.sqrt(5)))
    return direction_vectors(azimuth, height.asin().rad2deg())


def rotate_about_z(direction: Tensor, degrees: Tensor | float) -> Tensor:
    """Rotate directions [..., 3] about z."""
    angle = torch.as_tensor(degrees, dtype=direction.dtype, device=direction.device).deg2rad()
    x, y, z = direction.unbind(-1)
    return torch.stack([angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y, z.expand_as(x)], dim=-1)


def rotate_poses_about_z(poses: Tensor, degrees: float) -> Tensor:
    """Rotate camera-to-world poses [..., 4, 4] about the world's z axis."""
    rotation = torch.eye(4).to(poses)
    rotation[:3, :3] = rotate_about_z(torch.eye(3).to(poses), degrees).T
    return rotation @ poses


def raise_elevation(direction: Tensor, angle: Tensor) -> Tensor:
    """Move unit vectors [..., 3], none along z, up the circle through the zenith by ``angle`` [...] in radians."""
    x, y, z = direction.unbind(-1)
    flat = torch.hypot(x, y)
    tangent = torch.stack([-x / flat * z, -y / flat * z, flat], dim=-1)
    return angle.cos()[..., None] * direction + angle.sin()[..., None] * tangent


def orbit_poses(direction: Tensor, distance: Tensor | float, offsets: dict[str, Tensor] | None = None) -> Tensor:
    """Return poses [..., 4, 4] of upright cameras that look at the origin.

    Args:
        direction: from the origin to the cameras, [..., 3].
        distance: from the origin, broadcast against [...].
        offsets: deviations by name (:data:`POSE_PARAMETERS`): "roll" [...] in radians about the viewing axis, "aim"
            [..., 2] the camera's shift to its right and up in units of the distance, "distance" [...] a natural
            logarithm.

    Raises:
        ValueError: a direction along z, for which "upright" is undefined.
    """
    offsets = offsets or {}
    reach = distance.to(direction) if isinstance(distance, Tensor) else direction.new_full((), distance)
    reach = reach.expand(direction.shape[:-1])
    if "distance" in offsets:
        reach = reach * offsets["distance"].exp()
    eye = F.normalize(direction, dim=-1) * reach[..., None]
    pose = look_at(eye, torch.zeros_like(eye), unit_vector(2, eye))
    if "roll" in offsets:
        import roma

        axis_angle = F.pad(offsets["roll"][..., None], (2, 0))
        pose = pose @ _rigid_transform(roma.rotvec_to_rotmat(axis_angle), torch.zeros_like(eye))
    if "aim" in offsets:
        shift = F.pad(offsets["aim"] * reach[..., None], (0, 1))
        pose = pose @ _rigid_transform(
            torch.eye(3, dtype=shift.dtype, device=shift.device).expand(*shift.shape, 3), shift
        )
    return pose


def forward_facing_poses(positions: Tensor) -> Tensor:
    """Return poses [..., 4, 4] of cameras at ``positions`` [..., 3] near the origin that look at one point ahead."""
    return look_at(positions, -CONVERGENCE_DEPTH * unit_vector(2, positions), unit_vector(1, positions))


def unit_vector(axis: int, like: Tensor) -> Tensor:
    """Return the unit vector [3] along an axis, made on the device of ``like``: a copy from the host would wait."""
    return torch.eye(3, dtype=like.dtype, device=like.device)[axis]


def rodrigues_poses(parameters: Tensor) -> Tensor:
    """Return poses [..., 4, 4] of an axis-angle vector and a translation, [..., 6] (thesis, eq. 3.2)."""
    import roma

    return _rigid_transform(roma.rotvec_to_rotmat(parameters[..., :3]), parameters[..., 3:])


def _rigid_transform(rotation: Tensor, translation: Tensor) -> Tensor:
    upper = torch.cat([rotation, translation[..., None]], dim=-1)
    last = F.pad(torch.ones_like(upper[..., :1, :1]), (3, 0))
    return torch.cat([upper, last], dim=-2)


def framing_distance(focal: float) -> float:
    """Return the camera distance at which the middle of the box [-1, 1]^3 fills 90% of the image.

    Args:
        focal: focal length in units of the image's side.
    """
    return 2 * focal / FRAMING


def dolly_poses(poses: Tensor, factor: Tensor | float) -> Tensor:
    """Move cameras [..., 4, 4] along their viewing axes until the depth of the origin is ``factor`` times as large.

    With a focal length of ``factor`` times its value the origin keeps its place in the images, and its surroundings
    their size: only the perspective changes.
    """
    back = poses[..., :3, 2]
    depth = (poses[..., :3, 3] * back).sum(-1, keepdim=True)
    position = poses[..., :3, 3] + back * (depth * (factor - 1))
    return torch.cat([torch.cat([poses[..., :3, :3], position[..., None]], -1), poses[..., 3:, :]], -2)


class OrbitPoses(nn.Module):
    """Poses of V views of an object as parameters: azimuth and elevation of each view, and optional offsets.

    Angles instead of a vector: near the zenith a vector moves the azimuth much faster than the elevation.

    Args:
        direction: initial unit vectors [V, 3].
        distance: of all cameras from the origin.
        parameters: further optimised parameters, names of :data:`POSE_PARAMETERS`.
    """

    start: Tensor

    def __init__(self, direction: Tensor, distance: float, parameters: Sequence[str] = ()):
        super().__init__()
        self.distance = distance
        self.register_buffer("start", direction.clone())
        self.angles = nn.Parameter(torch.zeros(len(direction), 2).to(direction))  # azimuth, elevation; radians
        shapes = {name: (len(direction), 2) if name == "aim" else (len(direction),) for name in parameters}
        # the attribute's name is that of the stored tensors
        self.freedom = nn.ParameterDict({name: nn.Parameter(torch.zeros(s)) for name, s in shapes.items()})

    @property
    def direction(self) -> Tensor:
        """Current unit vectors [V, 3] from the origin to the cameras."""
        azimuth, elevation = self.angles.unbind(-1)
        return rotate_about_z(raise_elevation(self.start, elevation), azimuth.rad2deg())

    def with_directions(self, direction: Tensor) -> OrbitPoses:
        """Return fixed poses with other directions [V, 3] and the same offsets."""
        moved = OrbitPoses(direction, self.distance, tuple(self.freedom)).to(direction.device)
        for name, value in self.freedom.items():
            moved.freedom[name].data.copy_(value.detach())
        return moved.requires_grad_(False)

    def dolly(self, factor: float) -> None:
        """Move all cameras as :func:`dolly_poses` does."""
        self.distance *= factor
        if "aim" in self.freedom:
            self.freedom["aim"].data /= factor

    def forward(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return poses [B, 4, 4] of views with these indices."""
        offsets = {name: value[indices] for name, value in self.freedom.items()}
        return orbit_poses(self.direction[indices], self.distance, offsets)


class FreePoses(nn.Module):
    """Poses of V views as parameters: axis-angle and translation relative to ``base`` [V, 4, 4] (Wang et al. 2021)."""

    base: Tensor

    def __init__(self, base: Tensor):
        super().__init__()
        self.register_buffer("base", base.clone())
        self.numbers = nn.Parameter(torch.zeros(len(base), 6))

    def dolly(self, factor: float) -> None:
        """Move all cameras as :func:`dolly_poses` does."""
        self.base.copy_(dolly_poses(self().detach(), factor))
        self.numbers.data.zero_()

    def forward(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return poses [B, 4, 4] of views with these indices."""
        return self.base[indices] @ rodrigues_poses(self.numbers[indices])


class SharedMotion(nn.Module):
    """Poses [V, 4, 4] of which one parameter moves all cameras: towards one direction, on spheres about the origin.

    A ring of cameras becomes too high or low, or uneven: errors that a field can hide by a change of its shape.
    """

    base: Tensor

    def __init__(self, base: Tensor):
        super().__init__()
        self.register_buffer("base", base.clone())
        self.pull = nn.Parameter(torch.zeros(3))  # its length is the angle of cameras at a right angle to it

    def forward(self, indices: Tensor | slice = slice(None)) -> Tensor:
        """Return poses [B, 4, 4] of views with these indices."""
        base = self.base[indices]
        direction = F.normalize(base[:, :3, 3], dim=1)
        rotation = torch.cross(direction, self.pull.expand_as(direction), dim=1)
        return rodrigues_poses(torch.cat([rotation, torch.zeros_like(rotation)], 1)) @ base


def camera_path(kind: str, frames: int, poses: Tensor, layout: str) -> Tensor:
    """Return poses [frames, 4, 4] of a closed path at the mean elevation and distance of the views.

    Args:
        kind: "orbit" at one elevation, or "spiral", which varies it. In a forward-facing scene both are circles in the
            cameras' plane; the spiral also varies the depth.
        frames: at least 1.
        poses: of the views, [V, 4, 4].
        layout: "object" or "forward".

    Raises:
        ConfigError: unknown kind, or no frames.
    """
    if kind not in ("orbit", "spiral"):
        raise ConfigError(f"path={kind!r} is unknown; give orbit, spiral or poses")
    if frames < 1:
        raise ConfigError(f"frames={frames}: give at least 1")
    angle = torch.arange(frames) * (2 * math.pi / frames)
    wave = (2 * angle).sin() if kind == "spiral" else 0 * angle
    if layout == "forward":
        spread = poses[:, :3, 3].std(0, correction=0)
        circle = torch.stack([angle.cos(), angle.sin(), wave], dim=1)
        path = torch.eye(4).repeat(frames, 1, 1)
        path[:, :3, 3] = poses[:, :3, 3].mean(0) + FORWARD_RADIUS * spread * circle
        return path
    elevation = camera_directions(poses)[:, 2].clamp(-1, 1).asin().rad2deg().mean() + SPIRAL_DEGREES * wave
    distance = poses[:, :3, 3].norm(dim=1).mean()
    return orbit_poses(direction_vectors(angle.rad2deg(), elevation.clamp(-85, 85)), distance)
