"""The training loop that all models share: steps, signals, checkpoints, logs and previews."""

from __future__ import annotations

import copy
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.config import EngineConfig
from factorkit.engine.cuda_graph import WARM_UP
from factorkit.engine.previews import Preview, Previews, evaluation
from factorkit.engine.run_log import RunLog
from factorkit.engine.state import CheckpointManager, TrainingState
from factorkit.engine.step import NON_FINITE_LIMIT, Meter, Task, TrainingStep
from factorkit.utils import distributed
from factorkit.utils.errors import (
    CheckpointError,
    ConfigError,
    FactorkitError,
    OutOfMemoryError,
    WriteError,
    first_line,
    format_count,
    is_out_of_memory,
)
from factorkit.utils.files import read_log, timeline
from factorkit.utils.memory import keep_freed_memory

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
PREVIEW_FAILED = 1000  # reason to stop beside the numbers of signals


class StopSignal:
    """The signal that asked the training to end: ``number`` is 0 before one arrived."""

    number = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record SIGTERM, SIGUSR1 (which Slurm can send as a warning) and the first Ctrl-C during the block.

        A second Ctrl-C interrupts at once. A second SIGTERM does not: signalling torchrun and its processes sends two.
        """
        self.number = 0
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def record(number: int, frame: Any) -> None:
            self.number = number
            if number == signal.SIGINT:
                signal.signal(number, handlers[number])

        handlers = {number: signal.signal(number, record) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def check_steps(folder: Path, step: int, steps: int) -> None:
    """Raise ConfigError if the run in a folder has more steps than are asked for."""
    if step > steps:
        raise ConfigError(
            f"the run in {folder} has {step} steps already, more than steps={steps}; give at least as many, or another "
            "out="
        )


class Trainer:
    """Trains ``task`` in a run folder until ``config.steps``, resuming from the newest checkpoint there.

    Args:
        meta: JSON-able facts stored with every checkpoint: the whole configuration, and what the model is.
        stop_at: end with a checkpoint at this step; schedules still use ``config.steps``.
        report: writes the report of a run folder; None writes none.
    """

    def __init__(
        self,
        task: Task,
        config: EngineConfig,
        folder: Path,
        meta: dict[str, Any],
        *,
        device: torch.device,
        progress: bool = True,
        stop_at: int | None = None,
        report: Callable[[Path], object] | None = None,
    ):
        self.task, self.config, self.folder, self.device = task, config, Path(folder), device
        self.last = min(stop_at or config.steps, config.steps)
        self.progress, self.report = progress and distributed.rank() == 0, report
        distributed.check_batch(config.batch_size)
        self.state = TrainingState(task, config, device)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.step = 0
        self._manager = CheckpointManager(self.state, self.checkpoints, meta)
        in_background = distributed.world_size() > 1
        self._previews = Previews(task, config, self.folder / "samples", device, in_background)
        self._failed_preview: Preview | None = None  # ends the run
        self._stop_signal = StopSignal()
        self._consecutive_skips = 0
        self._log: RunLog | None = None  # of rank 0, during run()

    def restore(self) -> bool:
        """Load the newest whole checkpoint; return False if there is none. Collective.

        Raises:
            CheckpointError: no checkpoint is whole, or they belong to another model.
            ConfigError: the run has more steps than ``config.steps``.
        """
        step = self._manager.load()
        if step is None:
            return False
        check_steps(self.folder, step, self.config.steps)
        self.step = step
        return True

    def measure_step_seconds(self, steps: int) -> float:
        """Return the mean duration of the last ``steps`` steps, which no step exceeds, after a warm-up.

        Nothing is written.
        """
        meter = Meter(self.device)
        take_step = self._training_step(meter)
        warm_up = WARM_UP + 1 if self.device.type == "cuda" else 1
        self.step = max(0, self.last - warm_up - steps)
        with keep_freed_memory(self.device):
            for count in (warm_up, steps):
                start = time.perf_counter()
                for _ in range(count):
                    take_step(self.step)
                    self.step += 1
                    take_step.unreported_steps.clear()
                meter.read()  # waits for the device
        return (time.perf_counter() - start) / steps

    def run(self) -> nn.Module:
        """Train to the end and return the averaged model. Collective.

        Raises:
            KeyboardInterrupt: after Ctrl-C; a checkpoint is written.
            SystemExit: with code 128 + number after SIGTERM or SIGUSR1; a checkpoint is written.
            CheckpointError: a file of the run could not be written; earlier checkpoints are intact.
            ConfigError: the run in the folder has more steps than ``config.steps``.
            FactorkitError: several consecutive steps were not finite, an alarm reported a failure with
                ``stop_on_failure``, or another process is gone.
            OutOfMemoryError: the step does not fit; the message names the settings that reduce it.
        """
        resumed = self.restore()
        if distributed.rank() == 0:
            self._log = RunLog(self.folder, tensorboard=self.config.tensorboard)
        if self.step < self.last or not resumed:
            message = f"step {self.step} of {self.config.steps} on {self.device}"
            self._log_event("resume" if resumed else "start", message=message)
        try:
            with self._stop_signal.listening(), keep_freed_memory(self.device):
                self._train()
        except OSError as error:
            raise CheckpointError(
                f"the run in {self.folder} stopped at step {self.step}: {error}. Its checkpoints are intact; "
                "fix this and run the same command again to resume"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(self._out_of_memory_message(error)) from error
            if distributed.world_size() > 1 and distributed.is_peer_lost(error):
                raise FactorkitError(
                    f"another process of the run in {self.folder} is gone or unreachable, at step {self.step}. Under "
                    "torchrun --max-restarts=N all processes restart by themselves from the newest checkpoint "
                    f"({first_line(error)})"
                ) from error
            raise
        finally:
            self._previews.close()
            write_error = self._manager.close()
            if write_error is not None:  # must not hide the error of the run itself
                warnings.warn(str(write_error), stacklevel=2)
            if self._log is not None:
                self._log.close()
                self._log = None
                self._write_report()
        return self.state.averaged_model()

    def _log_event(self, kind: str, **fields: Any) -> None:
        if self._log is not None:
            self._log.event(kind, **{"step": self.step, **fields})

    def _out_of_memory_message(self, error: BaseException) -> str:
        config, share = self.config, self.config.batch_size // distributed.world_size()
        at_once = min(config.micro_batch_size or share, share)
        activity, advice = f"with {format_count(at_once, 'image')} at once", config.memory_advice(at_once)
        if self._failed_preview is not None and self._failed_preview.error is error:
            activity = f"drawing the sample grids of step {self._failed_preview.step}"
            advice = "sample_every=0 draws none before the end" if config.sample_every else "Make the model smaller"
        resume = (
            " Its checkpoints are intact; the same command with these settings resumes."
            if self._manager.saved_step
            else ""
        )
        return (
            f"the run in {self.folder} stopped at step {self.step}: out of memory on {self.device} {activity}. "
            f"{advice}.{resume} ({first_line(error)})"
        )

    def _write_report(self) -> None:
        if self.report is None:
            return
        try:
            self.report(self.folder)
        except (CheckpointError, WriteError) as error:  # must not hide the error of the run itself
            warnings.warn(str(error), stacklevel=2)

    def _train(self) -> None:
        config = self.config
        meter = Meter(self.device)
        take_step = self._training_step(meter, synchronised=distributed.world_size() > 1)
        if distributed.maximum(int(self._misses_preview())):
            with meter.paused():
                self._preview()
        bar_options: dict[str, Any] = {"desc": "training", "unit": "step", "dynamic_ncols": True}
        with tqdm(total=self.last, initial=self.step, disable=not self.progress, **bar_options) as bar:
            # collective: a process that stopped alone would leave the others waiting for its gradient
            while self.step < self.last and not self._stop_reason():
                take_step(self.step)
                self.step += 1
                bar.update()
                if self._may_wait_for_device():
                    self._check_finite(take_step.report_steps())
                if self.step % config.log_every == 0 or self.step == self.last:
                    line = meter.read()
                    line["seconds_left"] = (self.last - self.step) * config.batch_size / line["images_per_second"]
                    rate = config.learning_rate_at(self.step - 1)
                    self._log_event("step", images=self.step * config.batch_size, lr=rate, **line)
                    bar.set_postfix_str(_summary(line))
                self._handle_preview()
                if self._is_preview_step():
                    with meter.paused():
                        self._preview()
                if self.step % config.checkpoint_every == 0:
                    with meter.paused():
                        self._manager.save(self.step)
        self._check_finite(take_step.report_steps())
        if self._stop_reason() != PREVIEW_FAILED:
            self._manager.save(self.step)
            self._handle_preview(wait=True)
        self._manager.finish()
        reason = self._stop_reason()
        if reason == PREVIEW_FAILED:
            raise self._preview_error()
        finished = self.step == config.steps
        if finished and not _has_end_event(self.folder, self.step):
            self._log_event("end", message="finished")
        if reason:
            if not finished:
                name = signal.Signals(reason).name
                self._log_event("signal", message=f"{name}: saved at step {self.step}; the same command resumes")
            if reason == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + reason)

    def _training_step(self, meter: Meter, synchronised: bool = False) -> TrainingStep:
        state, averages = self.state, list(self.state.averages.values())
        options = (self.config, self.device, synchronised, state.sharded)
        return TrainingStep(self.task, state.optimizer, averages, meter, *options)

    def _may_wait_for_device(self) -> bool:
        """Return whether the loop waits for the device at this step anyway; always true on a CPU."""
        config = self.config
        intervals = [config.log_every, config.checkpoint_every] + ([config.sample_every] if config.sample_every else [])
        return self.device.type == "cpu" or self.step == self.last or any(self.step % n == 0 for n in intervals)

    def _check_finite(self, steps: list[tuple[int, str | None]]) -> None:
        for step, cause in steps:
            self._consecutive_skips = self._consecutive_skips + 1 if cause else 0
            if cause:
                self._log_event("skip", step=step, message=f"{cause} in step {step}; the step was skipped")
            if self._consecutive_skips >= NON_FINITE_LIMIT:
                raise FactorkitError(
                    f"{NON_FINITE_LIMIT} consecutive steps were not finite (in step {step} {cause}). The last good "
                    f"checkpoint is in {self.checkpoints.folder}; try a lower learning_rate=, gradient_clip=1.0 or "
                    "precision='fp32'"
                )

    def _stop_reason(self) -> int:
        """Return why the run must end early: a signal's number, PREVIEW_FAILED, or 0. Collective."""
        return distributed.maximum(self._stop_signal.number if self._failed_preview is None else PREVIEW_FAILED)

    # --- previews: drawn by rank 0, in the background where other processes would wait ---

    def _is_preview_step(self) -> bool:
        every = self.config.sample_every
        return self.step == self.last or bool(every and self.step % every == 0)

    def _misses_preview(self) -> bool:
        """Return whether a kill prevented the preview of the step that was resumed from."""
        if distributed.rank() or not self.step or not self._is_preview_step():
            return False
        return all(event["step"] != self.step for event in timeline(read_log(self.folder), "alarms"))

    def _preview(self) -> None:
        self.state.average.eval()
        self._handle_preview(wait=True)
        update_buffers = getattr(self.task, "update_buffers", None)
        model = self.state.averaged_model(needed=update_buffers is not None or distributed.rank() == 0)
        if update_buffers:
            with evaluation(self.config, self.device):
                update_buffers(model)
            for buffer, updated in zip(self.state.average.module.buffers(), model.buffers(), strict=True):
                buffer.copy_(updated)
        in_background = self._previews.background
        if in_background:  # saved before it is known whether the checkpoint is worth keeping
            self.checkpoints.undecided.add(self.step)
            self._manager.save(self.step)
        if distributed.rank() == 0:
            needs_copy = in_background and self.state.sharded is None
            self._previews.start(copy.deepcopy(model) if needs_copy else model, self.step)
        if not in_background:
            self._handle_preview()
            if self._failed_preview is not None:
                if self._failed_preview.error is not None:  # the weights are not at fault
                    self._manager.save(self.step)
                self._manager.finish()
                raise self._preview_error()

    def _handle_preview(self, wait: bool = False) -> None:
        """Log a finished preview and act on its alarms. Only rank 0 has previews, so this must not be collective."""
        preview = self._previews.pop_finished(wait)
        if preview is None:
            return
        failures = preview.fields.get("failures")
        if preview.error is None:
            self._log_event("alarms", **{"step": preview.step, **preview.fields})
            for failure in failures or ():
                tqdm.write(f"step {preview.step}: {failure}", file=sys.stderr)
            if preview.step < self.last:  # the end of the run writes a report anyway
                self._previews.run_after(preview.step, self._write_report)
        if failures == []:
            if not self._previews.background:  # kept in case of later alarms
                self._manager.save(self.step)
            error = preview.fields.get("error", 0.0)
            self._manager.keep_best(preview.step, error)
        else:
            self.checkpoints.undecided.discard(preview.step)
        if preview.error is not None or (failures and self.config.stop_on_failure):
            self._failed_preview = preview

    def _preview_error(self) -> BaseException:
        """Return the error with which a failed preview ends the run; only rank 0 has the preview."""
        preview = self._failed_preview
        if preview is None:
            return FactorkitError("process 0 ended this run because of its sample grids; see its error message")
        if preview.error is not None:
            return preview.error
        best = self.checkpoints.best()
        best_text = f"the best of them is of step {best[0]}" if best else "all of them had alarms"
        origin = "" if preview.step == self.step else f" by the alarms of step {preview.step}"
        return FactorkitError(
            f"stopped at step {self.step}{origin}: {'; '.join(preview.fields['failures'])}. Earlier checkpoints are in "
            f"{self.checkpoints.folder}; {best_text}. Try another seed= with another out=, or continue with "
            "stop_on_failure=False"
        )


def _has_end_event(folder: Path, step: int) -> bool:
    return any(event.get("event") == "end" and event.get("step") == step for event in read_log(folder))


def _summary(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.4f}"]
    if "areas" in line:
        parts.append("areas " + "/".join(f"{a:.2f}" for a in line["areas"]))
    return ", ".join(parts)
