"""The functions that benchmarks/segdiff.py times: ops and training steps, as PyTorch and as factorkit do them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.textbook import Textbook, normalise, pool, repeat
from benchmarks.traffic import counted
from factorkit import ops
from factorkit.engine.step import Meter, MovingAverage, TrainingStep, make_optimizer
from factorkit.nn.unet import Norm
from factorkit.ops.norm import NORMS
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.rng import BatchDraw, image_order

IMAGES = 512  # of the training set, noise


@dataclass
class OpCase:
    """An op at one shape: both functions take the inputs by position; gradients are taken for all of them."""

    inputs: list[Tensor]
    textbook: Callable[..., Tensor]
    factorkit: Callable[..., Tensor]

    def bytes(self) -> dict[str, int]:
        """What factorkit's launches move on a GPU, forward alone and with the backward pass."""
        inputs = [torch.empty_like(x, device="meta").requires_grad_() for x in self.inputs]
        with counted(launches=True) as count:
            out = self.factorkit(*inputs)
            forward = sum(part.moved for part in count.parts.values())
            torch.autograd.grad(out, inputs, torch.empty_like(out))
        return {"forward": forward, "both": sum(part.moved for part in count.parts.values())}


def op_cases(config: SegdiffConfig, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, OpCase]:
    """Every op of the decoder at its finest level, where the traffic is."""
    size, k, c = config.resolution, config.regions, config.model_channels * config.channel_mult[0]
    rows = batch * k

    def features(n: int, channels: int, kind: torch.dtype = dtype) -> Tensor:
        x = torch.randn(n, size, size, channels, device=device).to(kind).permute(0, 3, 1, 2)
        return x.requires_grad_()

    def vectors(channels: int, n: int | None = None) -> list[Tensor]:
        shape = (channels,) if n is None else (n, channels)
        return [
            torch.randn(*shape, device=device).to(torch.float32 if n is None else dtype).requires_grad_()
            for _ in range(2)
        ]

    def masks() -> Tensor:
        return torch.randn(batch, k, size, size, device=device).softmax(1).requires_grad_()

    def norm_of(channels: int, kind: str, weight: Tensor, bias: Tensor) -> SimpleNamespace:
        groups = Norm(channels, config.norm_groups).groups
        return SimpleNamespace(weight=weight, bias=bias, groups=groups, kind=kind)

    def masked(skip: Tensor, m: Tensor) -> Tensor:
        return repeat(skip, m) * m.flatten(0, 1)[:, None].to(skip.dtype)

    cases = {}
    for kind in NORMS:
        groups = Norm(2 * c, config.norm_groups).groups
        cases[f"masked_skip_norm_silu {kind}"] = OpCase(
            [features(rows, c), features(batch, c), masks(), *vectors(2 * c)],
            lambda u, s, m, w, b, kind=kind: F.silu(
                normalise(norm_of(2 * c, kind, w, b), torch.cat([u, masked(s, m)], 1), m)
            ),
            lambda u, s, m, w, b, kind=kind, groups=groups: ops.masked_skip_norm_silu(
                u, s, m, w, b, groups=groups, norm=kind
            ),
        )
    groups = Norm(c, config.norm_groups).groups
    cases["group_norm_silu"] = OpCase(
        [features(rows, c), *vectors(c), *vectors(c, rows)],
        lambda x, w, b, scale, shift: F.silu(
            normalise(norm_of(c, "group", w, b), x, None) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        ),
        lambda x, w, b, scale, shift: ops.group_norm_silu(x, w, b, scale, shift, groups=groups),
    )
    weight = torch.randn(c, 2 * c, 1, 1, device=device).to(dtype) / c**0.5
    cases["masked_skip_projection"] = OpCase(
        [features(rows, c), features(batch, c), masks(), weight.requires_grad_(), vectors(c)[0].to(dtype)],
        lambda u, s, m, w, b: F.conv2d(torch.cat([u, masked(s, m)], 1), w, b),
        ops.masked_skip_projection,
    )
    cases["region_blend"] = OpCase(
        [torch.randn(batch, k, size, size, device=device).requires_grad_(), features(rows, 3)],
        lambda x, y: (y.float().unflatten(0, (batch, k)) * x.softmax(1)[:, :, None]).sum(1),
        lambda x, y: ops.region_blend(x, y)[1],
    )
    levels = len(config.channel_mult) - 1
    cases["mask_pyramid"] = OpCase(
        [masks()],
        lambda m: torch.cat([F.avg_pool2d(m, 2**i).flatten(2) for i in range(1, levels + 1)], 2),
        lambda m: torch.cat([x.flatten(2) for x in ops.mask_pyramid(m, levels)[1:]], 2),
    )
    cases["region_pool"] = OpCase([features(batch, 2 * c), masks()], lambda f, m: pool(f.float(), m), ops.region_pool)
    return cases


