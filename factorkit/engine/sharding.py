"""Models that do not fit on one GPU: every process holds a shard of each weight, its average and moments (FSDP2).

What is trained is sharded along its first dimension, whole weights come together where they are needed. Single numbers,
which cannot be cut, and what is not trained stay whole in every process.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError

BUNDLE = 1 << 24  # numbers that are gathered at once


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Cut the module's weights into shards on the device, in place; its forward pass gathers them and scatters their
    gradients.

    Parts that say so (``gathered_alone``) are gathered each by itself, so that few are whole at a time.

    Raises:
        ConfigError: this torch cannot leave single numbers whole.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes a second, for whoever shards nothing
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(f"shard=True needs a later torch than {torch.__version__}; leave it out, or upgrade torch")
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # channels_last weights cannot be cut
    uncut = {p for p in module.parameters() if not (p.dim() and p.requires_grad)}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    parts = [part for part in module.modules() if getattr(part, "gathered_alone", False)]
    for part in [*parts, module]:
        fully_shard(part, mesh=mesh, ignored_params={p for p in part.parameters() if p in uncut})
    for parameter in uncut:
        parameter.data = parameter.data.to(device)
    return module


def is_cut(tensor: Tensor) -> bool:
    """Whether it is torch's DTensor, of which this process holds a shard."""
    return hasattr(tensor, "full_tensor")


def wholes(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """By name the tensors that shards are of, many of them in one message: all processes must ask."""
    bundle: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_cut(tensor):
            yield name, tensor.detach()
            continue
        bundle[name] = tensor.detach()
        if sum(t.numel() for t in bundle.values()) > BUNDLE:
            yield from _put_together(bundle)
            bundle = {}
    yield from _put_together(bundle)


def _put_together(bundle: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if not bundle:
        return
    mine = torch.cat([shard.reshape(-1) for shard in held(bundle.values())])
    each = [[_count(t, rank) for t in bundle.values()] for rank in range(distributed.world_size())]
    sent = mine.new_zeros(max(map(sum, each)))
    sent[: len(mine)] = mine
    found = [torch.empty_like(sent) for _ in each]
    dist.all_gather(found, sent)
    parts = [got[: sum(sizes)].split(sizes) for got, sizes in zip(found, each, strict=True)]
    for (name, tensor), pieces in zip(bundle.items(), zip(*parts, strict=True), strict=True):
        yield name, torch.cat(pieces).reshape(tensor.shape)


def _rows(tensor: Tensor, rank: int) -> slice:
    """Of a whole tensor, those that FSDP leaves with a process: it cuts as torch.chunk does."""
    room = -(-len(tensor) // distributed.world_size())
    return slice(min(rank * room, len(tensor)), min((rank + 1) * room, len(tensor)))


def _count(tensor: Tensor, rank: int) -> int:
    rows = _rows(tensor, rank)
    return (rows.stop - rows.start) * math.prod(tensor.shape[1:])


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of the tensors that shards are of, in process 0 alone: all must ask."""
    found = {}
    for name, tensor in wholes(tensors):
        if distributed.rank() == 0:
            found[name] = tensor.to("cpu", copy=True)
    return found


def held(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process has of the tensors."""
    return [t.to_local() if is_cut(t) else t for t in tensors]


def cut_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, which are whole, in shards where those of ``like`` are."""
    return {name: _cut(t, like[name]) if name in like else t for name, t in tensors.items()}


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    if not is_cut(like) or tensor.shape != like.shape:  # which whoever takes it will name
        return tensor
    from torch.distributed.tensor import DTensor

    mine = tensor[_rows(tensor, distributed.rank())].to(like.device).contiguous()
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The sharded ones, and the others: no operation takes both at once."""
    parameters = list(parameters)
    parts = ([p for p in parameters if is_cut(p) == cut] for cut in (True, False))
    return [part for part in parts if part]


def norms(gradients: list[Tensor]) -> Tensor:
    """The norms [N] of N gradients, of the whole ones where they are sharded."""
    found = torch.stack(torch._foreach_norm(held(gradients)))
    if not any(map(is_cut, gradients)):
        return found
    counted = [is_cut(g) or distributed.rank() == 0 for g in gradients]  # whole ones once
    squares = torch.where(torch.tensor(counted, device=found.device), found.square(), 0.0)
    dist.all_reduce(squares)
    return squares.sqrt()


def average_whole(gradients: Iterable[Tensor]) -> None:
    """Average over all processes, in place, the gradients that FSDP leaves alone."""
    for gradient in gradients:
        if not is_cut(gradient):
            dist.all_reduce(gradient)
            gradient /= distributed.world_size()


def hollow(module: nn.Module) -> nn.Module:
    """A copy of the module whose parameters take no memory."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a :func:`hollow` module with these tensors as its state."""
    found = copy.deepcopy(module)
    found.load_state_dict(tensors, assign=True)
    return found
