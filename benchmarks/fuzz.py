"""Malformed files and command lines: is every one refused in words, or skipped?

    python -m benchmarks.fuzz                      # 1000 inputs; writes benchmarks/results/fuzz.json
    python -m benchmarks.fuzz --count 200 --seed 7 --kinds image zip
    python -m benchmarks.fuzz --only 413           # one input again, with its traceback
    python -m benchmarks.fuzz --layouts 300        # sound data sets in random layouts: read right, or refused

Input i of a seed is always the same. Each is damaged, laid into a folder of its own and given to what reads it: the
command line where a command costs little, the function behind it elsewhere. Outcomes: `refused`, by a FactorkitError
or by one line of `error:` and exit code 2 or 1; `skipped`, with a warning that says so, while the good files beside it
were read; `read`, for some damage does no harm. Anything else is a finding: a traceback, an error without
words, more than `SECONDS` of processor, more than `MEMORY` of address space. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.fuzz_layouts import fuzz_layouts
from benchmarks.fuzz_targets import Target, UnclearMessageError, targets
from benchmarks.recording import commit, machine, write_result
from factorkit.utils.errors import FactorkitError

RESULTS = Path(__file__).with_name("results") / "fuzz.json"
SECONDS = 10  # of processor for one input
MEMORY = 3 * 2**30  # bytes of address space beyond what there was before the first one
SILENCE = 300  # seconds after which a deadlock is taken for granted
FINE = ("refused", "skipped", "read")


class Hang(BaseException):
    """An input took too long."""


class Verdict(NamedTuple):
    """The outcome of input ``number``."""

    number: int
    kind: str
    outcome: str  #: one of FINE, or "bug", "hang", "memory", "unclear"
    message: str  #: the message, or the traceback of a finding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=None)
    parser.add_argument("--only", type=int, default=None, metavar="NUMBER")
    parser.add_argument("--layouts", type=int, default=0, metavar="COUNT")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.layouts:
        sys.exit(fuzz_layouts(args.layouts, args.seed))
    numbers = range(args.count) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory() as folder:
        verdicts = []
        for verdict in fuzz(numbers, args.seed, Path(folder), args.kinds):
            verdicts.append(verdict)
            if verdict.outcome not in FINE:
                print(f"input {verdict.number} ({verdict.kind}): {verdict.outcome}\n{verdict.message}\n", flush=True)
            elif args.only is not None:
                print(f"{verdict.outcome}: {verdict.message}")
    record = counts(verdicts) | {"seed": args.seed, "peak_resident_mib": round(peak_mib())}
    print(table(record))
    if args.only is None and args.kinds is None:
        name = f"{args.count} inputs, seed {args.seed}"
        write_result(RESULTS, name, record | {"machine": machine(threads=1), "commit": commit()})
    sys.exit(any(verdict.outcome not in FINE for verdict in verdicts))


def fuzz(numbers: Sequence[int], seed: int, folder: Path, kinds: Sequence[str] | None = None) -> Iterator[Verdict]:
    """The verdict on each input; ``folder`` is scratch space, and so is the working directory meanwhile."""
    with _inside(folder):
        chosen = [t for t in targets(folder / "good") if kinds is None or t.name in kinds]
        with _limited():
            for number in numbers:
                target, place = chosen[number % len(chosen)], folder / "input"
                place.mkdir()
                rng = np.random.default_rng([seed, number])
                os.environ["FACTORKIT_CACHE"] = str(place / "cache")
                target.make(place, rng)
                yield Verdict(number, target.name, *judge(target, place, rng))
                shutil.rmtree(place)


def judge(target: Target, place: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Return the outcome and the message of reading an input."""
    with _clock(), warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", UserWarning)
        try:
            outcome = target.feed(place, rng)
        except FactorkitError as error:
            return ("refused", str(error)) if str(error).strip() else ("unclear", "an error without a word")
        except UnclearMessageError as error:
            return "unclear", str(error)
        except Hang:
            return "hang", traceback.format_exc()
        except MemoryError:
            return "memory", traceback.format_exc()
        except Exception:
            return "bug", traceback.format_exc()
    messages = [str(note.message) for note in noted if issubclass(note.category, UserWarning)]
    if outcome is not None:
        return outcome
    return ("skipped", "; ".join(messages)) if messages else ("read", "")


@contextlib.contextmanager
def _clock() -> Iterator[None]:
    """Raise Hang after SECONDS of processor; end the process, with every thread's stack, where nothing moves at all."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(SILENCE, exit=True)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """No more than MEMORY beyond what the process has mapped now."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:  # contextlib.chdir is of Python 3.11 and later
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def counts(verdicts: Sequence[Verdict]) -> dict:
    by_kind: dict[str, collections.Counter] = {}
    for verdict in verdicts:
        by_kind.setdefault(verdict.kind, collections.Counter())[verdict.outcome] += 1
    total = sum(by_kind.values(), collections.Counter())
    return {"inputs": len(verdicts), "total": dict(total), "kinds": {k: dict(v) for k, v in sorted(by_kind.items())}}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(record: dict) -> str:
    outcomes = [*FINE, *sorted(set(record["total"]) - set(FINE))]
    lines = [f"{'':<14}" + "".join(f"{name:>9}" for name in outcomes)]
    for kind, result in [*record["kinds"].items(), ("all", record["total"])]:
        lines.append(f"{kind:<14}" + "".join(f"{result.get(name, 0):>9}" for name in outcomes))
    return "\n".join([*lines, f"{record['inputs']} inputs, at most {record['peak_resident_mib']} MiB resident"])


if __name__ == "__main__":
    main()
