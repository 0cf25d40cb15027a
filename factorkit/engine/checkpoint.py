"""One checkpoint is one safetensors file, written so that a kill at any moment leaves the old or the new one whole.

The metadata carries the format's version, the step, the configuration and a SHA-256 of all of it and of the tensors; a
file whose hash differs is damaged. Whoever changes what lies in a file raises the version, and keeps reading the old
ones (tests/engine/stored holds one of each).
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from factorkit.engine.migration import migrate_settings, migrate_tensor_names
from factorkit.utils.atomic import clear_unfinished, replacing
from factorkit.utils.errors import CheckpointError
from factorkit.utils.safe_reading import parse_json, read_json

FORMAT, VERSION = "factorkit", 1
BEST = "best.json"
_NAME = re.compile(r"step_(\d+)\.safetensors$")


def average_name(decay: float) -> str:
    """Under which a checkpoint keeps a moving average of ``extra_ema_decays``; that of ``ema_decay`` is "ema"."""
    return f"ema_{float(decay)}"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write tensors and JSON-able ``meta`` to ``path``, whole or not at all, and wait until they are on the disk.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; what was there before still stands.
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(dict(meta), sort_keys=True)
    header = {"format": f"{FORMAT}-{VERSION}", "meta": text, "sha256": _digest(tensors, text)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors renames its own file into place, which nobody else may read
            save_file(tensors, temporary, metadata=header)
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {path}: {error}. Earlier checkpoints are untouched; free some space (or give another "
            "out=) and run the same command again to go on"
        ) from error
    return path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a checkpoint.

    Raises:
        CheckpointError: the file is missing, truncated, altered, not one of factorkit's, or of a later factorkit.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            # copies, for what safetensors gives is the file itself, mapped: it would change, or crash, as the file does
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error
    _check_version(path, str(header.get("format")))
    if header.get("sha256") != _digest(tensors, header.get("meta", "")):
        raise CheckpointError(f"{path} is damaged: its contents do not match its checksum")
    try:
        meta = parse_json(header["meta"])
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its settings cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path} is damaged: it holds {type(meta).__name__}, not settings by name")
    return migrate_tensor_names(tensors, meta.get("model")), migrate_settings(meta, path)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()) if t.numel() else b"")
    return digest.hexdigest()


def _check_version(path: Path, found: str) -> None:
    name, _, version = found.rpartition("-")
    if name != FORMAT or not version.isdecimal() or int(version) < 1:
        raise CheckpointError(f"{path} is a safetensors file, but not factorkit's (format {found!r})")
    if int(version) > VERSION:
        raise CheckpointError(f"{path} was written by a later factorkit (format {found}); upgrade this one to read it")


class Checkpoints:
    """The checkpoints of a run: ``<folder>/step_00000400.safetensors`` ..., the newest ``keep`` and the best."""

    def __init__(self, folder: Path, keep: int = 3):
        self.folder, self.keep = Path(folder), keep
        self.undecided: set[int] = set()  # steps of which nobody knows yet whether they are to be kept

    def paths(self) -> list[Path]:
        """Newest first."""
        found = [(int(m.group(1)), p) for p in self.folder.glob("step_*.safetensors") if (m := _NAME.match(p.name))]
        return [p for _, p in sorted(found, reverse=True)]

    def save(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step`` and drop those beyond the newest ``keep``, but for the best.

        Those of later steps go as well: they were damaged, or this step would not have been reached again.
        """
        path = write_checkpoint(self.path(step), tensors, {**meta, "step": step})
        paths = self.paths()
        newer = paths.index(path)
        self._drop(paths[:newer] + self._beyond(paths[newer:], self.keep))
        return path

    def prune(self, keep: int) -> list[Path]:
        """Drop all but the newest ``keep`` that are whole, and the best, where at least one is whole; answers which."""
        whole, damaged = [], []
        for path in self.paths():
            try:
                read_checkpoint(path)
                whole.append(path)
            except CheckpointError:
                damaged.append(path)
        stale = self._beyond(whole, keep) + damaged if whole else []
        self._drop(stale)
        return stale

    def _beyond(self, paths: list[Path], keep: int) -> list[Path]:
        best = self.best()
        kept = {self.path(step) for step in self.undecided.copy()} | ({self.path(best[0])} if best else set())
        return [path for path in paths[keep:] if path not in kept]

    def _drop(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        clear_unfinished(self.folder)
        for leftover in self.folder.glob(".tmp??????"):  # safetensors' own, of a save that was killed
            leftover.unlink(missing_ok=True)

    def keep_best(self, step: int, error: float) -> None:
        """Keep the checkpoint of ``step``, which must lie there, beyond its time if none kept so has a lower error.

        Raises:
            CheckpointError: the note of it cannot be written.
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
        """Step and error of the checkpoint that :meth:`keep_best` keeps; None where none is."""
        with suppress(OSError, ValueError, KeyError, TypeError):  # as if there was none
            noted = read_json(self.folder / BEST)
            step, error = int(noted["step"]), float(noted["error"])
            return (step, error) if self.path(step).exists() else None
        return None

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies, if it does."""
        return self.folder / f"step_{step:08d}.safetensors"

    def latest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint that is whole, passing over damaged ones with a warning; None where there is none.

        Raises:
            CheckpointError: there are checkpoints but none is whole.
        """
        damaged = []
        for path in self.paths():
            try:
                found = read_checkpoint(path)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            if damaged:
                warnings.warn(f"{'; '.join(damaged)}. Taking the previous one, {path.name}, instead", stacklevel=2)
            return found
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read: {'; '.join(damaged)}. "
                "Move the folder away, or give another out=, to start afresh"
            )
        return None
