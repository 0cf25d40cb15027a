"""What the network is asked to predict, and how its error is weighed.

With a = a_t and s = s_t of the schedule, every parametrisation in use is a linear mix of the two unknowns,

    x_t = a x0 + s eps,        out = p x0 + q eps,

so a pair (p, q) as a function of (a, s) is all there is to say about one: the training target is the second line, and
the two lines solved for x0 and eps give both back. A new parametrisation is one more line of `PREDICTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from factorkit.diffusion.schedule import Schedule
from factorkit.utils.errors import ConfigError

PREDICTIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, s: (torch.zeros_like(a), torch.ones_like(a)),  # Ho et al. 2020, eq. 12
    "v": lambda a, s: (-s, a),  # Salimans & Ho 2022, section 4
    "x0": lambda a, s: (torch.ones_like(a), torch.zeros_like(a)),  # the clean image itself
    "flow": lambda a, s: (-torch.ones_like(a), torch.ones_like(a)),  # the straight path's velocity, Lipman et al. 2023
}


def check_objective(prediction: str, schedule: str) -> None:
    """Raise ConfigError where no image can be read off a perfect prediction at every time of the kind of schedule."""
    if prediction not in PREDICTIONS:
        raise ConfigError(f"prediction={prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
    if prediction == "eps" and schedule == "flow":
        raise ConfigError(
            "prediction='eps' cannot work with schedule='flow': its last time is pure noise, of which the noise says "
            "nothing about the image; use prediction='flow', 'v' or 'x0', or schedule='linear' or 'cosine'"
        )


def target(prediction: str, schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network should output [B,C,H,W] for clean images x0, unit noise eps and integer times t [B].

    Raises ConfigError when `prediction` is not one of `PREDICTIONS`.
    """
    _, _, p, q = _coefficients(prediction, schedule, t)
    return p * x0 + q * eps


def to_x0(prediction: str, schedule: Schedule, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """The clean image [B,C,H,W] that the network's output `out` on x_t at times t [B] stands for."""
    a, s, p, q = _coefficients(prediction, schedule, t)
    return (q * x_t - s * out) / (a * q - s * p)


def to_eps(prediction: str, schedule: Schedule, x_t: Tensor, out: Tensor, t: Tensor) -> Tensor:
    """The unit noise [B,C,H,W] that the network's output `out` on x_t at times t [B] stands for."""
    a, s, p, q = _coefficients(prediction, schedule, t)
    return (a * out - p * x_t) / (a * q - s * p)


def denoising_loss(out: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample [B] over channels and pixels, in float32 whatever the inputs' type."""
    return (out.float() - target.float()).square().flatten(1).mean(1)


def loss_weight(schedule: Schedule, t: Tensor, power: float | Tensor) -> Tensor:
    """The weight (1 - ab_t)^power [B] of each sample's loss; power 0 weighs all times alike, 1 favours coarse ones.

    `power` may be a tensor on the schedule's device, so that a captured CUDA graph follows its changes.
    """
    return (1 - schedule.alpha_bar(t)).flatten() ** power


def min_snr_weight(prediction: str, schedule: Schedule, t: Tensor, gamma: float = 5.0) -> Tensor:
    """The weight [B] that makes each sample's loss min(SNR, gamma) times its squared error in x0 (Hang et al. 2023).

    SNR = a^2 / s^2. For a given x_t an error in x0 is one of (s p - a q) / s times it in the output, so the weight is
    min(SNR, gamma) s^2 / (a q - s p)^2: min(SNR, gamma) over SNR for eps, over SNR + 1 for v, over 1 for x0.
    """
    a, s, p, q = (c.flatten() for c in _coefficients(prediction, schedule, t))
    return torch.minimum(a.square(), gamma * s.square()) / (a * q - s * p).square()


def coarse_to_fine_power(step: int | Tensor, start: int, end: int) -> Tensor:
    """The power for `loss_weight` at a training step: 1 until `start`, then linearly down to 0 at `end` and after.

    A step given as a tensor on the device is answered by one there, which a captured CUDA graph follows.
    Early on the noisy times, which only coarse structure can explain, thus lead the way of the regions.
    Raises ConfigError when `end` lies before `start`.
    """
    if end < start:
        raise ConfigError(f"the coarse-to-fine weight cannot end at step {end}, before its start at step {start}")
    return torch.as_tensor((end - step) / max(1, end - start)).clamp(0, 1)


def _coefficients(prediction: str, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if prediction not in PREDICTIONS:
        raise ConfigError(f"prediction={prediction!r} is unknown; choose one of {', '.join(PREDICTIONS)}")
    a, s = schedule.signal(t), schedule.sigma(t)
    return a, s, *PREDICTIONS[prediction](a, s)
