"""Where forward-facing cameras stand, drawn in their plane."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from factorkit.report.image_grid import PAPER_COLOR, palette

SIDE = 240  # pixels of each half
FILLED = 0.8  # of a half's side, by the cameras' places
TICK = 0.12  # of a half's side: the line that shows where a camera looks
FROM_BEHIND = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))  # what points right and what points up in a half
FROM_ABOVE = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))
_FINE = 3  # drawn so much larger and reduced, for smooth edges
_FAINT, _GREY = (205, 205, 200), (150, 150, 150)
_BLUE = tuple(int(x) for x in palette(1)[0])


class Plane:
    """Pictures to one scale of cameras that face forward.

    Args:
        poses: [..., 4, 4], all that the pictures are to have room for.
    """

    def __init__(self, poses: Tensor):
        places = _flat(poses)[:, :3, 3]
        low, high = places.amin(0), places.amax(0)
        self.middle = (low + high) / 2
        self.scale = FILLED / max(float((high - low).max()), 1e-6)

    def picture(self, chosen: Tensor, candidates: Tensor | None = None) -> Image.Image:
        """As :func:`plane_picture` draws them."""
        sheet = Image.new("RGB", (2 * SIDE, SIDE), PAPER_COLOR)
        for i, axes in enumerate((FROM_BEHIND, FROM_ABOVE)):
            sheet.paste(self.half(axes, chosen, candidates), (i * SIDE, 0))
        return sheet

    def half(self, axes: tuple, chosen: Tensor, candidates: Tensor | None = None) -> Image.Image:
        """One look at them, 240 x 240: ``axes`` are what points right and what points up in it."""
        side, across = SIDE * _FINE, torch.tensor(axes, dtype=torch.float64).T
        sheet = Image.new("RGB", (side, side), PAPER_COLOR)
        draw = ImageDraw.Draw(sheet)

        def drawn(right_up: Tensor) -> Tensor:
            return side * right_up * right_up.new_tensor([1.0, -1.0])

        def places(poses: Tensor) -> Tensor:
            return side / 2 + drawn((_flat(poses)[:, :3, 3] - self.middle) @ across * self.scale)

        def dots(where: Tensor, color: tuple[int, ...], size: float) -> None:
            for x, y in where.tolist():
                draw.ellipse((x - size, y - size, x + size, y + size), fill=color)

        draw.line((0, side / 2, side, side / 2), fill=_FAINT, width=_FINE)
        draw.line((side / 2, 0, side / 2, side), fill=_FAINT, width=_FINE)
        if candidates is not None:
            dots(places(candidates), _GREY, 1.2 * _FINE)
        found = places(chosen)
        ahead = found + drawn(TICK * -_flat(chosen)[:, :3, 2] @ across)
        for start, end in zip(found.tolist(), ahead.tolist(), strict=True):
            draw.line((*start, *end), fill=_BLUE, width=2 * _FINE)
        dots(found, _BLUE, 2.2 * _FINE)
        return sheet.resize((SIDE, SIDE), Image.Resampling.BOX)


def plane_picture(chosen: Tensor, candidates: Tensor | None = None) -> Image.Image:
    """Where forward-facing cameras stand: from behind on the left (x right, y up), from above on the right (x right,
    what lies ahead upwards), to one scale; a line leads from each the way that it looks.

    Args:
        chosen: poses [V, 4, 4], blue.
        candidates: poses [..., 4, 4], small and grey.

    Returns:
        An RGB picture, 480 x 240.
    """
    everything = [_flat(x) for x in (chosen, candidates) if x is not None]
    return Plane(torch.cat(everything)).picture(chosen, candidates)


def _flat(poses: Tensor) -> Tensor:
    return poses.detach().cpu().double().reshape(-1, 4, 4)
