"""An index of a JSON lines file: 24 bytes for each key of a line, however long the lines are."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.utils.files import parse_line

MERGED_ENTRIES = 4096  # sorted in at once; until then a search goes through all of them


class LineIndex:
    """Finds the lines of a JSON lines file that belong to a key; may be used from several threads.

    Keys are stored as 64-bit hashes, so a line of another key can be among the result: the caller compares.

    Args:
        path: the file. Lines are read from it when they are asked for; a line that is gone is left out.
    """

    def __init__(self, path: Path):
        self.path = path
        self._sorted = np.empty((3, 0), np.int64)  # hash, offset, number; by hash, then in the order of the file
        self._recent = (array("q"), array("q"), array("q"))
        self._lock = threading.Lock()

    def add(self, key: Hashable, offset: int, number: int = 0) -> None:
        """Add the line at an offset in bytes, with any number to be found without reading the line."""
        with self._lock:
            for column, value in zip(self._recent, (hash(key), offset, number), strict=True):
                column.append(value)
            if len(self._recent[0]) >= MERGED_ENTRIES:
                self._merge()

    def number(self, key: Hashable) -> int:
        """Return the number of the newest line of a key; 0 if there is none."""
        entries = self._find(key)
        return int(entries[2, -1]) if entries.shape[1] else 0

    def lines(self, key: Hashable) -> list[dict[str, Any]]:
        """Return the lines of a key, the newest last."""
        return list(self._read(self._find(key)[1]))

    def numbers(self) -> np.ndarray:
        """Return the number of the newest line of each key, in no particular order."""
        return self._newest()[2]

    def numbered_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the newest line of each key whose number is not 0, by their numbers."""
        newest = self._newest()
        newest = newest[:, newest[2] != 0]
        yield from self._read(newest[1, np.argsort(newest[2], kind="stable")])

    def _find(self, key: Hashable) -> np.ndarray:
        value = hash(key)
        with self._lock:
            first, end = (np.searchsorted(self._sorted[0], value, side) for side in ("left", "right"))
            recent = np.array(self._recent)
            return np.concatenate([self._sorted[:, first:end], recent[:, recent[0] == value]], 1)

    def _newest(self) -> np.ndarray:
        with self._lock:
            self._merge()
            hashes = self._sorted[0]
            return self._sorted[:, np.append(hashes[1:] != hashes[:-1], True)[: len(hashes)]]

    def _merge(self) -> None:
        entries = np.concatenate([self._sorted, np.array(self._recent)], 1)
        self._sorted = entries[:, np.argsort(entries[0], kind="stable")]
        self._recent = (array("q"), array("q"), array("q"))

    def _read(self, offsets: np.ndarray) -> Iterator[dict[str, Any]]:
        if not len(offsets) or not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for offset in offsets.tolist():
                file.seek(offset)
                if (line := parse_line(file.readline())) is not None:
                    yield line
