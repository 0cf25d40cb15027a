"""Bytes moved and operations of each part of a training step, counted without a GPU.

    python -m benchmarks.traffic flowers64              # a preset at its batch size, bf16
    python -m benchmarks.traffic flowers64 --batch 32 --set regions=6 form='"regional"'

The step runs on the meta device, which computes shapes only. What each operation must read and write is added up:

    unfused   benchmarks/textbook.py, all branches as one batch: every operation of PyTorch reads its arguments once
              and writes its output once
    fused     factorkit: every kernel launch touches each of its tensors once (repeated reads hit a cache); the rest
              of the step as above
    least     factorkit, if every op of factorkit.ops read its arguments once and wrote its outputs once

The launches are those of the host code, partial sums and all; tests/kernels/launched/test_traffic.py asserts that the
kernels' loads and stores touch exactly these bytes. Operations are those of convolutions and matrix products; a
multiply-add counts as two.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.textbook import Textbook
from factorkit import kernels
from factorkit.nn.unet import Norm
from factorkit.ops.dispatch import triton_launchers
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.network import count_parameters

#: parts of the step by substrings of operation names; the first match counts
PARTS = {
    "convolutions and products": ("convolution", "addmm", "mm"),
    "attention": ("attention",),
    "norms, skips, masks, sums": ("",),
}
#: cuDNN adds a bias in a pass of its own and torch sums its gradient in another; the least is to do both elsewhere
BIASES = "biases of convolutions"
OPTIMISER = "clipping, Adam, average"
#: operations that are no views but move nothing, and operations that do not read what they overwrite
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")
OVERWRITE = ("copy_", "fill_", "zero_")
#: numbers read and written for each weight: norm and scaling of the gradient; Adam in torch's foreach form and fused;
#: lerp, and the same of separate products; casts of the weight to bf16 and of its gradient from it
CLIP, ADAM, FUSED_ADAM, LERP, AVERAGE, CASTS = 3, 18, 7, 3, 7, 3


@dataclass
class Traffic:
    moved: int = 0  # bytes
    flops: int = 0

    def add(self, moved: int, flops: int = 0) -> None:
        self.moved, self.flops = self.moved + moved, self.flops + flops


def size(tensors: Iterable) -> int:
    """Return the bytes of the tensors among the arguments; expanded numbers count once."""
    total = 0
    for x in tensors:
        if isinstance(x, Tensor):
            distinct = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0)
            total += torch.Size(distinct).numel() * x.element_size()
        elif isinstance(x, (tuple, list)):
            total += size(x)
    return total


class Count(TorchDispatchMode):
    """Add up by part what the operations inside move, on the meta device.

    With ``launches``, the kernel launches of factorkit's ops are counted in place of the ops.
    """

    launchers = triton_launchers()

    def __init__(self, launches: bool):
        super().__init__()
        self.launches, self.parts = launches, defaultdict(Traffic)

    def part(self, name: str) -> Traffic:
        return self.parts[next(part for part, held in PARTS.items() if any(h in name for h in held))]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func in self.launchers and self.launches:
            with counted_launches() as result, self:
                out = self.launchers[func](*args)
            self.part(name).add(result.moved)
            return out
        out = func(*args, **kwargs)
        if not func.is_view and name not in FREE:
            read = args[1:] if name in OVERWRITE else args
            flops = flop_registry.get(func.overloadpacket, lambda *a, **k: 0)
            self.part(name).add(size((*read, *kwargs.values(), out)), flops(*args, **kwargs, out_val=out))
        if name == "convolution" and args[2] is not None:
            self.parts[BIASES].add(2 * size((out,)))
        elif name == "convolution_backward" and args[-1][2]:
            self.parts[BIASES].add(size(args[:1]))
        return out


@contextmanager
def counted_launches():
    """Count the bytes of the tensors of all launches inside; nothing is launched."""
    total = Traffic()

    def start(kernel, grid, arguments, constants, options):
        total.add(size(arguments))

    original, kernels.tiles.start = kernels.tiles.start, start
    try:
        yield total
    finally:
        kernels.tiles.start = original


class FusedAttention(torch.autograd.Function):
    """Traffic of torch's fused attention, which torch does not use on the meta device."""

    count: Count  # set while a step is counted

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        FusedAttention.products(q, 2, size((q, k, v, q)))
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, grad):
        q, k, v = ctx.saved_tensors
        FusedAttention.products(q, 5, 2 * size((q, k, v, q)))  # the scores once more, and four products for gradients
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    @staticmethod
    def products(q: Tensor, number: int, moved: int) -> None:
        n, heads, pixels, depth = q.shape
        FusedAttention.count.part("attention").add(moved, 2 * number * n * heads * pixels**2 * depth)


