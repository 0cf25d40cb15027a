"""Sharded models (FSDP2), for models that do not fit on one GPU.

Every process holds a shard of each weight, its average and its moments, cut along the first dimension. Full weights are
gathered where they are needed. Scalars, and parameters that are not trained, stay whole in every process.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from factorkit.engine.step import is_sharded, local_parts
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError

_BUNDLE_NUMEL = 1 << 24  # elements gathered in one message


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Shard the module's weights on the device, in place; its forward pass gathers them.

    Submodules with a true attribute ``gathered_alone`` are gathered one by one, so that few are whole at a time.

    Raises:
        ConfigError: this torch cannot leave scalars whole.
    """
    from torch.distributed.device_mesh import init_device_mesh  # importing takes a second
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise ConfigError(f"shard=True needs a later torch than {torch.__version__}; leave it out, or upgrade torch")
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # channels_last weights cannot be sharded
    whole = {p for p in module.parameters() if not (p.dim() and p.requires_grad)}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    parts = [part for part in module.modules() if getattr(part, "gathered_alone", False)]
    for part in [*parts, module]:
        fully_shard(part, mesh=mesh, ignored_params={p for p in part.parameters() if p in whole})
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    return module


def gather_full(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors by name, gathering many shards in one message. Collective."""
    bundle: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            yield name, tensor.detach()
            continue
        bundle[name] = tensor.detach()
        if sum(t.numel() for t in bundle.values()) > _BUNDLE_NUMEL:
            yield from _gather_bundle(bundle)
            bundle = {}
    yield from _gather_bundle(bundle)


def _gather_bundle(bundle: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if not bundle:
        return
    local = torch.cat([shard.reshape(-1) for shard in local_parts(bundle.values())])
    sizes_by_rank = [[_local_numel(t, rank) for t in bundle.values()] for rank in range(distributed.world_size())]
    padded = local.new_zeros(max(map(sum, sizes_by_rank)))
    padded[: len(local)] = local
    received = [torch.empty_like(padded) for _ in sizes_by_rank]
    dist.all_gather(received, padded)
    parts = [part[: sum(sizes)].split(sizes) for part, sizes in zip(received, sizes_by_rank, strict=True)]
    for (name, tensor), pieces in zip(bundle.items(), zip(*parts, strict=True), strict=True):
        yield name, torch.cat(pieces).reshape(tensor.shape)


def _rows_of(tensor: Tensor, rank: int) -> slice:
    """Return the rows of a full tensor that a rank holds: FSDP cuts as torch.chunk does."""
    size = -(-len(tensor) // distributed.world_size())
    return slice(min(rank * size, len(tensor)), min((rank + 1) * size, len(tensor)))


def _local_numel(tensor: Tensor, rank: int) -> int:
    rows = _rows_of(tensor, rank)
    return (rows.stop - rows.start) * math.prod(tensor.shape[1:])


def copy_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the full tensors on the CPU on rank 0, and nothing on other ranks. Collective."""
    copies = {}
    for name, tensor in gather_full(tensors):
        if distributed.rank() == 0:
            copies[name] = tensor.to("cpu", copy=True)
    return copies


def shard_like(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard full tensors where those of the same name in ``like`` are sharded."""
    return {name: _shard_one(t, like[name]) if name in like else t for name, t in tensors.items()}


def _shard_one(tensor: Tensor, like: Tensor) -> Tensor:
    if not is_sharded(like) or tensor.shape != like.shape:  # load_state_dict names a wrong shape
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    local = tensor[_rows_of(tensor, distributed.rank())].to(like.device).contiguous()
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def copy_without_weights(module: nn.Module) -> nn.Module:
    """Return a copy of the module whose parameters are on the meta device."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, empty)


def copy_with_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a :func:`copy_without_weights` module with these tensors as its state."""
    loaded = copy.deepcopy(module)
    loaded.load_state_dict(tensors, assign=True)
    return loaded
