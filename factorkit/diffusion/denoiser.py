"""The one abstraction at the centre: a network that denoises through a bottleneck a person can read."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Denoised(NamedTuple):
    """What a denoiser answers.

    Attributes:
        prediction: [B, C, H, W], the quantity it was trained to predict (eps, v ...), fp32.
        bottleneck: what the model had to make up its mind about on the way: region masks, camera poses, or None.
    """

    prediction: Tensor
    bottleneck: Any


class Denoiser(nn.Module):
    """A model of ``x_t`` at noise level ``t``. Schedule, samplers and training loop know nothing else of a model."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Denoised:
        """Denoise ``x_t`` [B, C, H, W], in [-1, 1] plus noise, at integer steps ``t`` [B].

        cond: what the image is to be of, where the model can be told (class labels, int64 [B], -1 for none).
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it denoises")
