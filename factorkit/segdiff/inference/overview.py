"""The overview of a segmented folder: its first images beside their regions and masks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from factorkit.data.files import escape_name
from factorkit.report.image_grid import Caption, draw_image_grid, overlay_regions, palette
from factorkit.utils.output_record import OutputRecord

OVERVIEW = "overview.png"
OVERVIEW_IMAGES = 32  # at most
OVERVIEW_CELL = 128  # pixels a side


def name_overview(record: OutputRecord, inputs: Sequence[str], command: str = "") -> tuple[str, str]:
    """Return the name of an overview and what it shows; one that shows other images keeps its name.

    Args:
        inputs: all images of a call; the overview shows the first ones.
        command: what is done with them, if not segmenting.
    """
    known, path = set(inputs), PurePosixPath(OVERVIEW)

    def is_outdated(former: str) -> bool:
        paths = former.removeprefix(command).split("\n")
        return former.startswith(command) and all(name in known or not os.path.lexists(name) for name in paths)

    shown = command + "\n".join(inputs[:OVERVIEW_IMAGES])
    return f"{record.distinct_stem(path.stem, shown, is_outdated)}{path.suffix}", shown


def draw_overview_row(image: Image.Image, masks: np.ndarray) -> list[np.ndarray]:
    """Scale an image, its regions and its masks (uint8 [K, H, W]) to a cell; small ones by whole factors."""
    longest = max(image.size)
    scale = OVERVIEW_CELL / longest if longest > OVERVIEW_CELL else OVERVIEW_CELL // longest
    width, height = (max(1, round(side * scale)) for side in image.size)

    def resize(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((width, height), Image.Resampling.BOX))

    small, small_masks = resize(image), np.stack([resize(Image.fromarray(mask)) for mask in masks])
    return [small, overlay_regions(small, small_masks.argmax(0)), *small_masks]


def draw_overview(rows: Mapping[int, list[np.ndarray]], names: Sequence[str], num_regions: int) -> Image.Image:
    """Draw rows of :func:`draw_overview_row`, by the number of their image, under the names of all images."""
    colors = palette(num_regions)
    columns: list[Caption] = ["image", "regions", *((f"mask {k}", colors[k]) for k in range(len(colors)))]
    order = sorted(rows)
    captions = [escape_name(PurePosixPath(names[i]).name)[-24:] for i in order]
    return draw_image_grid([rows[i] for i in order], columns, captions, cell=OVERVIEW_CELL)
