"""What an experiment is: the rows of a table, what fills a cell, and what the dissertation says stands there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from factorkit.utils.errors import FactorkitError

if TYPE_CHECKING:
    from factorkit.reproduce.runner import Cells
    from factorkit.reproduce.setup import Setup

SCALES = ("small", "gpu", "full")
#: how long what shares table 2.1's training takes
TRAINED_ONCE = {
    "small": "3 minutes a seed on one CPU core, none after table2.1",
    "gpu": "not measured",
    "full": "not measured",
}


class NotRun(FactorkitError):
    """A cell that cannot be filled here; the message says why and what would help. The other cells go on."""


@dataclass(frozen=True)
class Column:
    """One number of every row.

    Attributes:
        key: its name among a cell's scores.
        title: over the column.
        factor: what it is multiplied by to be printed; 100 for shares, as the dissertation prints them.
        digits: behind the point.
        lower: less is better.
    """

    key: str
    title: str
    factor: float = 1.0
    digits: int = 2
    lower: bool = False


def percent(key: str, title: str) -> Column:
    """A share, printed as the dissertation does."""
    return Column(key, title, 100.0, 1)


@dataclass(frozen=True)
class Citation:
    """Numbers somebody else printed; never measured here.

    Attributes:
        row: what they are of.
        source: where they stand.
        values: by the column's key, in this package's units (shares, not percents).
    """

    row: str
    source: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Found:
    """What fills a cell: numbers for the table, arrays for pictures of several cells, pictures of its own by name."""

    scores: Mapping[str, float] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: as printed, and in file names.
        work: (setup, seed) to what fills the cell; raises :class:`NotRun` where this machine cannot.
        seeds: most seeds that are of use; 1 where nothing is random. None: as many as were asked for.
    """

    name: str
    work: Callable[[Setup, int], Found]
    seeds: int | None = None


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the dissertation.

    Attributes:
        name: as on the command line, ``"table2.1"``.
        title: what it shows, one line.
        data: what data it is about, and what else will do.
        duration: for each of :data:`SCALES`, how long, in words; "not measured" where nobody did.
        columns: of the table.
        rows: the setup's rows, best known first.
        citations: what was published.
        figures: other figures whose pictures this experiment leaves.
        seeds: how many where none are asked for.
        notes: what a reader of the table has to know, a sentence each.
        inputs: names of further data that it uses, such as ``video``.
        draw: writes pictures once the cells are there, and answers their names; it may find cells missing.
    """

    name: str
    title: str
    data: str
    duration: Mapping[str, str]
    columns: Sequence[Column]
    rows: Callable[[Setup], Sequence[Row]]
    citations: Sequence[Citation] = ()
    figures: Sequence[str] = ()
    seeds: int = 3
    notes: Sequence[str] = ()
    inputs: Sequence[str] = ()
    draw: Callable[[Setup, Cells], Sequence[str]] | None = None
