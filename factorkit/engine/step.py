"""One optimiser step: gather, noise, forward, backward, clipping, Adam, moving averages.

No operation waits for the device. A step whose gradient is not finite changes nothing, because every update is masked
on the device; it is reported when the log is written. So the same code runs eagerly on a CPU and as one CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from factorkit.engine.config import EngineConfig, autocast
from factorkit.engine.cuda_graph import GraphedWork
from factorkit.utils import distributed
from factorkit.utils.rng import BatchDraw, derived_seed, image_order, seed_device

NON_FINITE_LIMIT = 3  # consecutive steps with a non-finite gradient after which the run is stopped


class StepLoss(NamedTuple):
    """What a task reports of a micro-batch of B samples."""

    objective: Tensor  # [B], weighted; this is minimised
    loss: Tensor  # [B], unweighted, for the log
    level: Tensor  # [B], noise level in [0, 1), for the loss by quarters
    metrics: dict[str, Tensor]  # means over the micro-batch, logged by name


class Task(Protocol):
    """The interface between the training loop and a model's training.

    A task may also have ``takes_device_indices = True``: :meth:`loss` gets its indices on the device although it is not
    capturable, so that it need not wait for their copy. It may also have ``update_buffers(model)``: it updates the
    buffers of the averaged model from the training data, before :meth:`inspect`. All processes call it. And it may have
    ``prepare(step)``, called before the loss of a step is computed: it writes what depends on the number of the step
    into tensors that stay in place, and returns a hashable value that changes where :meth:`loss` takes another path.

    Attributes:
        model: the module to train.
        size: number of training images.
        capturable: whether :meth:`loss` runs entirely on the device, so that a CUDA graph can record it. Between two
            calls only tensors that stay in place may change, unless ``prepare`` returns another value.
    """

    model: nn.Module
    size: int
    capturable: bool

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return Adam's groups: "params", "scale" (a factor on the learning rate) and optionally "betas"."""

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Compute the loss of the images ``indices`` at optimiser step ``step`` (a scalar on the device).

        All random numbers come from ``draw``.
        """

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Write sample grids of the averaged model into ``folder`` and return the fields of the event "alarms".

        Rank 0 alone calls this; with several processes in a background thread during training, so that it must not
        touch the training's tensors and cannot use collectives. The loop uses two fields: "failures" (list of
        sentences) and "error" (lower is better).
        """


