"""Procedural rooms: a floor, a wall and an object, each of three parts, with exact labels at both levels.

Modelled on 3D Shapes (Burgess and Kim 2018), on which the dissertation shows its hierarchy. Each thing has its own
third of the hue circle, so that hue identifies floor and wall; its parts differ in brightness and a little in hue. The
borders of things and parts vary between images, so that position alone predicts little.
Each image is drawn at twice its resolution and box-averaged; lengths are fractions of the image's side.
"""

from __future__ import annotations

import colorsys

import numpy as np

from factorkit.data.procedural.flowers import OVERSAMPLING, box_average, check_arguments, smooth_noise

THINGS = ("floor", "wall", "object")
PARTS = (("ground", "rug", "path"), ("plain", "window", "pillar"), ("body", "lid", "band"))
NESTING = (3, 3)  # number of things, and of parts per thing
SHAPES = ("box", "cylinder", "cone", "dome")
HUES, HUE_SPREAD = (0.09, 0.43, 0.77), 0.03  # mean hue of each thing, and maximum deviation in one image
PART_HUE_OFFSETS = (0.0, -0.06, 0.06)
PART_BRIGHTNESS = (0.75, 0.45, 1.0)


def draw_rooms(count: int, resolution: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw rooms with the labels of their parts.

    Image i depends only on (seed, i), so a larger count leaves earlier images unchanged.

    Returns:
        images: uint8 [count, resolution, resolution, 3].
        labels: uint8 [count, resolution, resolution], 3 * thing + part, in the order of `THINGS` and `PARTS`: the
            label that covers most of the pixel.

    Raises:
        ConfigError: a negative count or seed, or a resolution below 1.
    """
    check_arguments("draw_rooms", count, resolution, seed)
    images = np.empty((count, resolution, resolution, 3), np.uint8)
    labels = np.empty((count, resolution, resolution), np.uint8)
    for i in range(count):
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
        fine_labels = _draw_labels(rng, OVERSAMPLING * resolution)
        image = _paint(rng, fine_labels)
        images[i] = np.rint(255 * box_average(np.clip(image, 0, 1)))
        labels[i] = box_average(np.eye(9, dtype=np.float32)[fine_labels]).argmax(-1)
    return images, labels


def _draw_labels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return the labels of one room, int [size, size]."""
    pixels = (np.arange(size) + 0.5) / size
    x, y = pixels[None, :], pixels[:, None]
    middle = rng.uniform(0.3, 0.7)
    horizon = middle + rng.uniform(-0.25, 0.25) * (x - 0.5)
    floor = y > horizon
    labels = np.where(floor, _label("floor", "ground"), _label("wall", "plain"))
    centre, half_width = rng.uniform(0.1, 0.9), rng.uniform(0.11, 0.15)
    labels = _fill(labels, ~floor & (abs(x - centre) < half_width), "wall", "pillar")
    centre = (centre + rng.uniform(0.35, 0.65)) % 1
    half_width, half_height = rng.uniform(0.16, 0.22), 0.38 * middle
    window = (abs(x - centre) < half_width) & (abs(y - middle * rng.uniform(0.35, 0.6)) < half_height)
    labels = _fill(labels, ~floor & window, "wall", "window")
    centre, slope, half_width = rng.uniform(0.1, 0.9), rng.uniform(-0.6, 0.6), rng.uniform(0.11, 0.15)
    labels = _fill(labels, floor & (abs(x - centre - slope * (y - 0.8)) < half_width), "floor", "path")
    centre = (centre + rng.uniform(0.35, 0.65)) % 1
    half_width, half_depth = rng.uniform(0.2, 0.28), 0.42 * (1 - middle)
    distance = ((x - centre) / half_width) ** 2 + ((y - 1 + (1 - middle) * rng.uniform(0.3, 0.5)) / half_depth) ** 2
    labels = _fill(labels, floor & (distance < 1), "floor", "rug")
    return _draw_object(rng, labels, x, y, middle)


def _draw_object(
    rng: np.random.Generator, labels: np.ndarray, x: np.ndarray, y: np.ndarray, horizon: float
) -> np.ndarray:
    """Draw one of `SHAPES` over the labels, with a lid on top and a band around it."""
    half_width, height = rng.uniform(0.19, 0.28), rng.uniform(0.42, 0.6)
    centre, foot = rng.uniform(0.2, 0.8), rng.uniform(max(0.6, horizon + 0.08), 0.95)
    level = (foot - y) / height  # 0 at the foot, 1 at the top
    shape = rng.choice(SHAPES)
    if shape == "cone":
        extent = half_width * (1.15 - 0.75 * level)
    elif shape == "dome":
        extent = half_width * np.sqrt(np.clip(1 - np.clip(level, 0, 1) ** 3, 0, 1))
    else:
        extent = half_width + 0 * level
    round_foot = 0 if shape == "box" else 0.1 * np.clip(1 - ((x - centre) / half_width) ** 2, 0, 1)
    inside = (abs(x - centre) < extent) & (level > -round_foot) & (level < 1)
    labels = _fill(labels, inside, "object", "body")
    labels = _fill(labels, inside & (level > rng.uniform(0.64, 0.72)), "object", "lid")
    low = rng.uniform(0.12, 0.3)
    return _fill(labels, inside & (level > low) & (level < low + rng.uniform(0.22, 0.3)), "object", "band")


def _paint(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Return colours float32 [size, size, 3], not clipped to [0, 1]: hue by thing, brightness by part."""
    size = len(labels)
    colours = np.empty((9, 3), np.float32)
    for thing, mean_hue in enumerate(HUES):
        hue = mean_hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
        saturation, value = rng.uniform(0.75, 0.95), rng.uniform(0.88, 1.0)
        for part, (offset, factor) in enumerate(zip(PART_HUE_OFFSETS, PART_BRIGHTNESS, strict=True)):
            brightness = value * factor * rng.uniform(0.95, 1.05)
            colours[3 * thing + part] = colorsys.hsv_to_rgb(hue + offset, saturation, min(1.0, brightness))
    image = colours[labels] * (1 + 0.06 * smooth_noise(rng, size, 3))
    return image + 0.02 * rng.standard_normal(image.shape, np.float32)


def _label(thing: str, part: str) -> int:
    number = THINGS.index(thing)
    return 3 * number + PARTS[number].index(part)


def _fill(labels: np.ndarray, area: np.ndarray, thing: str, part: str) -> np.ndarray:
    return np.where(area, _label(thing, part), labels)
