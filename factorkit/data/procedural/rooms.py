"""Procedural rooms: scenes of floor, wall and object, each of three parts, with exact labels at both levels.

Made after 3D Shapes (Burgess and Kim 2018), on which the dissertation shows its hierarchy: one object on a floor
before a wall. Each thing has a third of the colour circle to itself (which hue is floor and which is wall would else be
for every picture to say), and its parts differ in shade and a little in hue. Where a thing ends and where its parts are
varies from picture to picture: with a horizon that hardly moves, a mask that never looks is right at most pixels.
Each picture is drawn at twice its resolution and box-averaged; lengths are fractions of the picture's side.
"""

from __future__ import annotations

import colorsys

import numpy as np

from factorkit.data.procedural.flowers import OVERSAMPLING, _box_average, _smooth_noise, check_drawable

THINGS = ("floor", "wall", "object")
PARTS = (("ground", "rug", "path"), ("plain", "window", "pillar"), ("body", "lid", "band"))
NESTING = (3, 3)  # things, and parts of each
SHAPES = ("box", "cylinder", "cone", "dome")
HUES, HUE_SPREAD = (0.09, 0.43, 0.77), 0.03  # of the things, and how far a picture's may lie to either side
TURNS = (0.0, -0.06, 0.06)  # of a thing's hue, for each of its parts
SHADES = (0.75, 0.45, 1.0)  # brightness of a thing's parts, give or take a little


def draw_rooms(count: int, resolution: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw rooms with the parts they are made of.

    Picture i depends on (seed, i) alone: asking for more pictures leaves the earlier ones as they were.

    Returns:
        images: uint8 [count, resolution, resolution, 3].
        labels: uint8 [count, resolution, resolution], 3 * thing + part, in the order of `THINGS` and `PARTS`: the
            label that covers most of the pixel.

    Raises:
        ConfigError: a negative count or seed, or a resolution below 1.
    """
    check_drawable("rooms", count, resolution, seed)
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
    middle = rng.uniform(0.3, 0.7)
    horizon = middle + rng.uniform(-0.25, 0.25) * (x - 0.5)
    floor = y > horizon
    labels = np.where(floor, _code("floor", "ground"), _code("wall", "plain"))
    at, wide = rng.uniform(0.1, 0.9), rng.uniform(0.11, 0.15)
    labels = _put(labels, ~floor & (abs(x - at) < wide), "wall", "pillar")
    at, wide, high = (at + rng.uniform(0.35, 0.65)) % 1, rng.uniform(0.16, 0.22), 0.38 * middle
    window = (abs(x - at) < wide) & (abs(y - middle * rng.uniform(0.35, 0.6)) < high)
    labels = _put(labels, ~floor & window, "wall", "window")
    at, slant, wide = rng.uniform(0.1, 0.9), rng.uniform(-0.6, 0.6), rng.uniform(0.11, 0.15)
    labels = _put(labels, floor & (abs(x - at - slant * (y - 0.8)) < wide), "floor", "path")
    at, across, deep = (at + rng.uniform(0.35, 0.65)) % 1, rng.uniform(0.2, 0.28), 0.42 * (1 - middle)
    rug = ((x - at) / across) ** 2 + ((y - 1 + (1 - middle) * rng.uniform(0.3, 0.5)) / deep) ** 2 < 1
    labels = _put(labels, floor & rug, "floor", "rug")
    return _object(rng, labels, x, y, middle)


def _object(rng: np.random.Generator, labels: np.ndarray, x: np.ndarray, y: np.ndarray, horizon: float) -> np.ndarray:
    """One of `SHAPES` upon what is there: a lid above, a band around it."""
    half, tall = rng.uniform(0.19, 0.28), rng.uniform(0.42, 0.6)
    centre, foot = rng.uniform(0.2, 0.8), rng.uniform(max(0.6, horizon + 0.08), 0.95)
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
    labels = _put(labels, inside & (up > rng.uniform(0.64, 0.72)), "object", "lid")
    low = rng.uniform(0.12, 0.3)
    return _put(labels, inside & (up > low) & (up < low + rng.uniform(0.22, 0.3)), "object", "band")


def _paint(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Colours float32 [size, size, 3], about [0, 1] but not clipped: hues by thing, shades by part."""
    size = len(labels)
    colours = np.empty((9, 3), np.float32)
    for thing, usual in enumerate(HUES):
        hue = usual + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
        saturation, value = rng.uniform(0.75, 0.95), rng.uniform(0.88, 1.0)
        for part, (turn, shade) in enumerate(zip(TURNS, SHADES, strict=True)):
            brightness = value * shade * rng.uniform(0.95, 1.05)
            colours[3 * thing + part] = colorsys.hsv_to_rgb(hue + turn, saturation, min(1.0, brightness))
    picture = colours[labels] * (1 + 0.06 * _smooth_noise(rng, size, 3))
    return picture + 0.02 * rng.standard_normal(picture.shape, np.float32)


def _code(thing: str, part: str) -> int:
    number = THINGS.index(thing)
    return 3 * number + PARTS[number].index(part)


def _put(labels: np.ndarray, where: np.ndarray, thing: str, part: str) -> np.ndarray:
    return np.where(where, _code(thing, part), labels)
