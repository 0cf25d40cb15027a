"""``factorkit checkpoint``."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from factorkit.cli.base import Command, Flag, OptionalInt, OptionalPath, Result, format_duration
from factorkit.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from factorkit.engine.checkpoint import Checkpoints


@dataclass(kw_only=True)
class Checkpoint(Command):
    """List, verify, prune or export the checkpoints of a run.

    Actions:
        ls       list the checkpoints with step, size, age, and which one is best by the error of the alarms
        verify   read each one and compare it with its checksum; exit status 2 if one is damaged
        prune    keep the newest --keep undamaged ones and the best, in the run and in its stages
        export   write the averaged weights of one, or others that it holds (--weights), as a small file of their own

    A training resumes from the newest undamaged checkpoint.

    Examples:
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
    """The run folder."""
    keep: int = 1
    """prune: number of newest checkpoints to keep."""
    out: OptionalPath = None
    """export: the .safetensors file to write."""
    overwrite: Flag = False
    """export: also replace a file that was not written for this run."""
    step: OptionalInt = None
    """export: the step of the checkpoint. The default is the newest undamaged one."""
    best: Flag = False
    """export: use the best checkpoint."""
    weights: Annotated[str, arg(metavar="average|last|DECAY")] = "average"
    """export: the moving average, another average of the run by its decay (see --extra-ema-decays of train), or the
    weights of the last step."""

    def execute(self) -> Result:
        """List, verify, prune or export checkpoints."""
        actions = {"ls": self._list, "verify": self._verify, "prune": self._prune, "export": self._export}
        return actions[self.action]()

    def _list(self) -> Result:

        data = [_describe(self.run, folder, path) for folder in self._folders() for path in folder.paths()]
        now = time.time()
        lines = [
            f"{c['bytes'] / 2**20:10.1f} MiB  {format_duration(now - c['saved']):>14} ago  {c['path']}"
            + "  best" * c["best"]
            for c in data
        ]
        return {"checkpoints": data}, "\n".join(lines or [f"{self.run} has no checkpoint yet"])

    def _verify(self) -> Result:
        from factorkit.engine.checkpoint import read_checkpoint

        whole, damaged = [], []
        for folder in self._folders():
            for path in folder.paths():
                try:
                    read_checkpoint(path)
                    whole.append(str(path.relative_to(self.run)))
                except CheckpointError as error:
                    damaged.append(str(error))
        if damaged:
            rest = f"undamaged: {', '.join(whole)}" if whole else "all are damaged"
            raise CheckpointError(
                f"{'; '.join(damaged)} ({rest}). A training skips damaged checkpoints, `prune` deletes them"
            )
        return {"whole": whole}, "\n".join([*whole, f"{len(whole)} undamaged, none damaged"])

    def _prune(self) -> Result:
        from factorkit.engine.run_folder import locked

        if self.keep < 1:
            raise ConfigError(f"--keep {self.keep} must be at least 1")
        folders = self._folders()
        with locked(self.run):
            dropped = [str(path.relative_to(self.run)) for folder in folders for path in folder.prune(self.keep)]
        kept = [str(path.relative_to(self.run)) for folder in folders for path in folder.paths()]
        return {"dropped": dropped, "kept": kept}, "\n".join([*dropped, f"{len(dropped)} deleted, {len(kept)} kept"])

    def _export(self) -> Result:
        import factorkit
        from factorkit.engine.run_folder import TrainedRun

        if self.out is None:
            raise ConfigError("no file to export to: give --out FILE.safetensors")
        weights: str | float = self.weights
        with suppress(ValueError):
            weights = float(weights)
        run = factorkit.load(self._exported_checkpoint(), device="cpu", weights=weights)
        assert isinstance(run, TrainedRun)
        written = run.save(self.out, overwrite=self.overwrite, source=str(self.run.resolve()))
        return {"out": str(written), "step": run.step}, f"written: {written} (step {run.step})"

    def _exported_checkpoint(self) -> Path:
        from factorkit.engine.checkpoint import Checkpoints
        from factorkit.engine.run_folder import read_settings

        if self.best and self.step is not None:
            raise ConfigError("--best and --step name two checkpoints; give one of them")
        read_settings(self.run)
        checkpoints, step = Checkpoints(self.run / "checkpoints"), self.step
        if self.best:
            best = checkpoints.best()
            if best is None:
                raise CheckpointError(f"{self.run} has no best checkpoint: all had alarms. Leave --best out")
            step = best[0]
        if step is None:
            return self.run
        path = checkpoints.path(step)
        if not path.exists():
            steps = ", ".join(str(_step(p)) for p in reversed(checkpoints.paths())) or "none"
            raise CheckpointError(f"{self.run} has no checkpoint of step {step}; there are: {steps}")
        return path

    def _folders(self) -> list[Checkpoints]:
        """The checkpoint folders of the run, its stages and seed trials."""
        from factorkit.engine.checkpoint import Checkpoints
        from factorkit.engine.run_folder import read_settings

        read_settings(self.run)  # raises CheckpointError if it is not a run folder
        return [Checkpoints(folder) for folder in sorted(self.run.rglob("checkpoints")) if folder.is_dir()]


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _describe(run: Path, checkpoints: Checkpoints, path: Path) -> dict[str, Any]:
    best, entry = checkpoints.best(), path.stat()
    return {
        "path": str(path.relative_to(run)),
        "step": _step(path),
        "bytes": entry.st_size,
        "saved": entry.st_mtime,
        "best": best is not None and checkpoints.path(best[0]) == path,
    }
