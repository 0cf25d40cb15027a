"""Results of benchmarks: one JSON file each, an object of records by key."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

from factorkit.utils.files import replacing


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
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def record_once(path: Path, key: str, measure: Callable[[], dict]) -> None:
    """Add what ``measure`` returns, on one thread, with machine and commit, unless there is a record already."""
    if key not in read_results(path):
        facts = {"machine": machine(1), "commit": commit()}  # of the code that runs, which may change meanwhile
        write_result(path, key, measure() | facts)


def append_row(path: Path, row: dict[str, object]) -> None:
    """Append one line of JSON, so that a benchmark that is stopped keeps what it measured before."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def machine(threads: int) -> str:
    """The processor and the threads used of it."""
    return f"{processor()}, {threads} thread(s)"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this checkout, marked where it has changes, but for the results themselves."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results")
        return git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
