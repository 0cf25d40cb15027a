"""Photos of a textured room with an object on a table, from a walk around it, with true cameras."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from factorkit.data.views.views import Views
from factorkit.rendering import look_at
from tests.nerfdiff.textured import TEXTURE_SIDE, make_intrinsics_of, make_texture, sample_texture

SIZE = (360, 480)  # height and width of a photo, in which structure from motion looks for features
FOCAL = 0.8  # of a phone's main camera, in units of the longer side
NUM_VIEWS, TURNS, HELD_OUT_EVERY = 56, 1.5, 8
DISTANCE = 2.8  # of the cameras from the axis of the walk
TABLE, FLOOR, CEILING = -0.6, -2.2, 2.8  # heights
LIGHT = np.float32([0.48, 0.36, 0.8])
NUM_TILES = 12  # textures that the sides of all things share, with tiles
WALL_SIDE = 1280  # pixels of a texture that the largest wall does not repeat
TEXELS = (35.0, 90.0)  # of a texture, per unit of length


@dataclass(frozen=True, eq=False)
class Solid:
    """A box or an ellipsoid, turned about the vertical axis.

    Attributes:
        inside: whether it is seen from inside: the room.
    """

    centre: np.ndarray
    half: np.ndarray
    turn: np.ndarray
    textures: list[np.ndarray]
    texels: float
    is_round: bool = False
    inside: bool = False

    def intersect(self, eye: np.ndarray, rays: np.ndarray) -> np.ndarray:
        """Return the distance [N] along rays [3, N] to the surface; infinite where they miss it."""
        origin, rays, half = (eye - self.centre) @ self.turn, self.turn.T @ rays, self.half[:, None]
        if self.is_round:
            origin, rays = origin / self.half, rays / half
            a, b, c = (rays**2).sum(0), origin @ rays, origin @ origin - 1
            root = b * b - a * c
            distance = (-b - np.sqrt(root.clip(0))) / a
            return np.where((root > 0) & (distance > 0), distance, np.inf)
        rays = np.where(np.abs(rays) < 1e-6, 1e-6, rays)
        one, other = (-half - origin[:, None]) / rays, (half - origin[:, None]) / rays
        enter, leave = np.minimum(one, other).max(0), np.maximum(one, other).min(0)
        return leave if self.inside else np.where((enter < leave) & (enter > 0), enter, np.inf)

    def shade(self, points: np.ndarray) -> np.ndarray:
        """Return colours [N, 3] of points [N, 3] on the surface, each from the texture of the side that it faces."""
        local = (points - self.centre) @ self.turn
        normal = local / self.half**2 if self.is_round else local / self.half
        axis, rows = np.abs(normal).argmax(1), np.arange(len(local))
        sign = np.sign(normal[rows, axis])
        if not self.is_round:
            normal = np.eye(3, dtype=np.float32)[axis] * sign[:, None]
        normal = normal / np.linalg.norm(normal, axis=1, keepdims=True) @ self.turn.T
        facing = (-normal if self.inside else normal) @ LIGHT
        color = np.empty((len(local), 3), np.float32)
        for side in range(6):
            chosen = (axis == side // 2) & (sign == 2 * (side % 2) - 1)
            u, v = np.delete(local[chosen], side // 2, 1).T * self.texels
            color[chosen] = sample_texture(self.textures[side], u, v)
        return color * (0.75 + 0.25 * facing)[:, None]


def make_room(seed: int, tiles: bool = False) -> list[Solid]:
    """Return the room, a table with an object and other things on it, and furniture, all by seed.

    With ``tiles``, all share a few textures, which walls and floor repeat, as wallpaper and tiles do.
    """
    rng = np.random.default_rng(seed)
    patterns = [make_texture(100 * seed + i) for i in range(NUM_TILES if tiles else 0)]
    numbers = itertools.count(1000 * seed)

    def add(centre, half, degrees: float = 0.0, **options: bool) -> Solid:
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        contrast, tint = rng.uniform(0.5, 1.0), rng.uniform(0.15, 0.85, 3)
        chosen = rng.integers(0, NUM_TILES, 6)
        shades = tint * rng.uniform(0.7, 1.1, (6, 1)) if options.get("inside") else np.tile(tint, (6, 1))
        side = WALL_SIDE if options.get("inside") else TEXTURE_SIDE
        textures = [
            np.float32(t + contrast * ((patterns[i] if tiles else make_texture(next(numbers), side)) - 0.5))
            for i, t in zip(chosen, shades, strict=True)
        ]
        centre, half, turn = (np.float32(x) for x in (centre, half, [[c, -s, 0], [s, c, 0], [0, 0, 1]]))
        return Solid(centre, half, turn, textures, rng.uniform(*TEXELS), **options)

    width, depth = rng.uniform(5.0, 7.0, 2)
    x, y = rng.uniform(-0.8, 0.8, 2)
    solids = [add((x, y, (FLOOR + CEILING) / 2), (width, depth, (CEILING - FLOOR) / 2), inside=True)]
    yaw, half = rng.uniform(0, 90), rng.uniform(0.9, 1.2, 2)
    table = add((0, 0, TABLE - 0.06), (*half, 0.06), yaw)
    solids.append(table)
    leg = (TABLE - 0.12 - FLOOR) / 2
    for corner in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        solids.append(add((*(table.turn[:2, :2] @ (0.85 * half * corner)), FLOOR + leg), (0.07, 0.07, leg), yaw))
    base, top = rng.uniform(0.3, 0.45, 3), rng.uniform(0.2, 0.3, 3)
    solids.append(add((0, 0, TABLE + base[2]), base, rng.uniform(0, 90), is_round=bool(rng.integers(2))))
    solids.append(add((0, 0, TABLE + 2 * base[2] + top[2]), top, rng.uniform(0, 90), is_round=bool(rng.integers(2))))
    for azimuth in np.arange(3) * 2.1 + rng.uniform(0, 2 * np.pi):
        thing = rng.uniform(0.08, 0.18, 3)
        place = 0.68 * half.min() * np.array([np.cos(azimuth), np.sin(azimuth)])
        solids.append(add((*place, TABLE + thing[2]), thing, rng.uniform(0, 90), is_round=bool(rng.integers(2))))
    for azimuth in np.radians(np.arange(7) * 360 / 7 + rng.uniform(0, 360) + rng.uniform(-12, 12, 7)):
        size = rng.uniform((0.4, 0.3, 0.4), (0.8, 0.6, 1.5))
        place = rng.uniform(4.2, 4.9) * np.array([np.cos(azimuth), np.sin(azimuth)])
        facing = np.degrees(azimuth) + rng.uniform(60, 120)
        solids.append(add((*place, FLOOR + size[2]), size, facing, is_round=bool(rng.random() < 0.2)))
    return solids


def render_photo(solids: list[Solid], pose: np.ndarray, k: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image [H, W, 3] in [0, 1], one ray a pixel."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32) + 0.5
    rays = np.stack([(x.ravel() - k[0, 2]) / k[0, 0], -(y.ravel() - k[1, 2]) / k[1, 1], -np.ones(x.size)])
    rays, eye = np.float32(pose[:3, :3] @ rays), np.float32(pose[:3, 3])
    distances = np.stack([solid.intersect(eye, rays) for solid in solids])
    nearest = distances.argmin(0)
    color = np.zeros((x.size, 3), np.float32)
    for i in np.unique(nearest):
        rows = nearest == i
        color[rows] = solids[i].shade(eye + distances[i, rows, None] * rays[:, rows].T)
    return color.reshape(*size, 3).clip(0, 1)


def walk_around(count: int, seed: int) -> np.ndarray:
    """Return poses [count, 4, 4] of a walk of one and a half turns that rises, held by hand."""
    rng = np.random.default_rng(seed + 1)
    share = (np.arange(count) + rng.uniform(-0.2, 0.2, count)) / count
    azimuth = 2 * np.pi * (TURNS * share + rng.random())
    distance = DISTANCE * rng.uniform(0.95, 1.05, count)
    height = 0.2 + 1.2 * share + rng.uniform(-0.1, 0.1, count)
    eye = np.stack([distance * np.cos(azimuth), distance * np.sin(azimuth), height], 1)
    target = np.array([0, 0, -0.3]) + rng.uniform(-0.15, 0.15, (count, 3))
    poses = look_at(*map(torch.from_numpy, (eye, target, np.array([0.0, 0.0, 1.0])))).numpy()
    roll = np.radians(rng.uniform(-3, 3, count))
    turns = np.tile(np.eye(4), (count, 1, 1))
    turns[:, 0, 0] = turns[:, 1, 1] = np.cos(roll)
    turns[:, 0, 1], turns[:, 1, 0] = -np.sin(roll), np.sin(roll)
    return poses @ turns


@lru_cache(maxsize=1)
def make_photos(
    seed: int,
    *,
    count: int = NUM_VIEWS,
    size: tuple[int, int] = SIZE,
    exposure: float = 0.0,
    noise: float = 0.0,
    tiles: bool = False,
) -> tuple[Views, Views]:
    """Return photos of a room to train on, and every eighth held out.

    Args:
        seed: of the room, the walk, the exposures and the noise.
        count: number of photos.
        size: height and width.
        exposure: the brightness of each training photo changes by up to this share.
        noise: standard deviation of the noise of the training photos.
        tiles: see :func:`make_room`.
    """
    solids, poses, k = make_room(seed, tiles), walk_around(count, seed), make_intrinsics_of(size, FOCAL)
    photos = np.stack([render_photo(solids, pose, k, size) for pose in poses])
    rng, is_held_out = np.random.default_rng(seed + 2), np.arange(count) % HELD_OUT_EVERY == HELD_OUT_EVERY // 2
    gains = np.where(is_held_out, 1.0, np.exp(exposure * rng.uniform(-1, 1, count)))
    photos = photos * gains[:, None, None, None]
    if noise:
        photos[~is_held_out] += noise * rng.standard_normal(photos[~is_held_out].shape)
    photos = (photos.clip(0, 1) * 255).round() / 255
    views = Views(
        torch.from_numpy(photos).permute(0, 3, 1, 2).float(),
        [f"{i:03d}.jpg" for i in range(count)],
        torch.from_numpy(k).float().expand(count, 3, 3),
        poses=torch.from_numpy(poses).float(),
    )
    return views.select(torch.from_numpy(~is_held_out)), views.select(torch.from_numpy(is_held_out))
