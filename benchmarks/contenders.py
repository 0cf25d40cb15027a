"""Ops of segdiff and training steps as PyTorch and as factorkit do them, for benchmarks/test_*.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.textbook import Textbook, normalise, pool, repeat
from benchmarks.traffic import counted
from factorkit import ops
from factorkit.data import make_procedural_views
from factorkit.data.views.views import Views
from factorkit.engine.config import autocast
from factorkit.engine.step import Meter, MovingAverage, TrainingStep, make_optimizer
from factorkit.nerfdiff import config as nerfdiff
from factorkit.nerfdiff.scene import open_scene
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.nerfdiff.training_views import describe_scene
from factorkit.nn.unet import Norm
from factorkit.ops.norm_pytorch import GROUP_EPS, NORMS
from factorkit.segdiff.config import SegdiffConfig, preset_config
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.rng import BatchDraw, image_order

IMAGES = 512  # of the training set, noise
PRESETS = {"cpu": "demo", "cuda": "flowers64"}  # whose sizes are measured
Run = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass
class OpCase:
    """An op at one shape. All functions take the inputs by position and return the same outputs.

    Attributes:
        inputs: tensors; gradients are taken for all of them that require one.
        ours: factorkit's op.
        reference: the same in plain PyTorch, with every operation an op of its own.
        peers: other implementations by name.
        moved: bytes that our kernels must move on a GPU, "forward" and "both" (with the backward pass).
    """

    inputs: list[Tensor]
    ours: Run
    reference: Run
    peers: dict[str, Run] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)

    def differentiable(self) -> list[Tensor]:
        return [x for x in self.inputs if x.requires_grad]


def count_bytes(case: OpCase) -> dict[str, int]:
    """Return what the Triton launches of ours move on a GPU."""
    inputs = [torch.empty_like(x, device="meta").requires_grad_() for x in case.inputs]
    with counted(launches=True) as count:
        out = as_tuple(case.ours(*inputs))
        forward = sum(part.moved for part in count.parts.values())
        torch.autograd.grad(out, inputs, [torch.empty_like(x) for x in out])
    return {"forward": forward, "both": sum(part.moved for part in count.parts.values())}


REGION_OPS = (
    *(f"masked_skip_norm_silu {norm}" for norm in NORMS),
    "group_norm_silu",
    "masked_skip_projection",
    "region_blend",
    "mask_pyramid",
    "region_pool",
)


def as_tuple(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what an op returned as a tuple."""
    return (output,) if isinstance(output, Tensor) else tuple(output)


def region_op(name: str, config: SegdiffConfig, batch: int, device: torch.device, dtype: torch.dtype) -> OpCase:
    """Make an op of the decoder at its finest level, where the traffic is."""
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

    op, _, kind = name.partition(" ")
    if op == "masked_skip_norm_silu":
        groups = Norm(2 * c, config.norm_groups).groups
        return OpCase(
            [features(rows, c), features(batch, c), masks(), *vectors(2 * c)],
            lambda u, s, m, w, b: ops.masked_skip_norm_silu(u, s, m, w, b, groups=groups, norm=kind),
            lambda u, s, m, w, b: F.silu(normalise(norm_of(2 * c, kind, w, b), torch.cat([u, masked(s, m)], 1), m)),
        )
    if op == "group_norm_silu":
        groups, x = Norm(c, config.norm_groups).groups, features(rows, c)
        planes = x.detach().contiguous()  # the peer's layout: its conversion is not timed

        def two_passes(_: Tensor, *affine: Tensor) -> Tensor:
            if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
                raise ModuleNotFoundError("two-pass is a Triton kernel, which runs on CUDA only")
            from benchmarks.two_pass_norm import two_pass_group_norm_silu

            return two_pass_group_norm_silu(planes, *affine, groups, GROUP_EPS)

        return OpCase(
            [x, *vectors(c), *vectors(c, rows)],
            lambda x, w, b, scale, shift: ops.group_norm_silu(x, w, b, scale, shift, groups=groups),
            lambda x, w, b, scale, shift: F.silu(
                normalise(norm_of(c, "group", w, b), x, None) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            ),
            {"two-pass": two_passes},
        )
    if op == "masked_skip_projection":
        weight = torch.randn(c, 2 * c, 1, 1, device=device).to(dtype) / c**0.5
        bias = torch.randn(c, device=device).to(dtype).requires_grad_()
        return OpCase(
            [features(rows, c), features(batch, c), masks(), weight.requires_grad_(), bias],
            ops.masked_skip_projection,
            lambda u, s, m, w, b: F.conv2d(torch.cat([u, masked(s, m)], 1), w, b),
        )
    if op == "region_blend":
        return OpCase(
            [torch.randn(batch, k, size, size, device=device).requires_grad_(), features(rows, 3)],
            lambda x, y: ops.region_blend(x, y)[1],
            lambda x, y: (y.float().unflatten(0, (batch, k)) * x.softmax(1)[:, :, None]).sum(1),
        )
    if op == "mask_pyramid":
        levels = len(config.channel_mult) - 1
        return OpCase(
            [masks()],
            lambda m: tuple(ops.mask_pyramid(m, levels)[1:]),
            lambda m: tuple(F.avg_pool2d(m, 2**i) for i in range(1, levels + 1)),
        )
    return OpCase([features(batch, 2 * c), masks()], ops.region_pool, lambda f, m: pool(f.float(), m))


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
        with autocast(config, self.device):
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

    def __init__(self, task: Any, config: Any, device: torch.device):
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


