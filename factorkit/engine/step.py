"""One step of the optimiser, whole: gather, noise, forward, backward, clipping, Adam, moving average.

Nothing in it waits for the device, not even to learn whether the gradient is finite: a step that is not finite
changes nothing because every update is masked on the device, and is told of when the log is written. So the very
function that a CPU runs line by line can be one CUDA graph on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from factorkit.engine.config import EngineConfig
from factorkit.engine.cuda_graph import GraphedWork
from factorkit.engine.sharding import alike, average_whole, held, norms
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw, derived_seed, image_order

NON_FINITE_LIMIT = 3  # steps in a row whose gradient is not finite before the run is stopped


class StepLoss(NamedTuple):
    """What a task reports of one micro-batch of B samples."""

    objective: Tensor  # [B] what is minimised (weighted)
    loss: Tensor  # [B] the plain error, for the log
    level: Tensor  # [B] noise level in [0, 1), for the loss by quarters
    watch: dict[str, Tensor]  # means over the micro-batch, logged by name


class Task(Protocol):
    """What the loop asks of a model's training."""

    model: nn.Module
    size: int  # number of training images
    capturable: bool  # whether `loss` keeps to the device: the images lie there, nothing is read back

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adam's groups; each has "params" and "scale", the factor on the learning rate, and may have "betas"."""

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Errors of the images ``indices`` at optimiser step ``step`` (no dimensions, on the device, as a graph must
        follow it); all randomness from ``draw``."""

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Write sample sheets of the averaged model into ``folder``; the answer is logged as the event "alarms".

        Process 0 alone does it, where there are others in a thread of its own while the training goes on: it may touch
        nothing that the training reads or writes, nor speak to other processes. What the averaged model is to keep of
        its views goes into ``settle(model)``, which a task may have; all processes call it before.

        Two of its keys are known to the loop: "failures", what is wrong in words, and "error", less of which is better.
        """


class Objective(nn.Module):
    """A task's loss as a forward pass of its own: what DistributedDataParallel or FSDP is put around."""

    def __init__(self, task: Task):
        super().__init__()
        self.model, self.task = task.model, task
        self.indices = torch.zeros(0, dtype=torch.int64)  # of the batch; given as they are, FSDP would move them

    def forward(self, rows: slice, draw: BatchDraw, step: Tensor) -> StepLoss:
        return self.task.loss(self.model, self.indices[rows], draw, step)


