"""Balanced assignment of views to candidates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SINKHORN_ROUNDS = 20  # loads within 10% at the temperatures in use; exact ones are not needed


def balanced_assignment(errors: Tensor, temperature: Tensor | float, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """Return log-probabilities [V, N] of candidate n for view v with equal loads of all candidates (Cuturi 2013).

    Entropy-regularised optimal transport by Sinkhorn iterations in log space, ending with the rows, which sum to 1. At
    low temperatures it approaches the best assignment with equal loads.

    Args:
        errors: cost of each pair, [V, N].
        temperature: above 0, in units of the costs.
        rounds: iterations over columns and rows; lower temperatures need more.
    """
    plan = -errors / temperature
    load = math.log(errors.shape[0] / errors.shape[1])
    for _ in range(rounds):
        plan = plan - plan.logsumexp(0, keepdim=True) + load
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan


def standardise_errors(errors: Tensor) -> Tensor:
    """Divide errors [V, N] by each view's standard deviation over the candidates."""
    return errors / (errors.std(1, keepdim=True) + 1e-9)


def sample_assignment(log_probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Sample a candidate for each view [V] from log-probabilities [V, N] and uniform numbers [V] in [0, 1)."""
    edges = log_probabilities.exp().cumsum(1)
    index = torch.searchsorted(edges, (uniform * edges[:, -1])[:, None]).squeeze(1)
    return index.clamp_max(log_probabilities.shape[1] - 1)
