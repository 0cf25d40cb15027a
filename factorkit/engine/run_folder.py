"""A run is a folder: creating one, resuming it, refusing it for another run, reading it, and writing its log."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from factorkit.engine.checkpoint import Checkpoints, average_name, read_checkpoint, write_checkpoint
from factorkit.engine.config import migrate_settings
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError, ConfigError, first_mismatch
from factorkit.utils.files import is_number, read_json, read_log, replacing, timeline
from factorkit.utils.output_record import mark_output_folder, writing_file

CONFIG = "config.json"
LOCK = ".lock"
SCORES = "scores.json"
WEIGHTS = {"average": "ema.module.", "last": "model."}  # prefixes of tensors in a checkpoint


# Completes the settings of an older version with those added since.
Completion = Callable[[dict[str, Any]], dict[str, Any]]


def check_claim(
    folder: Path, settings: dict[str, Any], resumable: frozenset[str], complete: Completion | None = None
) -> None:
    """Raise the errors of :func:`claimed` without writing anything."""
    path = folder / CONFIG
    if path.exists():
        old = read_settings(folder)
        old_kind, kind = (values.get("model") or values.get("experiment") for values in (old, settings))
        if old_kind != kind:
            raise CheckpointError(f"{folder} holds a run of {old_kind}, not of {kind}; give another out=")
        stored, requested = _flat(old if complete is None else complete(old)), _flat(settings)
        names = sorted(k for k in {*stored, *requested} - resumable if stored.get(k) != requested.get(k))
        if names:
            listed = "; ".join(f"{k}: {stored.get(k)!r} there, {requested.get(k)!r} requested" for k in names)
            what = " and ".join(sorted({"data" if k.split(".")[0] == "data" else "settings" for k in names}))
            raise CheckpointError(
                f"{folder} holds a run with other {what} ({listed}). Give another out=, or the same {what} to resume it"
            )
    elif folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give another out=")
    elif folder.exists() and not all(p.name.startswith(".") for p in folder.iterdir()):
        # hidden files may be left of a killed write of config.json
        raise CheckpointError(f"{folder} exists and is not a factorkit run; give another out=")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with those of groups under ``group.name``."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


@contextmanager
def claimed(
    folder: Path,
    settings: dict[str, Any],
    resumable: frozenset[str],
    doing: str = "training in",
    complete: Completion | None = None,
) -> Iterator[None]:
    """Make ``folder`` the run of these settings, or check that it already is, and lock it during the block.

    Args:
        settings: everything that defines the run, JSON-able.
        resumable: settings that may differ from those of the run in the folder.
        doing: what the lock protects, for the message.
        complete: applied to the settings in the folder, which may be of an older version.

    Raises:
        CheckpointError: the folder holds another run (the message names the differing settings) or other files, or is
            locked. The folder is unchanged then.
    """
    check_claim(folder, settings, resumable, complete)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with locked(folder, doing):
        check_claim(folder, settings, resumable, complete)
        write_json(folder / CONFIG, settings)
        try:
            mark_output_folder(folder)
        except OSError as error:
            raise unwritable(folder, error) from error
        yield


@contextmanager
def locked(folder: Path, doing: str = "training in") -> Iterator[None]:
    """Lock ``folder`` against other processes of this machine during the block; a kill releases the lock.

    Raises:
        CheckpointError: another process has the lock, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        lock = open(folder / LOCK, "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise unwritable(folder / LOCK, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is {doing} {folder}. Wait for it, stop it, or give another out="
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of a run folder; old names are migrated.

    Raises:
        CheckpointError: the folder is not a run, or its settings cannot be read.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no {CONFIG}")
    return migrate_settings(read_object(path, "give another out="), path)


def read_object(path: Path, otherwise: str = "delete it") -> dict[str, Any]:
    """Read a JSON object that a run has written.

    Raises:
        CheckpointError: it cannot be read; ``otherwise`` is the advice if it cannot be restored.
    """
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"it contains {type(values).__name__}, not values by name")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it, or {otherwise}") from error
    return values


def model_name(path: Path) -> str | None:
    """Return the model of a run folder or a checkpoint file; None for a damaged file.

    Raises:
        CheckpointError: the path is a folder, but not a run.
    """
    if path.is_dir():
        return read_settings(path).get("model")
    with suppress(CheckpointError):
        return read_checkpoint(path)[1].get("model")
    return None


