"""The training loop both models share: it knows steps, signals, checkpoints and logs, not what is trained."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from factorkit.engine import distributed
from factorkit.engine.background import Background
from factorkit.engine.checkpoint import Checkpoints, average_name
from factorkit.engine.config import EngineConfig
from factorkit.engine.graph import WARM_UP
from factorkit.engine.log import RunLog, read_log
from factorkit.engine.meter import Meter
from factorkit.engine.report import write_report
from factorkit.engine.step import NON_FINITE_LIMIT, MovingAverage, Task, TrainingStep, make_optimizer
from factorkit.errors import CheckpointError, ConfigError, FactorkitError, OutOfMemory, is_out_of_memory

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class Trainer:
    """Trains ``task`` in the run folder ``folder`` until ``config.steps``, going on from the newest checkpoint there.

    Args:
        meta: JSON-able facts stored with every checkpoint (the whole configuration, what the model is).
        stop_at: end (with a checkpoint) before this step instead; the schedule stays that of ``config.steps``.
        report: write the folder's report; off where the folder is a stage of another run.
    """

    def __init__(self, task: Task, config: EngineConfig, folder: Path, meta: dict[str, Any], *, device: torch.device,
                 progress: bool = True, stop_at: int | None = None, report: bool = True):  # fmt: skip
        self.task, self.config, self.folder, self.meta, self.device = task, config, Path(folder), meta, device
        self.last = min(stop_at or config.steps, config.steps)
        self.progress = progress and distributed.rank() == 0
        self.report = report
        distributed.check_batch(config.batch_size)
        self.model = task.model.to(device)
        self.optimizer = make_optimizer(task.parameter_groups(), config, device)
        self.average = MovingAverage(self.model, config.ema, device)
        further = {average_name(decay): MovingAverage(self.model, decay, device) for decay in config.ema_also}
        self.averages = {"ema": self.average, **further}
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.step = 0
        self._saved: int | None = None  # the step that lies on disk, or is on its way there
        self._writing = Background()
        self._stop = 0  # the signal that asked for an end
        self._bad_steps = 0

    # --- state ---

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name: weights, their averages, Adam's moments."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, average in self.averages.items():
            tensors.update({f"{name}.{k}": v for k, v in average.state_dict().items()})
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors

    def restore(self) -> bool:
        """Take up the newest whole checkpoint; False where there is none.

        Raises:
            CheckpointError: no checkpoint is whole, or they belong to another model.
            ConfigError: the run has gone further than ``config.steps``.
        """
        found = self.checkpoints.latest()
        if not distributed.greatest(int(found is not None)):
            return False
        if found is None:
            raise CheckpointError(
                f"process {distributed.rank()} sees no checkpoint in {self.checkpoints.folder}, but others do; it must "
                "lie on a disk that all of their machines share"
            )
        tensors, meta = found
        part = lambda prefix: {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        try:
            self.model.load_state_dict(part("model."))
            for name, average in self.averages.items():
                if name == "ema" or part(f"{name}."):
                    average.load_state_dict(part(f"{name}."))
                else:  # asked for from here on
                    average.module.load_state_dict(self.model.state_dict())
        except RuntimeError as error:
            folder = self.checkpoints.folder
            raise CheckpointError(f"the checkpoints in {folder} are of another model: {error}") from error
        for name, parameter in self.model.named_parameters():
            if f"adam.step.{name}" in tensors:
                moments = ("exp_avg", "exp_avg_sq")
                self.optimizer.state[parameter] = {
                    "step": tensors[f"adam.step.{name}"].to(self.device),  # with the parameter, as fused Adam keeps it
                    **{k: torch.empty_like(parameter).copy_(tensors[f"adam.{k}.{name}"]) for k in moments},
                }
        self.step = self._saved = int(meta["step"])
        if distributed.greatest(self.step) != -distributed.greatest(-self.step):
            raise CheckpointError(
                f"the processes of this run see different checkpoints in {self.checkpoints.folder}; it must lie on a "
                "disk that all of their machines share"
            )
        if self.step > self.config.steps:
            raise ConfigError(
                f"the run in {self.folder} has taken {self.step} steps already, more than steps={self.config.steps}; "
                "ask for at least as many, or give another out="
            )
        return True

    def save(self) -> None:
        """Begin to write a checkpoint of the present step (process 0 writes), unless it is written already.

        The state is copied, the rest is done behind the training's back; one that failed is told of by the next.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        if self.step == self._saved:
            return
        self.finish_writing()
        if distributed.rank() == 0:
            step, state = self.step, {k: v.detach().to("cpu", copy=True) for k, v in self.state().items()}
            self._writing.submit(lambda: self.checkpoints.save(step, state, self.meta))
        self._saved = self.step

    def finish_writing(self) -> None:
        """Wait until what was to be saved is on disk, in all processes alike. Raises CheckpointError where it cannot
        be."""
        error = self._writing.finish()
        if distributed.greatest(int(error is not None)):
            self._saved = None
            raise error or CheckpointError("process 0 of this run could not write a checkpoint, and says why")

    def trial(self, steps: int) -> float:
        """Seconds a step takes here, once warm; nothing is written."""
        meter = Meter(self.device)
        take = self._training_step(meter)
        for count in (WARM_UP + 1 if self.device.type == "cuda" else 1, steps):
            start = time.perf_counter()
            for _ in range(count):
                take(self.step)
                self.step += 1
                take.taken.clear()
            meter.read()  # waits for the device
        return (time.perf_counter() - start) / steps

    # --- training ---

    def run(self) -> nn.Module:
        """Train to the end; answers the averaged model.

        Raises:
            KeyboardInterrupt, SystemExit(128 + number): after Ctrl-C, or after SIGTERM or SIGUSR1, once a checkpoint is
                written.
            CheckpointError: a checkpoint or another file of the run could not be written; earlier checkpoints stand.
            ConfigError: the run that lies in the folder has gone further than ``config.steps``.
            FactorkitError: three steps in a row were not finite, an alarm named a failure and the run was to stop, or
                another process of the run is gone.
            OutOfMemory: the step does not fit; the message names the settings that make it smaller.
        """
        resumed = self.restore()
        main = distributed.rank() == 0
        log = RunLog(self.folder, tensorboard=self.config.tensorboard) if main else None

        def note(kind: str, **fields: Any) -> None:
            if log is not None:
                log.event(kind, **{"step": self.step, **fields})

        if self.step < self.last or not resumed:
            note("resume" if resumed else "start", message=f"step {self.step} of {self.config.steps} on {self.device}")
        try:
            with self._signals():
                self._train(note)
        except OSError as error:
            raise CheckpointError(
                f"the run in {self.folder} stopped at step {self.step}: {error}. Its checkpoints stand; "
                "mend that and run the same command again to go on"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise OutOfMemory(self._no_room(error)) from error
            if distributed.world_size() > 1 and distributed.is_lost(error):
                raise FactorkitError(
                    f"another process of the run in {self.folder} is gone, at step {self.step}. Under torchrun "
                    "--max-restarts=N all of them start again by themselves, from the newest checkpoint"
                ) from error
            raise
        finally:
            failed = self._writing.close()
            if failed is not None:  # must not stand in for how the run itself ended
                warnings.warn(str(failed), stacklevel=2)
            if log is not None:
                log.close()
                self._report()
        return self.average.module

    def _no_room(self, error: BaseException) -> str:
        config, share = self.config, self.config.batch_size // distributed.world_size()
        at_once = min(config.micro_batch_size or share, share)
        stands = " Its checkpoints stand; the same command with these goes on." if self._saved else ""
        return (
            f"the run in {self.folder} stopped at step {self.step}: out of memory on {self.device} with {at_once} "
            f"images at once. {config.memory_advice(at_once)}.{stands} ({(str(error) or repr(error)).splitlines()[0]})"
        )

    def _report(self) -> None:
        if not self.report:
            return
        try:
            write_report(self.folder)
        except CheckpointError as error:  # must not stand in for how the run itself ended
            warnings.warn(str(error), stacklevel=2)

    def _train(self, note) -> None:
        config = self.config
        meter = Meter(self.device)
        take = self._training_step(meter, synchronised=distributed.world_size() > 1)
        shown = {"desc": "training", "unit": "step", "disable": not self.progress, "dynamic_ncols": True}
        with tqdm(total=self.last, initial=self.step, **shown) as bar:
            # asked of all processes: one that stopped alone would leave the others waiting for its gradient
            while self.step < self.last and not distributed.greatest(self._stop):
                take(self.step)
                self.step += 1
                bar.update()
                if self._waits():
                    self._watch_finite(take.skipped(), note)
                if self.step % config.log_every == 0 or self.step == self.last:
                    line = meter.read()
                    line["seconds_left"] = (self.last - self.step) * config.batch_size / line["images_per_second"]
                    rate = config.learning_rate_at(self.step - 1)
                    note("step", images=self.step * config.batch_size, lr=rate, **line)
                    bar.set_postfix_str(_summary(line))
                if self.step == self.last or (config.sample_every and self.step % config.sample_every == 0):
                    with meter.paused():
                        self._inspect(note)
                if self.step % config.checkpoint_every == 0:
                    with meter.paused():
                        self.save()
        self._watch_finite(take.skipped(), note)
        self.save()
        self.finish_writing()
        finished = self.step == config.steps
        if finished and not _has_ended(self.folder, self.step):
            note("end", message="finished")
        if stop := distributed.greatest(self._stop):
            if not finished:
                name = signal.Signals(stop).name
                note("signal", message=f"{name}: saved at step {self.step}; the same command again goes on from there")
            if stop == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + stop)

    def _training_step(self, meter: Meter, synchronised: bool = False) -> TrainingStep:
        return TrainingStep(
            self.task, self.optimizer, list(self.averages.values()), meter, self.config, self.device,
            synchronised=synchronised,
        )  # fmt: skip

    def _waits(self) -> bool:
        """Whether the loop may ask the device how it fared: where it would wait for it anyway, and always on a CPU."""
        config = self.config
        due = [config.log_every, config.checkpoint_every] + ([config.sample_every] if config.sample_every else [])
        return self.device.type == "cpu" or self.step == self.last or any(self.step % every == 0 for every in due)

    def _watch_finite(self, steps: list[tuple[int, str | None]], note) -> None:
        for step, culprit in steps:
            self._bad_steps = self._bad_steps + 1 if culprit else 0
            if culprit:
                note("skip", step=step, message=f"{culprit} in step {step}; the step was skipped")
            if self._bad_steps >= NON_FINITE_LIMIT:
                raise FactorkitError(
                    f"{NON_FINITE_LIMIT} steps in a row could not be taken (in step {step} {culprit}). The last "
                    f"good checkpoint is kept in {self.checkpoints.folder}; try a lower learning_rate=, "
                    "gradient_clip=1.0 or precision='fp32'"
                )

    def _inspect(self, note) -> None:
        found: dict[str, Any] = {}
        if distributed.rank() == 0:
            self.average.eval()
            precision = torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")
            with torch.no_grad(), precision:
                found = self.task.inspect(self.average.module, self.step, self.folder / "samples")
            note("alarms", **found)
            for failure in found.get("failures", ()):
                tqdm.write(f"step {self.step}: {failure}", file=sys.stderr)
            if self.step < self.last:  # the end of the run writes one anyway
                self._report()
        failures = found.get("failures")
        if distributed.greatest(int(failures == [])):  # kept for the case that one comes
            self.save()
            if distributed.rank() == 0:
                step, error = self.step, found.get("error", 0.0)
                self._writing.submit(lambda: self.checkpoints.keep_best(step, error))
        if self.config.stop_on_failure and distributed.greatest(int(bool(failures))):
            self.finish_writing()
            best, folder = self.checkpoints.best(), self.checkpoints.folder
            kept = f"the best of them is of step {best[0]}" if best else "none of them was free of alarms"
            raise FactorkitError(
                f"stopped at step {self.step}: {'; '.join(failures or ())}. Earlier checkpoints are kept in {folder}; "
                f"{kept}. Another seed= with another out= may do, or go on with stop_on_failure=False"
            )

    @contextmanager
    def _signals(self):
        """SIGTERM, SIGUSR1 (what Slurm may be asked to warn with) and the first Ctrl-C end the loop after the present
        step; a second Ctrl-C interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number, frame):
            self._stop = number
            signal.signal(number, before[number])

        self._stop = 0
        before = {s: signal.signal(s, remember) for s in ENDING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _has_ended(folder: Path, step: int) -> bool:
    return any(event.get("event") == "end" and event.get("step") == step for event in read_log(folder))


def _summary(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.4f}"]
    if "areas" in line:
        parts.append("areas " + "/".join(f"{a:.2f}" for a in line["areas"]))
    return ", ".join(parts)
