"""Procedural flowers: the labelled set that ships with the package, so that everything runs without a download.

Each picture is drawn at twice its resolution and box-averaged. Lengths are fractions of the picture's side, so a
flower looks the same at any resolution apart from its detail.
"""

from __future__ import annotations

import colorsys
from functools import lru_cache

import numpy as np

from factorkit.utils.errors import ConfigError

OVERSAMPLING = 2
PETAL_HUES = (0.0, 0.06, 0.14, 0.6, 0.78, 0.9)  # red, orange, yellow, blue, violet, pink
OUTLINES = ("petal", "star", "ellipse")
OUTLINE_SHARES = (0.6, 0.2, 0.2)


def check_drawable(name: str, count: int, resolution: int, seed: int) -> None:
    """Raise ConfigError where no such pictures can be drawn by the function of that name."""
    if count < 0 or seed < 0 or resolution < 1:
        raise ConfigError(
            f"{name}(count={count}, resolution={resolution}, seed={seed}): "
            "count and seed must be 0 or more, resolution 1 or more."
        )


def draw_flowers(count: int, resolution: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw flowers on green backgrounds, with their exact masks.

    Picture i depends on (seed, i) alone: asking for more pictures leaves the earlier ones as they were.

    Returns:
        images: uint8 [count, resolution, resolution, 3].
        masks: bool [count, resolution, resolution], True where the flower covers more than half of the pixel;
            24% of the pixels on average.

    Raises:
        ConfigError: a negative count or seed, or a resolution below 1.
    """
    check_drawable("flowers", count, resolution, seed)
    images = np.empty((count, resolution, resolution, 3), np.uint8)
    masks = np.empty((count, resolution, resolution), bool)
    for i in range(count):
        # spawn_key keeps the two numbers apart: as one list of words, (2**32 + 1, 0) and (1, 1) would be the same seed
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
        picture, inside = _draw(rng, OVERSAMPLING * resolution)
        images[i] = np.rint(255 * _box_average(np.clip(picture, 0, 1)))
        masks[i] = _box_average(inside[..., None].astype(np.float32))[..., 0] > 0.5
    return images, masks


def _draw(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One flower: colours float32 [size, size, 3], about [0, 1] but not clipped, and where it is, bool [size, size]."""
    background = _foliage(rng, size)
    outline = rng.choice(OUTLINES, p=OUTLINE_SHARES)
    centre, radius = rng.uniform(0.35, 0.65, 2), rng.uniform(0.2, 0.36)
    inside, angle, reach = _outline(rng, outline, size, centre, radius)
    picture = np.where(inside[..., None], _blossom(rng, angle, reach), background)
    lighting = 1 + 0.15 * _smooth_noise(rng, size, 2)
    return picture * lighting + 0.02 * rng.standard_normal(picture.shape, np.float32), inside


def _foliage(rng: np.random.Generator, size: int) -> np.ndarray:
    """A green of random hue under three octaves of noise, with up to four darker or lighter leaves; [size, size, 3]."""
    green = _rgb(hue=rng.uniform(0.22, 0.38), saturation=rng.uniform(0.4, 0.9), value=rng.uniform(0.25, 0.6))
    octaves = ((0.234, 4), (0.195, 9), (0.13, 24))
    shade = 1 + sum(amplitude * _smooth_noise(rng, size, cells) for amplitude, cells in octaves)
    picture = green * shade + 0.03 * _smooth_noise(rng, size, 5, channels=3)
    for _ in range(rng.integers(0, 5)):
        leaf, _, _ = _outline(rng, "ellipse", size, rng.uniform(0, 1, 2), rng.uniform(0.1, 0.25))
        picture[leaf] *= rng.uniform(0.6, 1.4)
    return picture


def _blossom(rng: np.random.Generator, angle: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """The flower's own colours over the whole picture, [size, size, 3]: paler inwards, striped, usually with a centre.

    `angle` (radians) and `reach` (0 at the centre, 1 on the outline) are [size, size].
    """
    size = len(reach)
    hue = rng.choice(PETAL_HUES) + rng.uniform(-0.03, 0.03)
    saturation, value = rng.uniform(0.55, 0.95), rng.uniform(0.65, 1.0)
    if rng.uniform() < 0.12:  # some are white
        saturation, value = 0.06, 0.95
    stripes = 0.12 * np.cos(rng.integers(5, 14) * angle) * np.minimum(reach, 1)
    texture = (1 - 0.25 * reach + stripes)[..., None] + 0.06 * _smooth_noise(rng, size, 12)
    colours = _rgb(hue, saturation, value) * texture
    if rng.uniform() < 0.7:
        heart = _rgb(hue=rng.uniform(0.05, 0.16), saturation=0.8, value=rng.uniform(0.3, 0.95))
        heart = heart * (1 + 0.2 * _smooth_noise(rng, size, 20))
        colours = np.where((reach < rng.uniform(0.15, 0.32))[..., None], heart, colours)
    return colours


def _outline(
    rng: np.random.Generator, kind: str, size: int, centre: np.ndarray, radius: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A closed outline about `centre` (x, y): inside, angle in radians, reach = distance / outline; [size, size]."""
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = pixels[None, :] - np.float32(centre[0]), pixels[:, None] - np.float32(centre[1])
    turn = np.float32(rng.uniform(0, 2 * np.pi))
    angle = np.arctan2(y, x)
    if kind == "ellipse":
        across = -np.sin(turn) * x + np.cos(turn) * y
        along = np.cos(turn) * x + np.sin(turn) * y
        reach = np.hypot(along, across / np.float32(rng.uniform(0.6, 1.0))) / np.float32(radius)
        return reach < 1, angle + turn, reach
    if kind == "petal":
        lobes, depth = rng.integers(4, 9), rng.uniform(0.08, 0.3)
        swing = np.cos(lobes * angle + turn)
    else:
        points, depth = rng.integers(4, 7), rng.uniform(0.25, 0.45)
        phase = ((angle + turn) * (points / (2 * np.pi))) % 1
        swing = 4 * np.abs(phase - 0.5) - 1  # a triangle wave, 1 at the points and -1 between them
    reach = np.hypot(x, y) / (radius * (1 + depth * swing)).astype(np.float32)
    return reach < 1, angle + turn, reach


def _smooth_noise(rng: np.random.Generator, size: int, cells: int, channels: int = 1) -> np.ndarray:
    """White noise on (cells+1)^2 knots, bilinear between them with knots on the corners; [size, size, channels]."""
    knots = rng.standard_normal((channels, cells + 1, cells + 1), np.float32)
    weights = _bilinear_weights(size, cells)
    return np.moveaxis(weights @ knots @ weights.T, 0, -1)


@lru_cache
def _bilinear_weights(size: int, cells: int) -> np.ndarray:
    """[size, cells+1]; row p holds what each knot contributes to pixel p."""
    position = np.linspace(0, cells, size, dtype=np.float32)[:, None]
    return np.maximum(0, 1 - np.abs(position - np.arange(cells + 1, dtype=np.float32)))


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _box_average(picture: np.ndarray) -> np.ndarray:
    """[2R, 2R, C] -> [R, R, C]."""
    size, _, channels = picture.shape
    half = size // OVERSAMPLING
    return picture.reshape(half, OVERSAMPLING, half, OVERSAMPLING, channels).mean((1, 3))
