"""Procedural rooms: scenes of floor, wall and object, each of three parts, with exact labels at both levels.

Made after 3D Shapes (Burgess and Kim 2018), on which the dissertation shows its hierarchy: one object on a floor
before a wall, but each in a range of hues of its own (which hue is floor and which is wall would else be for every
picture to say), with parts in shades of it. Each picture is drawn at twice its resolution and box-averaged; lengths are
fractions of the picture's side.
"""

from __future__ import annotations

import colorsys

import numpy as np

from factorkit.data.procedural import OVERSAMPLING, _box_average, _smooth_noise
from factorkit.errors import ConfigError

THINGS = ("floor", "wall", "object")
PARTS = (("ground", "rug", "strip"), ("plain", "window", "wainscot"), ("body", "lid", "band"))
NESTING = (3, 3)  # things, and parts of each
SHAPES = ("box", "cylinder", "cone", "dome")
HUES, HUE_SPREAD = (0.09, 0.43, 0.77), 0.07  # of the things, and how far a picture's may lie to either side
SHADES = (0.75, 0.48, 1.0)  # brightness of a thing's parts, give or take a little


def rooms(count: int, resolution: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw rooms with the parts they are made of.

    Picture i depends on (seed, i) alone: asking for more pictures leaves the earlier ones as they were.

    Returns:
        images: uint8 [count, resolution, resolution, 3].
        labels: uint8 [count, resolution, resolution], 3 * thing + part, in the order of `THINGS` and `PARTS`: the
            label that covers most of the pixel.

    Raises:
        ConfigError: a negative count or seed, or a resolution below 1.
    """
    if count < 0 or seed < 0 or resolution < 1:
        raise ConfigError(
            f"rooms(count={count}, resolution={resolution}, seed={seed}): "
            "count and seed must be 0 or more, resolution 1 or more."
        )
    images = np.empty((count, resolution, resolution, 3), np.uint8)
    labels = np.empty((count, resolution, resolution), np.uint8)
    for i in range(count):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
        drawn = _layout(rng, OVERSAMPLING * resolution)
        picture = _paint(rng, drawn)
        images[i] = np.rint(255 * _box_average(np.clip(picture, 0, 1)))
        labels[i] = _box_average(np.eye(9, dtype=np.float32)[drawn]).argmax(-1)
    return images, labels


def _layout(rng: np.random.Generator, size: int) -> np.ndarray:
    """Labels int [size, size] of one room."""
    pixels = (np.arange(size) + 0.5) / size
    x, y = pixels[None, :], pixels[:, None]
    horizon = rng.uniform(0.4, 0.6) + rng.uniform(-0.12, 0.12) * (x - 0.5)
    below = y - horizon  # above 0 on the floor
    labels = np.where(below > 0, _code("floor", "ground"), _code("wall", "plain"))
    labels = _put(labels, (below <= 0) & (below > -rng.uniform(0.08, 0.16)), "wall", "wainscot")
    labels = _put(labels, (below > 0) & (1 - y < rng.uniform(0.08, 0.16)), "floor", "strip")
    wide, high, left, top = rng.uniform(0.2, 0.4), rng.uniform(0.14, 0.22), rng.uniform(0.02, 0.7), rng.uniform(0, 0.1)
    labels = _put(labels, (x > left) & (x < left + wide) & (y > top) & (y < top + high), "wall", "window")
    middle, across = rng.uniform(0.2, 0.8), rng.uniform(0.3, 0.45)
    depth = 1 - (1 - horizon) * rng.uniform(0.35, 0.55)
    rug = ((x - middle) / across) ** 2 + ((y - depth) / 0.14) ** 2 < 1
    labels = _put(labels, rug & (labels == _code("floor", "ground")), "floor", "rug")
    return _object(rng, labels, x, y)


def _object(rng: np.random.Generator, labels: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One of `SHAPES` upon what is there: a lid above, a band around it."""
    half, tall = rng.uniform(0.19, 0.28), rng.uniform(0.42, 0.56)
    centre, foot = rng.uniform(0.28, 0.72), rng.uniform(0.78, 0.92)
    up = (foot - y) / tall  # 0 at the foot, 1 at the top
    shape = rng.choice(SHAPES)
    if shape == "cone":
        reach = half * (1.15 - 0.75 * up)
    elif shape == "dome":
        reach = half * np.sqrt(np.clip(1 - np.clip(up, 0, 1) ** 3, 0, 1))
    else:
        reach = half + 0 * up
    round_foot = 0 if shape == "box" else 0.1 * np.clip(1 - ((x - centre) / half) ** 2, 0, 1)
    inside = (abs(x - centre) < reach) & (up > -round_foot) & (up < 1)
    labels = _put(labels, inside, "object", "body")
    labels = _put(labels, inside & (up > rng.uniform(0.68, 0.78)), "object", "lid")
    low = rng.uniform(0.12, 0.3)
    return _put(labels, inside & (up > low) & (up < low + rng.uniform(0.18, 0.26)), "object", "band")


def _paint(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Colours float32 [size, size, 3], about [0, 1] but not clipped: a hue for each thing, a shade for each part."""
    size = len(labels)
    colours = np.empty((9, 3), np.float32)
    for thing, usual in enumerate(HUES):
        hue = usual + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
        saturation, value = rng.uniform(0.6, 0.95), rng.uniform(0.75, 1.0)
        for part, shade in enumerate(SHADES):
            brightness = value * shade * rng.uniform(0.93, 1.07)
            colours[3 * thing + part] = colorsys.hsv_to_rgb(hue, saturation, min(1.0, brightness))
    picture = colours[labels] * (1 + 0.06 * _smooth_noise(rng, size, 3))
    return picture + 0.02 * rng.standard_normal(picture.shape, np.float32)


def _code(thing: str, part: str) -> int:
    number = THINGS.index(thing)
    return 3 * number + PARTS[number].index(part)


def _put(labels: np.ndarray, where: np.ndarray, thing: str, part: str) -> np.ndarray:
    return np.where(where, _code(thing, part), labels)
