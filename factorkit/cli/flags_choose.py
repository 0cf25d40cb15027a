"""The flags of ``factorkit choose-regions``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from factorkit.cli.flag_types import Command, Result


@dataclass(kw_only=True)
class ChooseRegions(Command):
    """Say how many regions photographs fall into, without labels.

    For every candidate K and seed, regions that compete by place and colour are trained for seconds, and judged by how
    much noise they cannot tell from photographs that were kept out. Recommended is the smallest K after which the next
    one takes less than LEAST_FALL off that error. It counts what lies at much the same place in all photographs,
    whatever its colours.

    OUT receives choice.json, regions.png (photographs and their regions, a row a candidate) and the trainings. The same
    command again trains only what is not finished; candidates, seeds and steps may be added.

    EXAMPLES
        factorkit choose-regions photos/
        factorkit choose-regions horses/ --no-random-flip --candidates 2 3 4 5 6 --seed-trials 3
    """

    data: Positional[Annotated[Path | None, arg(metavar="DATA", help_behavior_hint="")]] = None
    """As `train segdiff` takes it; without: the procedural flowers."""
    out: Path = Path("runs/regions")
    """Where to write."""
    candidates: Annotated[tuple[int, ...], arg(metavar="K K...")] = (2, 3, 4, 5)
    """Numbers of regions to try."""
    seed_trials: int = 2
    """Trainings of each; the best stands for it."""
    min_improvement: float = 0.02
    """Share of the error that a further region must take off."""
    resolution: int = 32
    """Pixels a side."""
    random_flip: bool = True
    """Show half of the photographs mirrored; not for things that all face one way."""
    steps: int = 200
    """Of each training."""
    holdout: str = "auto"
    """Labelled images to judge on, as in `train segdiff`; without labels, up to a quarter of all."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda|cuda:N")] = "auto"
    """Where to train; auto takes a GPU if there is one."""

    def run_command(self) -> Result:
        from factorkit.cli import commands

        holdout = int(self.holdout) if self.holdout.isdecimal() else self.holdout
        return commands.choose(
            self.data,
            self.out,
            candidates=self.candidates,
            seed_trials=self.seed_trials,
            min_improvement=self.min_improvement,
            resolution=self.resolution,
            random_flip=self.random_flip,
            steps=self.steps,
            holdout=holdout,
            device=self.device,
        )
