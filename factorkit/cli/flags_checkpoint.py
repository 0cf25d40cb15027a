"""The flags of `factorkit checkpoint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from factorkit.cli.flag_types import Command, Flag, OptionalInt, OptionalPath, Result


@dataclass(kw_only=True)
class Checkpoint(Command):
    """List, verify, thin out or export the checkpoints of a run.

    What to do with them:
        ls       what there is: steps, sizes, ages, and which is the best by the alarms' error
        verify   read every one and compare it with its checksum; exit status 2 where one is damaged
        prune    keep the newest --keep that are whole, and the best; of the stages of a run too
        export   write the averaged weights of one, or others that it holds (--weights), as a small file of their own

    A training resumes from the newest checkpoint that is whole, whatever lies there.

    EXAMPLES
        factorkit checkpoint ls runs/photos
        factorkit checkpoint verify runs/photos --json
        factorkit checkpoint prune runs/photos --keep 1
        factorkit checkpoint export runs/photos --out photos.safetensors
        factorkit checkpoint export runs/photos --best --out photos.safetensors
        factorkit checkpoint export runs/photos --weights 0.999 --out smooth.safetensors
    """

    action: Positional[Literal["ls", "verify", "prune", "export"]]
    """What to do."""
    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """A run folder."""
    keep: int = 1
    """prune: how many of the newest stay."""
    out: OptionalPath = None
    """export: the .safetensors file to write."""
    step: OptionalInt = None
    """export: of which step; without: the newest that is whole."""
    best: Flag = False
    """export: the best instead."""
    weights: Annotated[str, arg(metavar="average|last|DECAY")] = "average"
    """export: the moving average ("average"), one of --extra-ema-decays by its decay, or "last": those of the last step."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_checkpoint as commands

        if self.action == "ls":
            return commands.list_all(self.run)
        if self.action == "verify":
            return commands.verify(self.run)
        if self.action == "prune":
            return commands.prune(self.run, self.keep)
        return commands.export(self.run, self.out, self.step, self.best, self.weights)
