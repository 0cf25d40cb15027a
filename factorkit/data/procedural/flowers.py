"""Procedural flowers: the built-in labelled images, so that everything runs without a download.

Each image is drawn at twice its resolution and box-averaged. Lengths are fractions of the image's side, so the
resolution changes the detail only.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np

from factorkit.utils.errors import ConfigError

OVERSAMPLING = 2
PETAL_HUES = (0.0, 0.06, 0.14, 0.6, 0.78, 0.9)  # red, orange, yellow, blue, violet, pink
OUTLINES = ("petal", "star", "ellipse")
OUTLINE_PROBABILITIES = (0.6, 0.2, 0.2)


def draw_flowers(count: int, resolution: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw flowers on green backgrounds, with their exact masks.

    Image i depends only on (seed, i), so a larger count leaves earlier images unchanged.

    Returns:
        images: uint8 [count, resolution, resolution, 3].
        masks: bool [count, resolution, resolution], True if the flower covers more than half of the pixel; 24% of the
            pixels on average.

    Raises:
        ConfigError: a negative count or seed, or a resolution below 1.
    """
    check_arguments("draw_flowers", count, resolution, seed)
    images = np.empty((count, resolution, resolution, 3), np.uint8)
    masks = np.empty((count, resolution, resolution), bool)
    for i in range(count):
        # spawn_key keeps the numbers apart: as a list of words, (2**32 + 1, 0) and (1, 1) would be the same seed.
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
        image, inside = _draw_flower(rng, OVERSAMPLING * resolution)
        images[i] = np.rint(255 * box_average(np.clip(image, 0, 1)))
        masks[i] = box_average(inside[..., None].astype(np.float32))[..., 0] > 0.5
    return images, masks


def check_arguments(function: str, count: int, resolution: int, seed: int) -> None:
    """Raise ConfigError for a negative count or seed, or a resolution below 1."""
    if count < 0 or seed < 0 or resolution < 1:
        raise ConfigError(
            f"{function}(count={count}, resolution={resolution}, seed={seed}): "
            "count and seed must be 0 or more, resolution 1 or more."
        )


def _draw_flower(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return colours float32 [size, size, 3], not clipped to [0, 1], and the mask bool [size, size]."""
    background = _draw_foliage(rng, size)
    outline = rng.choice(OUTLINES, p=OUTLINE_PROBABILITIES)
    centre, radius = rng.uniform(0.35, 0.65, 2), rng.uniform(0.2, 0.36)
    inside, angle, distance = _draw_outline(rng, outline, size, centre, radius)
    image = np.where(inside[..., None], _draw_petals(rng, angle, distance), background)
    lighting = 1 + 0.15 * smooth_noise(rng, size, 2)
    return image * lighting + 0.02 * rng.standard_normal(image.shape, np.float32), inside


def _draw_foliage(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return [size, size, 3]: a random green with three octaves of noise and up to four darker or lighter leaves."""
    green = _rgb(hue=rng.uniform(0.22, 0.38), saturation=rng.uniform(0.4, 0.9), value=rng.uniform(0.25, 0.6))
    octaves = ((0.234, 4), (0.195, 9), (0.13, 24))
    shade = 1 + sum(amplitude * smooth_noise(rng, size, cells) for amplitude, cells in octaves)
    image = green * shade + 0.03 * smooth_noise(rng, size, 5, channels=3)
    for _ in range(rng.integers(0, 5)):
        leaf, _, _ = _draw_outline(rng, "ellipse", size, rng.uniform(0, 1, 2), rng.uniform(0.1, 0.25))
        image[leaf] *= rng.uniform(0.6, 1.4)
    return image


def _draw_petals(rng: np.random.Generator, angle: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Return the flower's colours for all pixels, [size, size, 3]: striped, usually with a centre of another colour.

    Args:
        rng: random generator.
        angle: [size, size] in radians.
        distance: [size, size], 0 at the centre and 1 on the outline.
    """
    size = len(distance)
    hue = rng.choice(PETAL_HUES) + rng.uniform(-0.03, 0.03)
    saturation, value = rng.uniform(0.55, 0.95), rng.uniform(0.65, 1.0)
    if rng.uniform() < 0.12:  # some are white
        saturation, value = 0.06, 0.95
    stripes = 0.12 * np.cos(rng.integers(5, 14) * angle) * np.minimum(distance, 1)
    texture = (1 - 0.25 * distance + stripes)[..., None] + 0.06 * smooth_noise(rng, size, 12)
    colours = _rgb(hue, saturation, value) * texture
    if rng.uniform() < 0.7:
        centre = _rgb(hue=rng.uniform(0.05, 0.16), saturation=0.8, value=rng.uniform(0.3, 0.95))
        centre = centre * (1 + 0.2 * smooth_noise(rng, size, 20))
        colours = np.where((distance < rng.uniform(0.15, 0.32))[..., None], centre, colours)
    return colours


def _draw_outline(
    rng: np.random.Generator, kind: str, size: int, centre: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mask, the angle in radians, and the distance in units of the outline's radius; each [size, size]."""
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = pixels[None, :] - np.float32(centre[0]), pixels[:, None] - np.float32(centre[1])
    rotation = np.float32(rng.uniform(0, 2 * np.pi))
    angle = np.arctan2(y, x)
    if kind == "ellipse":
        across = -np.sin(rotation) * x + np.cos(rotation) * y
        along = np.cos(rotation) * x + np.sin(rotation) * y
        distance = np.hypot(along, across / np.float32(rng.uniform(0.6, 1.0))) / np.float32(radius)
        return distance < 1, angle + rotation, distance
    if kind == "petal":
        lobes, depth = rng.integers(4, 9), rng.uniform(0.08, 0.3)
        wave = np.cos(lobes * angle + rotation)
    else:
        points, depth = rng.integers(4, 7), rng.uniform(0.25, 0.45)
        phase = ((angle + rotation) * (points / (2 * np.pi))) % 1
        wave = 4 * np.abs(phase - 0.5) - 1  # a triangle wave, 1 at the points and -1 between them
    distance = np.hypot(x, y) / (radius * (1 + depth * wave)).astype(np.float32)
    return distance < 1, angle + rotation, distance


def smooth_noise(rng: np.random.Generator, size: int, cells: int, channels: int = 1) -> np.ndarray:
    """Interpolate white noise on (cells + 1)^2 knots bilinearly; [size, size, channels]."""
    knots = rng.standard_normal((channels, cells + 1, cells + 1), np.float32)
    weights = _bilinear_weights(size, cells)
    return np.moveaxis(weights @ knots @ weights.T, 0, -1)


@lru_cache
def _bilinear_weights(size: int, cells: int) -> np.ndarray:
    """Return [size, cells + 1], the weights of the knots for each pixel."""
    position = np.linspace(0, cells, size, dtype=np.float32)[:, None]
    return np.maximum(0, 1 - np.abs(position - np.arange(cells + 1, dtype=np.float32)))


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def box_average(image: np.ndarray) -> np.ndarray:
    """Average blocks of `OVERSAMPLING` pixels: [2R, 2R, C] to [R, R, C]."""
    size, _, channels = image.shape
    half = size // OVERSAMPLING
    return image.reshape(half, OVERSAMPLING, half, OVERSAMPLING, channels).mean((1, 3))
