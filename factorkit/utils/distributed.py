"""The processes of a run: torchrun starts them, torch.distributed connects them.

Decisions that all processes must share are exchanged on the CPU by gloo, so that no process waits for its GPU.
"Collective" means that every rank must call the function.
"""

from __future__ import annotations

import atexit
import inspect
import itertools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from factorkit.utils import errors
from factorkit.utils.errors import ConfigError, FactorkitError, format_count

Result = TypeVar("Result")

COLLECTIVE_TIMEOUT = timedelta(hours=4)  # one process may decode a data set while the others wait
JOIN_TIMEOUT = timedelta(minutes=30)  # until all processes have started
_POLL_SECONDS = 0.02


def rank() -> int:
    """Return the rank of this process; rank 0 writes the files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# --- joining and leaving ---


def join_processes(device: torch.device) -> None:
    """Join the processes that torchrun started, if it did: NCCL for GPU tensors, gloo for CPU tensors.

    Raises:
        FactorkitError: not all of them came in time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's collectives run on the current device
    store, number, count = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=number,
        world_size=count,
        timeout=COLLECTIVE_TIMEOUT,
        store=dist.PrefixStore(agree_on_name(store, number, count), store),
    )
    atexit.register(leave_processes)


def leave_processes() -> None:
    """Leave the process group: threads that still listen to it may crash a process that exits."""
    if getattr(sys, "last_value", None) is not None:  # an error ends the process and has been printed
        exit_immediately(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_immediately(code: int) -> None:
    """Exit with ``code`` if this process belongs to an NCCL group; otherwise do nothing.

    NCCL's shutdown waits for the other processes, which wait for this one in the middle of a step, so that torchrun
    would not learn of the failure.
    """
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def agree_on_name(store: dist.Store, number: int, count: int) -> str:
    """Agree on a name for this start of the processes. Collective; all ranks return the same name.

    torchrun's store survives a restart of the processes, and gloo would find the addresses of the old ones there. So
    every process publishes a new random word, and rank 0 answers it with the name; words of earlier starts have no
    process waiting for the answer.
    """
    word, deadline = uuid4().hex, time.monotonic() + JOIN_TIMEOUT.total_seconds()
    others = range(1, count)
    answered = dict.fromkeys(others, b"")
    if number:
        store.set(f"factorkit/hello/{number}", word)
    while time.monotonic() < deadline:
        if number:
            answer = _read(store, f"factorkit/welcome/{number}").decode().split()
            if answer[:1] == [word]:
                store.set(f"factorkit/{answer[1]}/{number}", "met")
                return answer[1]
        else:
            for other in others:
                hello = _read(store, f"factorkit/hello/{other}")
                if hello != answered[other]:
                    store.set(f"factorkit/welcome/{other}", f"{hello.decode()} {word}")
                    answered[other] = hello
            if store.check([f"factorkit/{word}/{other}" for other in others]):
                return word
        time.sleep(_POLL_SECONDS)
    raise FactorkitError(f"after {JOIN_TIMEOUT}, not all of the run's {count} processes have reached process {number}")


def _read(store: dist.Store, key: str) -> bytes:
    return store.get(key) if store.check([key]) else b""


def local_device(device: torch.device) -> torch.device:
    """Return the GPU of this process on its machine (torchrun's LOCAL_RANK); other devices unchanged.

    Raises:
        ConfigError: the machine has fewer GPUs than processes, or ``device`` names one GPU for all of them.
    """
    if device.type != "cuda":
        return device
    number, processes = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.index is None:
        if number >= torch.cuda.device_count():
            raise ConfigError(
                f"this is process {number + 1} of {processes} on this machine, but torch finds "
                f"{format_count(torch.cuda.device_count(), 'GPU')} here; give torchrun --nproc-per-node no more"
            )
        return torch.device("cuda", number)
    if processes > 1:
        raise ConfigError(
            f"device='{device}' is one GPU, but {processes} processes run on this machine, each on its own GPU; give "
            "device='cuda'"
        )
    return device


def is_peer_lost(error: BaseException) -> bool:
    """Return whether an error means that another process of the run is gone or unreachable."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


# --- data parallelism ---


def data_parallel(module: nn.Module, micro_batches: int) -> DistributedDataParallel:
    """Wrap the module so that its gradients are averaged over all processes during the backward pass.

    Buffers are not synchronised: every process computes the same ones. With several micro-batches the graph is not
    static: a static graph would send the gradients of the first micro-batch alone in the first step.
    """
    # a 1x1 kernel in channels_last differs from a contiguous one in its strides alone
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    parameters = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # torch < 2.13
    # no device_ids, which would move all arguments to the GPU: indices are read on the CPU
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "static_graph": micro_batches == 1, buffers: False}
    return DistributedDataParallel(module, **options)


@contextmanager
def no_gradient_sync(module: Any) -> Iterator[None]:
    """Accumulate gradients locally during the block; the next backward pass outside it averages them."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    module.set_requires_gradient_sync(False)
    yield
    module.set_requires_gradient_sync(True)


def check_batch(batch_size: int, name: str = "batch_size") -> None:
    """Raise ConfigError if the batch cannot be divided equally; ``name`` is the setting that the message names."""
    if batch_size % world_size():
        below, above = batch_size // world_size() * world_size(), -(-batch_size // world_size()) * world_size()
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(
            f"{name}={batch_size} cannot be divided equally among {world_size()} processes; give a multiple of their "
            f"number, such as {name}={near} (micro_batch_size is per process and need not divide anything)"
        )


# --- collectives ---


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Average.apply(gradient)  # the loss of each process depends on the values of all


def average(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, differentiable in all of them. Collective."""
    return _Average.apply(values) if world_size() > 1 else values


def map_shares(work: Callable[[slice], Result], count: int) -> Result:
    """Return ``work(slice(0, count))``, where each process computes its share of the rows. Collective.

    The result is a tensor [rows, ...], or tuples, lists and dictionaries of such tensors, and the same in all
    processes; values that are not tensors are each process's own. Rows must be independent of each other. With fewer
    rows than processes, every process computes all of them.
    """
    world = world_size()
    if world == 1 or count < world:
        return work(slice(0, count))
    edges = [count * i // world for i in range(world + 1)]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    parts, structure = tree_flatten(work(slice(edges[rank()], edges[rank() + 1])))
    rows = [_gather_unequal_rows(part, sizes) if isinstance(part, Tensor) else part for part in parts]
    return tree_unflatten(rows, structure)


def _gather_unequal_rows(local: Tensor, sizes: list[int]) -> Tensor:
    padded = local.new_zeros(max(sizes), *local.shape[1:])
    padded[: len(local)] = local
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([part[:size] for part, size in zip(received, sizes, strict=True)])


def gather_rows(values: Tensor) -> tuple[Tensor, slice]:
    """Concatenate the rows of all processes, which have equally many. Collective.

    Returns:
        The rows, and the slice of them that belongs to this process.
    """
    if world_size() == 1:
        return values, slice(0, len(values))
    received = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(received, values.contiguous())
    return torch.cat(received), slice(rank() * len(values), (rank() + 1) * len(values))


def maximum(number: int) -> int:
    """Return the maximum of the processes' numbers, for decisions that all must take together. Collective."""
    if world_size() > 1:
        values = torch.tensor(number)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        number = int(values)
    return number


def barrier() -> None:
    """Wait for all processes. Collective."""
    maximum(0)


def run_on_first(work: Callable[[], Result]) -> Result:
    """Run ``work`` on rank 0 and return its result on all ranks; if it raises, all ranks raise. Collective."""
    outcome: list[Any] = [(None, ("FactorkitError", "process 0 of this run was interrupted"))]
    try:
        if rank() == 0:
            outcome = [(work(), None)]
    except Exception as error:
        outcome = [(None, _describe(error))]
        raise
    finally:
        if world_size() > 1:
            dist.broadcast_object_list(outcome, device=torch.device("cpu"))
    result, failure = outcome[0]
    _raise(failure)
    return result


@contextmanager
def enter_on_first(context: AbstractContextManager[object]) -> Iterator[None]:
    """Enter ``context`` on rank 0 alone; if that raises, all ranks raise. Collective."""
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(context)

        run_on_first(enter)
        yield


def gather_results(work: Callable[[], Result]) -> list[Result]:
    """Run ``work`` on all ranks and return all results by rank; if one raises, all ranks raise. Collective."""
    if world_size() == 1:
        return [work()]
    outcome: tuple[Any, Any] = None, None
    local_error: Exception | None = None
    try:
        outcome = work(), None
    except Exception as error:
        local_error, outcome = error, (None, _describe(error))
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, outcome)
    if local_error is not None:
        raise local_error
    for _, failure in outcomes:
        _raise(failure)
    return [result for result, _ in outcomes]


def _describe(error: Exception) -> tuple[str, str]:
    """Return the class name and the message of an error, to be raised in the other processes."""
    return ("WriteError" if isinstance(error, OSError) else type(error).__name__), str(error)


def _raise(failure: tuple[str, str] | None) -> None:
    if failure is not None:
        raise getattr(errors, failure[0], FactorkitError)(failure[1])


@contextmanager
def first_on_machine() -> Iterator[None]:
    """Run the block in one process of each machine first, and in its others afterwards. Collective."""
    waits = int(os.environ.get("LOCAL_RANK", "0")) > 0
    if waits:
        barrier()
    yield
    if not waits:
        barrier()