def read_weights(path: Path, model: str, weights: str | float = "average") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the settings of a run folder (its newest whole checkpoint) or a ``.safetensors`` file.

    Args:
        model: the model it must be of.
        weights: "average", the main moving average; the decay of an average; or "last", the weights of the last step.
            Only checkpoints of a run have all of them. With a decay, the settings are those of a run with that
            average alone.

    Raises:
        CheckpointError: the path is missing, damaged, or of another model.
        ConfigError: ``weights`` is unknown, or the file does not have these weights.
    """
    if isinstance(weights, str) and weights not in WEIGHTS:
        raise ConfigError(
            f"weights={weights!r} is unknown; choose one of {', '.join(WEIGHTS)}, or a decay of extra_ema_decays"
        )
    if path.is_dir():
        read_settings(path)
        checkpoint = Checkpoints(path / "checkpoints").latest()
        if checkpoint is None:
            raise CheckpointError(f"{path} has no checkpoint yet; run the same training command again to resume")
        tensors, meta = checkpoint
    else:
        tensors, meta = read_checkpoint(path)
    if meta.get("model") != model:
        raise CheckpointError(f"{path} holds a {meta.get('model')!r} model, not {model}")
    if isinstance(weights, str):
        prefix, what = WEIGHTS[weights], f"weights of the {weights} step"
    else:
        main = weights == meta.get("ema_decay")
        prefix, what = WEIGHTS["average"] if main else f"{average_name(weights)}.module.", f"average of decay {weights}"
        meta = {**meta, "ema_decay": float(weights), "extra_ema_decays": []}
    chosen = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    if not chosen:
        decays = {k.split(".module.")[0].removeprefix("ema_") for k in tensors if re.match(r"ema_[\d.e-]+\.module", k)}
        there = f", or weights={' or '.join(sorted(decays))}" if decays else ""
        raise ConfigError(f"{path} holds no {what}: load the run folder, or weights='average'{there}")
    return chosen, meta


def load_trained(
    path: Path, model: str, weights: str | float, read_config: Callable[[dict[str, Any]], Any]
) -> tuple[Any, Any, int]:
    """Load settings, module and step of a trained model; nothing is allocated before the settings are plausible.

    Args:
        path, model, weights: as for :func:`read_weights`.
        read_config: returns the configuration of stored settings, checked: its ``counts()`` are for
            :func:`check_plausible`, its ``build()`` makes the module.

    Raises:
        CheckpointError: nothing there, damaged, or not this model.
        ConfigError: unknown ``weights``.
    """
    tensors, meta = read_weights(path, model, weights)
    try:
        config = read_config(meta)
        check_plausible(path, tensors, **config.counts())
        with torch.device("meta"):
            module = config.build()
        own = module.state_dict()
        for name, tensor in tensors.items():  # assigned, not copied: another precision would reach the operations
            if name in own and tensor.is_floating_point():
                tensors[name] = tensor.to(own[name].dtype)
        module.load_state_dict(tensors, assign=True)
        return config, module, int(meta["step"])
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the weights in {path} do not match the model of its settings: {first_mismatch(error)}"
        ) from error


def select_settings(config: type[Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of stored settings that a configuration class has."""
    return {field.name: meta[field.name] for field in dataclasses.fields(config) if field.name in meta}


def sum_step_seconds(*folders: Path) -> float:
    """Return the seconds of the training steps in the logs of run folders; repeated steps count once."""
    events = (event for folder in folders for event in timeline(read_log(folder), "step"))
    return sum(event["seconds"] for event in events if is_number(event.get("seconds")))


def check_plausible(path: Path, weights: Mapping[str, Tensor], **numbers: int) -> None:
    """Refuse implausible sizes before a model is built, which might take unbounded memory or time.

    ``numbers`` are counts of layers, channels and the like.

    Raises:
        CheckpointError: a number exceeds both the number of weights and their longest side, or there are no weights.
    """
    limit = max([len(weights), *(side for t in weights.values() for side in t.shape)])
    for name, number in numbers.items():
        if not 0 < number <= limit:
            raise CheckpointError(f"{path} is damaged: its weights do not fit a model with {name}={number}")


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically; raises CheckpointError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as temporary:
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def identify_run(folder: Path | None, weights: Mapping[str, Tensor]) -> str:
    """Return what identifies a run as the input of its results: its folder, else a hash of its weights."""
    if folder is not None:
        return str(folder.resolve())
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return f"weights {digest.hexdigest()}"


class TrainedRun:
    """A trained model of any kind, its step and, if it has one, its run folder."""

    MODEL: ClassVar[str]
    model: Any
    config: Any
    step: int
    folder: Path | None

    def _settings(self) -> dict[str, Any]:
        """Return what a checkpoint stores besides the weights."""
        return {"model": self.MODEL, **self.config.to_dict(), "step": self.step}

    def _stored_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of an exported model."""
        return {f"ema.module.{name}": value for name, value in self.model.state_dict().items()}

    def save(self, path: str | Path, *, overwrite: bool = False, source: str | None = None) -> Path:
        """Write the averaged weights and all settings as one ``.safetensors`` file for :func:`factorkit.load`.

        Of several processes only the first writes.

        Args:
            path: the file.
            overwrite: also replace a file that was not written for this run.
            source: identifies the run; None: its folder, else its weights.

        Raises:
            WriteError: another file is in the way.
            CheckpointError: ``path`` cannot be written; an existing file is then unchanged.
        """
        if distributed.rank() > 0:
            return Path(path)
        weights = self._stored_tensors()
        source = f"save: {source or identify_run(self.folder, weights)}"
        opened = partial(writing_file, source=source, overwrite=overwrite)
        return write_checkpoint(Path(path), weights, self._settings(), opened)

    @property
    def scores(self) -> dict[str, Any] | None:
        """The result of the last ``evaluate`` in the run folder; None if there is none.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self.folder / SCORES if self.folder else None
        return read_object(path) if path and path.exists() else None

    def _store_scores(self, scores: dict[str, Any]) -> None:
        """Write the scores into the run folder, if there is one; raises CheckpointError if that fails."""
        if (folder := self.folder) is not None:
            distributed.run_on_first(lambda: write_json(folder / SCORES, scores))


def copy_folder(source: Path, target: Path) -> None:
    """Copy the content of a folder into another; raises CheckpointError if that fails."""
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except OSError as error:  # shutil.Error lists every file with its reason
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise CheckpointError(
            f"could not copy {source} to {target}: {first}. Fix this and run the same command again to resume"
        ) from error


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a path in a run folder that cannot be written."""
    return CheckpointError(f"could not write {path}: {error}; give a writable out=")
