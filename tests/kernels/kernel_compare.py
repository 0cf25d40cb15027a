"""A kernel against the fp64 reference on the same numbers: answers and gradients, as strict as the dtype allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Rounding to half precision is an error of eps/2 (eps for the interpreter, which truncates); sums in fp32 add little.
TOLERANCE = {torch.float32: 32, torch.float16: 1.5, torch.bfloat16: 1.5}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def soft_masks(batch: int, regions: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, regions, height, width).softmax(1)


def assert_close(got: Tensor, want: Tensor, name: str = "answer", size: float = 0.0) -> None:
    """The error in proportion to ``want``, whose numbers count as ``size`` at least."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)} for {tuple(want.shape)}"
    assert torch.isfinite(got).all(), f"{name} is not finite everywhere"
    allowed = TOLERANCE[got.dtype] * torch.finfo(got.dtype).eps
    error = (got.double() - want).norm() / want.norm().clamp_min(max(1e-30, size * want.numel() ** 0.5))
    assert error <= allowed, f"{name} is off by {error:.1e}, allowed {allowed:.1e}"


def compare(
    run: Callable,
    reference: Callable,
    inputs: dict[str, Tensor | None],
    make_grad: Callable = torch.randn_like,
    size: float = 0.0,
) -> list[Tensor]:
    """``run`` and ``reference`` take the inputs by position; gradients for all of them under the same upstream ones."""
    leaves = {n: None if x is None else x.detach().requires_grad_() for n, x in inputs.items()}
    exact = {n: None if x is None else x.detach().double().requires_grad_() for n, x in inputs.items()}
    got, want = run(*leaves.values()), reference(*exact.values())
    got, want = ([x] if isinstance(x, Tensor) else list(x) for x in (got, want))
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert_close(g, w, f"answer {i}", size)
    upstream = [make_grad(g.detach()) for g in got]
    names = [n for n, x in inputs.items() if x is not None]
    found = torch.autograd.grad(got, [leaves[n] for n in names], upstream, allow_unused=True)
    wanted = torch.autograd.grad(want, [exact[n] for n in names], [u.double() for u in upstream], allow_unused=True)
    for name, f, w in zip(names, found, wanted, strict=True):
        if w is None:
            assert f is None or not f.any(), f"{name} has a gradient that it should not have"
        else:
            assert f.dtype == inputs[name].dtype
            assert_close(f, w, f"gradient for {name}", size)
    return got