class Objective(nn.Module):
    """A task's loss as a forward pass, to be wrapped by DistributedDataParallel or FSDP."""

    def __init__(self, task: Task):
        super().__init__()
        self.model, self.task = task.model, task
        self.indices = torch.zeros(0, dtype=torch.int64)  # of the batch; as an argument, FSDP would move them

    def forward(self, rows: slice, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Compute the loss of these rows of the batch."""
        return self.task.loss(self.model, self.indices[rows], draw, step)


class MovingAverage(AveragedModel):
    """The exponential moving average of the weights, with decay min(decay, (1+n)/(10+n)) after n updates.

    Differs from torch's class in that the count stays on the device and an update can be masked.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device):
        super().__init__(model, device=device)
        self.decay = decay
        self.eval()

    @cached_property
    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters and buffers, listed at the first update, when sharding has replaced them if it does."""
        return list(self.module.parameters()), list(self.module.buffers())

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor], valid: Tensor) -> None:
        """Update with a model's parameters where ``valid`` (a scalar bool); buffers are always copied."""
        count = self.n_averaged
        weight = 1 - ((1 + count) / (10 + count)).clamp_max(self.decay)
        weight = torch.where(count == 0, 1.0, weight) * valid
        own_parameters, own_buffers = self.tensors
        averaged, current = local_parts(own_parameters), local_parts(parameters)
        # In both forms, weights of 0 and 1 keep either side exactly.
        if weight.is_cuda:  # a lerp with a weight from the device would be a launch for each tensor
            torch._foreach_mul_(averaged, 1 - weight)
            torch._foreach_add_(averaged, torch._foreach_mul(current, weight))
        else:
            torch._foreach_lerp_(averaged, current, [weight] * len(averaged))
        for own, other in zip(own_buffers, buffers, strict=True):
            own.copy_(other)
        self.n_averaged += valid


def measure_convolutions(device: torch.device) -> None:
    """Let cuDNN measure its algorithms once for each shape: all batches of a training have the same."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


class TrainingStep:
    """Callable that takes one optimiser step, updates the averages and adds to the meter.

    Args:
        optimizer: from :func:`make_optimizer`.
        synchronised: average gradients over all processes. This excludes a CUDA graph.
        sharded: the task's :class:`Objective` if its weights are sharded.
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
        sharded: Objective | None = None,
    ):
        self.task, self.model = task, task.model
        self.optimizer, self.averages, self.meter, self.config = optimizer, averages, meter, config
        # Listed once: walking through the modules takes time in every step, and the optimiser holds the same tensors.
        self.parameters, self.buffers = dict(self.model.named_parameters()), list(self.model.buffers())
        self.model.train()
        on_gpu = device.type == "cuda"
        measure_convolutions(device)
        indices_on_gpu = on_gpu and (task.capturable or getattr(task, "takes_device_indices", False))
        self.micro_batches = list(_micro_batches(config))
        self.draws = [BatchDraw(config.seed, 0, config.batch_size, rows, device) for rows in self.micro_batches]
        objective = sharded or Objective(task)
        self.indices = torch.zeros(config.batch_size, dtype=torch.int64, device=device if indices_on_gpu else "cpu")
        objective.indices = self.indices
        self.objective: nn.Module = objective
        if synchronised and sharded is None:
            self.objective = distributed.data_parallel(objective, micro_batches=len(self.micro_batches))
        self.sharded, self.synchronised = sharded is not None, synchronised
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        self.consecutive_skips = torch.zeros((), dtype=torch.int64, device=device)
        # first row of the batch with a non-finite loss, and first parameter with a non-finite gradient; -1 is none
        self.causes = torch.full((2,), -1, device=device)
        self.gradient_names: list[str] = []  # parameters that have a gradient
        self.history = torch.zeros(config.log_every, 3, dtype=torch.int64, device=device)  # finite, causes; by step
        self.unreported_steps: list[int] = []
        self.run: Callable[[Hashable], None] = lambda form: self._work()
        if on_gpu and task.capturable and config.cuda_graph and not synchronised:
            self.run = GraphedWork(self._work, lambda: [d.generator for d in self.draws], self._reset, device)

    def __call__(self, step: int) -> None:
        """Take the step that follows ``step`` finished ones."""
        self._prepare(step)
        if not self.model.training:
            self.model.train()
        self.run(self._prepare_task(step))
        self.history[len(self.unreported_steps)].copy_(torch.cat([self.finite[None], self.causes]))
        self.unreported_steps.append(step)

    def report_steps(self) -> list[tuple[int, str | None]]:
        """Return the steps since the last call, each with the reason why it was skipped, or None.

        Must be called at least every ``log_every`` steps. Waits for the device.
        """
        history = self.history[: len(self.unreported_steps)].tolist()
        steps, self.unreported_steps = self.unreported_steps, []
        return [
            (step, None if finite else self._describe_cause(step, *causes))
            for step, (finite, *causes) in zip(steps, history, strict=True)
        ]

    def _describe_cause(self, step: int, row: int, parameter: int) -> str:
        config, row = self.config, distributed.maximum(row)  # the row may belong to another process
        if row >= 0:
            order = image_order(config.seed, step * config.batch_size, config.batch_size, self.task.size)
            return f"the loss of image {int(order[row])} was not finite"
        if parameter >= 0:
            return f"the gradient of {self.gradient_names[parameter]} was not finite"
        return "the gradient was not finite"

    def _prepare(self, step: int) -> None:
        """Write everything that changes from step to step into tensors that stay in place."""
        config, images_seen = self.config, step * self.config.batch_size
        for group in self.optimizer.param_groups:
            group["lr"].fill_(config.learning_rate_at(step) * group["scale"])
        self.step.fill_(step)
        seed_device(derived_seed("dropout", config.seed, images_seen, distributed.rank()), self.step.device)
        for draw in self.draws:
            draw.restart(images_seen)
        order = image_order(config.seed, images_seen, config.batch_size, self.task.size)
        self.indices.copy_(order.pin_memory() if self.indices.is_cuda else order, non_blocking=True)

    def _prepare_task(self, step: int) -> Hashable:
        prepare = getattr(self.task, "prepare", None)
        if prepare is None:
            return None
        with autocast(self.config, self.step.device):
            return prepare(step)

    def _reset(self) -> None:
        """After a failed capture, replace the generators it used and drop partial gradients."""
        step, self.draws = int(self.step), [draw.fresh() for draw in self.draws]
        self.optimizer.zero_grad(set_to_none=True)
        self._prepare(step)

    def _work(self) -> None:
        config = self.config
        # the forward pass updates running statistics before it is known whether the step is skipped
        old_buffers = [b.clone() for b in self.buffers]
        self.causes.fill_(-1)
        for i, (rows, draw) in enumerate(zip(self.micro_batches, self.draws, strict=True)):
            sync = i == len(self.micro_batches) - 1 or not self.synchronised
            with nullcontext() if sync else distributed.no_gradient_sync(self.objective):
                with autocast(config, self.step.device):
                    result = self.objective(rows, draw, self.step)
                # DDP and FSDP average over processes; the mean over the batch needs the sum
                (result.objective.sum() * (distributed.world_size() / config.batch_size)).backward()
            self.meter.add(result)
            self._record_cause(0, ~result.objective.detach().isfinite(), rows.start)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.sharded:
            average_unsharded(gradients.values())
        norms = gradient_norms(list(gradients.values()))
        norm, self.gradient_names = torch.linalg.vector_norm(norms), list(gradients)
        self._record_cause(1, ~norms.isfinite(), 0)
        # beyond the limit nothing changes, so that the run stops with the weights it had there
        self.finite.copy_(norm.isfinite() & (self.consecutive_skips < NON_FINITE_LIMIT))
        self.consecutive_skips.copy_(torch.where(self.finite, 0, self.consecutive_skips + 1))
        if config.gradient_clip is not None:
            for group in group_by_sharding(self.parameters.values()):
                nn.utils.clip_grads_with_norm_(group, config.gradient_clip, norm, foreach=True)
        # fused Adam skips its update where found_inf is set
        self.optimizer.found_inf = (~self.finite).float()  # type: ignore[attr-defined]  # read by torch, not declared
        self.optimizer.step()
        # under DDP gradients are views of the communication buffers and stay in place
        self.optimizer.zero_grad(set_to_none=self.sharded or not self.synchronised)
        for buffer, old in zip(self.buffers, old_buffers, strict=True):
            buffer.copy_(torch.where(self.finite, buffer, old))
        for average in self.averages:
            average.update(self.parameters.values(), self.buffers, self.finite)

    def _record_cause(self, kind: int, non_finite: Tensor, offset: int) -> None:
        """Record the first index of ``non_finite``, plus ``offset``, unless one was recorded before."""
        index = torch.where(non_finite.any(), non_finite.int().argmax() + offset, -1)
        self.causes[kind].copy_(torch.where(self.causes[kind] < 0, index, self.causes[kind]))


