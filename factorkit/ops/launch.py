"""How an op reaches its kernel in factorkit._C: on the CPU with torch's number of threads, on CUDA on torch's current
stream."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from factorkit.ops.compiled import address, extension
from factorkit.ops.dispatch import use_reference


@lru_cache
def _cuda_extension() -> bool:
    """Whether factorkit._C has CUDA kernels; if not, one warning with the cause and the cure."""
    module = extension()
    if module is not None and module.build_info()["cuda"]:
        return True
    cause = "cannot be imported" if module is None else "was built without CUDA"
    warnings.warn(
        f"factorkit._C {cause}: rendering and encodings on CUDA run as plain PyTorch, slowly. Install again where nvcc "
        "is on PATH, with FACTORKIT_CUDA=1; `factorkit doctor` tells more",
        stacklevel=2,
    )
    return False


def plain(x: Tensor) -> bool:
    """True where the reference is to run: asked for by FACTORKIT_REFERENCE=1, or no kernel for the tensor's device."""
    return use_reference() or not _has_kernels(x.is_cuda)


def _has_kernels(cuda: bool) -> bool:
    return _cuda_extension() if cuda else extension() is not None


# what torch.compiler.assume_constant_result does, which imports the whole compiler, and with it Triton, to say so
_has_kernels._dynamo_marked_constant = True


def call(name: str, like: Tensor, *arguments) -> None:
    """Run the kernel ``name`` for the dtype and on the device of ``like``; tensors among the arguments, alone or in
    tuples, become addresses, and None becomes 0."""
    dtype = str(like.dtype).removeprefix("torch.")
    plain_arguments = [_plain(argument) for argument in arguments]
    if like.is_cuda:
        with torch.cuda.device(like.device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(extension(), name + "_cuda")(dtype, *plain_arguments, stream)
    else:
        getattr(extension(), name)(dtype, *plain_arguments, torch.get_num_threads())


def _plain(argument):
    if argument is None or isinstance(argument, Tensor):
        return address(argument)
    if isinstance(argument, (tuple, list)):
        return [_plain(part) for part in argument]
    return argument
