"""Compute the cells of an experiment one after another, and write its table after each.

A fingerprint of the content of the data, independent of its place and file times, identifies the cells of a folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import factorkit
from factorkit.data.files import escape_name, wrap_os_errors
from factorkit.engine.config import to_python
from factorkit.engine.run_folder import claimed, read_object, write_json
from factorkit.report.content import judged_alarms, passed_decisively
from factorkit.reproduce import experiments
from factorkit.reproduce.experiment import (
    SCALES,
    CellResult,
    CellUnavailableError,
    Experiment,
    Row,
    Setup,
    file_name,
    format_markdown,
    format_text,
    make_table,
)
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.files import LOG_NAME, read_arrays, read_log, replacing
from factorkit.utils.output_record import OutputFilter

MAX_READ_FILES = 20_000  # of more files only the names and sizes count
BLOCK_BYTES = 2**15  # read at each end of a file: all of most masks
SAMPLED_BLOCKS = 64  # read in between, where a change may leave both ends as they were
COMPRESSED = frozenset((".jpg", ".jpeg", ".png", ".webp"))  # here a change moves or alters the end


def fingerprint(data: Path | None, inputs: Mapping[str, Path] | None = None, out: Path | None = None) -> Any:
    """Return a JSON-able fingerprint of data and of further inputs by name.

    Of a folder the names and sizes of all files and both ends of each file count (of 20,000 files, evenly spaced, if
    there are more); of a zip the names, sizes and checksums of its members; of a .npy everything. Hidden files, file
    times, the place of the folder, and files below ``out`` do not count.

    Returns:
        {"name", "files", "bytes", "sha256"}, and the same by the name of each further input; "procedural" without data.

    Raises:
        DataError: there is nothing, or it cannot be read.
    """
    own: Any = "procedural" if data is None else _fingerprint(data, out)
    if not inputs:
        return own
    own = {"name": own} if data is None else own
    return own | {key: _fingerprint(path, out) for key, path in inputs.items()}


def _fingerprint(data: Path, out: Path | None) -> dict[str, Any]:
    path = data.expanduser().resolve()
    if not path.exists():
        raise DataError(
            f"{escape_name(str(data))}: no such file or folder (looked in {Path.cwd()}). Check the spelling."
        )
    content, total = hashlib.sha256(), 0
    with wrap_os_errors(path, "so its data cannot be identified. Fix its permissions."):
        files = sorted(_list_files(path, out)) if path.is_dir() else [""]
        step = max(1, -(-len(files) // MAX_READ_FILES))
        for number, name in enumerate(files):
            file = path / name if name else path
            size = file.stat().st_size
            total += size
            content.update(repr((name, size)).encode("utf-8", "surrogateescape"))
            if number % step == 0:
                content.update(_read_sample(file, size))
    return {"name": path.name, "files": len(files), "bytes": total, "sha256": content.hexdigest()[:16]}


def _list_files(folder: Path, out: Path | None) -> Iterator[str]:
    """Yield the relative paths of the files below a folder; links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise error

    outputs = OutputFilter(folder)
    entered = set() if out is None else {os.path.realpath(out)}
    for here, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        true_path = os.path.realpath(here)
        if true_path in entered:
            folders.clear()
            continue
        entered.add(true_path)
        if here != str(folder) and outputs.skips_folder(here):
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        for name in names:
            if name.startswith(".") or outputs.skips_file(here, name):
                continue
            if os.path.isfile(os.path.join(here, name)):
                yield Path(here, name).relative_to(folder).as_posix()


