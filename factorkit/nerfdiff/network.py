"""Nerfdiff (thesis chapter 3): to denoise a view, say where it was taken from and render the scene from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.diffusion.denoiser import Denoised, Denoiser
from factorkit.diffusion.schedule import Schedule
from factorkit.nerfdiff.cameras.candidates import Candidates
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.fields.grid import Field
from factorkit.nerfdiff.rays import Optics, render_views
from factorkit.nn.unet import Encoder, Norm, TimeEmbedding
from factorkit.utils.rng import BatchDraw


class Cameras(NamedTuple):
    """The bottleneck: candidate poses [B, N, 4, 4], their scores [B, N], and the candidate of the best score [B]."""

    poses: Tensor
    scores: Tensor
    chosen: Tensor

    @property
    def best(self) -> Tensor:
        """The chosen poses [B, 4, 4]."""
        return self.poses[torch.arange(len(self.chosen), device=self.chosen.device), self.chosen]


def to_signal(images: Tensor) -> Tensor:
    """Radiance in [0, 1] to the network's range [-1, 1]; :func:`to_radiance` leads back."""
    return 2 * images - 1


def to_radiance(signal: Tensor) -> Tensor:
    """The network's range [-1, 1] to radiance in [0, 1]."""
    return (signal + 1) / 2


def noisy(x0: Tensor, schedule: Schedule, config: NerfdiffConfig, draw: BatchDraw) -> tuple[Tensor, Tensor]:
    """What the encoder reads in training: views x0 [B, 3, H, W] at random levels of noise, and those levels [B].

    Levels are T u^timestep_power of even u: above 1 the low ones, where a pose can be told, come more often. Without noise
    the views themselves, at level 0.
    """
    if not config.noise:
        return x0, torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    t = (draw.uniform() ** config.timestep_power * config.timesteps).long()
    return schedule.noise(x0, draw.normal(*x0.shape[1:]), t), t


class NerfdiffModel(Denoiser):
    """Encoder, candidates and field in one: its prediction is the clean view, seen from the camera of the best score.

    Args:
        encoder, candidates, field: the parts.
        views: a pose for each training view, [V, 4, 4], as the search and refinement left them.
        optics: of the scene.
        size: height and width of the views.
        samples: steps along a ray.
    """

    views: Tensor

    def __init__(
        self,
        encoder: PoseEncoder,
        candidates: Candidates,
        field: Field,
        views: Tensor,
        optics: Optics,
        size: tuple[int, int],
        samples: int,
    ):
        super().__init__()
        self.encoder, self.candidates, self.field = encoder, candidates, field
        self.size, self.samples, self.forward_facing = tuple(size), samples, optics.forward
        self.register_buffer("views", views)
        self.register_buffer("intrinsics", optics.intrinsics)
        self.register_buffer("background", optics.background)

    @property
    def optics(self) -> Optics:
        return Optics(self.intrinsics, self.background, self.forward_facing)

    def cameras(self, x_t: Tensor, t: Tensor) -> Cameras:
        """The candidates for views x_t [B, 3, H, W], in [-1, 1] plus noise, at times t [B]."""
        raw, scores = self.encoder(x_t, t)
        return Cameras(self.candidates(raw), scores, scores.argmax(1))

    def forward(self, x_t: Tensor, t: Tensor, cond: None = None) -> Denoised:
        """The clean view [B, 3, H, W] in [-1, 1] that x_t is taken for, without gradient, and its cameras."""
        found = self.cameras(x_t, t)
        seen = render_views(self.field, found.best, self.optics, tuple(x_t.shape[2:]), self.samples)
        return Denoised(to_signal(seen.color.movedim(-1, 1)), found)


@torch.no_grad()
def look(model: NerfdiffModel, images: Tensor, batch: int = 64) -> Cameras:
    """The cameras of clean images [V, 3, H, W] in [0, 1]."""
    found = []
    for part in to_signal(images).split(batch):
        found.append(model.cameras(part, torch.zeros(len(part), dtype=torch.int64, device=part.device)))
    return Cameras(*(torch.cat(x) for x in zip(*found, strict=True)))


def wide(x: Tensor) -> Tensor:
    """At least 32 bits: a pose has to be told more finely than half precision can."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PoseEncoder(nn.Module):
    """U-Net encoder, norm and SiLU, the last features whole or averaged, and two linear heads (thesis, fig. 3.12).

    Args:
        size: height and width of what it reads; views of another size are averaged down to it.
        model_channels, channel_mult, num_res_blocks: of the U-Net.
        candidates: N.
        numbers: raw ones for each candidate.
        pooling: "average" over the last features (fig. 3.12) discards positions, which small networks
            need; "flatten" keeps them.
    """

    def __init__(
        self,
        size: tuple[int, int],
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        candidates: int,
        numbers: int,
        *,
        norm_groups: int = 32,
        pooling: str = "flatten",
    ):
        super().__init__()
        self.size, self.pooling = tuple(size), pooling
        self.shape = (candidates, numbers)
        self.time = TimeEmbedding(model_channels)
        self.encoder = Encoder(
            3, model_channels, channel_mult, num_res_blocks, (), max(size), 4 * model_channels, norm_groups=norm_groups
        )
        channels = self.encoder.out_channels
        self.norm = Norm(channels, norm_groups)
        if pooling == "flatten":
            for _ in channel_mult[1:]:
                size = tuple((side + 1) // 2 for side in size)
            hidden = 128
            self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], hidden), nn.SiLU())
        else:
            hidden = channels
            self.hidden = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Linear(hidden, candidates * numbers)
        self.scores = nn.Linear(hidden, candidates)
        for head in (self.numbers, self.scores):  # the first cameras are the anchors, but not exactly
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Raw numbers [B, N, numbers] and scores [B, N] of views [B, 3, H, W] in [-1, 1] plus noise at times t [B]."""
        if tuple(x_t.shape[2:]) != self.size:
            x_t = F.interpolate(x_t, size=self.size, mode="area")
        last = self.encoder(x_t, self.time(t))[-1]
        h = self.hidden(self.norm(last))
        numbers, scores = (wide(head(h)) for head in (self.numbers, self.scores))
        return numbers.unflatten(1, self.shape), scores
