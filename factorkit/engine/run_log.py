"""The log of a run: events as lines of JSON, and numbers for TensorBoard."""

from __future__ import annotations

import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

from factorkit.utils.files import LOG_NAME, JsonLines


class RunLog:
    """Append events to ``folder/log.jsonl``, which :func:`factorkit.utils.files.read_log` reads back.

    Opening creates the folder. Each event has reached the operating system when :meth:`event` returns.

    Args:
        tensorboard: also write every number of events with a step to ``folder/tensorboard``. Without the package
            tensorboard, a warning is issued instead.
    """

    def __init__(self, folder: str | os.PathLike[str], *, tensorboard: bool = False) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        self._lines = JsonLines(self.path)
        self._tensorboard = _tensorboard_writer(folder / "tensorboard") if tensorboard else None

    def event(self, kind: str, /, **fields: Any) -> None:
        """Write one line ``{"event": kind, "time": unix seconds, **fields}``.

        Tensors and arrays become lists or numbers, NaN and infinities null, and other types their ``str``.
        """
        record = {"event": kind, "time": round(time.time(), 3), **_to_json_types(fields)}
        self._lines.append(record)
        if self._tensorboard is not None and isinstance(record.get("step"), int):
            for name, value in _numbers(record):
                self._tensorboard.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Close all files. A second call does nothing."""
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _to_json_types(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _to_json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json_types(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and numpy scalars
        return _to_json_types(value.tolist())
    return str(value)


def _numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the numbers of an event by name; those in a list as ``name/0``, ``name/1``, ..."""
    flat = []
    for name, value in record.items():
        if name in ("step", "time"):
            continue
        entries = [(f"{name}/{i}", v) for i, v in enumerate(value)] if isinstance(value, list) else [(name, value)]
        flat += [(n, float(v)) for n, v in entries if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return flat


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn(
            f"tensorboard=True, but the package tensorboard is not installed: nothing is written to {folder}. "
            "Install it with `pip install factorkit[tensorboard]`; log.jsonl is written either way.",
            stacklevel=3,
        )
        return None
    return SummaryWriter(str(folder))
