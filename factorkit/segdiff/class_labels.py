"""Classes of a run: which ones a user asks for, and how they are shown."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from factorkit.report.image_grid import draw_image_grid
from factorkit.segdiff.previews import outlined
from factorkit.utils.errors import ConfigError


def chosen_labels(classes: Any, names: Sequence[str], count: int, guidance: float = 1.0) -> Tensor | None:
    """Labels int64 [count] for `classes`, taken in turn: "all", a name, a label, or a list of names, labels and None.

    Raises:
        ConfigError: a class there is not, any at all where `names` is empty, an empty list, or guidance without one.
    """
    if not 0 <= guidance < math.inf:
        raise ConfigError(f"guidance={guidance} must be 0 or more; 1 does not guide, 2 to 4 is usual")
    if classes is None:
        if guidance != 1:
            raise ConfigError(f"guidance={guidance} leads towards classes; say which, classes='all' for each in turn")
        return None
    if not names:
        raise ConfigError(
            "this run knows no classes; leave classes= and guidance= out, or train one with train_segdiff(classes=...)"
        )
    if isinstance(classes, str) and classes == "all":
        chosen = list(range(len(names)))
    else:
        asked = [classes] if isinstance(classes, (str, int, np.integer)) else list(classes)
        chosen = [label_of(one, names) for one in asked]
    if not chosen:
        raise ConfigError("classes= is an empty list; name a class, or leave it out")
    return torch.tensor(chosen, dtype=torch.int64).repeat(-(-count // len(chosen)))[:count]


def label_of(asked: Any, names: Sequence[str]) -> int:
    """The label of a class given by name or number, -1 for None. Raises ConfigError for one that is not there."""
    if asked is None:
        return -1
    if isinstance(asked, str) and asked in names:
        return list(names).index(asked)
    if isinstance(asked, str):
        near = difflib.get_close_matches(asked, names, n=3)
        listed = " or ".join(near) if near else ", ".join(names)
        raise ConfigError(
            f"there is no class {asked!r} in this run; {'did you mean' if near else 'there are'} {listed}"
        )
    if not isinstance(asked, (int, np.integer)) or not 0 <= asked < len(names):
        raise ConfigError(f"there is no class {asked!r} in this run; labels are 0 to {len(names) - 1}")
    return int(asked)


def class_sheet(images: np.ndarray, masks: np.ndarray, classes: Sequence[str | None], per_line: int = 6) -> Image.Image:
    """A row for each class: its first `per_line` images, each beside its regions.

    images: uint8 [N, H, W, 3]; masks: float [N, K, H, W] in [0, 1]; classes: what each image is of. With a single
    region the images stand alone.
    """
    rows, captions = [], []
    for name in dict.fromkeys(classes):
        row = []
        for n in [i for i, one in enumerate(classes) if one == name][:per_line]:
            row += [images[n]] if masks.shape[1] == 1 else [images[n], outlined(images[n], masks[n].argmax(axis=0))]
        rows.append(row)
        captions.append(name or "any")
    return draw_image_grid(rows, row_captions=captions)