def make_optimizer(groups: list[dict[str, Any]], config: EngineConfig, device: torch.device) -> torch.optim.Adam:
    """Return fused Adam whose learning rates and counts are tensors on the device."""
    optimizer = torch.optim.Adam(
        [
            {**group, "params": parameters, "lr": torch.tensor(config.learning_rate, device=device)}
            for group in groups
            for parameters in group_by_sharding(group["params"])
        ],
        fused=True,
        capturable=device.type == "cuda",
    )
    # it runs uncaptured while the graph warms up
    optimizer._warned_capturable_if_run_uncaptured = True
    return optimizer


def _micro_batches(config: EngineConfig) -> Iterator[slice]:
    """Yield the rows of the batch that belong to this process, in micro-batches."""
    rank, world, batch = distributed.rank(), distributed.world_size(), config.batch_size
    start, end = batch * rank // world, batch * (rank + 1) // world
    size = config.micro_batch_size or max(1, end - start)
    for low in range(start, end, size):
        yield slice(low, min(low + size, end))


class Meter:
    """Sums between two lines of the log, kept on the device and read once.

    They are added to in place, so that a CUDA graph can do it.
    """

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=device)  # (loss, samples) by quarter of the level
        self.metrics: dict[str, Tensor] = {}
        self._restart()

    def _restart(self) -> None:
        self.paused_seconds, self.start = 0.0, time.perf_counter()

    def add(self, result: StepLoss) -> None:
        """Add a micro-batch."""
        quarter = (result.level * 4).long().clamp(0, 3)
        loss = result.loss.detach().double()
        self.sums[0].index_add_(0, quarter, loss)
        self.sums[1].index_add_(0, quarter, torch.ones_like(loss))
        for name, value in result.metrics.items():
            value = value.detach().float() * len(loss)
            if name not in self.metrics:
                self.metrics[name] = torch.zeros_like(value)
            self.metrics[name].add_(value)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the training time."""
        start = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - start

    def read(self) -> dict[str, Any]:
        """Return the means since the last call, over all processes. Collective."""
        sums = distributed.average(self.sums).cpu()  # waits for the device, so the clock is read afterwards
        seconds = time.perf_counter() - self.start - self.paused_seconds
        rows = sums[1].sum().item()  # of each process
        line = {
            "loss": sums[0].sum().item() / max(rows, 1),
            "loss_by_quarter": [s / n if n else None for s, n in zip(*sums.tolist(), strict=True)],
            "images_per_second": rows * distributed.world_size() / max(seconds, 1e-9),
            "seconds": seconds,
        }
        for name, total in self.metrics.items():
            line[name] = distributed.average(total / rows).tolist()
        for total in (self.sums, *self.metrics.values()):
            total.zero_()
        self._restart()
        return line


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this is a DTensor, of which this process holds a shard."""
    return hasattr(tensor, "full_tensor")


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts of the tensors that this process holds."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]  # type: ignore[attr-defined]  # a method of DTensor


def group_by_sharding(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Separate sharded parameters from others: no foreach operation takes both."""
    parameters = list(parameters)
    groups = ([p for p in parameters if is_sharded(p) == sharded] for sharded in (True, False))
    return [group for group in groups if group]


def gradient_norms(gradients: list[Tensor]) -> Tensor:
    """Return the norms [N] of N full gradients. Collective if any is sharded."""
    norms = torch.stack(torch._foreach_norm(local_parts(gradients)))
    if not any(map(is_sharded, gradients)):
        return norms
    counted = [is_sharded(g) or distributed.rank() == 0 for g in gradients]  # count whole gradients once
    squares = torch.where(torch.tensor(counted, device=norms.device), norms.square(), 0.0)
    dist.all_reduce(squares)
    return squares.sqrt()


def average_unsharded(gradients: Iterable[Tensor]) -> None:
    """Average the gradients that FSDP leaves alone over all processes, in place. Collective."""
    for gradient in gradients:
        if not is_sharded(gradient):
            dist.all_reduce(gradient)
            gradient /= distributed.world_size()
