"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from factorkit.diffusion.denoiser import Denoised, Denoiser


class Guided(Denoiser):
    """A denoiser told what the image is to be of, and pushed that way: free + scale (told - free).

    What is mixed are predictions, whatever their kind: the clean image and the noise are affine in each of them, so
    they are mixed by the same shares. The bottleneck is that of the told model.

    Args:
        denoiser: called as denoiser(x_t, t, cond); cond None is the free model.
        cond: what it is told, for every image of the batch.
        scale: 1 is the told model and costs one call; above it likeness is bought with variety, at two calls; 0 is the
            free model. Some call scale - 1 the weight.
    """

    def __init__(self, denoiser: Denoiser, cond: Any, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.cond, self.scale = denoiser, cond, scale

    def forward(self, x_t: Tensor, t: Tensor, cond: None = None) -> Denoised:
        told = self.denoiser(x_t, t, self.cond)
        if self.scale == 1:
            return told
        free = self.denoiser(x_t, t, None).prediction
        return Denoised(free + self.scale * (told.prediction - free), told.bottleneck)
