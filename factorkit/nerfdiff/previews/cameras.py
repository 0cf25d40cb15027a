"""Drawings of camera positions: on a sphere around an object, or in the plane of forward-facing cameras."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from factorkit.report.image_grid import INK_COLOR, PAPER_COLOR, palette

SIDE = 240  # pixels of each half of a drawing
SPHERE_ELEVATION = 25.0  # degrees above the horizon from which the sphere is drawn
PLANE_FILL = 0.8  # share of a half's side that the camera positions fill
DIRECTION_LENGTH = 0.12  # of the line that shows a viewing direction, in units of a half's side
FROM_BEHIND = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))  # world axes that point right and up in a half
FROM_ABOVE = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))

_SUPERSAMPLING = 3  # for smooth edges
_LARGE = SIDE * _SUPERSAMPLING
_LINE_COLOR, _CANDIDATE_COLOR = (205, 205, 200), (150, 150, 150)
_CAMERA_COLOR, _TRUE_COLOR = (tuple(int(x) for x in color) for color in palette(2))
_CANDIDATE_RADIUS, _CAMERA_RADIUS, _TRUE_RADIUS = 1.2, 2.2, 3.2  # pixels

Color = tuple[int, ...]


def draw_sphere(cameras: Tensor, candidates: Tensor | None = None, true: Tensor | None = None) -> Image.Image:
    """Draw cameras around an object as dots on a sphere (thesis, fig. 3.7), in an image of 480 x 240 pixels.

    Each dot is opposite to the camera's viewing direction; z is up. The sphere is seen from 25 degrees above the
    horizon on the left and from above on the right; dots behind it are pale.

    Args:
        cameras: poses [V, 4, 4], blue.
        candidates: poses [..., 4, 4], small and grey.
        true: poses [V, 4, 4] in the same coordinates, orange rings, each with a line to its camera.
    """
    image = Image.new("RGB", (2 * SIDE, SIDE), PAPER_COLOR)
    for i, elevation in enumerate((SPHERE_ELEVATION, 90.0)):
        image.paste(draw_hemisphere(elevation, cameras, candidates, true), (i * SIDE, 0))
    return image


def draw_plane(cameras: Tensor, candidates: Tensor | None = None) -> Image.Image:
    """Draw forward-facing cameras from behind on the left and from above on the right, in 480 x 240 pixels.

    A line leads from each camera along its viewing direction; from above, depth points up.

    Args:
        cameras: poses [V, 4, 4], blue.
        candidates: poses [..., 4, 4], small and grey.
    """
    plane = PlaneDrawing(torch.cat([_flatten(x) for x in (cameras, candidates) if x is not None]))
    image = Image.new("RGB", (2 * SIDE, SIDE), PAPER_COLOR)
    for i, axes in enumerate((FROM_BEHIND, FROM_ABOVE)):
        image.paste(plane.draw(axes, cameras, candidates), (i * SIDE, 0))
    return image


class PlaneDrawing:
    """Drawings of forward-facing cameras at one scale, which leaves room for all of ``poses`` [..., 4, 4]."""

    def __init__(self, poses: Tensor):
        positions = _flatten(poses)[:, :3, 3]
        low, high = positions.amin(0), positions.amax(0)
        self.center = (low + high) / 2
        self.scale = PLANE_FILL / max(float((high - low).max()), 1e-6)

    def draw(
        self, axes: tuple[tuple[float, ...], ...], cameras: Tensor, candidates: Tensor | None = None
    ) -> Image.Image:
        """Draw one projection, 240 x 240 pixels, onto the world axes that point right and up."""
        projection = torch.tensor(axes, dtype=torch.float64).T
        image = Image.new("RGB", (_LARGE, _LARGE), PAPER_COLOR)
        draw = ImageDraw.Draw(image)

        def to_pixels(right_up: Tensor) -> Tensor:
            return _LARGE * right_up * right_up.new_tensor([1.0, -1.0])

        def project(poses: Tensor) -> Tensor:
            return _LARGE / 2 + to_pixels((_flatten(poses)[:, :3, 3] - self.center) @ projection * self.scale)

        def dots(points: Tensor, color: Color, radius: float) -> None:
            for x, y in points.tolist():
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)

        draw.line((0, _LARGE / 2, _LARGE, _LARGE / 2), fill=_LINE_COLOR, width=_SUPERSAMPLING)
        draw.line((_LARGE / 2, 0, _LARGE / 2, _LARGE), fill=_LINE_COLOR, width=_SUPERSAMPLING)
        if candidates is not None:
            dots(project(candidates), _CANDIDATE_COLOR, _CANDIDATE_RADIUS * _SUPERSAMPLING)
        positions = project(cameras)
        ends = positions + to_pixels(DIRECTION_LENGTH * -_flatten(cameras)[:, :3, 2] @ projection)
        for start, end in zip(positions.tolist(), ends.tolist(), strict=True):
            draw.line((*start, *end), fill=_CAMERA_COLOR, width=2 * _SUPERSAMPLING)
        dots(positions, _CAMERA_COLOR, _CAMERA_RADIUS * _SUPERSAMPLING)
        return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def draw_hemisphere(
    elevation: float, cameras: Tensor, candidates: Tensor | None = None, true: Tensor | None = None
) -> Image.Image:
    """Draw :func:`draw_sphere` from one elevation in degrees, in 240 x 240 pixels."""
    angle = math.radians(elevation)
    image = Image.new("RGB", (_LARGE, _LARGE), PAPER_COLOR)
    draw = ImageDraw.Draw(image)
    radius, center = 0.45 * _LARGE, _LARGE / 2
    to_viewer = np.array([0.0, -math.cos(angle), math.sin(angle)])
    upwards = np.array([0.0, math.sin(angle), math.cos(angle)])

    def project(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return pixels [N, 2] of directions [N, 3], and which are on the visible side."""
        right, up = directions[:, 0], directions @ upwards
        return np.stack([center + radius * right, center - radius * up], axis=1), directions @ to_viewer >= 0

    def line(points: np.ndarray, color: Color) -> None:
        pixels, visible = project(points)
        for i in range(len(points) - 1):
            if visible[i]:
                draw.line([*pixels[i], *pixels[i + 1]], fill=color, width=_SUPERSAMPLING)

    def dots(directions: np.ndarray, color: Color, radius: float, ring: bool = False) -> None:
        pixels, visible = project(directions)
        pale = tuple((a + 2 * b) // 3 for a, b in zip(color, _LINE_COLOR, strict=True))
        size = radius * _SUPERSAMPLING
        for front in (False, True):
            shade = color if front else pale
            for x, y in pixels[visible == front]:
                box = (x - size, y - size, x + size, y + size)
                if ring:
                    draw.ellipse(box, outline=shade, width=_SUPERSAMPLING)
                else:
                    draw.ellipse(box, fill=shade)

    outline = (center - radius, center - radius, center + radius, center + radius)
    draw.ellipse(outline, outline=_LINE_COLOR, width=_SUPERSAMPLING)
    turn = np.linspace(0, 2 * math.pi, 97)
    for height in (-0.5, 0.0, 0.5):
        flat = math.sqrt(1 - height**2)
        circle = np.stack([flat * np.cos(turn), flat * np.sin(turn), np.full_like(turn, height)], axis=1)
        line(circle, INK_COLOR if height == 0 else _LINE_COLOR)
    for meridian in range(6):
        azimuth = meridian * math.pi / 6
        line(
            np.stack([np.cos(turn) * math.cos(azimuth), np.cos(turn) * math.sin(azimuth), np.sin(turn)], axis=1),
            _LINE_COLOR,
        )
    if candidates is not None:
        dots(_backward_axes(candidates), _CANDIDATE_COLOR, _CANDIDATE_RADIUS)
    axes = _backward_axes(cameras)
    if true is not None:
        for start, end in zip(_backward_axes(true), axes, strict=True):
            share = np.linspace(0, 1, 17)[:, None]
            arc = (1 - share) * start + share * end
            line(arc / np.linalg.norm(arc, axis=1, keepdims=True).clip(1e-6), _TRUE_COLOR)
        dots(_backward_axes(true), _TRUE_COLOR, _TRUE_RADIUS, ring=True)
    dots(axes, _CAMERA_COLOR, _CAMERA_RADIUS)
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def _flatten(poses: Tensor) -> Tensor:
    return poses.detach().cpu().double().reshape(-1, 4, 4)


def _backward_axes(poses: Tensor) -> np.ndarray:
    """Return directions [N, 3] opposite to the viewing directions of cameras [..., 4, 4]."""
    return _flatten(poses)[:, :3, 2].numpy()
