"""The log of a run: one JSON object a line in `log.jsonl`, appended to and never rewritten."""

from __future__ import annotations

import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

from factorkit.utils.jsonl import JsonLines, read_lines

LOG_NAME = "log.jsonl"


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Every event in `folder/log.jsonl`, in the order written; an empty list where there is no log yet.

    Lines that are no JSON object are passed over: the last one may be half written, by a run that was killed or by one
    that is writing at this moment.
    """
    return [event for _, event in read_lines(Path(folder) / LOG_NAME)]


class RunLog:
    """Appends events to `folder/log.jsonl`, which `read_log` reads back.

    Opening creates the folder. Each event has reached the operating system when `event` returns (see `JsonLines`).

    `tensorboard=True` also mirrors every number that comes with a `step` to `folder/tensorboard`; without the package
    it warns and the run goes on.
    """

    def __init__(self, folder: str | os.PathLike[str], *, tensorboard: bool = False) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOG_NAME
        self._lines = JsonLines(self.path)
        self._mirror = _tensorboard_writer(folder / "tensorboard") if tensorboard else None

    def event(self, kind: str, /, **fields: Any) -> None:
        """Write one line `{"event": kind, "time": unix seconds, **fields}`.

        Tensors and arrays become lists or numbers, NaN and infinities null (JSON has no word for them), and whatever
        else JSON does not know its `str`.
        """
        record = {"event": kind, "time": round(time.time(), 3), **_plain(fields)}
        self._lines.append(record)
        if self._mirror is not None and isinstance(record.get("step"), int):
            for name, value in _numbers(record):
                self._mirror.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Close the file and the mirror; a second call does nothing."""
        self._lines.close()
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """`value` in the types strict JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):  # torch tensors, numpy arrays and numpy scalars
        return _plain(value.tolist())
    return str(value)


def _numbers(record: dict[str, Any]) -> list[tuple[str, float]]:
    """The numbers of an event by name; those in a list as `name/0`, `name/1`, ..."""
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
            f"tensorboard=True, but the package tensorboard is not installed: nothing is mirrored to {folder}. "
            "Install it with `pip install factorkit[tensorboard]`; log.jsonl is written either way.",
            stacklevel=3,
        )
        return None
    return SummaryWriter(str(folder))
