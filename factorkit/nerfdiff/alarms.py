"""What can be told without true poses when cameras were found wrongly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from factorkit.errors import FactorkitError
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.nerfdiff.poses import azimuths

SPREAD = 0.3  # of azimuths, 0 (all the same) to 1 (all around): below, the cameras stand in one corner
USE = 0.2  # effective number of candidates in use over their number: below, few do all the work
DOUBLED = 0.05  # share of views that agree better with the scene after a turn


def effective_use(chosen: Tensor, count: int) -> float:
    """exp(entropy) of how the choices [V] among ``count`` fall, over the most it can be: 1 / count to 1."""
    share = torch.bincount(chosen.flatten(), minlength=count) / chosen.numel()
    return float(torch.special.entr(share).sum().exp() / min(count, chosen.numel()))


def azimuth_spread(poses: Tensor) -> float:
    """1 minus the length of the mean of the azimuths' unit vectors: 0 all the same, 1 all around."""
    angle = azimuths(poses[:, :3, 3]).deg2rad()
    return float(1 - torch.stack([angle.cos(), angle.sin()]).mean(1).norm())


def stop_if_asked(found: dict[str, Any], config: NerfdiffConfig) -> dict[str, Any]:
    """The same figures, unless the run is to stop at failures and there are some.

    Raises:
        FactorkitError: there are; the checkpoints written so far stand.
    """
    if config.stop_on_failure and found.get("failures"):
        words = "; ".join(found["failures"])
        raise FactorkitError(f"stopped: {words}. The checkpoints stand; another seed= may do, or stop_on_failure=False")
    return found


def pose_alarms(
    poses: Tensor, chosen: Tensor | None = None, count: int = 1, doubled: float | None = None
) -> dict[str, Any]:
    """Figures and, in words, what they give away; for cameras around an object.

    Args:
        poses: of the views, [V, 4, 4].
        chosen: which of ``count`` candidates each view took, [V].
        doubled: share of the views that a held-out field saw better from another side.
    """
    found: dict[str, Any] = {"azimuth_spread": azimuth_spread(poses)}
    failures = []
    if found["azimuth_spread"] < SPREAD:
        failures.append(f"collapse: all cameras stand on one side (azimuth spread {found['azimuth_spread']:.2f})")
    if chosen is not None and count > 1:
        found["candidate_use"] = effective_use(chosen, count)
        if found["candidate_use"] < USE:
            failures.append(f"collapse: few candidates take all views (use {found['candidate_use']:.2f} of 1)")
    if doubled is not None:
        found["doubled"] = doubled
        if doubled > DOUBLED:
            failures.append(
                f"duplication: {doubled:.0%} of the views agree better with a field that never saw them after a turn; "
                "the scene may stand there twice. Train with flip_rounds=8 or more"
            )
    return {**found, "failures": failures}
