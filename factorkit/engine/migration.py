"""Settings of earlier versions: stored run folders and checkpoints are read under today's names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from factorkit.utils.errors import CheckpointError


class _Changes(NamedTuple):
    names: dict[str, str]  # old name -> name of today
    values: dict[tuple[str, Any], Any]  # (name of today, old value) -> value of today
    removed: dict[str, Any]  # old name -> the only value that today's code still computes


_COMMON = {"decay": "lr_decay_fraction", "ema": "ema_decay", "ema_also": "extra_ema_decays"}  # of EngineConfig
_CHANGES: dict[str, _Changes] = {}


def register_renamed_settings(
    models: Iterable[str],
    names: Mapping[str, str],
    values: Mapping[tuple[str, Any], Any] | None = None,
    removed: Mapping[str, Any] | None = None,
) -> None:
    """Declare which settings of a model have changed since runs were first stored.

    Args:
        models: values of ``model`` in the stored settings that the table applies to.
        names: old name -> new name.
        values: (new name, old value) -> new value.
        removed: settings that are gone, with the value that the code now always uses.
    """
    for model in models:
        _CHANGES[model] = _Changes(dict(names), dict(values or {}), dict(removed or {}))


def migrate_settings(settings: dict[str, Any], source: object) -> dict[str, Any]:
    """Return stored settings under the names and values of this version; others are left as they are.

    Raises:
        CheckpointError: a removed setting has a value that this version cannot compute; ``source`` is named.
    """
    changes = _CHANGES.get(str(settings.get("model")), _Changes({}, {}, {}))
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
