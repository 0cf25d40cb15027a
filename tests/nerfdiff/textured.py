"""Rendered photos of a textured block on a textured floor, from known cameras: enough texture for features."""

from __future__ import annotations

import numpy as np
import torch

from factorkit.data.views.cameras import Distortion, make_intrinsics
from factorkit.rendering import look_at

TEXTURE_SIDE = 256  # pixels
TEXELS = 110.0  # per unit of length
BLOCK = np.array([0.5, 0.4, 0.6])  # half sizes
FLOOR = -0.6
AMBIENT = 0.4  # share of the light that comes from everywhere, where there is a lamp


def make_intrinsics_of(size: tuple[int, int], focal: float = 1.1) -> np.ndarray:
    """Return K for a focal length in units of the width, in pixels of an image of this height and width."""
    return make_intrinsics(focal * size[1], focal * size[1], size[1] / 2, size[0] / 2)


def orbit(degrees, elevation: float = 30.0, distance: float = 3.0) -> np.ndarray:
    """Return poses [V, 4, 4] of cameras that look at the block."""
    azimuth, height = np.radians(degrees), np.radians(elevation)
    eye = distance * np.stack(
        [np.cos(height) * np.cos(azimuth), np.cos(height) * np.sin(azimuth), np.full(len(azimuth), np.sin(height))], 1
    )
    eye = torch.from_numpy(eye)
    up = torch.tensor([0.0, 0.0, 1.0], dtype=eye.dtype)
    return look_at(eye, torch.zeros_like(eye), up).numpy()


def render_turned(pose: np.ndarray, degrees, size: tuple[int, int]) -> list[np.ndarray]:
    """Return images of a camera that turns on the spot about its vertical axis."""
    images = []
    for angle in np.radians(degrees):
        turn = np.eye(4)
        turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
        images.append(render_photo(pose @ turn, make_intrinsics_of(size), size)[0])
    return images


def make_texture(seed: int, side: int = TEXTURE_SIDE) -> np.ndarray:
    """Return smooth colours in [0, 1] with details of 4 and of 16 pixels."""
    rng, total = np.random.default_rng(seed), np.zeros((side, side, 3))
    for cells in (side // 16, side // 4):
        noise = torch.from_numpy(rng.random((1, 3, cells, cells)))
        total += torch.nn.functional.interpolate(noise, (side,) * 2, mode="bilinear")[0].permute(1, 2, 0).numpy()
    return (total - total.min()) / (total.max() - total.min())


TINTS = ((0.9, 0.5, 0.3), (0.4, 0.6, 0.9), (0.9, 0.8, 0.4), (0.6, 0.65, 0.6))  # of the block's sides and the floor
TEXTURES = [0.55 * make_texture(seed) + 0.45 * np.array(tint) for seed, tint in enumerate(TINTS)]


def sample_texture(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return colours of a repeated texture at positions in texels, bilinear."""
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    a, b = (u - i)[:, None], (v - j)[:, None]
    i, j, k, m = (index % len(texture) for index in (i, j, i + 1, j + 1))
    lower = (1 - a) * texture[i, j] + a * texture[k, j]
    return (1 - b) * lower + b * ((1 - a) * texture[i, m] + a * texture[k, m])


def render_photo(
    pose: np.ndarray,
    k: np.ndarray,
    size: tuple[int, int],
    lens: Distortion | None = None,
    still: bool = False,
    block: np.ndarray | None = None,
    light: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return an image uint8 [H, W, 3] and the mask [H, W] of the block.

    Args:
        still: behind the block is one texture that does not move, instead of the floor.
        block: centre of the block, for one that moves.
        light: direction to a lamp, which makes the sides of the block that face it brighter; None: all are alike.
    """
    height, width = size
    fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
    y, x = np.mgrid[: 2 * height, : 2 * width] / 2 + 0.25  # four rays a pixel
    seen_x, seen_y = (x.ravel() - cx) / fx, (y.ravel() - cy) / fy
    ray_x, ray_y = seen_x, seen_y
    for _ in range(20 if lens else 0):  # invert the lens
        bent_x, bent_y = (np.asarray(t) for t in lens(torch.from_numpy(ray_x), torch.from_numpy(ray_y)))
        ray_x, ray_y = ray_x + seen_x - bent_x, ray_y + seen_y - bent_y
    rays = np.stack([ray_x, -ray_y, -np.ones_like(ray_x)], 1) @ pose[:3, :3].T
    eye = pose[:3, 3]
    rays = np.where(np.abs(rays) < 1e-9, 1e-9, rays)
    centre = np.zeros(3) if block is None else block
    low, high = (centre - BLOCK - eye) / rays, (centre + BLOCK - eye) / rays
    enter, leave = np.minimum(low, high).max(1), np.maximum(low, high).min(1)
    is_block = (enter < leave) & (enter > 0)
    axis = np.minimum(low, high).argmax(1)
    hits = eye + enter[:, None] * rays - centre
    color = np.full((len(rays), 3), 0.8)
    for a in range(3):
        rows = is_block & (axis == a)
        u, v = np.delete(hits[rows], a, 1).T * TEXELS + 37 * a * np.sign(hits[rows, a])
        color[rows] = sample_texture(TEXTURES[a], u, v)
        if light is not None:
            facing = np.sign(hits[rows, a]) * light[a] / np.linalg.norm(light)
            color[rows] *= AMBIENT + (1 - AMBIENT) * facing.clip(0)[:, None]
    distance = (FLOOR - eye[2]) / rays[:, 2]
    rows = ~is_block & (distance > 0) & (distance < 12)
    floor = eye + distance[:, None] * rays
    if still:
        rows = ~is_block
        color[rows] = sample_texture(TEXTURES[3], y.ravel()[rows] * 0.7, x.ravel()[rows] * 0.7)
    else:
        color[rows] = sample_texture(TEXTURES[3], floor[rows, 0] * TEXELS, floor[rows, 1] * TEXELS)
    pixels = color.reshape(height, 2, width, 2, 3).mean((1, 3))
    mask = is_block.reshape(height, 2, width, 2).mean((1, 3)) > 0.5
    return (pixels * 255).round().astype(np.uint8), mask
