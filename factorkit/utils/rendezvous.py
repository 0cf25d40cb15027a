"""How the processes of a run find each other, the first time and every time torchrun has started them again."""

from __future__ import annotations

import atexit
import os
import sys
import time
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist

from factorkit.utils.errors import FactorkitError

PATIENCE = timedelta(hours=4)  # with the process that decodes a data set or draws sheets while the others wait for it
MEETING = timedelta(minutes=30)  # until all processes have come
POLL = 0.02  # seconds


def join(device: torch.device) -> None:
    """Join the processes torchrun started, if it did (NCCL on GPUs, gloo on CPUs and for what is said on them).

    Raises:
        FactorkitError: not all of them came.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL's collectives run on the current one
    store, rank, world = next(dist.rendezvous("env://", timeout=MEETING))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
        store=dist.PrefixStore(meet(store, rank, world), store),
    )
    atexit.register(leave)


def leave() -> None:
    """Part from the other processes: threads that still listen to them may crash a process that ends."""
    if getattr(sys, "last_value", None) is not None:  # the error that ends it has been shown
        end_at_once(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def end_at_once(code: int) -> None:
    """End this process where it failed and has others by NCCL; else nothing.

    NCCL's farewell waits for the others, which wait for this process in the midst of a step: torchrun, which is to end
    them all or to start them again, would hear of nothing.
    """
    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def meet(store: dist.Store, rank: int, world: int) -> str:
    """A name for this very meeting of the processes, the same in all of them.

    torchrun's store outlives the processes that it starts again (torch 2.13: plain gloo fails then, finding the
    addresses of those that are gone). So each says a word that nobody said before, and hears it from process 0 together
    with the name; what others said earlier is nobody's word.
    """
    word, until = uuid4().hex, time.monotonic() + MEETING.total_seconds()
    others = range(1, world)
    heard = dict.fromkeys(others, b"")
    if rank:
        store.set(f"factorkit/hello/{rank}", word)
    while time.monotonic() < until:
        if rank:
            answer = _read(store, f"factorkit/welcome/{rank}").decode().split()
            if answer[:1] == [word]:
                store.set(f"factorkit/{answer[1]}/{rank}", "met")
                return answer[1]
        else:
            for other in others:
                said = _read(store, f"factorkit/hello/{other}")
                if said != heard[other]:
                    store.set(f"factorkit/welcome/{other}", f"{said.decode()} {word}")
                    heard[other] = said
            if store.check([f"factorkit/{word}/{other}" for other in others]):
                return word
        time.sleep(POLL)
    raise FactorkitError(f"after {MEETING}, not all of the run's {world} processes have come to process {rank}")


def _read(store: dist.Store, key: str) -> bytes:
    return store.get(key) if store.check([key]) else b""
