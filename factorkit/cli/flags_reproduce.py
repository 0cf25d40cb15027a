"""The flags of ``factorkit reproduce``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from factorkit.cli.flag_types import Command, Flag, OptionalInt, OptionalPath, Result
from factorkit.utils.errors import ConfigError


@dataclass(kw_only=True)
class Reproduce(Command):
    """Run a table or figure of the dissertation.

    OUT/NAME receives table.md, table.json, pictures/ and cells/, one JSON for every row and seed: a finished one is
    not run again, so the same command goes on after a kill. Trainings lie in OUT/runs, and experiments share them.
    Published numbers stand beside ours, marked as cited.

    EXAMPLES
        factorkit reproduce --list
        factorkit reproduce table2.1 --data flowers/ --seeds 5
        factorkit reproduce table2.6 --data CUB_200_2011/ --scale gpu --out runs/cub
        factorkit reproduce fig3.11 --data lego/ --seeds 1
    """

    name: Positional[Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]] = None
    """Which; see --list."""
    list: Flag = False
    """Show every table and figure: data, duration, what it prints, the dissertation's numbers."""
    scale: Literal["small", "gpu", "full"] = "small"
    """small: 32 pixels, for a CPU; gpu: 64 pixels and C=128; full: the dissertation's settings."""
    data: OptionalPath = None
    """As `train` takes it; without: the pictures or views the package draws."""
    out: Path = Path("runs/reproduce")
    """The folder of all experiments on one data set."""
    seeds: OptionalInt = None
    """From 0 on; without: as many as --list says."""
    rows: tuple[str, ...] = ()
    """Only these rows of the table, by name."""
    ignore: OptionalInt = None
    """Mask value of pixels that are not scored."""
    holdout: Annotated[str | None, arg(metavar="STR", help_behavior_hint="")] = None
    """Labelled images kept out of training, as in `train segdiff`."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda|cuda:N")] = "auto"
    """Where to train; auto takes a GPU if there is one."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_reproduce

        if self.list:
            return commands_reproduce.list_experiments()
        if self.name is None:
            raise ConfigError("nothing to reproduce: give a table or figure, or --list to see them all")
        holdout = int(self.holdout) if self.holdout and self.holdout.isdigit() else self.holdout
        return commands_reproduce.run(
            self.name,
            self.data,
            scale=self.scale,
            out=self.out,
            seeds=self.seeds,
            rows=self.rows,
            device=self.device,
            ignore=self.ignore,
            holdout=holdout,
        )