class PlainStep:
    """A training step as one writes it: the same images, noise and loss, torch's Adam, a moving average."""

    def __init__(self, task: SegdiffTask, net: nn.Module, config: SegdiffConfig, device: torch.device):
        self.task, self.net, self.config, self.device, self.step = task, net, config, device, 0
        self.parameters = list(net.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.learning_rate)

    def __call__(self) -> None:
        config, seen = self.config, self.step * self.config.batch_size
        draw = BatchDraw(config.seed, seen, config.batch_size, slice(None), self.device)
        indices = image_order(config.seed, seen, config.batch_size, self.task.size)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            result = self.task.loss(self.net, indices, draw, torch.tensor(self.step, device=self.device))
        self.optimizer.zero_grad()
        result.objective.mean().backward()
        if config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, config.gradient_clip)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - config.ema_decay)
        self.step += 1


class OurStep:
    """factorkit's step, as its training loop takes it."""

    def __init__(self, task: SegdiffTask, config: SegdiffConfig, device: torch.device):
        model, self.step = task.model.to(device), 0
        optimizer = make_optimizer(task.parameter_groups(), config, device)
        average = MovingAverage(model, config.ema_decay, device)
        self.take = TrainingStep(task, optimizer, [average], Meter(device), config, device)

    def __call__(self) -> None:
        self.take(self.step)
        self.take.unreported_steps.clear()
        self.step += 1


def make_task(config: SegdiffConfig, device: torch.device) -> SegdiffTask:
    """The configuration's task on noise; equal configurations, equal weights, none of them left at zero."""
    images = np.random.default_rng(0).integers(
        0, 256, (max(IMAGES, config.batch_size), config.resolution, config.resolution, 3), np.uint8
    )
    task = SegdiffTask(config, images, images[:2], device)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for p in task.model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    task.model.to(device).train()
    return task


def step_contenders(config: SegdiffConfig, device: torch.device, compiler: str) -> dict[str, Callable[[], object]]:
    """Functions that make each contender: () → (its step, the network inside)."""

    def textbook(folded: bool, compiled: bool = False):
        task = make_task(config, device)
        net = Textbook(task.model, folded)
        run = torch.compile(net, backend=compiler) if compiled else net
        return PlainStep(task, run, config, device), run

    def ours():
        task = make_task(config, device)
        return OurStep(task, config, device), task.model

    return {
        "textbook": lambda: textbook(False),
        "folded": lambda: textbook(True),
        "compiled": lambda: textbook(True, True),
        "factorkit": ours,
    }


def gradients(net: nn.Module, config: SegdiffConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prediction and the gradient of all parameters for one fixed batch, both flat fp32 on the CPU; for comparing."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(config.batch_size, 3, config.resolution, config.resolution, generator=generator).to(device)
    t = torch.arange(config.batch_size, device=device) * 7 % config.timesteps
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        prediction = net(x.contiguous(memory_format=torch.channels_last), t).prediction
    result = torch.autograd.grad((prediction * x.sin()).mean(), [p for p in net.parameters()], allow_unused=True)
    flat = [torch.zeros(0) if g is None else g.float().flatten().cpu() for g in result]
    return prediction.detach().float().cpu(), torch.cat(flat)
