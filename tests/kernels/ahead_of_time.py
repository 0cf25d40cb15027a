"""Compiling kernels without a GPU: note which launches a call would make, compile them, read what came out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from factorkit.kernels import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Variant:
    """A kernel as Triton would compile it for one launch: types, divisible arguments, constants and warps."""

    kernel: Callable
    types: tuple[tuple[str, str], ...]
    divisible: tuple[int, ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    def __str__(self) -> str:
        shown = " ".join(f"{k}={v}" for k, v in self.constants if k.isupper() and v is not None)
        dtype = next(t for _, t in self.types if t.startswith("*"))[1:]
        plain = "plain" if ("bias", None) in self.constants else "biased"
        return f"{self.name} {dtype} {shown} warps={dict(self.options)['num_warps']} {plain}"


def variant_of(kernel, arguments: tuple, constants: dict, options: dict) -> Variant:
    """As Triton's launcher specialises it: 1 and None become constants, multiples of 16 are known as such."""
    types, divisible, fixed = [], [], dict(constants)
    for position, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        name, special = parameter.name, not parameter.do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and special):
            fixed[name] = value
        elif isinstance(value, torch.Tensor):
            types.append((name, POINTERS[value.dtype]))
            divisible.append(position)
        elif isinstance(value, float):
            types.append((name, "fp32"))
        else:
            types.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and special:
                divisible.append(position)
    return Variant(kernel, tuple(types), tuple(divisible), tuple(sorted(fixed.items())), tuple(options.items()))


@contextmanager
def recorded():
    """Collects the variants of all launches inside; nothing runs, so tensors may be on the meta device."""
    found: dict[Variant, None] = {}

    def start(kernel, grid, arguments, constants, options):
        found[variant_of(kernel, arguments, constants, options)] = None

    original, tiles.start = tiles.start, start
    try:
        yield found
    finally:
        tiles.start = original


@dataclass
class Compiled:
    registers: int
    shared: int
    spills: int  # bytes a thread keeps in local memory, for want of registers
    widest_load: int  # bits


def compile_for(variant: Variant, capability: int) -> Compiled:
    signature = dict(variant.types) | {name: "constexpr" for name, _ in variant.constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i in variant.divisible}
    ordered = {name: signature[name] for name in variant.kernel.arg_names}
    source = ASTSource(variant.kernel, ordered, dict(variant.constants), attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)", built.asm["ptx"])
    widths = [int(n or 1) * int(bits) for n, bits in loads]
    number = lambda key: int(re.search(rf"{key}:(\d+)", usage)[1])  # noqa: E731
    return Compiled(number("REG"), built.metadata.shared, number("STACK") + number("LOCAL"), max(widths, default=0))


def compile_all(variants: list[Variant], capability: int) -> list[Compiled]:
    """All of them, on all cores. One thread parses at a time: CPython 3.11 counts the depth of all trees as one."""
    parse, turn = ast.parse, threading.Lock()

    def parse_alone(*args, **kwargs):
        with turn:
            return parse(*args, **kwargs)

    with mock.patch.object(ast, "parse", parse_alone), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda variant: compile_for(variant, capability), variants))
