"""The state of a training: weights, moving averages and Adam's moments; and saving and loading it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

import torch
from torch import Tensor, nn

from factorkit.engine import sharding
from factorkit.engine.checkpoint import Checkpoints, average_name
from factorkit.engine.config import EngineConfig
from factorkit.engine.step import MovingAverage, Objective, Task, make_optimizer
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError, first_mismatch


class TrainingState:
    """The model of ``task``, its averages and the optimiser, on ``device``; sharded if the configuration asks for it.

    Attributes:
        average: the main moving average.
        averages: all of them by name.
        sharded: the task's objective, if its weights are sharded.
    """

    def __init__(self, task: Task, config: EngineConfig, device: torch.device):
        self.device = device
        shards = config.shard and distributed.world_size() > 1
        initial_device = torch.device("cpu") if shards else device  # weights are whole before they are sharded
        self.model = task.model.to(initial_device)
        self.average = MovingAverage(self.model, config.ema_decay, initial_device)
        self.averages = {"ema": self.average}
        for decay in config.extra_ema_decays:
            self.averages[average_name(decay)] = MovingAverage(self.model, decay, initial_device)
        self.sharded: Objective | None = None
        if shards:
            self._structure = sharding.copy_without_weights(self.model)
            self.sharded = cast(Objective, sharding.shard(Objective(task), device))
            for average in self.averages.values():
                sharding.shard(average.module, device)
                average.n_averaged = average.n_averaged.to(device)
        self.optimizer = make_optimizer(task.parameter_groups(), config, device)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs by name; some may be sharded."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for name, average in self.averages.items():
            tensors.update({f"{name}.{k}": v for k, v in average.state_dict().items()})
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{key}.{name}"] = value
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the full tensors of a checkpoint. An average that it does not have starts at its weights.

        Raises:
            RuntimeError: the tensors belong to another model.
        """

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(sharding.shard_like(part("model."), self.model.state_dict()))
        for name, average in self.averages.items():
            if name == "ema" or part(f"{name}."):
                average.load_state_dict(sharding.shard_like(part(f"{name}."), average.state_dict()))
            else:
                average.module.load_state_dict(self.model.state_dict())
        for name, parameter in self.model.named_parameters():
            if f"adam.step.{name}" in tensors:
                moments = {k: tensors[f"adam.{k}.{name}"] for k in ("exp_avg", "exp_avg_sq")}
                moments = sharding.shard_like(moments, dict.fromkeys(moments, parameter))
                self.optimizer.state[parameter] = {
                    "step": tensors[f"adam.step.{name}"].to(self.device),  # fused Adam keeps it on the device
                    **{k: torch.empty_like(parameter).copy_(moment) for k, moment in moments.items()},
                }

    def averaged_model(self, needed: bool = True) -> nn.Module:
        """Return the averaged model: itself, or a gathered copy if it is sharded. Collective if it is sharded.

        Args:
            needed: whether this process uses the result; otherwise a copy without weights is returned.
        """
        if self.sharded is None:
            return self.average.module
        # buffers are whole already and must not change with those of the average
        tensors = {k: v.clone() for k, v in sharding.gather_full(self.average.module.state_dict()) if needed}
        return sharding.copy_with_state(self._structure, tensors).eval() if needed else self._structure


class CheckpointManager:
    """Saves and loads the training state. Rank 0 writes, in a background thread. Methods are collective.

    Attributes:
        saved_step: the step of the newest checkpoint that is on disk or being written; None without one.
    """

    def __init__(self, state: TrainingState, checkpoints: Checkpoints, meta: Mapping[str, Any]):
        self.state, self.checkpoints, self.meta = state, checkpoints, meta
        self.saved_step: int | None = None
        self._writer = BackgroundWorker()

    def load(self) -> int | None:
        """Load the newest whole checkpoint and return its step; None if there is none.

        Raises:
            CheckpointError: no checkpoint is whole, or they belong to another model.
        """
        latest, folder = self.checkpoints.latest(), self.checkpoints.folder
        if not distributed.maximum(int(latest is not None)):
            return None
        advice = "put the folder on a disk that all machines share"
        if latest is None:
            raise CheckpointError(
                f"process {distributed.rank()} finds no checkpoint in {folder}, but others do; {advice}"
            )
        tensors, meta = latest
        try:
            self.state.load(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoints in {folder} belong to another model: {first_mismatch(error)}"
            ) from error
        step = self.saved_step = int(meta["step"])
        if distributed.maximum(step) != -distributed.maximum(-step):
            raise CheckpointError(f"the processes of this run find different checkpoints in {folder}; {advice}")
        return step

    def save(self, step: int) -> None:
        """Start to write a checkpoint of the current state, unless ``step`` is saved already.

        If the checkpoint before could not be written, this call waits for the new one: there may be free space again.

        Raises:
            CheckpointError: neither could be written.
        """
        if step == self.saved_step:
            return
        error = self._write_error()
        tensors = sharding.copy_full(self.state.tensors())
        if distributed.rank() == 0:
            self._writer.submit(lambda: self.checkpoints.save(step, tensors, self.meta))
        self.saved_step = step
        if error is not None:
            self.finish()
            if distributed.rank() == 0:
                warnings.warn(f"{error} (the checkpoint of step {step} was written)", stacklevel=3)

    def keep_best(self, step: int, error: float) -> None:
        """Keep the checkpoint of ``step`` if none kept before has a lower error. On rank 0 alone; not collective."""
        self._writer.submit(lambda: self.checkpoints.keep_best(step, error))

    def finish(self) -> None:
        """Wait until all checkpoints are on disk.

        Raises:
            CheckpointError: one could not be written.
        """
        if (error := self._write_error()) is not None:
            self.saved_step = None
            raise error

    def close(self) -> Exception | None:
        """Wait for the thread and end it; return its error. Not collective."""
        return self._writer.close()

    def _write_error(self) -> Exception | None:
        """Wait for the writer and return its error, on all ranks."""
        error = self._writer.finish()
        if distributed.maximum(int(error is not None)):
            return error or CheckpointError("process 0 of this run could not write a checkpoint; see its error message")
        return None


class BackgroundWorker:
    """Run jobs one after the other in one thread, so that disk writes do not block training.

    After a job that failed, the others are skipped.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "factorkit-background")
        self._jobs: list[Future[None]] = []
        self._error: Exception | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Run ``job`` after earlier jobs. Objects it uses must not change meanwhile."""
        self._jobs.append(self._thread.submit(self._run, job))

    def finish(self) -> Exception | None:
        """Wait for all jobs and return the error of a failed one; the error is then cleared."""
        wait(self._jobs)
        self._jobs.clear()
        error, self._error = self._error, None
        return error

    def close(self) -> Exception | None:
        """Call :meth:`finish` and end the thread."""
        error = self.finish()
        self._thread.shutdown()
        return error

    def _run(self, job: Callable[[], object]) -> None:
        if self._error is None:
            try:
                job()
            except Exception as error:
                self._error = error
