"""Nerfdiff (thesis chapter 3): predict the camera of a noisy view, and denoise it by rendering the scene from there."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.diffusion.denoiser import Denoised, Denoiser
from factorkit.nerfdiff.cameras.candidates import Candidates
from factorkit.nerfdiff.fields.base import Field
from factorkit.nerfdiff.rays import CameraModel, render_views
from factorkit.nn.unet import Encoder, Norm, TimeEmbedding
from factorkit.nn.uvit import TokenEncoder

NORM_GROUPS = 32  # upper bound of those of a GroupNorm
HIDDEN_UNITS = 128  # between the flattened feature map and the heads
HEAD_STD = 0.01  # of the heads' initial weights: the first candidates are near their anchors, but not equal


class CameraPrediction(NamedTuple):
    """The bottleneck: candidate poses [B, N, 4, 4], scores [B, N], and the index [B] of the best score."""

    poses: Tensor
    scores: Tensor
    best_index: Tensor

    @property
    def best_poses(self) -> Tensor:
        """The poses [B, 4, 4] with the best score."""
        return self.poses[torch.arange(len(self.best_index), device=self.best_index.device), self.best_index]


def to_signal(images: Tensor) -> Tensor:
    """Map radiance in [0, 1] to the network's range [-1, 1]."""
    return 2 * images - 1


def to_radiance(signal: Tensor) -> Tensor:
    """Map the network's range [-1, 1] to radiance in [0, 1]."""
    return (signal + 1) / 2


class PoseEncoder(nn.Module):
    """Encoder of a U-Net (thesis, fig. 3.12) or a transformer, norm and SiLU, pooling, and two linear heads.

    Args:
        time: embeds time steps.
        encoder: from noisy views [B, 3, H, W] and that embedding to features, the last of which are used.
        size: height and width at which it reads views; other sizes are resampled by area.
        grid: height and width of its last features.
        raw_size: raw outputs for each candidate.
        norm: kind of the norm before the pooling.
        pooling: "average" over the last feature map (fig. 3.12) discards positions, which small networks need;
            "flatten" keeps them.
        stem: side in pixels of the squares that the encoder reads as one pixel of 3 * stem^2 channels.
    """

    def __init__(
        self,
        time: TimeEmbedding,
        encoder: Encoder | TokenEncoder,
        size: tuple[int, int],
        grid: tuple[int, int],
        candidates: int,
        raw_size: int,
        *,
        norm: str = "group",
        pooling: str = "flatten",
        stem: int = 1,
    ):
        super().__init__()
        self.size, self.stem = size, stem
        self.output_shape = (candidates, raw_size)
        self.time, self.encoder = time, encoder
        channels = self.encoder.out_channels
        self.norm = Norm(channels, NORM_GROUPS, norm)
        if pooling == "flatten":
            features = HIDDEN_UNITS
            self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(channels * math.prod(grid), features), nn.SiLU())
        else:
            features = channels
            self.hidden = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.numbers = nn.Linear(features, candidates * raw_size)
        self.scores = nn.Linear(features, candidates)
        for head in (self.numbers, self.scores):
            nn.init.normal_(head.weight, std=HEAD_STD)
            nn.init.zeros_(head.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw outputs [B, N, raw_size] and scores [B, N] for noisy views [B, 3, H, W] at times t [B]."""
        if tuple(x_t.shape[2:]) != self.size:
            x_t = F.interpolate(x_t, size=self.size, mode="area")
        if self.stem > 1:
            x_t = F.pixel_unshuffle(x_t, self.stem)
        features = self.hidden(self.norm(self.encoder(x_t, self.time(t))[-1]))
        # at least fp32: half precision is too coarse for a pose
        raw, scores = (
            x.to(torch.promote_types(x.dtype, torch.float32)) for x in (self.numbers(features), self.scores(features))
        )
        return raw.unflatten(1, self.output_shape), scores


class NerfdiffModel(Denoiser):
    """Encoder, candidates and field; its prediction is the clean view, rendered from the best candidate.

    Args:
        encoder: predicts raw outputs and scores.
        candidates: maps raw outputs to poses.
        views: poses of the training views, [V, 4, 4], as search and refinement left them.
        size: height and width of the views.
    """

    views: Tensor
    intrinsics: Tensor
    background: Tensor

    def __init__(
        self,
        encoder: PoseEncoder,
        candidates: Candidates,
        field: Field,
        views: Tensor,
        camera: CameraModel,
        size: tuple[int, int],
        samples_per_ray: int,
    ):
        super().__init__()
        self.encoder, self.candidates, self.field = encoder, candidates, field
        self.size, self.samples_per_ray, self.forward_facing = size, samples_per_ray, camera.forward_facing
        self.register_buffer("views", views)
        self.register_buffer("intrinsics", camera.intrinsics)
        self.register_buffer("background", camera.background)

    @property
    def camera(self) -> CameraModel:
        """The camera model that all views share."""
        return CameraModel(self.intrinsics, self.background, self.forward_facing)

    def predict_cameras(self, x_t: Tensor, t: Tensor) -> CameraPrediction:
        """Predict the cameras of views x_t [B, 3, H, W], in [-1, 1] plus noise, at times t [B]."""
        raw, scores = self.encoder(x_t, t)
        return CameraPrediction(self.candidates(raw), scores, scores.argmax(1))

    def forward(self, x_t: Tensor, t: Tensor, cond: None = None) -> Denoised:
        """Return the clean view [B, 3, H, W] in [-1, 1] and its cameras; the rendering has no gradient."""
        cameras = self.predict_cameras(x_t, t)
        size = (x_t.shape[2], x_t.shape[3])
        rendered = render_views(self.field, cameras.best_poses, self.camera, size, self.samples_per_ray)
        return Denoised(to_signal(rendered.color.movedim(-1, 1)), cameras)


@torch.no_grad()
def predict_clean(model: NerfdiffModel, images: Tensor, batch: int = 64) -> CameraPrediction:
    """Predict the cameras of noise-free images [V, 3, H, W] in [0, 1]."""
    parts = []
    for signal in to_signal(images).split(batch):
        parts.append(model.predict_cameras(signal, torch.zeros(len(signal), dtype=torch.int64, device=signal.device)))
    return CameraPrediction(*(torch.cat(x) for x in zip(*parts, strict=True)))
