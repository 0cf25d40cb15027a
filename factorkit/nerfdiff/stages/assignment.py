"""Who goes where: views to candidates, with a load for each candidate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDS = 20  # loads within a tenth at the temperatures in use; exact ones are not needed


def balanced_plan(errors: Tensor, temperature: float, rounds: int = ROUNDS) -> Tensor:
    """Log-probabilities [V, N] of candidate n for view v, every candidate with the same load (Cuturi 2013).

    The transport of least cost plus temperature times negative entropy, by Sinkhorn's rounds in log space; it ends with
    the rows, which sum to 1 exactly. At small temperatures it approaches the best assignment of equal loads.

    Args:
        errors: [V, N], the cost; a view's own scale does not matter where it was divided out before.
        temperature: above 0, in the units of the costs.
        rounds: of making columns and rows fit in turn; lower temperatures take more.
    """
    plan = -errors / temperature
    load = math.log(errors.shape[0] / errors.shape[1])
    for _ in range(rounds):
        plan = plan - plan.logsumexp(0, keepdim=True) + load
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan


def spread(errors: Tensor) -> Tensor:
    """Errors [V, N] in units of each view's own standard deviation over the candidates."""
    return errors / (errors.std(1, keepdim=True) + 1e-9)


def drawn(plan: Tensor, uniform: Tensor) -> Tensor:
    """A candidate for each view [V], from log-probabilities [V, N] and numbers [V] in [0, 1)."""
    edges = plan.exp().cumsum(1)
    return torch.searchsorted(edges, (uniform * edges[:, -1])[:, None]).squeeze(1).clamp_max(plan.shape[1] - 1)
