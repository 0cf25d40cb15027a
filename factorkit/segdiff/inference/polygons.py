"""Polygons of a mask: its borders along the edges of the pixels, simplified.

Coordinates are those of pixel corners: pixel (0, 0) covers the square from (0, 0) to (1, 1). Pixels that touch only at
a corner are separate components.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up: each is a right turn after the one before
MAX_AREA_CHANGE = 0.015  # of a ring by simplification
EXACT_TOLERANCE = 0.25  # pixels; below it the exact corners are used


class Polygon(NamedTuple):
    """A connected component: corners [n, 2] as (x, y), clockwise on the screen; those of holes go the other way."""

    outer: np.ndarray
    holes: list[np.ndarray]


def trace_polygons(mask: np.ndarray, tolerance: float) -> list[Polygon]:
    """Return the components of a mask, bool [H, W], the largest first.

    Args:
        mask: may be empty, then there are none.
        tolerance: a removed corner is at most so many pixels from the line that replaces it; 0 keeps every corner. A
            border is simplified less if the area that changes sides would be more than 1.5% of what it encloses.
    """
    rings, parents = _trace_rings(mask)
    simple = [simplify_ring(ring, tolerance) for ring in rings]
    holes: dict[int, list[np.ndarray]] = {}
    for ring, parent in zip(simple, parents, strict=True):
        if parent >= 0:
            holes.setdefault(parent, []).append(ring)
    outer = [(i, abs(ring_area(rings[i]))) for i, parent in enumerate(parents) if parent < 0]
    return [Polygon(simple[i], holes.get(i, [])) for i, _ in sorted(outer, key=lambda pair: -pair[1])]


def join_holes(polygon: Polygon) -> np.ndarray:
    """Return one ring [n, 2] of a polygon with holes: a cut of no width leads from the border to each hole.

    The cut runs to the left from the topmost corner of the hole, so that it stays inside the polygon.
    """
    ring = polygon.outer.astype(float)
    starts = [np.lexsort((hole[:, 0], hole[:, 1]))[0] for hole in polygon.holes]
    order = sorted(range(len(starts)), key=lambda i: (polygon.holes[i][starts[i], 1], polygon.holes[i][starts[i], 0]))
    for i in order:
        hole = np.roll(polygon.holes[i], -starts[i], 0).astype(float)
        x, y = hole[0]
        (x1, y1), (x2, y2) = ring.T, np.roll(ring, -1, 0).T
        crossing = np.flatnonzero((np.minimum(y1, y2) <= y) & (y <= np.maximum(y1, y2)) & (y1 != y2))
        at = x1[crossing] + (y - y1[crossing]) * (x2[crossing] - x1[crossing]) / (y2[crossing] - y1[crossing])
        left = np.flatnonzero(at <= x)
        if len(left):
            best = left[at[left].argmax()]
            edge, point = int(crossing[best]), np.array([[at[best], y]])
        else:  # simplification moved the border past the hole
            edge = int(((ring - hole[0]) ** 2).sum(1).argmin())
            point = ring[edge : edge + 1]
        ring = np.concatenate([ring[: edge + 1], point, hole, hole[:1], point, ring[edge + 1 :]])
    return ring


def ring_area(ring: np.ndarray) -> float:
    """Return the area in a ring [n, 2]: positive for borders, negative for holes."""
    x, y = ring.T.astype(float)
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def simplify_ring(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Remove corners of a ring [n, 2] (Douglas and Peucker 1973); see :func:`trace_polygons`."""
    while tolerance >= EXACT_TOLERANCE and len(ring) > 4:
        corners = _select_corners(ring, tolerance)
        if len(corners) > 2 and _changed_area(ring, corners) <= MAX_AREA_CHANGE * abs(ring_area(ring)):
            return ring[corners]
        tolerance /= 2
    return ring


def _changed_area(ring: np.ndarray, corners: np.ndarray) -> float:
    """Return the area between a ring and its simplification, as the sum of what each new line cuts off or adds."""
    closed = np.concatenate([ring, ring[:1]]).astype(float)
    x, y = closed.T
    sums = np.concatenate([[0], np.cumsum(x[:-1] * y[1:] - x[1:] * y[:-1])])
    first, last = corners, np.append(corners[1:], len(ring))  # the first corner is always selected
    back = x[last] * y[first] - x[first] * y[last]
    return float(np.abs(sums[last] - sums[first] + back).sum() / 2)


