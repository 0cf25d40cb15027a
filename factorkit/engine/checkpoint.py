"""Checkpoints: one safetensors file each, written atomically.

The metadata holds the format's version, the step, the configuration, and a SHA-256 of all of it and of the tensors; a
file with another hash is damaged. A change of the content raises the version; older versions stay readable
(tests/engine/stored has a file of each version).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from factorkit.engine.config import migrate_settings, migrate_tensor_names
from factorkit.utils.errors import CheckpointError
from factorkit.utils.files import clear_unfinished, parse_json, read_json, replacing

FORMAT, VERSION = "factorkit", 1
BEST = "best.json"  # step and error of the best checkpoint
_NAME = re.compile(r"step_(\d+)\.safetensors$")


def average_name(decay: float) -> str:
    """Return the prefix in a checkpoint of an average of ``extra_ema_decays``; the prefix of the main one is "ema"."""
    return f"ema_{float(decay)}"


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    opened: Callable[[Path], AbstractContextManager[Path]] | None = None,
) -> Path:
    """Write tensors and JSON-able ``meta`` atomically and wait until they are on the disk.

    Args:
        meta: JSON-able.
        opened: yields the temporary path that becomes the file; None: durably.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; an old file is intact.
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(dict(meta), sort_keys=True)
    header = {"format": f"{FORMAT}-{VERSION}", "meta": text, "sha256": _digest(tensors, text)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) if opened is None else opened(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors replaces the file by one that others cannot read
            save_file(tensors, temporary, metadata=header)
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {path}: {error}. Earlier checkpoints are intact; free some space (or give another "
            "out=) and run the same command again to resume"
        ) from error
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors (on the CPU) and the metadata of a checkpoint; old names of settings are migrated.

    Raises:
        CheckpointError: the file is missing, damaged, of another program, or of a later factorkit.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            # copies: safetensors maps the file, which may change or disappear
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    _check_version(path, str(header.get("format")))
    if header.get("sha256") != _digest(tensors, header.get("meta", "")):
        raise CheckpointError(f"{path} is damaged: its contents do not match its checksum")
    try:
        meta = parse_json(header["meta"])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its settings cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} is damaged: it contains {type(meta).__name__}, not settings by name")
    return migrate_tensor_names(tensors, meta.get("model")), migrate_settings(meta, path)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()) if t.numel() else b"")
    return digest.hexdigest()


def _check_version(path: Path, file_format: str) -> None:
    name, _, version = file_format.rpartition("-")
    if name != FORMAT or not version.isdecimal() or int(version) < 1:
        raise CheckpointError(f"{path} is not a factorkit checkpoint (format {file_format!r})")
    if int(version) > VERSION:
        raise CheckpointError(
            f"{path} was written by a later factorkit (format {file_format}); upgrade factorkit to read it"
        )


class Checkpoints:
    """The checkpoints of a run: ``<folder>/step_00000400.safetensors`` ...; keeps the newest ``keep`` and the best.

    Attributes:
        undecided: steps whose checkpoint may still become the best, and is kept until that is known.
    """

    def __init__(self, folder: Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep
        self.undecided: set[int] = set()

    def paths(self) -> list[Path]:
        """Return the files, newest first."""
        numbered = [(int(m.group(1)), p) for p in self.folder.glob("step_*.safetensors") if (m := _NAME.match(p.name))]
        return [p for _, p in sorted(numbered, reverse=True)]

    def newest_step(self) -> int:
        """Return the step of the newest file; 0 without one."""
        return max((int(path.stem.removeprefix("step_")) for path in self.paths()), default=0)

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and delete those beyond the newest ``keep``, except the best.

        Checkpoints of later steps are deleted too: the run resumed before them, so they are damaged.
        """
        path = write_checkpoint(self.path(step), tensors, {**meta, "step": step})
        paths = self.paths()
        newer = paths.index(path)
        self._delete(paths[:newer] + self._beyond(paths[newer:], self.keep))
        return path

    def prune(self, keep: int) -> list[Path]:
        """Delete all checkpoints but the newest ``keep`` whole ones and the best; return those deleted.

        If no checkpoint is whole, nothing is deleted.
        """
        whole, damaged = [], []
        for path in self.paths():
            try:
                read_checkpoint(path)
                whole.append(path)
            except CheckpointError:
                damaged.append(path)
        stale = self._beyond(whole, keep) + damaged if whole else []
        self._delete(stale)
        return stale

    def _beyond(self, paths: list[Path], keep: int) -> list[Path]:
        best = self.best()
        kept = {self.path(step) for step in self.undecided.copy()} | ({self.path(best[0])} if best else set())
        return [path for path in paths[keep:] if path not in kept]

    def _delete(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        clear_unfinished(self.folder)
        for leftover in self.folder.glob(".tmp??????"):  # of safetensors, from a killed save
            leftover.unlink(missing_ok=True)

    def keep_best(self, step: int, error: float) -> None:
        """Make the checkpoint of ``step``, which must exist, the best one unless the best has a lower error.

        Raises:
            CheckpointError: ``best.json`` cannot be written.
        """
        self.undecided.discard(step)
        best = self.best()
        if best is not None and best[1] < error:
            return
        try:
            with replacing(self.folder / BEST, durable=True) as temporary:
                temporary.write_text(json.dumps({"step": step, "error": error}))
        except OSError as failure:
            raise CheckpointError(f"could not write {self.folder / BEST}: {failure}. Free some space") from failure

    def best(self) -> tuple[int, float] | None:
        """Return step and error of the best checkpoint; None without one."""
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file counts as none
            best = read_json(self.folder / BEST)
            step, error = int(best["step"]), float(best["error"])
            return (step, error) if self.path(step).exists() else None
        return None

    def path(self, step: int) -> Path:
        """Return the path of a step's checkpoint."""
        return self.folder / f"step_{step:08d}.safetensors"

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the newest whole checkpoint, with a warning about damaged ones; None if there are no checkpoints.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        damaged = []
        for path in self.paths():
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}. Using the previous one, {path.name}, instead", stacklevel=2)
            return checkpoint
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read: {'; '.join(damaged)}. "
                "Move the folder away, or give another out=, to start from the beginning"
            )
        return None