def make_step(
    name: str, config: SegdiffConfig, device: torch.device, compiler: str = "inductor"
) -> tuple[Callable[[], None], nn.Module]:
    """Return a training step and the network in it.

    Args:
        name: "reference" (the branches in a loop), "folded" (as one batch, channels last), "compiled" (folded, under
            torch.compile), "ours" (factorkit, eager) or "graph" (factorkit as a CUDA graph).
        config: of the model and its training.
        device: of the step.
        compiler: torch.compile's backend.
    """
    if name in ("ours", "graph"):
        config = preset_config(None, **{**config.to_dict(), "cuda_graph": name == "graph"}).resolved()
        task = make_task(config, device)
        return OurStep(task, config, device), task.model
    task = make_task(config, device)
    net: nn.Module = Textbook(task.model, folded=name != "reference")
    if name == "compiled":
        net = torch.compile(net, backend=compiler)
    return PlainStep(task, net, config, device), net


def gradients(net: nn.Module, config: SegdiffConfig, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return the prediction and the gradient of each parameter for one fixed batch, fp32 on the CPU; for comparing."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(config.batch_size, 3, config.resolution, config.resolution, generator=generator).to(device)
    t = torch.arange(config.batch_size, device=device) * 7 % config.timesteps
    with autocast(config, device):
        prediction = net(x.contiguous(memory_format=torch.channels_last), t).prediction
    result = torch.autograd.grad((prediction * x.sin()).mean(), [p for p in net.parameters()], allow_unused=True)
    return prediction.detach().float().cpu(), [torch.zeros(0) if g is None else g.float().cpu() for g in result]


class StageReachedError(Exception):
    """Carries the task and the configuration of a stage out of a training that is not carried out."""


def make_nerfdiff_step(
    stage: str, device: torch.device, views: Views | None = None, **changes: Any
) -> Callable[[], None]:
    """Return a training step of a stage of nerfdiff.

    Args:
        stage: "search", "refine", "fit" (of known poses), "distil" or "joint".
        device: of the step.
        views: None: the procedural scene.
        **changes: to the preset ``demo``.
    """

    class StageFinder(Training):
        def train_stage(self, name: str, build_task: Callable, folder: Path | None = None, **options: object) -> object:
            config = self.config.stage(name, **options)
            task = build_task(config)
            if name == stage:
                raise StageReachedError(task, config)
            return task.model

    ways = {"fit": {"poses": "known"}, "distil": {"poses": "known"}, "joint": {"search": "joint"}}
    config = nerfdiff.preset_config("demo", **{**ways.get(stage, {}), **changes, "device": device.type})
    views = make_procedural_views(config.num_candidates * 3, config.resolution) if views is None else views
    scene = open_scene(views, config.resolution, device, config.poses == "known")
    try:
        settings = {"scene": describe_scene(scene, views, config.poses == "known")}
        StageFinder(config, scene, Path(), settings, progress=False).train_stages()
    except StageReachedError as reached:
        return OurStep(*reached.args, device)
    raise ValueError(f"stage={stage!r} is not a stage of this training")
