"""Pictures of cameras and scenes: where the cameras stand, what they see, how far away it is."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from factorkit.nerfdiff.previews.plane import FROM_BEHIND, Plane
from factorkit.report.image_grid import INK_COLOR, PAPER_COLOR, Caption, draw_image_grid, palette
from factorkit.utils.images import images_to_pixels, unit_to_uint8

MOST = 1 << 22  # depths that tell the range of all
SPHERE = 240  # pixels a side
ELEVATION = 25.0  # degrees above the horizon from which the sphere is seen
_FINE = 3  # drawn so much larger and reduced, for smooth edges
_FAINT = (205, 205, 200)  # meridians, and what lies behind the sphere is drawn towards it
_BLUE, _ORANGE = (tuple(int(x) for x in color) for color in palette(2))


def sphere_picture(chosen: Tensor, candidates: Tensor | None = None, true: Tensor | None = None) -> Image.Image:
    """Where cameras stand as seen from the thing they look at: the dissertation's figure 3.7.

    Each camera is a dot on the unit sphere in the direction opposite to where it looks; z is up. The sphere is seen
    from 25 degrees above the horizon on the left and from straight above on the right; dots behind it are pale.

    Args:
        chosen: poses [V, 4, 4], blue.
        candidates: poses [..., 4, 4], small and grey.
        true: poses [V, 4, 4] in the same space, orange rings; a line leads to the chosen one.

    Returns:
        An RGB picture, 480 x 240.
    """
    sides = [_sphere(math.radians(rise), chosen, candidates, true) for rise in (ELEVATION, 90.0)]
    sheet = Image.new("RGB", (2 * SPHERE, SPHERE), PAPER_COLOR)
    for i, side in enumerate(sides):
        sheet.paste(side, (i * SPHERE, 0))
    return sheet


def views_sheet(
    images: Tensor, renders: Tensor, depth: Tensor, opacity: Tensor, names: Sequence[str] | None = None
) -> Image.Image:
    """Pictures beside what the model makes of them: a column for each view; in rows the picture, the render, their
    difference (twice the absolute one, so that a half is white) and the disparity.

    Args:
        images, renders: [V, 3, H, W] in [0, 1].
        depth, opacity: [V, H, W]; the depth is the expected one, not divided by the opacity.
        names: captions.
    """
    apart = 2 * (images - renders).abs()
    near = disparity_image(depth, opacity)
    rows = [images_to_pixels(images), images_to_pixels(renders), images_to_pixels(apart), list(near)]
    return draw_image_grid(rows, names, row_captions=["picture", "render", "2 x difference", "disparity"])


def disparity_image(depth: Tensor, opacity: Tensor) -> np.ndarray:
    """Disparities 1 / depth as uint8 [V, H, W]: the nearest of all is white, the farthest dark grey, nothing is black.

    Args:
        depth, opacity: [V, H, W], the expected depth not divided by the opacity.
    """
    seen = opacity > 0.5
    inverse = torch.where(seen, opacity / depth.clamp_min(1e-6), torch.nan)
    if not seen.any():
        return np.zeros(tuple(depth.shape), np.uint8)
    # A stray nearest pixel should not take all the range.
    known = inverse[seen]
    known = known[:: 1 + known.numel() // MOST]
    low, high = known.quantile(0.01), known.quantile(0.99)
    shade = 0.15 + 0.85 * (inverse - low) / (high - low).clamp_min(1e-6 * high)
    return unit_to_uint8(shade.clamp(0.15, 1).nan_to_num(0))


def novel_sheet(
    frames: Sequence[Tensor],
    cameras: Sequence[Tensor],
    times: Sequence[int],
    noisy: Sequence[Tensor] | None = None,
    layout: str = "object",
) -> Image.Image:
    """Views as they take shape out of noise, and where their cameras are (the dissertation's figure 3.9).

    Args:
        frames: S tensors [n, 3, H, W] in [0, 1], the clean images that the steps see.
        cameras: S tensors of poses [n, 4, 4].
        times: the S time steps.
        noisy: S tensors [n, 3, H, W] in [0, 1], shown above the clean ones.
        layout: "object" or "forward".
    """
    plane = Plane(torch.cat(list(cameras)))

    def camera(pose: Tensor) -> np.ndarray:
        if layout == "object":
            return np.asarray(_sphere(math.radians(ELEVATION), pose, None, None))
        return np.asarray(plane.half(FROM_BEHIND, pose))

    rows: list[list[np.ndarray]] = []
    captions: list[Caption] = []
    for n in range(len(frames[0])):
        if noisy is not None:
            rows.append([images_to_pixels(x[n : n + 1])[0] for x in noisy])
            captions.append(f"view {n}, noisy")
        rows.append([images_to_pixels(x[n : n + 1])[0] for x in frames])
        captions.append(f"view {n}")
        rows.append([camera(poses[n : n + 1]) for poses in cameras])
        captions.append("its camera")
    return draw_image_grid(rows, [f"t = {t}" for t in times], captions, cell=SPHERE // 2)


def _sphere(rise: float, chosen: Tensor, candidates: Tensor | None, true: Tensor | None) -> Image.Image:
    side = SPHERE * _FINE
    sheet = Image.new("RGB", (side, side), PAPER_COLOR)
    draw = ImageDraw.Draw(sheet)
    radius, middle = 0.45 * side, side / 2
    towards = np.array([0.0, -math.cos(rise), math.sin(rise)])  # from the sphere's middle to the eye
    upwards = np.array([0.0, math.sin(rise), math.cos(rise)])

    def place(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [N, 2] of directions [N, 3], and which lie on the side that is seen."""
        right, up = directions[:, 0], directions @ upwards
        return np.stack([middle + radius * right, middle - radius * up], axis=1), directions @ towards >= 0

    def line(points: np.ndarray, color: tuple[int, ...], width: int) -> None:
        where, before = place(points)
        for i in range(len(points) - 1):
            if before[i]:
                draw.line([*where[i], *where[i + 1]], fill=color, width=width)

    def dots(directions: np.ndarray, color: tuple[int, ...], size: float, ring: bool = False) -> None:
        where, before = place(directions)
        pale = tuple((a + 2 * b) // 3 for a, b in zip(color, _FAINT, strict=True))
        for behind in (True, False):
            for (x, y), front in zip(where, before, strict=True):
                if front != behind:
                    box = (x - size, y - size, x + size, y + size)
                    draw.ellipse(
                        box,
                        **(
                            {"outline": color if front else pale, "width": _FINE}
                            if ring
                            else {"fill": color if front else pale}
                        ),
                    )

    draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), outline=_FAINT, width=_FINE)
    turn = np.linspace(0, 2 * math.pi, 97)
    for height in (-0.5, 0.0, 0.5):
        flat = math.sqrt(1 - height**2)
        circle = np.stack([flat * np.cos(turn), flat * np.sin(turn), np.full_like(turn, height)], axis=1)
        line(circle, INK_COLOR if height == 0 else _FAINT, _FINE)
    for meridian in range(6):
        azimuth = meridian * math.pi / 6
        along = np.stack([np.cos(turn) * math.cos(azimuth), np.cos(turn) * math.sin(azimuth), np.sin(turn)], axis=1)
        line(along, _FAINT, _FINE)
    if candidates is not None:
        dots(_back(candidates), (150, 150, 150), 1.2 * _FINE)
    found = _back(chosen)
    if true is not None:
        for start, end in zip(_back(true), found, strict=True):
            share = np.linspace(0, 1, 17)[:, None]
            arc = (1 - share) * start + share * end
            line(arc / np.linalg.norm(arc, axis=1, keepdims=True).clip(1e-6), _ORANGE, _FINE)
        dots(_back(true), _ORANGE, 3.2 * _FINE, ring=True)
    dots(found, _BLUE, 2.2 * _FINE)
    return sheet.resize((SPHERE, SPHERE), Image.Resampling.BOX)


def _back(poses: Tensor) -> np.ndarray:
    """Directions [N, 3] opposite to where cameras [..., 4, 4] look."""
    return poses.detach().cpu().double()[..., :3, 2].reshape(-1, 3).numpy()
