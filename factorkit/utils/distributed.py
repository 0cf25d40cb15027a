"""Processes of one run: torchrun starts them, torch.distributed joins them, nothing of our own in between.

What they must agree upon is said on the CPU, by gloo, so that no process waits for its GPU to hear it.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from factorkit.utils import errors
from factorkit.utils.errors import ConfigError, FactorkitError

Answer = TypeVar("Answer")


def rank() -> int:
    """This process's number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def data_parallel(module: nn.Module, pieces: int) -> DistributedDataParallel:
    """The module, its gradients averaged over all processes as they arise.

    Its buffers are left alone: every process finds the same ones. A backward pass in several ``pieces`` is told so: in
    its first step a static graph would send what the first of them found.
    """
    # a 1x1 kernel in channels_last is told from none by its strides alone
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    # without device_ids, with which it would move all arguments to the GPU: indices are read on the CPU
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "static_graph": pieces == 1, buffers: False}
    return DistributedDataParallel(module, **options)


@contextmanager
def unsynchronised(module: Any) -> Iterator[None]:
    """A piece of the backward pass of a module in several processes, whose gradients wait for the next one's."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    module.set_requires_gradient_sync(False)
    yield
    module.set_requires_gradient_sync(True)


def check_batch(batch_size: int, name: str = "batch_size") -> None:
    """Raise ConfigError where the processes of the run cannot share a batch equally; ``name`` is the setting's."""
    if batch_size % world_size():
        less, more = batch_size // world_size() * world_size(), -(-batch_size // world_size()) * world_size()
        near = f"{less} or {more}" if less else str(more)
        raise ConfigError(
            f"{name}={batch_size} cannot be shared equally by {world_size()} processes; give a multiple of their "
            f"number, such as {name}={near} (micro_batch_size is each one's own and need divide nothing)"
        )


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / world_size()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Average.apply(gradient)  # each process' loss depends on all processes' values


def average(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes; gradients go back to all of them."""
    return _Average.apply(values) if world_size() > 1 else values


def in_shares(work: Callable[[slice], Answer], count: int) -> Answer:
    """``work(slice(0, count))``, each process working on its share of the rows: all of them must ask, and all are told.

    The answer is a tensor [rows, ...] or holds such tensors in tuples, lists and dictionaries; what else it holds is
    each process's own. Rows must not depend on each other. Where there are fewer rows than processes, each works on all
    of them.
    """
    world = world_size()
    if world == 1 or count < world:
        return work(slice(0, count))
    edges = [count * i // world for i in range(world + 1)]
    sizes = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    held, form = tree_flatten(work(slice(edges[rank()], edges[rank() + 1])))
    return tree_unflatten([_put_together(part, sizes) if isinstance(part, Tensor) else part for part in held], form)


def _put_together(mine: Tensor, sizes: list[int]) -> Tensor:
    """The rows of all processes, of which each has so many, in all of them."""
    sent = mine.new_zeros(max(sizes), *mine.shape[1:])
    sent[: len(mine)] = mine
    found = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(found, sent)
    return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])


def gathered(values: Tensor) -> tuple[Tensor, slice]:
    """The rows of all processes, which have as many each, one after the other; and which of them are this one's."""
    if world_size() == 1:
        return values, slice(0, len(values))
    found = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(found, values.contiguous())
    return torch.cat(found), slice(rank() * len(values), (rank() + 1) * len(values))


def greatest(number: int) -> int:
    """The greatest of the processes' numbers, for decisions that all of them must take alike."""
    if world_size() > 1:
        values = torch.tensor(number)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        number = int(values)
    return number


def barrier() -> None:
    """Wait for all processes."""
    greatest(0)


def on_first(work: Callable[[], Answer]) -> Answer:
    """What process 0 makes of ``work`` while the others wait, in all of them; where it fails, all of them do."""
    told: list[Any] = [(None, ("FactorkitError", "process 0 of this run was interrupted"))]
    try:
        if rank() == 0:
            told = [(work(), None)]
    except Exception as error:
        told = [(None, _named(error))]
        raise
    finally:
        if world_size() > 1:
            dist.broadcast_object_list(told, device=torch.device("cpu"))
    answer, failure = told[0]
    _raise(failure)
    return answer


@contextmanager
def first_within(context: AbstractContextManager[object]) -> Iterator[None]:
    """Process 0 is in ``context`` meanwhile, and no other; where it cannot enter it, all processes fail."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        on_first(enter)
        yield


def everyones(work: Callable[[], Answer]) -> list[Answer]:
    """What each process makes of ``work``, in their order, in all of them; where one fails, all of them do."""
    if world_size() == 1:
        return [work()]
    mine: tuple[Any, Any] = None, None
    failure: Exception | None = None
    try:
        mine = work(), None
    except Exception as error:
        failure, mine = error, (None, _named(error))
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, mine)
    if failure is not None:
        raise failure
    for _, elsewhere in found:
        _raise(elsewhere)
    return [answer for answer, _ in found]


def _named(error: Exception) -> tuple[str, str]:
    """What the other processes are told of an error."""
    return ("WriteError" if isinstance(error, OSError) else type(error).__name__), str(error)


def _raise(failure: tuple[str, str] | None) -> None:
    """The error of another process, by its name and words."""
    if failure is not None:
        raise getattr(errors, failure[0], FactorkitError)(failure[1])


@contextmanager
def first_of_machine() -> Iterator[None]:
    """What is done here is done by one process of each machine first, and then by its others, who find it done."""
    others = int(os.environ.get("LOCAL_RANK", "0")) > 0
    if others:
        barrier()
    yield
    if not others:
        barrier()


def local_device(device: torch.device) -> torch.device:
    """The GPU of this process on its machine (torchrun's LOCAL_RANK).

    Raises:
        ConfigError: there are fewer GPUs than processes on it, or all of them were told to share one.
    """
    if device.type != "cuda":
        return device
    number, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.index is None:
        if number >= torch.cuda.device_count():
            raise ConfigError(
                f"this is process {number + 1} of {processes} on this machine, but torch sees "
                f"{torch.cuda.device_count()} GPU(s) here; give torchrun --nproc-per-node no more than that"
            )
        return torch.device("cuda", number)
    if processes > 1:
        raise ConfigError(
            f"device='{device}' is one GPU, but {processes} processes run on this machine, each on a GPU of its own; "
            "give device='cuda'"
        )
    return device


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of a process whose fellow is gone or was never reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
