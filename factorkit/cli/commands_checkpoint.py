"""What `factorkit checkpoint` does."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import factorkit
from factorkit.cli.flag_types import Result
from factorkit.cli.words import duration
from factorkit.engine.checkpoint import Checkpoints, read_checkpoint
from factorkit.engine.run_folder import held, read_settings
from factorkit.utils.errors import CheckpointError, ConfigError


def folders_of(run: Path) -> list[Checkpoints]:
    """The checkpoints of a run, and those of its stages and seed trials.

    Raises:
        CheckpointError: it is no run folder.
    """
    read_settings(run)
    return [Checkpoints(folder) for folder in sorted(run.rglob("checkpoints")) if folder.is_dir()]


def list_all(run: Path) -> Result:
    """Every checkpoint with its step, size and age."""
    found = [described(run, checkpoints, path) for checkpoints in folders_of(run) for path in checkpoints.paths()]
    now = time.time()
    lines = [
        f"{c['bytes'] / 2**20:10.1f} MiB  {duration(now - c['saved']):>14} ago  {c['path']}{'  best' * c['best']}"
        for c in found
    ]
    return {"checkpoints": found}, "\n".join(lines or [f"{run} has no checkpoint yet"])


def described(run: Path, checkpoints: Checkpoints, path: Path) -> dict[str, Any]:
    """A checkpoint's path within the run, step, bytes, when it was saved, and whether it is kept as the best."""
    best, entry = checkpoints.best(), path.stat()
    return {
        "path": str(path.relative_to(run)),
        "step": int(path.stem.removeprefix("step_")),
        "bytes": entry.st_size,
        "saved": entry.st_mtime,
        "best": best is not None and checkpoints.path(best[0]) == path,
    }


def verify(run: Path) -> Result:
    """Read all of them.

    Raises:
        CheckpointError: one or more are damaged; what is whole is named too.
    """
    whole, damaged = [], []
    for checkpoints in folders_of(run):
        for path in checkpoints.paths():
            try:
                read_checkpoint(path)
                whole.append(str(path.relative_to(run)))
            except CheckpointError as error:
                damaged.append(str(error))
    if damaged:
        kept = f"whole: {', '.join(whole)}" if whole else "none is whole"
        raise CheckpointError(f"{'; '.join(damaged)} ({kept}). A training passes damaged ones over, `prune` drops them")
    return {"whole": whole}, "\n".join([*whole, f"{len(whole)} whole, none damaged"])


def prune(run: Path, keep: int) -> Result:
    """Drop old and damaged ones.

    Raises:
        ConfigError: nothing is to be kept.
        CheckpointError: a training is under way.
    """
    if keep < 1:
        raise ConfigError(f"--keep {keep}: at least one has to stay")
    folders = folders_of(run)
    with held(run):
        dropped = [str(path.relative_to(run)) for checkpoints in folders for path in checkpoints.prune(keep)]
    left = [str(path.relative_to(run)) for checkpoints in folders for path in checkpoints.paths()]
    return {"dropped": dropped, "kept": left}, "\n".join([*dropped, f"{len(dropped)} dropped, {len(left)} kept"])


def export(run: Path, out: Path | None, step: int | None, best: bool, weights: str) -> Result:
    """The averaged weights of one checkpoint, or others of its, in a file of their own.

    Raises:
        ConfigError: no file to write to, two different checkpoints asked for, or weights that are not there.
        CheckpointError: the checkpoint is not there, or damaged.
    """
    if out is None:
        raise ConfigError("export where to? Give --out FILE.safetensors")
    if best and step is not None:
        raise ConfigError("--best and --step ask for two checkpoints; give one of them")
    read_settings(run)
    checkpoints, source = Checkpoints(run / "checkpoints"), run
    if best:
        known = checkpoints.best()
        if known is None:
            raise CheckpointError(f"{run} keeps no best checkpoint: none was without an alarm. Leave --best out")
        step = known[0]
    if step is not None:
        source = checkpoints.path(step)
        if not source.exists():
            there = ", ".join(str(int(p.stem.removeprefix("step_"))) for p in reversed(checkpoints.paths())) or "none"
            raise CheckpointError(f"{run} has no checkpoint of step {step}; there are: {there}")
    asked: str | float = weights
    with suppress(ValueError):
        asked = float(weights)
    loaded = factorkit.load(source, device="cpu", weights=asked)
    written = loaded.save(out)
    return {"out": str(written), "step": loaded.step}, f"written: {written} (step {loaded.step})"
