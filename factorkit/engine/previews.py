"""A task's sample grids and alarms: computed at once, or in a background thread where other processes would wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from factorkit.engine.config import EngineConfig, autocast
from factorkit.engine.state import BackgroundWorker
from factorkit.engine.step import Task


class Preview(NamedTuple):
    """The result of inspecting the model at a step: the fields the task returned, or the error that prevented it."""

    step: int
    fields: dict[str, Any]
    error: BaseException | None = None


class PreviewCancelledError(Exception):
    """The run has ended before this preview was finished."""


class Previews:
    """Run ``task.inspect`` into ``folder``, one step at a time.

    Args:
        background: use a thread; otherwise :meth:`start` returns when the preview is finished.
    """

    def __init__(self, task: Task, config: EngineConfig, folder: Path, device: torch.device, background: bool):
        self.task, self.config, self.folder, self.device, self.background = task, config, folder, device, background
        self._thread = BackgroundWorker()
        self._cancelled = threading.Event()
        self._finished: list[Preview] = []

    def start(self, model: nn.Module, step: int) -> None:
        """Inspect ``model``, which in background mode must be a copy that nothing else uses."""
        if not self.background:
            self._catch(step, lambda: self._inspect(model, step))
            return
        for part in model.modules():
            part.register_forward_pre_hook(self._check_cancelled)
        ready = None
        if self.device.type == "cuda":  # the copy is complete when the work queued so far is done
            ready = torch.cuda.current_stream(self.device).record_event()
        self._thread.submit(lambda: self._catch(step, lambda: self._inspect(model, step, ready)))

    def pop_finished(self, wait: bool = False) -> Preview | None:
        """Return a finished preview that was not returned yet, or None; ``wait`` waits for a running one."""
        if wait:
            self._thread.finish()
        return self._finished.pop(0) if self._finished else None

    def run_after(self, step: int, job: Callable[[], object]) -> None:
        """Run ``job`` after the preview of ``step``, in the same thread."""
        if self.background:
            self._thread.submit(lambda: self._catch(step, job))
        else:
            job()

    def close(self) -> None:
        """Cancel unfinished work and end the thread."""
        self._cancelled.set()
        self._thread.close()

    def _check_cancelled(self, *_: Any) -> None:
        """Forward hook of every submodule of the copy, since a thread cannot be stopped from outside."""
        if self._cancelled.is_set():
            raise PreviewCancelledError

    def _catch(self, step: int, work: Callable[[], object]) -> None:
        try:
            work()
        except PreviewCancelledError:
            pass
        except BaseException as error:
            if not (self.background or isinstance(error, Exception)):  # a second Ctrl-C
                raise
            self._finished.append(Preview(step, {}, error))

    def _inspect(self, model: nn.Module, step: int, ready: torch.cuda.Event | None = None) -> None:
        with separate_stream(self.device, ready), separate_autocast(), evaluation(self.config, self.device):
            fields = self.task.inspect(model, step, self.folder)
        self._finished.append(Preview(step, fields))


@contextmanager
def separate_stream(device: torch.device, ready: torch.cuda.Event | None) -> Iterator[None]:
    """Use a CUDA stream of its own after the event ``ready``; without an event, change nothing.

    On the training's stream, reading any result would wait for all steps that are queued there.
    """
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:
        stream.synchronize()  # before the memory of the copy is freed


@contextmanager
def separate_autocast() -> Iterator[None]:
    """Keep autocast in the block from clearing the training's cache of cast weights.

    Threads share this cache but count their nesting separately, and leaving the outermost level clears it.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()


@contextmanager
def evaluation(config: EngineConfig, device: torch.device) -> Iterator[None]:
    """Disable gradients and use the precision of the training."""
    with torch.no_grad(), autocast(config, device):
        yield