def _select_corners(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """Return which corners of a ring remain, as indices in order."""
    closed = np.concatenate([ring, ring[:1]]).astype(float)
    middle = int(((ring - ring[0]) ** 2).sum(1).argmax())
    chosen = {0, middle}
    pending = [(0, middle), (middle, len(ring))]
    while pending:
        first, last = pending.pop()
        if last - first < 2:
            continue
        start, along = closed[first], closed[last] - closed[first]
        offsets = closed[first + 1 : last] - start
        share = np.clip(offsets @ along / max(along @ along, 1e-12), 0, 1)
        distances = ((offsets - share[:, None] * along) ** 2).sum(1)
        furthest = int(distances.argmax())
        if distances[furthest] > tolerance**2:
            corner = first + 1 + furthest
            chosen.add(corner)
            pending += [(first, corner), (corner, last)]
    return np.array(sorted(chosen))


def _trace_rings(mask: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
    """Return every border as its corners [n, 2], and for each hole the index of the ring around it, else -1."""
    width = mask.shape[1]
    edges, following = _link_edges(mask)
    ring_of = [-1] * len(edges)
    rings: list[np.ndarray] = []
    links = following.tolist()
    for first in range(len(links)):
        if ring_of[first] >= 0:
            continue
        path, edge = [], first
        while ring_of[edge] < 0:
            ring_of[edge] = len(rings)
            path.append(edge)
            edge = links[edge]
        codes = edges[path]
        turns = codes % 4 != np.roll(codes, 1) % 4
        points = codes[turns] // 4
        rings.append(np.stack([points % (width + 1), points // (width + 1)], 1))
    parents = [-1] * len(rings)
    starts = [np.lexsort((ring[:, 0], ring[:, 1]))[0] for ring in rings]
    corners = [tuple(int(v) for v in ring[start]) for ring, start in zip(rings, starts, strict=True)]
    for i in sorted(range(len(rings)), key=lambda i: (corners[i][1], corners[i][0])):
        if ring_area(rings[i]) > 0:
            continue
        x, y = corners[i]  # the pixel to the left of it is in the component, and so is its run of pixels
        outside = np.flatnonzero(~mask[y, :x])
        left = int(outside[-1]) + 1 if len(outside) else 0
        code = ((y + 1) * (width + 1) + left) * 4 + 3  # the edge on the left of the run leads up
        ring = ring_of[int(np.searchsorted(edges, code))]
        parents[i] = ring if parents[ring] < 0 else parents[ring]
    return rings, parents


def _link_edges(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges between mask and ground, and which edge follows each one.

    An edge has the mask on its right. Its code is 4 times its first corner plus its direction; the codes are sorted.
    """
    width = mask.shape[1] + 1
    inside = np.pad(mask.astype(bool), 1)
    here = inside[1:-1, 1:-1]
    codes = []
    neighbours = (inside[:-2, 1:-1], inside[1:-1, 2:], inside[2:, 1:-1], inside[1:-1, :-2])
    for side, (neighbour, corner) in enumerate(zip(neighbours, ((0, 0), (1, 0), (1, 1), (0, 1)), strict=True)):
        rows, columns = np.nonzero(here & ~neighbour)
        codes.append(((rows + corner[1]) * width + columns + corner[0]) * 4 + side)
    edges = np.sort(np.concatenate(codes))
    direction = edges % 4
    ends = edges // 4 + np.array([dx + dy * width for dx, dy in STEPS])[direction]
    following = np.full(len(edges), -1)
    for turn in (1, 0, 3):  # right first: where four edges meet, the pixels of the mask stay apart
        wanted = ends * 4 + (direction + turn) % 4
        place = np.searchsorted(edges, wanted).clip(max=max(len(edges) - 1, 0))
        following = np.where((following < 0) & (edges[place] == wanted), place, following) if len(edges) else following
    return edges, following