class MovingAverage(AveragedModel):
    """The moving average of the weights: after n updates it keeps min(decay, (1+n)/(10+n)) of itself.

    torch's container and state, with arithmetic that leaves the count on the device and can be told to do nothing.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device):
        super().__init__(model, device=device)
        self.decay = decay
        self.eval()

    @torch.no_grad()
    def follow(self, model: nn.Module, valid: Tensor) -> None:
        """Take up the weights of ``model`` where ``valid`` (bool, no dimensions); its buffers are copied."""
        done = self.n_averaged
        share = 1 - ((1 + done) / (10 + done)).clamp_max(self.decay)
        share = torch.where(done == 0, 1.0, share) * valid
        averaged, current = held(self.module.parameters()), held(model.parameters())
        # not a lerp, which takes no weight from the device; at shares 0 and 1 either side stays to the bit
        torch._foreach_mul_(averaged, 1 - share)
        torch._foreach_add_(averaged, torch._foreach_mul(current, share))
        for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        self.n_averaged += valid


class TrainingStep:
    """``step_of(n)`` takes the n-th step: trains ``task.model``, moves the ``averages``, adds to ``meter``.

    Args:
        synchronised: average gradients over all processes. Several processes take their steps without a CUDA graph.
        sharded: the task's :class:`Objective`, where its weights are sharded.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        averages: Sequence[MovingAverage],
        meter: Meter,
        config: EngineConfig,
        device: torch.device,
        synchronised: bool = False,
        sharded: nn.Module | None = None,
    ):
        self.task, self.model = task, task.model
        self.optimizer, self.averages, self.meter, self.config = optimizer, averages, meter, config
        on_device = device.type == "cuda" and task.capturable
        self.slices = list(_micro_batches(config))
        self.draws = [
            BatchDraw(config.seed, 0, config.batch_size, rows, device, first=i == 0)
            for i, rows in enumerate(self.slices)
        ]
        objective = Objective(task) if sharded is None else sharded
        self.indices = torch.zeros(config.batch_size, dtype=torch.int64, device=device if on_device else "cpu")
        objective.indices = self.indices
        if synchronised and sharded is None:
            objective = distributed.data_parallel(objective, pieces=len(self.slices))
        self.objective, self.sharded = objective, sharded is not None
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.bad = torch.zeros((), dtype=torch.int64, device=device)  # steps in a row that were not finite
        # the first row of the batch whose loss, and the first parameter whose gradient, is not finite; None is -1
        self.culprits = torch.full((2,), -1, device=device)
        self.names: list[str] = []  # of the parameters that have a gradient
        self.history = torch.zeros(config.log_every, 3, dtype=torch.int64, device=device)  # `finite` and those, by step
        self.taken: list[int] = []
        self.run = self._work
        self.synchronised = synchronised
        if on_device and config.cuda_graph and not synchronised:
            self.run = GraphedWork(self._work, lambda: [d.generator for d in self.draws], self._again, device)

    def __call__(self, step: int) -> None:
        """Take the step after ``step`` finished ones; :meth:`skipped` must be asked every ``log_every`` steps."""
        self._prepare(step)
        self.model.train()
        self.run()
        self.history[len(self.taken)].copy_(torch.cat([self.finite[None], self.culprits]))
        self.taken.append(step)

    def skipped(self) -> list[tuple[int, str | None]]:
        """The steps taken since the last call and, of those that were skipped, what was not finite in them: in words,
        None for the others. Waits for the device."""
        found = self.history[: len(self.taken)].tolist()
        steps, self.taken = self.taken, []
        return [
            (step, None if finite else self._blamed(step, *culprits))
            for step, (finite, *culprits) in zip(steps, found, strict=True)
        ]

    def _blamed(self, step: int, row: int, parameter: int) -> str:
        config, row = self.config, distributed.greatest(row)  # it may be another process's, which asks as well
        if row >= 0:
            order = image_order(config.seed, step * config.batch_size, config.batch_size, self.task.size)
            return f"the loss of image {int(order[row])} was not finite"
        if parameter >= 0:
            return f"the gradient of {self.names[parameter]} was not finite"
        return "the gradient was not finite"

    def _prepare(self, step: int) -> None:
        """What changes from step to step, written into tensors that stay where they are."""
        config, seen = self.config, step * self.config.batch_size
        for group in self.optimizer.param_groups:
            group["lr"].fill_(config.learning_rate_at(step) * group["scale"])
        self.step.fill_(step)
        torch.manual_seed(derived_seed("dropout", config.seed, seen, distributed.rank()))
        for draw in self.draws:
            draw.restart(seen)
        order = image_order(config.seed, seen, config.batch_size, self.task.size)
        self.indices.copy_(order.pin_memory() if self.indices.is_cuda else order, non_blocking=True)

    def _again(self) -> None:
        """After a capture that failed: generators it has drawn from are replaced, half a gradient is dropped."""
        step, self.draws = int(self.step), [draw.fresh() for draw in self.draws]
        self.optimizer.zero_grad(set_to_none=True)
        self._prepare(step)

    def _work(self) -> None:
        config, buffers = self.config, list(self.model.buffers())
        # running statistics move in the forward pass, before anybody knows that the step is to be skipped
        before = [b.clone() for b in buffers]
        self.culprits.fill_(-1)
        for i, (rows, draw) in enumerate(zip(self.slices, self.draws, strict=True)):
            last = i == len(self.slices) - 1 or not self.synchronised
            with nullcontext() if last else distributed.unsynchronised(self.objective):
                with torch.autocast(self.step.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    found = self.objective(rows, draw, self.step)
                # both average over processes, the batch's mean needs a sum
                (found.objective.sum() * (distributed.world_size() / config.batch_size)).backward()
            self.meter.add(found)
            self._blame(0, ~found.objective.detach().isfinite(), rows.start)
        trained = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        if self.sharded:
            average_whole(trained.values())
        each = norms(list(trained.values()))
        norm, self.names = torch.linalg.vector_norm(each), list(trained)
        self._blame(1, ~each.isfinite(), 0)
        # once the limit is reached nothing moves any more: what the run is stopped with is what stood then
        self.finite.copy_(norm.isfinite() & (self.bad < NON_FINITE_LIMIT))
        self.bad.copy_(torch.where(self.finite, 0, self.bad + 1))
        if config.gradient_clip is not None:
            for part in alike(self.model.parameters()):
                nn.utils.clip_grads_with_norm_(part, config.gradient_clip, norm, foreach=True)
        self.optimizer.found_inf = (~self.finite).float()  # fused Adam leaves weights, moments and its count alone then
        self.optimizer.step()
        # gradients that are views of what is sent stay where they are
        self.optimizer.zero_grad(set_to_none=self.sharded or not self.synchronised)
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(torch.where(self.finite, buffer, old))
        for average in self.averages:
            average.follow(self.model, self.finite)

    def _blame(self, kind: int, bad: Tensor, first: int) -> None:
        """Note the first of ``bad``, counted from ``first``, unless one was noted before."""
        found = torch.where(bad.any(), bad.int().argmax() + first, -1)
        self.culprits[kind].copy_(torch.where(self.culprits[kind] < 0, found, self.culprits[kind]))


def make_optimizer(groups: list[dict[str, Any]], config: EngineConfig, device: torch.device) -> torch.optim.Adam:
    """Fused Adam whose learning rates and counts are tensors on the device."""
    rate = lambda: torch.tensor(config.learning_rate, device=device)  # noqa: E731
    optimizer = torch.optim.Adam(
        [{**group, "params": part, "lr": rate()} for group in groups for part in alike(group["params"])],
        fused=True,
        capturable=device.type == "cuda",
    )
    optimizer._warned_capturable_if_run_uncaptured = True  # it runs uncaptured while the graph warms up
    return optimizer


def _micro_batches(config: EngineConfig) -> Iterator[slice]:
    """The rows of the batch that are this process's, in pieces that fit in memory."""
    rank, world, batch = distributed.rank(), distributed.world_size(), config.batch_size
    start, end = batch * rank // world, batch * (rank + 1) // world
    size = config.micro_batch_size or max(1, end - start)
    for low in range(start, end, size):
        yield slice(low, min(low + size, end))


if TYPE_CHECKING:
    from factorkit.engine.step import StepLoss


class Meter:
    """Sums over the steps between two lines of the log, kept on the device and read once.

    They are added to in place, so that a CUDA graph may do it.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=device)  # loss, samples; by quarters of the level
        self.watch: dict[str, Tensor] = {}
        self._restart()

    def _restart(self) -> None:
        self.pause, self.since = 0.0, time.perf_counter()

    def add(self, found: StepLoss) -> None:
        quarter = (found.level * 4).long().clamp(0, 3)
        loss = found.loss.detach().double()
        self.sums[0].index_add_(0, quarter, loss)
        self.sums[1].index_add_(0, quarter, torch.ones_like(loss))
        for name, value in found.watch.items():
            value = value.detach().float() * len(loss)
            if name not in self.watch:
                self.watch[name] = torch.zeros_like(value)
            self.watch[name].add_(value)

    @contextmanager
    def paused(self):
        """Time spent on sheets and checkpoints is no training time."""
        start = time.perf_counter()
        yield
        self.pause += time.perf_counter() - start

    def read(self) -> dict[str, Any]:
        """Means since the last reading, over all processes."""
        sums = distributed.average(self.sums).cpu()  # waits for the device, so the clock is read after it
        seconds = time.perf_counter() - self.since - self.pause
        rows = sums[1].sum().item()  # of each process
        by_quarter = [s / n if n else None for s, n in zip(*sums.tolist(), strict=True)]
        line = {
            "loss": sums[0].sum().item() / max(rows, 1),
            "loss_by_quarter": by_quarter,
            "images_per_second": rows * distributed.world_size() / max(seconds, 1e-9),
            "seconds": seconds,
        }
        for name, total in self.watch.items():
            line[name] = distributed.average(total / rows).tolist()
        for total in (self.sums, *self.watch.values()):
            total.zero_()
        self._restart()
        return line