def _read_sample(file: Path, size: int) -> bytes:
    """Digest a file, or enough of it to distinguish it from another of its name and size."""
    suffix = file.suffix.lower()
    if suffix in (".zip", ".npz"):
        with suppress(zipfile.BadZipFile, ValueError, NotImplementedError), zipfile.ZipFile(file) as archive:
            members = [(m.filename, m.file_size, m.CRC) for m in archive.infolist()]
            return repr(members).encode("utf-8", "surrogateescape")
    content = hashlib.sha256()
    with open(file, "rb") as opened:
        if size <= 2 * BLOCK_BYTES or suffix == ".npy":
            while part := opened.read(2**20):
                content.update(part)
        else:
            step = max(BLOCK_BYTES, size // SAMPLED_BLOCKS)
            between = [] if suffix in COMPRESSED else range(0, size - BLOCK_BYTES, step)
            for place in (0, *between, size - BLOCK_BYTES):
                opened.seek(place)
                content.update(opened.read(BLOCK_BYTES))
    return content.digest()


@dataclass
class Cells:
    """The cells of an experiment.

    Attributes:
        folder: where they are stored.
        rows: the seeds of each row.
        records: {"scores", "images", "seconds", ...} of each finished cell, by row and seed.
        missing: why a cell is not there, by row and seed.
    """

    folder: Path
    rows: dict[str, list[int]]
    records: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    missing: dict[tuple[str, int], str] = field(default_factory=dict)

    def load(self) -> None:
        """Read the finished cells."""
        for row, seeds in self.rows.items():
            for seed in seeds:
                if (path := self._path(row, seed)).exists():
                    self.records[row, seed] = read_object(path)

    def store(self, row: str, seed: int, result: CellResult, seconds: float, trainings: Sequence[Path] = ()) -> None:
        """Write a cell and the alarms of its trainings. The numbers come last: they mark it as finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(row, seed)
        if result.arrays:
            with replacing(path.with_suffix(".npz")) as temporary:
                np.savez_compressed(temporary, **result.arrays)  # type: ignore[arg-type]  # not allow_pickle
        record = {
            "row": row,
            "seed": seed,
            "scores": dict(result.scores),
            "images": list(result.images),
            "seconds": round(seconds, 1),
            "alarms": {folder.name: read_alarms(folder) for folder in trainings if (folder / LOG_NAME).exists()},
            "factorkit": factorkit.__version__,
            "torch": torch.__version__,
        }
        write_json(path, record)
        self.records[row, seed] = record

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """Read the arrays of each row's cell of seed 0, for the rows that have some."""
        return {row: arrays for row in self.rows if (arrays := self._read_arrays(row, 0))}

    def _read_arrays(self, row: str, seed: int) -> dict[str, np.ndarray]:
        path = self._path(row, seed).with_suffix(".npz")
        if (row, seed) not in self.records or not path.exists():
            return {}
        try:
            arrays = read_arrays(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}. Restore it, or delete it and the .json beside it"
            ) from error
        return arrays if isinstance(arrays, dict) else {}

    def _path(self, row: str, seed: int) -> Path:
        return self.folder / f"{file_name(row)}-seed{seed}.json"


@dataclass(frozen=True)
class Report:
    """The result of a call: the table as data and as text, and the folder of its files."""

    folder: Path
    data: dict[str, Any]
    text: str


def read_alarms(folder: Path) -> list[str]:
    """Return the failures of a run's newest checks, or that no check ran that can tell; empty where one has passed."""
    log = read_log(folder)
    if passed_decisively(log):
        return []
    return judged_alarms(log)[1] or ["no check that separates right from wrong runs has run"]


