"""How an op reaches its implementation: one registration with torch's dispatcher, used by all ops.

:func:`register` makes ``torch.ops.factorkit.<name>``: its default implementation, faster ones by device, the shapes of
its outputs and its gradient. :func:`select` returns that op, or the differentiable PyTorch reference where
FACTORKIT_REFERENCE=1 asks for it or no compiled kernel exists.

The ``check_...`` functions check inputs before any address is passed to compiled code. Values (NaN, the order of
offsets) are checked on the CPU only: on CUDA that would wait for the device. The kernels read no foreign address
whatever the values are, and a NaN ray gets no samples.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Neither is visible to static analysis: kernels/ lies beside the package, _C is compiled.
kernels = importlib.import_module("factorkit.kernels")
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPILED_DEVICES = ("cpu", "cuda")
CPP_DTYPES = (torch.float32, torch.bfloat16)  # of the U-Net's ops in csrc/
CPP_MIN_CHANNELS = 8  # of csrc/rows.h: a whole vector


# Of torch.ops.factorkit. With torch.library.custom_op instead, calls take the host twice as long.
LIBRARY = torch.library.Library("factorkit", "DEF")


class Op(NamedTuple):
    """A registered op: its default implementation, what replaces it by type of device, and its Triton kernels.

    ``with_inputs`` returns the outputs and, behind them, some of the first inputs, for what else reads them: the
    gradients from there arrive in the op's backward pass, which adds them to its own. Each would take a pass otherwise.
    """

    default: Callable[..., Any]
    by_device: dict[str, Callable[..., Any]]
    triton: Callable[..., Any] | None
    needs_extension: bool
    with_inputs: Callable[..., Any] | None = None


OPS: dict[str, Op] = {}


def register(
    name: str,
    default: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    cpp: Callable[..., Any] | None = None,
    triton: Callable[..., Any] | None = None,
    autograd: tuple[Callable[..., None], Callable[..., Any]] | None = None,
    needs_extension: bool = False,
    schema: str | None = None,
    returned_inputs: int = 0,
) -> None:
    """Register ``factorkit::<name>`` with torch. Its schema has no defaults and, with ``autograd``, no lists.

    Args:
        name: of the op.
        default: the implementation.
        fake: allocates the outputs, given the arguments, without computing them.
        cpp: runs on the CPU instead of ``default`` unless it returns None.
        triton: runs on CUDA instead of ``default`` where Triton is installed and takes all tensors.
        autograd: ``setup_context`` and ``backward`` as of ``torch.library.register_autograd``; None: its backward pass
            raises RuntimeError.
        needs_extension: ``default`` itself calls factorkit._C, on the CPU and on CUDA.
        schema: the op's signature; from the annotations of ``default`` if None.
        returned_inputs: how many of the first inputs ``with_inputs`` of the :class:`Op` returns, if it is to exist.
    """
    schema = schema or torch.library.infer_schema(default, mutates_args=())
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"factorkit::{name}", fake, lib=LIBRARY)
    op = OPS[name] = Op(default, {} if cpp is None else {"cpu": cpp}, triton, needs_extension)
    for device in COMPILED_DEVICES:
        LIBRARY.impl(name, functools.partial(_run_on, device, op), _dispatch_key(device))
    if not needs_extension:
        LIBRARY.impl(name, default, "CompositeExplicitAutograd")
    if autograd is None and not name.endswith("_backward"):
        autograd = (lambda ctx, inputs, output: None, functools.partial(_refuse_gradient, name))
    if autograd is not None:
        overload = getattr(torch.ops.factorkit, name).default
        LIBRARY.impl(name, _differentiable(overload, *autograd), "Autograd")
        if returned_inputs:
            OPS[name] = op._replace(with_inputs=_differentiable(overload, *autograd, returned_inputs))
    _register_triton(op, "cuda")


def _run_on(device: str, op: Op, *args: Any) -> Any:
    fast = op.by_device.get(device)
    result = None if fast is None else fast(*args)
    return op.default(*args) if result is None else result


def _dispatch_key(device: str) -> str:
    return device.upper()


def _differentiable(
    op: torch._ops.OpOverload,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    returned_inputs: int = 0,
) -> Callable[..., Any]:
    """Return what runs the op and records its gradient; its outputs end in that many inputs."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*args)
            setup_context(ctx, args, output)
            return (*output, *args[:returned_inputs]) if returned_inputs else output

    Differentiable.backward = staticmethod(backward)  # type: ignore[method-assign]  # torch's way, with the name taken
    return Differentiable.apply


def _refuse_gradient(name: str, ctx: Any, *grads: Any) -> None:
    raise RuntimeError(f"factorkit::{name} has no gradient: detach its inputs")


def _register_triton(op: Op, device: str) -> None:
    if op.triton is not None:
        run = op.triton
        op.by_device[device] = lambda *args: run(*args) if triton_takes(args) else None


