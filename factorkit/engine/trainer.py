"""The training loop both models share: it knows steps, signals, checkpoints and logs, not what is trained."""

from __future__ import annotations

import copy
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from factorkit.engine import sharding
from factorkit.engine.checkpoint import Checkpoints, average_name
from factorkit.engine.config import EngineConfig
from factorkit.engine.cuda_graph import WARM_UP
from factorkit.engine.log import RunLog
from factorkit.engine.previews import Sheet, Sheets, looking, reason
from factorkit.engine.signals import Asked
from factorkit.engine.step import NON_FINITE_LIMIT, Meter, MovingAverage, Objective, Task, TrainingStep, make_optimizer
from factorkit.utils import distributed
from factorkit.utils.background_worker import Background
from factorkit.utils.errors import (
    CheckpointError,
    ConfigError,
    FactorkitError,
    OutOfMemory,
    first_line,
    is_out_of_memory,
)
from factorkit.utils.jsonl import read_log, timeline

BAD_SHEET = 1000  # beside the numbers of signals, why the loop ends


class Trainer:
    """Trains ``task`` in the run folder ``folder`` until ``config.steps``, going on from the newest checkpoint there.

    Args:
        meta: JSON-able facts stored with every checkpoint (the whole configuration, what the model is).
        stop_at: end (with a checkpoint) before this step instead; the schedule stays that of ``config.steps``.
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
        self.task, self.config, self.folder, self.meta, self.device = task, config, Path(folder), meta, device
        self.last = min(stop_at or config.steps, config.steps)
        self.progress = progress and distributed.rank() == 0
        self.report = report
        distributed.check_batch(config.batch_size)
        cut = config.shard and distributed.world_size() > 1
        place = torch.device("cpu") if cut else device  # where weights are whole before they are cut
        self.model = task.model.to(place)
        self.average = MovingAverage(self.model, config.ema_decay, place)
        further = {average_name(decay): MovingAverage(self.model, decay, place) for decay in config.extra_ema_decays}
        self.averages = {"ema": self.average, **further}
        self.sharded: nn.Module | None = None  # the task's objective, if it is
        if cut:
            self._form = sharding.hollow(self.model)
            self.sharded = sharding.shard(Objective(task), device)
            for average in self.averages.values():
                sharding.shard(average.module, device)
                average.n_averaged = average.n_averaged.to(device)
        self.optimizer = make_optimizer(task.parameter_groups(), config, device)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        self.step = 0
        self._saved: int | None = None  # the step that lies on disk, or is on its way there
        self._writing = Background()
        self._sheets = Sheets(task, config, self.folder / "samples", device, behind=distributed.world_size() > 1)
        self._bad_sheet: Sheet | None = None  # one that is to end the run
        self._asked = Asked()  # by a signal, to end
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

    def _averaged(self, wanted: bool = True) -> nn.Module:
        """The averaged model, whole: itself, or a copy of its shards where it is ``wanted``; all must ask for those."""
        if self.sharded is None:
            return self.average.module
        # buffers are whole already, and must not change with those of the average
        tensors = {k: v.clone() for k, v in sharding.wholes(self.average.module.state_dict()) if wanted}
        return sharding.filled(self._form, tensors).eval() if wanted else self._form

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
            self.model.load_state_dict(sharding.cut_like(part("model."), self.model.state_dict()))
            for name, average in self.averages.items():
                if name == "ema" or part(f"{name}."):
                    average.load_state_dict(sharding.cut_like(part(f"{name}."), average.state_dict()))
                else:  # asked for from here on
                    average.module.load_state_dict(self.model.state_dict())
        except RuntimeError as error:
            folder = self.checkpoints.folder
            raise CheckpointError(f"the checkpoints in {folder} are of another model: {error}") from error
        for name, parameter in self.model.named_parameters():
            if f"adam.step.{name}" in tensors:
                moments = {k: tensors[f"adam.{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")}
                moments = sharding.cut_like(moments, dict.fromkeys(moments, parameter))
                self.optimizer.state[parameter] = {
                    "step": tensors[f"adam.step.{name}"].to(self.device),  # with the parameter, as fused Adam keeps it
                    **{k: torch.empty_like(parameter).copy_(moment) for k, moment in moments.items()},
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

        The state is copied, the rest is done behind the training's back. Where the one before could not be written,
        this one is waited for: the disk may have room again.

        Raises:
            CheckpointError: neither of them could be written.
        """
        if self.step == self._saved:
            return
        failed = self._failed_to_write()
        step, state = self.step, sharding.copied(self.state())
        if distributed.rank() == 0:
            self._writing.submit(lambda: self.checkpoints.save(step, state, self.meta))
        self._saved = self.step
        if failed is not None:
            self.finish_writing()
            if distributed.rank() == 0:
                warnings.warn(f"{failed} (the checkpoint of step {step} is written)", stacklevel=2)

    def finish_writing(self) -> None:
        """Wait until what was to be saved is on disk, in all processes alike. Raises CheckpointError where it cannot
        be."""
        if (failed := self._failed_to_write()) is not None:
            self._saved = None
            raise failed

    def _failed_to_write(self) -> Exception | None:
        """What went wrong with what was to be saved, which is waited for, in all processes alike."""
        error = self._writing.finish()
        if distributed.greatest(int(error is not None)):
            return error or CheckpointError("process 0 of this run could not write a checkpoint, and says why")
        return None

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
            with self._asked.listening():
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
                    f"another process of the run in {self.folder} is gone or out of reach, at step {self.step}. Under "
                    "torchrun --max-restarts=N all of them start again by themselves, from the newest checkpoint "
                    f"({first_line(error)})"
                ) from error
            raise
        finally:
            self._sheets.close()
            failed = self._writing.close()
            if failed is not None:  # must not stand in for how the run itself ended
                warnings.warn(str(failed), stacklevel=2)
            if log is not None:
                log.close()
                self._report()
        return self._averaged()

    def _no_room(self, error: BaseException) -> str:
        config, share = self.config, self.config.batch_size // distributed.world_size()
        at_once = min(config.micro_batch_size or share, share)
        doing, advice = f"with {at_once} images at once", config.memory_advice(at_once)
        if self._bad_sheet is not None and self._bad_sheet.error is error:
            doing = f"drawing the sample sheet of step {self._bad_sheet.step}"
            advice = "sample_every=0 draws none before the end" if config.sample_every else "Make the model smaller"
        stands = " Its checkpoints stand; the same command with these goes on." if self._saved else ""
        return (
            f"the run in {self.folder} stopped at step {self.step}: out of memory on {self.device} {doing}. "
            f"{advice}.{stands} ({first_line(error)})"
        )

    def _report(self) -> None:
        if self.report is None:
            return
        try:
            self.report(self.folder)
        except CheckpointError as error:  # must not stand in for how the run itself ended
            warnings.warn(str(error), stacklevel=2)

    def _train(self, note) -> None:
        config = self.config
        meter = Meter(self.device)
        take = self._training_step(meter, synchronised=distributed.world_size() > 1)
        if distributed.greatest(int(self._lacks_sheet())):
            with meter.paused():
                self._inspect(note)
        shown = {"desc": "training", "unit": "step", "disable": not self.progress, "dynamic_ncols": True}
        with tqdm(total=self.last, initial=self.step, **shown) as bar:
            # asked of all processes: one that stopped alone would leave the others waiting for its gradient
            while self.step < self.last and not self._ending():
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
                self._tell_of_sheet(note)
                if self._sheet_due():
                    with meter.paused():
                        self._inspect(note)
                if self.step % config.checkpoint_every == 0:
                    with meter.paused():
                        self.save()
        self._watch_finite(take.skipped(), note)
        if self._ending() != BAD_SHEET:
            self.save()
            self._tell_of_sheet(note, wait=True)
        self.finish_writing()
        stop = self._ending()
        if stop == BAD_SHEET:
            raise reason(self._bad_sheet, self.step, self.checkpoints)
        finished = self.step == config.steps
        if finished and not _has_ended(self.folder, self.step):
            note("end", message="finished")
        if stop:
            if not finished:
                name = signal.Signals(stop).name
                note("signal", message=f"{name}: saved at step {self.step}; the same command again goes on from there")
            if stop == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + stop)

    def _training_step(self, meter: Meter, synchronised: bool = False) -> TrainingStep:
        return TrainingStep(
            self.task,
            self.optimizer,
            list(self.averages.values()),
            meter,
            self.config,
            self.device,
            synchronised,
            self.sharded,
        )

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

    # --- sheets: process 0 draws them, behind the training's back where others would wait ---

    def _sheet_due(self) -> bool:
        every = self.config.sample_every
        return self.step == self.last or bool(every and self.step % every == 0)

    def _lacks_sheet(self) -> bool:
        """Whether the step that was resumed is one whose sheet a kill has left undone."""
        if distributed.rank() or not self.step or not self._sheet_due():
            return False
        return all(event["step"] != self.step for event in timeline(read_log(self.folder), "alarms"))

    def _inspect(self, note) -> None:
        self.average.eval()
        self._tell_of_sheet(note, wait=True)
        settle = getattr(self.task, "settle", None)
        model = self._averaged(wanted=settle is not None or distributed.rank() == 0)
        if settle:
            with looking(self.config, self.device):
                settle(model)
            for kept, settled in zip(self.average.module.buffers(), model.buffers(), strict=True):
                kept.copy_(settled)
        if self._sheets.behind:  # before anybody knows whether it is worth keeping
            self.checkpoints.awaited.add(self.step)
            self.save()
        if distributed.rank() == 0:
            still = self._sheets.behind and self.sharded is None
            self._sheets.begin(copy.deepcopy(model) if still else model, self.step)
        if not self._sheets.behind:
            self._tell_of_sheet(note)
            if self._bad_sheet is not None:
                if self._bad_sheet.error is not None:  # no fault of the weights
                    self.save()
                self.finish_writing()
                raise reason(self._bad_sheet, self.step, self.checkpoints)

    def _tell_of_sheet(self, note, wait: bool = False) -> None:
        """Log what a sheet has found, once it is done, and what follows from that: process 0 has them, so that nothing
        here may be said among all."""
        sheet = self._sheets.take(wait)
        if sheet is None:
            return
        failures = sheet.found.get("failures")
        if sheet.error is None:
            note("alarms", **{"step": sheet.step, **sheet.found})
            for failure in failures or ():
                tqdm.write(f"step {sheet.step}: {failure}", file=sys.stderr)
            if sheet.step < self.last:  # the end of the run writes one anyway
                self._sheets.then(sheet.step, self._report)
        if failures == []:
            if not self._sheets.behind:  # kept for the case that an alarm comes
                self.save()
            self._writing.submit(lambda: self.checkpoints.keep_best(sheet.step, sheet.found.get("error", 0.0)))
        else:
            self.checkpoints.awaited.discard(sheet.step)
        if sheet.error is not None or (failures and self.config.stop_on_failure):
            self._bad_sheet = sheet

    def _ending(self) -> int:
        """Why the run is to end before its time, in all processes alike: a signal's number, BAD_SHEET, or 0."""
        return distributed.greatest(self._asked.number if self._bad_sheet is None else BAD_SHEET)


def _has_ended(folder: Path, step: int) -> bool:
    return any(event.get("event") == "end" and event.get("step") == step for event in read_log(folder))


def _summary(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.4f}"]
    if "areas" in line:
        parts.append("areas " + "/".join(f"{a:.2f}" for a in line["areas"]))
    return ", ".join(parts)
