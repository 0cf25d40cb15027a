"""The bytes of benchmarks/traffic.py against the loads and stores that the interpreted kernels make."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import torch
from kernel_compare import rand, soft_masks

from benchmarks.traffic import size
from factorkit import kernels, ops

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts what the interpreter does")


FEATURES = 64  # channels from which a tensor counts as features, and not as masks or images


class Accesses:
    """How often each number of each tensor of each launch is loaded and stored."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import interpreter_builder as builder

        self.launches: list[tuple[str, list[torch.Tensor], Counter, Counter]] = []
        load, store, start = builder.create_masked_load, builder.create_masked_store, kernels.tiles.start

        def watched_load(pointers, mask, *rest):
            self.launches[-1][2].update(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist())
            return load(pointers, mask, *rest)

        def watched_store(pointers, value, mask, *rest):
            self.launches[-1][3].update(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].tolist())
            return store(pointers, value, mask, *rest)

        def watched_start(kernel, grid, arguments, constants, options):
            tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
            self.launches.append((kernel.fn.__name__.removesuffix("_kernel"), tensors, Counter(), Counter()))
            start(kernel, grid, arguments, constants, options)

        monkeypatch.setattr(builder, "create_masked_load", watched_load)
        monkeypatch.setattr(builder, "create_masked_store", watched_store)
        monkeypatch.setattr(kernels.tiles, "start", watched_start)

    def check(self) -> dict[str, int]:
        """Asserts that the launches touch what benchmarks/traffic.py counts; how often kernels load a feature."""
        times: dict[str, int] = {}
        counted = touched = 0
        for name, tensors, loaded, stored in self.launches:
            for x in tensors:
                addresses = addresses_of(x)
                reads, writes = (sum(1 for a in addresses if a in counts) for counts in (loaded, stored))
                features = x.dim() == 4 and x.shape[1] >= FEATURES
                unused = x.dim() < 3 and not reads and not writes  # of the affine part, too small to be told apart
                assert unused or {reads, writes} == {0, len(addresses)}, f"{name} touches {reads}+{writes} of {x.shape}"
                counted, touched = counted + size([x]), touched + (reads + writes) * x.element_size()
                if features and reads:
                    times[name] = max(times.get(name, 0), max(loaded[a] for a in addresses))
            assert max(stored.values()) == 1, f"{name} stores a number twice"
            strangers = (set(loaded) | set(stored)) - {a for x in tensors for a in addresses_of(x)}
            assert not strangers, f"{name} touches numbers it was not given"
        assert touched <= counted <= 1.02 * touched
        return times


def addresses_of(x: torch.Tensor) -> list[int]:
    offsets = torch.zeros((), dtype=torch.int64)
    for length, stride in zip(x.shape, x.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(length if stride else 1) * stride * x.element_size()
    return (x.data_ptr() + offsets.flatten()).tolist()


def skip_norm(norm, shared, dtype=torch.bfloat16, regions=3):
    """Tensors of a branch decoder's first norm, several tiles of channels wide; a shortcut reads u and the skip too."""
    b, c_u, c_s, h, w = 2, 72, 136, 4, 8
    u = rand(b if shared else b * regions, c_u, h, w, dtype=dtype)
    affine = [rand(c_u + c_s) for _ in range(2)] + [rand(b * regions, c_u + c_s, dtype=dtype) for _ in range(2)]
    inputs = [u, rand(b, c_s, h, w, dtype=dtype), soft_masks(b, regions, h, w), *affine]
    inputs = [x.requires_grad_() for x in inputs]
    return ops.norm_silu_with_inputs(*inputs, groups=8, norm=norm), inputs


def own_norm(norm, input_bias):
    masks = soft_masks(2, 3, 4, 8) if norm == "masked_group" else None
    x, affine = rand(6, 72, 4, 8, dtype=torch.bfloat16).requires_grad_(), [rand(72).requires_grad_() for _ in range(3)]
    affine = affine if input_bias else affine[:2]
    more = {"input_bias": affine[2]} if input_bias else {}
    out = ops.group_norm_silu(x, *affine[:2], groups=8, norm=norm, masks=masks, **more)
    return out, [x, *affine]


def region_ops(name):
    masks = soft_masks(2, 3, 8, 8).requires_grad_()
    x, skip = (rand(2, 72, 8, 8, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    own, bias = rand(6, 72, 8, 8, dtype=torch.bfloat16).requires_grad_(), rand(72).requires_grad_()
    branches, logits = rand(6, 3, 8, 8).requires_grad_(), torch.randn(2, 3, 8, 8, requires_grad=True)
    return {
        "add": lambda: (torch.ops.factorkit.masked_skip_add(x, skip, masks, bias, own), [x, skip, masks, bias, own]),
        "pyramid": lambda: (torch.cat([m.flatten() for m in ops.mask_pyramid(masks, 3)[1:]]), [masks]),
        "pool": lambda: (ops.region_pool(x, masks), [x, masks]),
        "blend": lambda: (ops.region_blend(logits, branches)[1], [logits, branches]),
    }[name]()


CASES = {
    **{f"skip {n} {s}": (skip_norm, n, s) for n in ("group", "masked_group", "pixel") for s in (True, False)},
    **{f"own {n} {b}": (own_norm, n, b) for n in ("group", "masked_group", "pixel") for b in (False, True)},
    **{n: (region_ops, n) for n in ("add", "pyramid", "pool", "blend")},
}


@pytest.mark.parametrize("case", CASES)
def test_counted_bytes_match_kernel_accesses(case, monkeypatch):
    make, *given = CASES[case]
    accesses = Accesses(monkeypatch)
    out, inputs = make(*given)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(out, inputs, [torch.randn_like(x) for x in out])
    assert accesses.launches
    times = accesses.check()
    # What is loaded again comes from a cache: branches of a tile follow one another, in one program or side by side.
    again = {name: n for name, n in times.items() if n > 1}
    shared = case.startswith("skip") and case.endswith("True")
    expected = {"add": {"branch_gradients": 2}}.get(case, {})  # one gradient for both sides of the sum
    if case.startswith("skip") and "pixel" not in case:
        expected = {"sums": 3} | ({"branch_gradients": 3} if shared else {})
    assert again == expected
