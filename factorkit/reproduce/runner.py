"""Fills an experiment's cells, one after another, and writes its table after each."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import factorkit
from factorkit.engine.config import plain
from factorkit.engine.run_folder import claimed, read_object, write_json
from factorkit.reproduce.cell_keys import identify
from factorkit.reproduce.experiment import SCALES, Experiment, Found, NotRun, Row
from factorkit.reproduce.registry import find
from factorkit.reproduce.setup import Setup, slug
from factorkit.reproduce.table import as_json, as_markdown, as_text
from factorkit.utils.atomic import replacing
from factorkit.utils.errors import CheckpointError, ConfigError
from factorkit.utils.safe_reading import read_arrays


@dataclass
class Cells:
    """What is known of an experiment's cells.

    Attributes:
        folder: where they lie.
        rows: the rows, each with the seeds that were asked for.
        found: {"scores", "pictures", "seconds", ...} by row and seed.
        missing: why a cell is not there, by row and seed.
    """

    folder: Path
    rows: list[tuple[str, list[int]]]
    found: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    missing: dict[tuple[str, int], str] = field(default_factory=dict)

    def path(self, row: str, seed: int) -> Path:
        """The cell's file."""
        return self.folder / f"{slug(row)}-seed{seed}.json"

    def load(self) -> None:
        """Take up the cells that are finished."""
        for row, seeds in self.rows:
            for seed in seeds:
                if (path := self.path(row, seed)).exists():
                    self.found[row, seed] = read_object(path)

    def keep(self, row: str, seed: int, found: Found, seconds: float) -> None:
        """Write a cell; its numbers last, for they say that it is finished."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(row, seed)
        if found.arrays:
            with replacing(path.with_suffix(".npz")) as temporary:
                np.savez_compressed(temporary, **found.arrays)
        record = {
            "row": row,
            "seed": seed,
            "scores": dict(found.scores),
            "pictures": list(found.pictures),
            "seconds": round(seconds, 1),
            "factorkit": factorkit.__version__,
            "torch": torch.__version__,
        }
        write_json(path, record)
        self.found[row, seed] = record

    def arrays(self, row: str, seed: int = 0) -> dict[str, np.ndarray]:
        """What a cell kept for the pictures; nothing where there is no such cell."""
        path = self.path(row, seed).with_suffix(".npz")
        if (row, seed) not in self.found or not path.exists():
            return {}
        try:
            found = read_arrays(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}. Restore it, or delete it and the .json beside it"
            ) from error
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Report:
    """A finished call: the table as data and as text, and where its files lie."""

    folder: Path
    data: dict[str, Any]
    text: str


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
    """Run a table or figure of the dissertation; the same call again goes on where it stopped.

    One seed of every row first, so that what is there early is a whole table. Cells that stand in
    ``OUT/NAME/cells`` are not run again, trainings in ``OUT/runs`` serve every experiment that needs them.

    Args:
        name: of an experiment, or of a figure that one draws (:func:`factorkit.reproduce.experiments`).
        data: a folder or file as the model's training takes it; None: the procedural set of the package.
        voc: PASCAL VOC 2012, which table2.7 scores.
        video: a video or folder of frames, which fig2.14 segments; None: a pan over a training image.
        scale: ``"small"`` (this machine, 32 px), ``"gpu"`` (64 px, C=128) or ``"full"`` (the thesis' settings).
        out: the folder of all experiments of one data set and scale.
        seeds: how many, from 0 on; None: the experiment's own number.
        rows: only these, by name; the table says of the others that they were not run.
        device: where to train.
        ignore, holdout: as in :func:`factorkit.train_segdiff`.
        changes: settings of all trainings, over the scale's.

    Raises:
        ConfigError: an unknown experiment, scale or row, or no seeds.
        DataError: the data or another input are not there.
        CheckpointError: the folder holds cells of other data or settings, or another process fills them.
    """
    experiment, changes = find(name), {key: plain(value) for key, value in changes.items()}
    if scale not in SCALES:
        raise ConfigError(f"scale={scale!r} is unknown; choose one of {', '.join(SCALES)}")
    seeds = experiment.seeds if seeds is None else seeds
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}: at least one seed has to be run")
    options = {k: v for k, v in (("ignore", ignore), ("holdout", holdout)) if v is not None}
    place = None if data is None else Path(data)
    inputs = {key: Path(value) for key, value in (("voc", voc), ("video", video)) if value is not None}
    if unused := sorted(set(inputs) - set(experiment.inputs)):
        raise ConfigError(f"{experiment.name} does not use {', '.join(unused)}; leave it out")
    known = identify(place, inputs, Path(out))
    setup = Setup(
        experiment.name, place, scale, Path(out), device, progress, options, changes, json.dumps(known), inputs
    )
    every = list(experiment.rows(setup))
    unknown = [row for row in rows if row not in {r.name for r in every}]
    if unknown:
        there = ", ".join(repr(row.name) for row in every)
        raise ConfigError(f"{experiment.name} has no row {', '.join(map(repr, unknown))}; there are {there}")
    settings = {"experiment": experiment.name, "scale": scale, "data": known, **options, **changes}
    settings = json.loads(json.dumps(settings))
    empty = not any((setup.folder / "cells").glob("*.json"))  # nobody's yet, whatever it was begun with
    anew = (lambda there: settings) if empty else None
    with claimed(setup.folder, settings, frozenset(), "filling the cells of", anew):
        return _fill(experiment, setup, every, seeds, set(rows))


def _fill(experiment: Experiment, setup: Setup, rows: list[Row], seeds: int, wanted: set[str]) -> Report:
    counts = {row.name: min(seeds, row.seeds or seeds) for row in rows}
    cells = Cells(setup.folder / "cells", [(row.name, list(range(counts[row.name]))) for row in rows])
    cells.load()
    for seed in range(max(counts.values())):
        for row in rows:
            if seed >= counts[row.name] or (row.name, seed) in cells.found:
                continue
            if wanted and row.name not in wanted:
                cells.missing[row.name, seed] = "not asked for"
                continue
            if setup.progress:
                print(f"{experiment.name}: {row.name}, seed {seed}", file=sys.stderr, flush=True)
            start = time.perf_counter()
            try:
                found = row.work(setup, seed)
            except NotRun as reason:
                cells.missing[row.name, seed] = str(reason)
                warnings.warn(f"{row.name}, seed {seed}, is left out: {reason}", stacklevel=4)
                continue
            cells.keep(row.name, seed, found, time.perf_counter() - start)
            _write(experiment, setup, cells, [])
    return _write(experiment, setup, cells, experiment.draw(setup, cells) if experiment.draw else [])


def _write(experiment: Experiment, setup: Setup, cells: Cells, drawn: Sequence[str]) -> Report:
    own = [picture for cell in cells.found.values() for picture in cell["pictures"]]
    data = as_json(experiment, setup, cells) | {"pictures": [*drawn, *own]}
    write_json(setup.folder / "table.json", data)
    with replacing(setup.folder / "table.md") as temporary:
        temporary.write_text(as_markdown(experiment, data), encoding="utf-8")
    return Report(setup.folder, data, as_text(experiment, data))
