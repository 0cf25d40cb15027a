"""A run is a folder. This is how one is claimed: made afresh, taken up again, or refused as another run's."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from factorkit.engine.checkpoint import Checkpoints, average_name, read_checkpoint
from factorkit.engine.migration import migrate_settings
from factorkit.utils.atomic import replacing
from factorkit.utils.errors import CheckpointError, ConfigError
from factorkit.utils.safe_reading import read_json

CONFIG = "config.json"
LOCK = ".lock"
WEIGHTS = {"average": "ema.module.", "last": "model."}  # where a checkpoint keeps them


Completion = Callable[[dict[str, Any]], dict[str, Any]]


def claim(
    folder: Path, settings: dict[str, Any], resumable: frozenset[str], completed: Completion | None = None
) -> None:
    """Make ``folder`` the run of these settings, or find that it already is.

    Args:
        settings: everything the run is defined by, JSON-able.
        resumable: settings that may differ from those of the run that lies there.
        completed: what makes the settings found there, perhaps of an older version, as full as today's.

    Raises:
        CheckpointError: the folder holds another run (the differing settings are named) or something else altogether.
    """
    check_claim(folder, settings, resumable, completed)
    write_json(folder / CONFIG, settings)


def check_claim(
    folder: Path, settings: dict[str, Any], resumable: frozenset[str], completed: Completion | None = None
) -> None:
    """Raise what :func:`claim` would; nothing is written."""
    path = folder / CONFIG
    if path.exists():
        old = read_settings(folder)
        kind, asked = (of.get("model") or of.get("experiment") for of in (old, settings))
        if kind != asked:
            raise CheckpointError(f"{folder} holds a run of {kind}, not of {asked}; give another out=")
        there, wanted = (_flat(of) for of in (old if completed is None else completed(old), settings))
        names = sorted(k for k in {*there, *wanted} - resumable if there.get(k) != wanted.get(k))
        if names:
            listed = "; ".join(f"{k}: {there.get(k)!r} there, {wanted.get(k)!r} asked for" for k in names)
            kinds = {"data" if k.split(".")[0] == "data" else "settings" for k in names}
            what = " and ".join(sorted(kinds))
            raise CheckpointError(
                f"{folder} holds a run with other {what} ({listed}). Give another out=, or the same {what} to resume it"
            )
    elif folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give another out=")
    elif folder.exists() and not all(p.name.startswith(".") for p in folder.iterdir()):
        # hidden files may be what a kill left of the first config.json
        raise CheckpointError(f"{folder} exists and holds something that is no factorkit run; give another out=")


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """What settings in groups hold under ``group.name``, the others as they are."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


@contextmanager
def claimed(
    folder: Path,
    settings: dict[str, Any],
    resumable: frozenset[str],
    doing: str = "training in",
    completed: Completion | None = None,
) -> Iterator[None]:
    """:func:`claim` a folder and keep others from it meanwhile (:func:`held`); where one fails, nothing has changed."""
    check_claim(folder, settings, resumable, completed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    with held(folder, doing):
        claim(folder, settings, resumable, completed)
        yield


@contextmanager
def held(folder: Path, doing: str = "training in") -> Iterator[None]:
    """Keep other processes of this machine from training in ``folder``, or what else they are ``doing``, meanwhile; a
    kill releases it.

    Raises:
        CheckpointError: another process does, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        lock = open(folder / LOCK, "w")
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
    """The settings in a run folder. Raises CheckpointError where there is no run."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no {CONFIG}")
    return migrate_settings(read_object(path, "give another out="), path)


def read_object(path: Path, otherwise: str = "delete it") -> dict[str, Any]:
    """The values by name in a JSON file that a run has written.

    Raises:
        CheckpointError: it cannot be read; ``otherwise`` says what helps where it cannot be restored.
    """
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"it holds {type(values).__name__}, not values by name")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore it, or {otherwise}") from error
    return values


def model_name(path: Path) -> str | None:
    """Which model a run folder or a checkpoint file is of, as far as that can be told; what is wrong with a damaged
    one is said by whoever reads it.

    Raises:
        CheckpointError: the path is a folder, but no run.
    """
    if path.is_dir():
        return read_settings(path).get("model")
    with suppress(CheckpointError):
        return read_checkpoint(path)[1].get("model")
    return None


def read_weights(path: Path, model: str, weights: str | float = "average") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the settings in a run folder (its newest whole checkpoint) or a ``.safetensors`` file.

    weights: "average", the moving average; its decay, or one of ``extra_ema_decays``; or "last", those of the last step
        themselves. Only checkpoints hold more than one average, and the last. Where a decay is asked for, the
        settings answered are those of a training that kept no other.

    Raises:
        CheckpointError: nothing there, damaged, or of another model than ``model``.
        ConfigError: other ``weights``, or ones that the file was saved without.
    """
    if isinstance(weights, str) and weights not in WEIGHTS:
        raise ConfigError(
            f"weights={weights!r} is unknown; choose one of {', '.join(WEIGHTS)}, or a decay of extra_ema_decays"
        )
    if path.is_dir():
        read_settings(path)
        found = Checkpoints(path / "checkpoints").latest()
        if found is None:
            raise CheckpointError(f"{path} has no checkpoint yet; run the same training command again to go on")
        tensors, meta = found
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


def check_plausible(path: Path, weights: Mapping[str, Tensor], **numbers: int) -> None:
    """Refuse sizes that no model with these weights can have before one is built, which might take any memory or time.

    Args:
        numbers: counts of layers, channels and the like: none is beyond the longest side of a weight and their number.

    Raises:
        CheckpointError: one is beyond that; or there are no weights.
    """
    most = max([len(weights), *(side for t in weights.values() for side in t.shape)])
    for name, number in numbers.items():
        if not 0 < number <= most:
            raise CheckpointError(f"{path} is damaged: a model of {name}={number} has other weights than lie there")


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as temporary:
            text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise unwritable(path, error) from error


def copy_folder(source: Path, target: Path) -> None:
    """Copy what lies in a folder into another. Raises CheckpointError where it cannot be."""
    try:
        shutil.copytree(source, target, dirs_exist_ok=True)
    except OSError as error:  # shutil's own lists every file with its reason
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise CheckpointError(
            f"could not copy {source} to {target}: {first}. Mend that and run the same command again to go on"
        ) from error


def unwritable(path: Path, error: OSError) -> CheckpointError:
    """What is said of a place in a run folder that cannot be written."""
    return CheckpointError(f"could not write {path}: {error}; give an out= that can be written")
