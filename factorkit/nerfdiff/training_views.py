"""The training views as they were given, kept in the run folder: for scoring, for exports and for the viewer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.utils.atomic import replacing
from factorkit.utils.errors import CheckpointError
from factorkit.utils.images import uint8_to_unit, unit_to_uint8
from factorkit.utils.safe_reading import read_arrays

GIVEN = "views.npz"


def keep_views(folder: Path, views: Views) -> None:
    """Write pictures (8 bits a colour), names, intrinsics and, where they came with them, true poses.

    Raises:
        CheckpointError: the file cannot be written.
    """
    arrays = {
        "images": unit_to_uint8(views.images),
        "names": np.array(views.names),
        "intrinsics": views.intrinsics.numpy(),
        "layout": np.array(views.layout),
    }
    for name in ("poses", "background"):
        value = getattr(views, name)
        if value is not None:
            arrays[name] = value.numpy()
    path = folder / GIVEN
    try:
        with replacing(path) as temporary:
            np.savez_compressed(temporary, **arrays)
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}. Free some space, or give another out=") from error


def kept_views(folder: Path | None) -> Views | None:
    """The views that :func:`keep_views` wrote; None where there are none.

    Raises:
        CheckpointError: the file cannot be read.
    """
    path = None if folder is None else folder / GIVEN
    if path is None or not path.is_file():
        return None
    try:
        found = read_arrays(path)
        optional: dict[str, Tensor] = {k: torch.from_numpy(found[k]) for k in ("poses", "background") if k in found}
        return Views(
            uint8_to_unit(torch.from_numpy(found["images"])),
            [str(name) for name in found["names"]],
            torch.from_numpy(found["intrinsics"]),
            layout=str(found["layout"]),
            **optional,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:  # of shapes, types and names
        raise CheckpointError(f"{path} cannot be read: {error}. The training command again restores it") from error
