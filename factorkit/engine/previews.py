"""A task's sample sheets: drawn at once, or, where other processes would wait, behind the training's back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.config import EngineConfig
from factorkit.engine.step import Task
from factorkit.utils.background_worker import Background
from factorkit.utils.errors import FactorkitError


class Sheet(NamedTuple):
    """What came of the sheets of a step: what the task found, or the error that kept it from that."""

    step: int
    found: dict[str, Any]
    error: BaseException | None = None


class Abandoned(Exception):
    """Nobody waits for this sheet any more."""


class Sheets:
    """Draws the sheets of ``task`` into ``folder``, one at a time.

    Args:
        behind: in a thread of its own; else before :meth:`begin` returns.
    """

    def __init__(self, task: Task, config: EngineConfig, folder: Path, device: torch.device, behind: bool):
        self.task, self.config, self.folder, self.device, self.behind = task, config, folder, device, behind
        self._thread = Background()
        self._unwanted = threading.Event()
        self._done: list[Sheet] = []

    def begin(self, model: nn.Module, step: int) -> None:
        """Draw the sheets of ``step`` from ``model``, which is a copy that nobody else has where it is done behind."""
        if not self.behind:
            self._watched(step, lambda: self._draw(model, step))
            return
        for part in model.modules():
            part.register_forward_pre_hook(self._check)
        ready = None
        if self.device.type == "cuda":  # the copy is whole once what is queued now is done
            ready = torch.cuda.current_stream(self.device).record_event()
        self._thread.submit(lambda: self._watched(step, lambda: self._draw(model, step, ready)))

    def take(self, wait: bool = False) -> Sheet | None:
        """The sheet that is done and was not taken yet; with ``wait``, once it is done."""
        if wait:
            self._thread.finish()
        return self._done.pop(0) if self._done else None

    def then(self, step: int, job: Callable[[], object]) -> None:
        """Do ``job``, which tells of the sheet of ``step``."""
        if self.behind:
            self._thread.submit(lambda: self._watched(step, job))
        else:
            job()

    def close(self) -> None:
        """Give up what is not done, and end the thread."""
        self._unwanted.set()
        self._thread.close()

    def _check(self, *_: Any) -> None:
        """Before every part of the copied model: a thread cannot be stopped from outside."""
        if self._unwanted.is_set():
            raise Abandoned

    def _watched(self, step: int, work: Callable[[], object]) -> None:
        try:
            work()
        except Abandoned:
            pass
        except BaseException as error:
            if not (self.behind or isinstance(error, Exception)):  # a second Ctrl-C
                raise
            self._done.append(Sheet(step, {}, error))

    def _draw(self, model: nn.Module, step: int, ready: Any = None) -> None:
        with own_stream(self.device, ready), own_autocast(), looking(self.config, self.device):
            found = self.task.inspect(model, step, self.folder)
        self._done.append(Sheet(step, found))


@contextmanager
def own_stream(device: torch.device, ready: Any) -> Iterator[None]:
    """Work on a GPU beside the training's, from its event ``ready`` on; on the training's own stream, every look at a
    result would wait for all that is queued there. Without an event, as everywhere."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # before the memory of what was drawn from is the training's again


@contextmanager
def own_autocast() -> Iterator[None]:
    """Autocast that begins and ends within leaves alone what the training has cast: threads count their nesting each by
    itself, but share the casts, and the outermost to end drops all of them, in the midst of the other's step."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()


@contextmanager
def looking(config: EngineConfig, device: torch.device) -> Iterator[None]:
    """How an averaged model is looked at: without gradient, in the precision of the training."""
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        yield


def reason(bad: Sheet | None, step: int, checkpoints: Checkpoints) -> BaseException:
    """Why a sheet ends a run at ``step``; None is the sheet of another process."""
    if bad is None:
        return FactorkitError("process 0 of this run ended it for what its sample sheet showed, and says why")
    if bad.error is not None:
        return bad.error
    best = checkpoints.best()
    kept = f"the best of them is of step {best[0]}" if best else "none of them was free of alarms"
    seen = "" if bad.step == step else f" by the sample sheet of step {bad.step}"
    return FactorkitError(
        f"stopped at step {step}{seen}: {'; '.join(bad.found['failures'])}. Earlier checkpoints are kept in "
        f"{checkpoints.folder}; {kept}. Another seed= with another out= may do, or go on with stop_on_failure=False"
    )