def reproduce(
    name: str,
    data: str | Path | None = None,
    *,
    voc: str | Path | None = None,
    video: str | Path | None = None,
    scale: str = "small",
    out: str | Path = "runs/reproduce",
    seeds: int | None = None,
    rows: Sequence[str] = (),
    device: str = "auto",
    ignore: int | None = None,
    holdout: str | int | None = None,
    progress: bool = True,
    **changes: Any,
) -> Report:
    """Run a table or figure of the dissertation. The same call again continues where it stopped.

    The first seed of every row is computed first, so that a whole table exists early. Cells in ``OUT/NAME/cells`` are
    not computed again; trainings in ``OUT/runs`` serve every experiment that needs them.

    Args:
        name: of an experiment or a figure (:func:`factorkit.reproduce.list_experiments`).
        data: a folder or file, in any format that the training of the model reads; None for procedural data.
        voc: folder of PASCAL VOC 2012, which table2.7 scores.
        video: video or folder of frames that fig2.14 segments; None for a pan over a training image.
        scale: ``"small"`` (32 px, for a CPU), ``"gpu"`` (64 px, 128 channels) or ``"full"`` (as in the thesis).
        out: folder of all experiments of one data set and scale.
        seeds: how many, from 0 on; None for the number of the experiment.
        rows: names of the rows to compute; empty for all.
        device: where to train.
        ignore: mask value of pixels that are not scored.
        holdout: as in :func:`factorkit.train_segdiff`.
        progress: whether to report progress.
        **changes: settings of all trainings, which override those of the scale.

    Raises:
        ConfigError: an unknown experiment, scale or row, an input that the experiment does not use, or no seeds.
        DataError: the data or another input does not exist.
        CheckpointError: the folder holds cells of other data or settings, or another process computes them.
    """
    experiment, changes = experiments.find_experiment(name), {key: to_python(value) for key, value in changes.items()}
    if scale not in SCALES:
        raise ConfigError(f"scale={scale!r} is unknown; choose one of {', '.join(SCALES)}")
    seeds = experiment.seeds if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} must be at least 1")
    inputs = {key: Path(value) for key, value in (("voc", voc), ("video", video)) if value is not None}
    if unused := sorted(set(inputs) - set(experiment.inputs)):
        raise ConfigError(f"{experiment.name} does not use {', '.join(unused)}; leave it out")
    options = {key: value for key, value in (("ignore", ignore), ("holdout", holdout)) if value is not None}
    path, out = None if data is None else Path(data), Path(out)
    identity = fingerprint(path, inputs, out)
    setup = Setup(experiment.name, path, scale, out, device, progress, options, changes, json.dumps(identity), inputs)
    every = list(experiment.rows(setup))
    if unknown := [row for row in rows if row not in {r.name for r in every}]:
        names = ", ".join(repr(row.name) for row in every)
        raise ConfigError(f"{experiment.name} has no row {', '.join(map(repr, unknown))}; there are {names}")
    settings = {"experiment": experiment.name, "scale": scale, "data": identity, **options, **changes}
    settings = json.loads(json.dumps(settings))
    empty = not any((setup.folder / "cells").glob("*.json"))  # a folder without cells may change its data
    replace = (lambda stored: settings) if empty else None
    with claimed(setup.folder, settings, frozenset({"data.name"}), "filling the cells of", replace):
        return _compute(experiment, setup, every, seeds, set(rows))


def _compute(experiment: Experiment, setup: Setup, rows: list[Row], seeds: int, wanted: set[str]) -> Report:
    cells = Cells(setup.folder / "cells", {row.name: list(range(min(seeds, row.max_seeds or seeds))) for row in rows})
    cells.load()
    for seed, row in product(range(seeds), rows):
        if seed not in cells.rows[row.name] or (row.name, seed) in cells.records:
            continue
        if wanted and row.name not in wanted:
            cells.missing[row.name, seed] = "not requested"
            continue
        if setup.progress:
            print(f"{experiment.name}: {row.name}, seed {seed}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        setup.trainings.clear()
        try:
            result = row.compute(seed)
        except CellUnavailableError as reason:
            cells.missing[row.name, seed] = str(reason)
            warnings.warn(f"{row.name}, seed {seed}, is left out: {reason}", stacklevel=4)
            continue
        cells.store(row.name, seed, result, time.perf_counter() - start, setup.trainings)
        _write_table(experiment, setup, cells, [])
    return _write_table(experiment, setup, cells, experiment.draw(setup, cells.arrays()) if experiment.draw else [])


def _write_table(experiment: Experiment, setup: Setup, cells: Cells, drawn: Sequence[str]) -> Report:
    # "pictures" is the key of cells that an earlier version stored
    images = [image for cell in cells.records.values() for image in cell.get("images", cell.get("pictures", ()))]
    data = make_table(experiment, setup, cells.rows, cells.records, cells.missing) | {"images": [*drawn, *images]}
    write_json(setup.folder / "table.json", data)
    with replacing(setup.folder / "table.md") as temporary:
        temporary.write_text(format_markdown(experiment, data), encoding="utf-8")
    return Report(setup.folder, data, format_text(experiment, data))
