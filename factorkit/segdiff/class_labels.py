"""The labels behind the classes that a user asks a run for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.utils.errors import ConfigError


def select_labels(classes: Any, names: Sequence[str], count: int, guidance: float = 1.0) -> Tensor | None:
    """Return labels int64 [count] for ``classes``, taken in turn; None for no classes.

    Args:
        classes: "all", a name, a label, a list of names, labels and None, or None.
        guidance: scale of the guidance, which needs classes.

    Raises:
        ConfigError: an unknown class, any class if ``names`` is empty, an empty list, or guidance without a class.
    """
    if not 0 <= guidance < math.inf:
        raise ConfigError(f"guidance={guidance} must be 0 or more; 1 does not guide, 2 to 4 is usual")
    if classes is None:
        if guidance != 1:
            raise ConfigError(f"guidance={guidance} needs classes=; use classes='all' for each class in turn")
        return None
    if not names:
        raise ConfigError(
            "this run has no classes; leave out classes= and guidance=, or train with train_segdiff(classes=...)"
        )
    if isinstance(classes, str) and classes == "all":
        labels = list(range(len(names)))
    else:
        requested = [classes] if isinstance(classes, (str, int, np.integer)) else list(classes)
        labels = [find_label(one, names) for one in requested]
    if not labels:
        raise ConfigError("classes= is an empty list; name a class, or leave it out")
    return torch.tensor(labels, dtype=torch.int64).repeat(-(-count // len(labels)))[:count]


def find_label(requested: Any, names: Sequence[str]) -> int:
    """Return the label of a class given by name or number, -1 for None.

    Raises:
        ConfigError: there is no such class.
    """
    if requested is None:
        return -1
    if isinstance(requested, str) and requested in names:
        return list(names).index(requested)
    if isinstance(requested, str):
        near = difflib.get_close_matches(requested, names, n=3)
        hint = f"did you mean {' or '.join(near)}" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"there is no class {requested!r} in this run; {hint}")
    if not isinstance(requested, (int, np.integer)) or not 0 <= requested < len(names):
        raise ConfigError(f"there is no class {requested!r} in this run; labels are 0 to {len(names) - 1}")
    return int(requested)
