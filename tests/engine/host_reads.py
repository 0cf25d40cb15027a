"""What in a step would wait for a GPU, or copy to it, noted while the step runs on a CPU."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class HostTensors(TorchFunctionMode):
    """Notes tensors made on the host: on a GPU, they would have to be copied to it."""

    FACTORIES = frozenset(
        {
            torch.arange,
            torch.empty,
            torch.eye,
            torch.full,
            torch.linspace,
            torch.ones,
            torch.rand,
            torch.randint,
            torch.randn,
            torch.tensor,
            torch.zeros,
        }
    )

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_host = func in self.FACTORIES and kwargs.get("device") is None and args != ((0,),)  # (0,): of checkpoint
        if on_host or func is torch.Tensor.new_tensor:
            self.found.append(f"{func.__name__} on the host")
        return func(*args, **kwargs)


class Watched(TorchDispatchMode):
    """Notes operations for which the host would wait for a GPU, and those that make a tensor of host numbers."""

    WAITING = frozenset(
        {
            "_local_scalar_dense",
            "bincount",
            "equal",
            "is_nonzero",
            "lift_fresh",
            "linalg_qr",
            "masked_select",
            "nonzero",
            "unique2",
            "_unique2",
        }
    )

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.host_tensors = HostTensors(self.found)

    def __enter__(self):
        self.host_tensors.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.host_tensors.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        )
        if name in self.WAITING or by_mask:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))
