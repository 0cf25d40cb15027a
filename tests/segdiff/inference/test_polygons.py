"""Polygons of masks: redrawn they are the mask, exactly without simplification and nearly with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from factorkit.segdiff.inference.polygons import join_holes, ring_area, trace_polygons

draw = pytest.importorskip("skimage.draw")


def redraw(polygons, shape) -> np.ndarray:
    mask = np.zeros(shape, bool)
    for polygon in polygons:
        x, y = join_holes(polygon).T - 0.5  # centres of pixels are at whole numbers there
        mask[draw.polygon(y, x, shape)] = True
    return mask


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def blobs() -> np.ndarray:
    """Two components: one with two holes, one of them around an island, and a slanted bar."""
    image = Image.new("1", (200, 160))
    pen = ImageDraw.Draw(image)
    for box, fill in (((10, 10, 130, 150), 1), ((30, 30, 80, 90), 0), ((45, 45, 62, 70), 1), ((60, 100, 95, 130), 0)):
        pen.ellipse(box, fill=fill)
    pen.polygon([(140, 20), (160, 12), (195, 140), (180, 150)], fill=1)
    return np.array(image)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_trace_any_mask_redraws_to_itself(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.55
    polygons = trace_polygons(mask, 0)
    assert np.array_equal(redraw(polygons, mask.shape), mask)
    area = sum(ring_area(p.outer) + sum(ring_area(hole) for hole in p.holes) for p in polygons)
    assert area == mask.sum()


def test_trace_known_masks_give_known_corners():
    assert trace_polygons(np.zeros((3, 4), bool), 1) == []
    assert trace_polygons(np.zeros((0, 0), bool), 1) == []
    (pixel,) = trace_polygons(np.pad([[True]], ((2, 0), (3, 1))), 5)
    assert pixel.outer.tolist() == [[3, 2], [4, 2], [4, 3], [3, 3]] and pixel.holes == []
    (whole,) = trace_polygons(np.ones((3, 4), bool), 1)
    assert ring_area(whole.outer) == 12 and len(whole.outer) == 4
    assert len(trace_polygons(np.eye(5, dtype=bool), 1)) == 5  # pixels that touch at a corner are apart
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    (frame,) = trace_polygons(ring, 1)
    assert (ring_area(frame.outer), [ring_area(hole) for hole in frame.holes]) == (25, [-1])


def test_trace_largest_component_comes_first_and_owns_its_holes():
    first, second, island = trace_polygons(blobs(), 1)
    assert [len(p.holes) for p in (first, second, island)] == [2, 0, 0]
    assert ring_area(first.outer) > ring_area(second.outer) > ring_area(island.outer)


@pytest.mark.parametrize("tolerance", [0.5, 1, 3])
def test_trace_simplified_has_fewer_corners_and_nearly_the_mask(tolerance):
    mask = blobs()
    exact, simple = trace_polygons(mask, 0), trace_polygons(mask, tolerance)
    assert iou(redraw(simple, mask.shape), mask) >= 0.98
    counts = [sum(len(ring) for p in polygons for ring in (p.outer, *p.holes)) for polygons in (exact, simple)]
    assert counts[1] < (0.5 if tolerance >= 1 else 0.8) * counts[0]


@pytest.mark.parametrize("radius", [1, 2, 4, 8, 20])
def test_trace_small_disc_at_tolerance_one_keeps_its_shape(radius):
    y, x = np.mgrid[:50, :50] - 24.3
    mask = x**2 + y**2 <= radius**2
    assert iou(redraw(trace_polygons(mask, 1), mask.shape), mask) >= 0.97
