"""What the commands say, whatever the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from factorkit.utils.errors import ConfigError, FactorkitError
from factorkit.utils.jsonl import read_log, timeline


class Interrupted(FactorkitError):
    """A training was stopped from outside; the message says what is saved."""

    def __init__(self, exit_code: int, message: str):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def saying_what_is_saved(folder: Path) -> Iterator[None]:
    """Ctrl-C and SIGTERM leave a training as exceptions, once it has saved; this gives them words."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        saved = f"a checkpoint is saved in {folder}, the same command goes on from there"
        if not any(folder.rglob("step_*.safetensors")):
            saved = "nothing was saved yet"
        raise Interrupted(int(stop.code or 0) if isinstance(stop, SystemExit) else 130, f"stopped: {saved}") from None


def load_run(path: Path, device: str, model: str) -> Any:
    """The run behind a folder or file, in each of the processes that torchrun started.

    Raises:
        ConfigError: it is not of ``model``.
        CheckpointError: it cannot be read.
    """
    import factorkit
    from factorkit.engine.config import resolve_device
    from factorkit.utils import distributed
    from factorkit.utils.distributed import join_processes

    chosen = distributed.local_device(resolve_device(device))
    join_processes(chosen)
    run = factorkit.load(path, device=str(chosen))
    if run.MODEL != model:
        raise ConfigError(f"{path} is a {run.MODEL} run; this command is for {model} runs")
    return run


def failures(folder: Path) -> list[str]:
    """The label-free alarms that went off at the run's last sample sheet, in words."""
    alarms = timeline(read_log(folder), "alarms")
    return list(alarms[-1].get("failures", ())) if alarms else []


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