def as_under_autocast(model: nn.Module) -> nn.Module:
    """bf16 where autocast computes in it, fp32 elsewhere (the meta device has no autocast of its own)."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.bfloat16()
            module.register_forward_pre_hook(lambda m, args: tuple(x.to(m.weight.dtype) for x in args))
        elif isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda m, args: tuple(x.float() for x in args))
    assert all(m.weight.dtype == torch.float32 for m in model.modules() if isinstance(m, Norm))
    return model


def step_traffic(
    preset: str | None, batch: int | None = None, half: bool = True, **changes
) -> dict[str, dict[str, Traffic]]:
    """{"unfused" | "fused" | "least": {part: what it moves}} of one training step of a preset's model.

    Raises:
        ConfigError: an unknown preset or setting.
    """
    config = preset_config(preset, **{"masks": "network", **changes}).resolved()
    batch = batch or config.batch_size
    result = {}
    for kind in ("unfused", "fused", "least"):
        with torch.device("meta"):
            model = config.build().train()
            weights = count_parameters(model)
            model = as_under_autocast(model) if half else model
            run = Textbook(model, folded=True) if kind == "unfused" else model
            x = torch.empty(batch, config.resolution, config.resolution, 3).permute(0, 3, 1, 2)
            t = torch.empty(batch, dtype=torch.long)
            with counted(kind == "fused") as count:
                (run(x, t)[0] - x).square().mean().backward()
        if kind == "least":
            count.parts[BIASES] = Traffic()
        updates = {"unfused": CLIP + ADAM + LERP, "fused": CLIP + FUSED_ADAM + AVERAGE, "least": FUSED_ADAM + LERP}
        count.parts[OPTIMISER].add(4 * weights * (updates[kind] + (CASTS if half else 0)))
        result[kind] = {part: count.parts[part] for part in (*PARTS, BIASES, OPTIMISER)}
    return result


@contextmanager
def counted(launches: bool):
    """Counts what is done inside, attention as one operation."""
    if launches and (cause := kernels.unavailable()):
        raise SystemExit(f"{cause}: the launches of its kernels are what is counted; pip install 'triton>=3.6'")
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention, FusedAttention.count = FusedAttention.apply, Count(launches)
    try:
        with FusedAttention.count as count:
            yield count
    finally:
        F.scaled_dot_product_attention = attention


def table(result: dict[str, dict[str, Traffic]]) -> str:
    lines = ["| part | TFLOP | unfused, GB | fused, GB | least, GB | saved |", "|---|---|---|---|---|---|"]
    sums = {
        kind: Traffic(sum(p.moved for p in parts.values()), sum(p.flops for p in parts.values()))
        for kind, parts in result.items()
    }
    for part in (*result["fused"], "total"):
        unfused, ours, least = (sums[kind] if part == "total" else result[kind][part] for kind in result)
        saved = 1 - ours.moved / max(1, unfused.moved)
        moved = " | ".join(f"{t.moved / 1e9:.2f}" for t in (unfused, ours, least))
        lines.append(f"| {part} | {ours.flops / 1e12:.2f} | {moved} | {100 * saved:.0f}% |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="flowers64")
    parser.add_argument("--batch", type=int, help="images a step; the preset's if left out")
    parser.add_argument("--fp32", action="store_true", help="without autocast")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings, VALUE in JSON")
    args = parser.parse_args()
    changes = {k: json.loads(v) for k, v in (entry.split("=", 1) for entry in args.set)}
    print(table(step_traffic(args.preset, args.batch, not args.fp32, **changes)))


if __name__ == "__main__":
    main()
