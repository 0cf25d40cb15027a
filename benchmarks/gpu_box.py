"""Everything that a machine with a GPU can prove, in one command of less than 9 minutes; docs/gpu.md explains it.

    python -m benchmarks.gpu_box                  # or `make gpu`
    python -m benchmarks.gpu_box --out FOLDER     # a copy of the results, and the log of each stage
    python -m benchmarks.gpu_box --sanitize       # compute-sanitizer over the CUDA ops, or `make gpu-sanitize`
    python -m benchmarks.gpu_box --show           # prints the tables of what was measured before

Each stage (benchmarks/gpu_stages.py) is a process with a time limit of its own. Its result is written to
benchmarks/results/gpu.json as soon as it ends, whatever comes after. A stage that fails does not stop the next. The
same command again repeats only the stages that have not passed with these sources on this device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu_stages import SANITIZER_STAGES, Stage, gpu_stages
from benchmarks.gpu_table import tables
from benchmarks.recording import commit, read_results, write_result

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results") / "gpu.json"
TAIL_CHARACTERS = 3000  # of a stage's output, kept in the results
SOURCES = ("benchmarks/*.py", "csrc/*", "factorkit/**/*.py", "kernels/*.py", "tests/**/*.py", "setup.py")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the stages out where there is no GPU")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / "gpu", help="folder for logs and a copy of the results"
    )
    parser.add_argument("--preset", help="of the segdiff steps and ops; flowers64 on a GPU, demo on a CPU")
    parser.add_argument("--batch", type=int, help="images a step; the preset's, or half of it below 100 GB")
    parser.add_argument("--lego", type=Path, help="NeRF's synthetic Lego; the procedural scene where it is not found")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages")
    parser.add_argument("--again", action="store_true", help="repeat stages that have passed")
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer over the CUDA ops instead")
    parser.add_argument("--show", action="store_true", help="run nothing")
    args = parser.parse_args(words)
    failed = 0
    if not args.show:
        stages = (
            SANITIZER_STAGES if args.sanitize else gpu_stages(args.device, args.preset, args.batch, find_lego(args))
        )
        if unknown := set(args.only or ()) - {stage.name for stage in stages}:
            parser.error(f"--only {min(unknown)}: no such stage; choose from {', '.join(s.name for s in stages)}")
        stages = [stage for stage in stages if not args.only or stage.name in args.only]
        failed = run_stages(stages, describe_machine(args.device), RESULTS, args.out, again=args.again)
    print(tables(read_results(RESULTS)))
    return int(failed > 0)


def run_stages(
    stages: Sequence[Stage], machine: dict[str, str], results: Path, out: Path, *, again: bool = False
) -> int:
    """Run the stages in order, store each result at once, and return how many did not pass.

    Args:
        stages: to run.
        machine: "device", "commit" and "sources"; results of another device or other sources are kept apart.
        results: JSON, an object of records by device and sources.
        out: receives a copy of ``results`` and the output of each stage.
        again: whether stages that have passed are repeated.
    """
    out.mkdir(parents=True, exist_ok=True)
    set_aside_if_damaged(results)
    key = f"{machine['device']}, sources {machine['sources']}"
    record = read_results(results).get(key, {"machine": machine, "stages": {}})
    for stage in stages:
        before = record["stages"].get(stage.name, {})
        if before.get("status") == "passed" and not again:
            print(f"{stage.name}: passed before", flush=True)
            continue
        print(f"{stage.name} (at most {stage.limit_s} s) ...", end=" ", flush=True)
        record["stages"][stage.name] = result = run_stage(stage, out)
        print(f"{result['status']} after {result['seconds']} s", flush=True)
        write_result(results, key, record)
        shutil.copyfile(results, out / results.name)
    return sum(record["stages"][stage.name]["status"] != "passed" for stage in stages)


def run_stage(stage: Stage, out: Path) -> dict[str, object]:
    """Run one stage as a process group, which ends at the limit, and return its record."""
    output, log = out / f"{stage.name}.jsonl", out / f"{stage.name}.log"
    output.unlink(missing_ok=True)
    places = {"{python}": sys.executable, "{output}": str(output.resolve())}
    command = [places.get(word, word) for word in stage.command]
    start, status = time.monotonic(), ""
    with open(log, "wb") as file:
        try:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment},
                start_new_session=True,
            )
        except OSError as error:
            status = f"failed: {error}"
        else:
            try:
                code = process.wait(timeout=stage.limit_s)
                status = "passed" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                status = f"stopped at its limit of {stage.limit_s} s"
            finally:
                end_group(process)
    return {
        "started": round(time.time() - (time.monotonic() - start)),
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "rows": read_rows(output),
        "output_tail": log.read_text(errors="replace")[-TAIL_CHARACTERS:],
    }


def end_group(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_rows(path: Path) -> list[dict[str, object]]:
    """Return what a stage wrote, one JSON object a line; a last line that a kill cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def set_aside_if_damaged(results: Path) -> None:
    """Rename a results file that is not JSON, so that nothing in it is lost."""
    try:
        read_results(results)
    except ValueError:
        aside = results.with_suffix(".damaged.json")
        results.replace(aside)
        print(f"{results} is not JSON; it was renamed to {aside} and a new file is begun", flush=True)


def describe_machine(device: str) -> dict[str, str]:
    """Return the device's name, the commit, and a digest of the sources, which need no git."""
    import torch

    from benchmarks.recording import processor

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; --device cpu tries the stages out without one")
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    return {"device": name, "commit": commit(), "sources": digest.hexdigest()[:10], "versions": versions}


def find_lego(args: argparse.Namespace) -> Path | None:
    """Return the folder of NeRF's synthetic Lego: ``--lego``, or a folder of data in or beside the repository."""
    if args.lego is not None:
        return args.lego
    places = [ROOT / "shared/data/nerf_lego_200", ROOT.parent / "shared/data/nerf_lego_200"]
    return next((place for place in places if place.is_dir()), None)


if __name__ == "__main__":
    sys.exit(main())
