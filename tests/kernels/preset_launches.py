"""Every launch of a training step of the presets, found by taking the step with the models on the meta device."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.traffic import as_under_autocast
from factorkit.ops import dispatch
from factorkit.segdiff.config import preset_config


class ThroughKernels(TorchDispatchMode):
    """Runs the kernels' host side on meta tensors, where torch would ask an op's fake."""

    launchers = dispatch.triton_launchers()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        run = self.launchers.get(function)
        return function(*args, **(kwargs or {})) if run is None else run(*args)


def training_step(preset: str, batch: int, half: bool = True, **changes) -> None:
    """Forward and backward of a preset's model and of the fused loss; nothing is computed."""
    config = preset_config(preset, **{"masks": "network", **changes}).resolved()
    with torch.device("meta"):
        model = config.build().to(memory_format=torch.channels_last)
        model = as_under_autocast(model) if half else model
        x = torch.empty(batch, 3, config.resolution, config.resolution).contiguous(memory_format=torch.channels_last)
        t = torch.empty(batch, dtype=torch.long)
        with ThroughKernels():
            out = model(x, t)
            out.prediction.sum().backward()
