"""The common interface of both models: a network that denoises through a readable bottleneck."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Denoised(NamedTuple):
    """The output of a denoiser.

    Attributes:
        prediction: [B, C, H, W], the quantity that it was trained to predict (eps, v ...), fp32.
        bottleneck: the intermediate result that serves the task: region masks, camera poses, or None.
    """

    prediction: Tensor
    bottleneck: Any


class Denoiser(nn.Module):
    """A model of ``x_t`` at time ``t``: all that schedule, samplers and training loop use of a model."""

    def forward(self, x_t: Tensor, t: Tensor, cond: Any = None) -> Denoised:
        """Denoise ``x_t`` [B, C, H, W], in [-1, 1] plus noise, at integer times ``t`` [B].

        cond: the condition, where the model takes one (class labels, int64 [B], -1 for none).
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward")


class GuidedDenoiser(Denoiser):
    """A denoiser with classifier-free guidance (Ho & Salimans 2022): free + scale (conditional - free).

    Predictions of any kind may be mixed: clean image and noise are affine in each of them. The bottleneck is that of
    the conditional model.

    Args:
        denoiser: called as denoiser(x_t, t, cond); cond None is the unconditional model.
        cond: the condition of every image of the batch.
        scale: 1 is the conditional model and costs one call; larger values trade variety for fidelity at two calls; 0
            is the unconditional model. Some papers call scale - 1 the weight.
    """

    def __init__(self, denoiser: Denoiser, cond: Any, scale: float = 1.0) -> None:
        super().__init__()
        self.denoiser, self.cond, self.scale = denoiser, cond, scale

    def forward(self, x_t: Tensor, t: Tensor, cond: None = None) -> Denoised:
        """Denoise ``x_t`` with the condition and the scale of this instance."""
        conditional = self.denoiser(x_t, t, self.cond)
        if self.scale == 1:
            return conditional
        free = self.denoiser(x_t, t, None).prediction
        return Denoised(free + self.scale * (conditional.prediction - free), conditional.bottleneck)
