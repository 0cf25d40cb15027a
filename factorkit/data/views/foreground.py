"""Foreground masks and loss masks in folders of their own, matched to views by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from factorkit.data.files import fold_stem, format_examples
from factorkit.data.masks import MASK_KEYS, match_masks, to_opacity
from factorkit.data.open import open_source
from factorkit.data.sources import FileSource, Source
from factorkit.data.views.loading import LazyView, SceneSettings
from factorkit.utils.errors import DataError, format_count


def add_masks(
    views: Sequence[LazyView], settings: SceneSettings, masks: Any, loss_masks: Any, upright: bool = False
) -> tuple[list[LazyView], tuple[str, ...]]:
    """Add masks to the views of a split.

    Args:
        views: of a split.
        settings: of the whole scene, whose names the masks must match.
        masks: foreground masks, anything that :func:`factorkit.data.open_source` accepts, or None.
        loss_masks: masks of value 0 where a view is not scored, or None.
        upright: whether the EXIF orientation of the masks is applied, as it is to images without cameras.

    Returns:
        The views, and sentences on what was read.

    Raises:
        DataError: masks that match no view, or views of the split without a mask while others have one.
    """
    notes = settings.notes
    names = list(settings.names) or [view.name for view in views]
    result = list(views)
    for source, field, meaning in (
        (masks, "read_mask", "foreground mask"),
        (loss_masks, "read_loss_mask", "loss mask"),
    ):
        if source is None:
            continue
        opened = open_source(source, keys=MASK_KEYS)
        mask_of = _match(names, opened)
        missing = [view.name for view in result if _stem(view.name) not in mask_of]
        if missing:
            raise DataError(
                f"{_describe(source)}: no mask for {len(missing)} of {format_count(len(result), 'view')}, the first is "
                f'{format_examples(missing, 1)}. Add the masks, or give masks="none" (--masks none) to use none.'
            )
        if field == "read_loss_mask":
            result = [
                replace(v, read_loss_mask=partial(_read_scored, opened, mask_of[_stem(v.name)], upright))
                for v in result
            ]
        else:
            result = [
                replace(v, read_mask=partial(_read_opacity, opened, mask_of[_stem(v.name)], upright)) for v in result
            ]
        effect = "transparent" if field == "read_mask" else "not scored"
        notes += (f"{_describe(source)}: {format_count(len(opened), meaning)} (0 is {effect}).",)
    return result, notes


def _match(names: Sequence[str], masks: Source) -> dict[str, int]:
    """Return the mask's index for the stem of each view's name that has one."""
    folder = common_folder(names)
    images = FileSource(Path(), [name[len(folder) :] for name in names])
    numbers = {_number(name): j for j, name in enumerate(masks.names)}
    is_numbered = None not in numbers and len(numbers) == len(masks)
    if is_numbered and not {fold_stem(name) for name in images.names} & {fold_stem(name) for name in masks.names}:
        # NeuS's image/000003.png has mask/003.png.
        return {_stem(name): numbers[_number(name)] for name in names if _number(name) in numbers}
    return {_stem(names[i]): j for i, j in match_masks(images, masks)}


def _number(name: str) -> int | None:
    """Return the number that is a file's whole stem, or None."""
    stem = PurePosixPath(name).stem
    return int(stem) if stem.isdecimal() else None


def common_folder(names: Sequence[str]) -> str:
    """Return the folder that all names begin with, with a slash; masks repeat only the folders below it."""
    parts = [PurePosixPath(name).parent.parts for name in names]
    common: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    return "".join(f"{part}/" for part in common)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix() if PurePosixPath(name).suffix else name


def _describe(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "masks"


def _read_opacity(masks: Source, index: int, upright: bool) -> np.ndarray:
    return to_opacity(masks.decode(index), masks.names[index], upright)


def _read_scored(masks: Source, index: int, upright: bool) -> np.ndarray:
    return (_read_opacity(masks, index, upright) > 0).astype(np.float32)