def run_triton_kernels_on(device: str) -> None:
    """Register the Triton kernels for a type of device: tests do so for the CPU, where Triton interprets them."""
    for op in OPS.values():
        _register_triton(op, device)


def triton_launchers() -> dict[Any, Callable[..., Any]]:
    """Return the function that launches the Triton kernels, by overload of each op that has them."""
    return {getattr(torch.ops.factorkit, name).default: op.triton for name, op in OPS.items() if op.triton is not None}


def triton_takes(args: Any) -> bool:
    """Return whether all tensors among the arguments are non-empty and of a dtype of the kernels, and Triton exists."""
    tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, Tensor)]
    if not all(x.dtype in TRITON_DTYPES and x.numel() > 0 for x in tensors):
        return False
    cause = kernels.unavailable()
    if cause is not None:
        _warn_once(
            f"{cause}: on the GPU the ops run as plain PyTorch, with the same results, slower and with more memory. "
            "Triton comes with a CUDA build of torch on Linux; by itself: pip install 'triton>=3.6'. "
            "See `factorkit doctor`"
        )
    return cause is None


def select(name: str, reference: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return what to call for arguments on x's device: the registered op, or its reference."""
    if use_reference() or (OPS[name].needs_extension and not has_extension(x.device.type)):
        return reference
    return getattr(torch.ops.factorkit, name)


def use_reference() -> bool:
    """Return whether FACTORKIT_REFERENCE asks for the plain differentiable reference of every op, for debugging."""
    return os.environ.get("FACTORKIT_REFERENCE", "0") not in ("", "0")


# --- factorkit._C ---


def import_extension() -> tuple[ModuleType | None, dict[str, str]]:
    """Import factorkit._C; return it and a warning for each device for which it has no kernels."""
    cuda_cost = "rendering and encodings on CUDA run as plain PyTorch, slowly"
    cuda_fix = "Install again where nvcc is on PATH, with FACTORKIT_CUDA=1; see `factorkit doctor`"
    try:
        extension = importlib.import_module("factorkit._C")
    except ImportError as error:
        cause = f"factorkit._C cannot be imported ({error})"
        cpu_fix = "Install the package with `pip install -e .`; see `factorkit doctor`"
        cpu = f"{cause}: ops on the CPU run several times slower. {cpu_fix}"
        return None, {"cpu": cpu, "cuda": f"{cause}: {cuda_cost}. {cuda_fix}"}
    if extension.build_info().get("cuda"):
        return extension, {}
    return extension, {"cuda": f"factorkit._C was built without CUDA: {cuda_cost}. {cuda_fix}"}


EXTENSION: Any  # of None nothing is called: select() or has_extension() comes first
EXTENSION, MISSING_KERNELS = import_extension()


def has_extension(device: str) -> bool:
    """Return whether factorkit._C has kernels for a type of device; if not, warn once with the cause and the fix."""
    if device in MISSING_KERNELS:
        _warn_once(MISSING_KERNELS[device])
        return False
    return device in COMPILED_DEVICES


_warnings_given: set[str] = set()


def _warn_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _warnings_given:
        _warnings_given.add(message)
        warnings.warn(message, stacklevel=3)


def call_extension(name: str, like: Tensor, *arguments: Any) -> None:
    """Run a function of factorkit._C for the dtype and on the device of ``like``.

    It runs with torch's number of threads on the CPU, and on torch's current stream on CUDA. Tensors among the
    arguments, alone or in sequences, become addresses, and None becomes 0.
    """
    dtype = str(like.dtype).removeprefix("torch.")
    plain_arguments = [_to_addresses(argument) for argument in arguments]
    if like.is_cuda:
        with torch.cuda.device(like.device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(EXTENSION, name + "_cuda")(dtype, *plain_arguments, stream)
    else:
        getattr(EXTENSION, name)(dtype, *plain_arguments, torch.get_num_threads())


def _to_addresses(argument: Any) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return 0 if argument is None else argument.data_ptr()
    if isinstance(argument, (tuple, list)):
        return [_to_addresses(part) for part in argument]
    return argument


def addresses(*tensors: Tensor | None) -> list[int]:
    """Return where the tensors lie, 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


# --- layouts and precision ---


def dense_format(x: Tensor) -> torch.memory_format:
    """Return channels_last for a tensor with that layout only, else contiguous: ops keep the layout of their input."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def with_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """Return x contiguous in the layout of ``like``."""
    return x.contiguous(memory_format=dense_format(like))


def empty_like(x: Tensor) -> Tensor:
    """Allocate a dense tensor with the shape, dtype and layout of x."""
    return torch.empty_like(x, memory_format=dense_format(x))


def save_inputs(ctx: Any, inputs: tuple, output: Any) -> None:
    """Save all inputs for the backward pass: the ``setup_context`` of ops whose inputs are all tensors."""
    ctx.save_for_backward(*inputs)


def reference_gradients(
    reference: Callable[..., Any], arguments: Sequence[Any], grads: Sequence[Tensor | None]
) -> tuple:
    """Return the gradient for each argument, as a graph: for backward passes that are to be differentiated again.

    Those run under ``create_graph=True``, that is with gradients enabled. The kernels' own gradients have no
    derivative; the reference's have those of every order.
    """
    # Aliases give partial derivatives, also where one argument was computed from another.
    arguments = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in arguments]
    outputs = reference(*arguments)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    pairs = [(x, g) for x, g in zip(outputs, grads, strict=False) if g is not None and x.requires_grad]
    wanted = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad]
    found: list[Tensor | None] = [None] * len(arguments)
    if pairs and wanted:
        inputs, of_outputs = [arguments[i] for i in wanted], [g.to(x.dtype) for x, g in pairs]
        gradients = torch.autograd.grad([x for x, _ in pairs], inputs, of_outputs, create_graph=True, allow_unused=True)
        for i, gradient in zip(wanted, gradients, strict=True):
            found[i] = gradient
    return tuple(found)


def full_precision(run: Callable[..., Any]) -> Callable[..., Any]:
    """Exclude a function from autocast, which would run the matrix products of statistics and tokens in 16 bits."""

    @functools.wraps(run)
    def run_without_autocast(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return run(first, *args)

    return run_without_autocast


def check_rays(origins: Tensor, directions: Tensor) -> None:
    """Raise ValueError unless both are [N, 3], of one float dtype on one device, without NaN or infinity."""
    for name, x in (("origins", origins), ("directions", directions)):
        if x.dim() != 2 or x.shape[1] != 3:
            raise ValueError(f"{name} must be [rays, 3]; got {tuple(x.shape)}")
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64; got {x.dtype}: 16 bits are too few for rays")
        check_values(name, x)
    check_matches("directions", directions, "origins", origins)


def check_matches(name: str, x: Tensor, like_name: str, like: Tensor, shape: torch.Size | None = None) -> None:
    """Raise ValueError unless x has the dtype, the device and the shape (or ``shape``) of ``like``."""
    shape = like.shape if shape is None else shape
    if x.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)} to fit {like_name} {tuple(like.shape)}; got {tuple(x.shape)}")
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device} but {like_name} is {like.dtype} on {like.device}")


def check_values(name: str, x: Tensor, allow_infinity: bool = False) -> None:
    """Raise ValueError where x holds NaN, or infinity unless allowed."""
    if not is_readable(x):
        return
    bad = x.isnan() if allow_infinity else ~x.isfinite()
    if bad.any():
        row = bad.reshape(bad.shape[0], -1).any(1).nonzero()[0].item()
        values = "NaN" if allow_infinity else "NaN or infinity"
        raise ValueError(f"{name} holds {values}, first in row {row} of {x.shape[0]}")


def check_offsets(offsets: Tensor, samples: int, device: torch.device) -> None:
    """Raise ValueError unless offsets are int64 [rays + 1] on the device, rising from 0 to at most ``samples``."""
    if offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"ray_offsets must be int64 [rays + 1]; got {offsets.dtype} {tuple(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"ray_offsets are on {offsets.device} but the samples are on {device}")
    if not is_readable(offsets):
        return
    steps = offsets.diff()
    if offsets[0] != 0 or (steps < 0).any() or offsets[-1] > samples:
        raise ValueError(
            f"ray_offsets must start at 0, never fall, and end at {samples} or before, the number of samples; they go "
            f"from {offsets[0].item()} to {offsets[-1].item()}, smallest step {min(steps.tolist(), default=None)}"
        )


def is_readable(x: Tensor) -> bool:
    """Return whether values can be read for free: on the CPU, and not while torch traces with fake tensors."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def check_box(lower: Sequence[float], upper: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the corners as three floats each; raise ValueError unless every lower one is below the upper."""
    low, high = [float(v) for v in lower], [float(v) for v in upper]
    if len(low) != 3 or len(high) != 3 or not all(-math.inf < a < b < math.inf for a, b in zip(low, high, strict=True)):
        raise ValueError(f"a box needs three finite coordinates a corner, lower < upper in each; got {low} and {high}")
    return low, high


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """Return a seed as an int64 scalar on the device; raise ValueError unless it is one, None, or fits 63 bits."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            actual = f"{seed.dtype} {tuple(seed.shape)} on {seed.device}"
            raise ValueError(f"seed is {actual}; give one int64 number on {device}, or an integer")
        return seed
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed}; it must be from 0 to 2^63 - 1, or None for no jitter")
    return None if seed is None else torch.full((), seed, dtype=torch.int64, device=device)
