"""Settings of earlier versions: stored run folders and checkpoints are read under today's names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from factorkit.utils.errors import CheckpointError

T = TypeVar("T")


class _Changes(NamedTuple):
    names: dict[str, str]  # old name -> name of today
    values: dict[tuple[str, Any], Any]  # (name of today, old value) -> value of today
    removed: dict[str, Any]  # old name -> the only value that today's code still computes
    tensors: dict[str, str]  # old part of a tensor's dotted name -> part of today


_COMMON = {"decay": "lr_decay_fraction", "ema": "ema_decay", "ema_also": "extra_ema_decays"}  # of EngineConfig
_CHANGES: dict[str, _Changes] = {}


def register_renamed_settings(
    models: Iterable[str],
    names: Mapping[str, str],
    values: Mapping[tuple[str, Any], Any] | None = None,
    removed: Mapping[str, Any] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> None:
    """Declare which settings of a model have changed since runs were first stored.

    Args:
        models: values of ``model`` in the stored settings that the table applies to.
        names: old name -> new name.
        values: (new name, old value) -> new value.
        removed: settings that are gone, with the value that the code now always uses.
        tensors: old part of the dotted names of tensors -> new part.
    """
    for model in models:
        _CHANGES[model] = _Changes(dict(names), dict(values or {}), dict(removed or {}), dict(tensors or {}))


def migrate_settings(settings: dict[str, Any], source: object) -> dict[str, Any]:
    """Return stored settings under the names and values of this version; others are left as they are.

    Raises:
        CheckpointError: a removed setting has a value that this version cannot compute; ``source`` is named.
    """
    changes = _CHANGES.get(str(settings.get("model")), _Changes({}, {}, {}, {}))
    migrated: dict[str, Any] = {}
    for name, value in settings.items():
        if name in changes.removed:
            if value != changes.removed[name]:
                raise CheckpointError(
                    f"{source} was written with {name}={value!r} by an earlier factorkit; this version only supports "
                    f"{name}={changes.removed[name]!r}. Use the earlier version, or train again"
                )
            continue
        new = changes.names.get(name) or _COMMON.get(name, name)
        if new != name and new in settings:
            new = name
        if isinstance(value, (str, int, float, type(None))):
            value = changes.values.get((new, value), value)
        migrated[new] = value
    return migrated


def migrate_tensor_names(tensors: Mapping[str, T], model: object) -> dict[str, T]:
    """Return the tensors of a stored model of this kind under the names of this version."""
    migrated = dict(tensors)
    for old, new in _CHANGES.get(str(model), _Changes({}, {}, {}, {})).tensors.items():
        part = re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])")
        migrated = {part.sub(new, name): tensor for name, tensor in migrated.items()}
    return migrated
