"""Results of benchmarks: one JSON file each, an object of records by key."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.rendering import commit, processor

__all__ = ["commit", "machine", "read_results", "write_result"]


def read_results(path: Path) -> dict[str, dict]:
    """All records of a file; none where there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_result(path: Path, key: str, record: dict) -> None:
    """Add one record. Two benchmarks may run side by side, so the file is locked while it is read and written."""
    import fcntl

    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = {**read_results(path), key: record}
        path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def machine(threads: int) -> str:
    """The processor and the threads used of it."""
    return f"{processor()}, {threads} thread(s)"
