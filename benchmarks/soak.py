"""A long training: does its memory grow, are files left open?

    python -m benchmarks.soak                  # an hour of the demo's training; writes benchmarks/results/soak.json
    python -m benchmarks.soak --minutes 5

The training is the demo's own command with more steps than it will ever take, in a process of its own, with one thread;
this process looks at it through /proc and ends it by SIGTERM, as a scheduler would. The slope is a straight line
fitted by least squares to the resident memory after the second sample grid and report (and at least a tenth of the
time), until when libraries are imported and allocate what they keep. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.recording import commit, machine, write_result

RESULTS = Path(__file__).with_name("results") / "soak.json"
WARM_UP, GRIDS = 0.1, 2  # share of the time; number of sample grids
PATIENCE = 3600  # seconds for the last step, checkpoint and report, on a machine that may have better to do
KEPT = 60  # points of each curve that the result keeps
ENDED = 128 + signal.SIGTERM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("--model", choices=("segdiff", "nerfdiff"), default="segdiff")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = soak(args.model, args.minutes * 60, args.every, Path(folder))
    record |= {"machine": machine(threads=1), "commit": commit()}
    write_result(RESULTS, f"{args.model} {args.minutes:g} min", record)
    print(words(record))


def soak(model: str, seconds: float, every: float, folder: Path) -> dict:
    """Train for so long in `folder`, sampling its memory; return the summary."""
    command = [sys.executable, "-m", "factorkit", "train", model, "--preset", "demo", "--steps", "100000000"]
    command += ["--out", str(folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FACTORKIT_CACHE": str(folder / "cache")}
    samples: list[tuple[float, float, int]] = []
    with open(folder / "output.txt", "w") as log:
        start, began = time.monotonic(), time.time()
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        while process.poll() is None and (now := time.monotonic() - start) < seconds:
            samples.append((now, *look(process.pid)))
            time.sleep(every)
        used = processor_seconds(process.pid) if process.poll() is None else 0.0
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=PATIENCE)
    if code != ENDED:
        raise SystemExit(f"the training ended with {code}:\n{(folder / 'output.txt').read_text()[-2000:]}")
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    grids = [line["time"] - began for line in lines if line["event"] == "alarms"]
    settled = max([WARM_UP * seconds, *grids[GRIDS - 1 : GRIDS]])
    result = summary(samples, seconds, settled) | {"sample_grids": len(grids)}
    return result | {"steps": max(line["step"] for line in lines), "processor_seconds": round(used), "exit_code": code}


def look(pid: int) -> tuple[float, int]:
    """Resident memory in MiB, and how many files a process holds open."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def processor_seconds(pid: int) -> float:
    """Processor time that a process took so far, all threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(samples: list[tuple[float, float, int]], seconds: float, since: float) -> dict:
    """Slopes and extremes of (seconds, MiB, files) from `since` on; and thinned curves of everything."""
    settled = [point for point in samples if point[0] >= since]
    hours, memory, files = [t / 3600 for t, _, _ in settled], [m for _, m, _ in settled], [f for _, _, f in settled]
    quarter = max(1, len(settled) // 4)
    thin = samples[:: max(1, len(samples) // KEPT)]
    return {
        "seconds": seconds,
        "looks": len(samples),
        "settled_after": round(since),
        "settled_looks": len(settled),
        "memory_slope_mib_per_hour": round(statistics.linear_regression(hours, memory).slope, 2),
        "memory_mib": {
            "least": round(min(memory), 1),
            "most": round(max(memory), 1),
            "median_first_quarter": round(statistics.median(memory[:quarter]), 1),
            "median_last_quarter": round(statistics.median(memory[-quarter:]), 1),
        },
        "files_slope_per_hour": round(statistics.linear_regression(hours, files).slope, 3),
        "files": {"least": min(files), "most": max(files), "first": files[0], "last": files[-1]},
        "curve": [[round(t), round(m, 1), f] for t, m, f in thin],
    }


def words(record: dict) -> str:
    memory, files = record["memory_mib"], record["files"]
    return "\n".join(
        [
            f"{record['seconds'] / 60:g} minutes, {record['steps']} steps, {record['sample_grids']} sample grids; "
            f"{record['settled_looks']} of {record['looks']} looks are after second {record['settled_after']}",
            f"resident memory   {memory['least']} to {memory['most']} MiB, slope {record['memory_slope_mib_per_hour']} "
            f"MiB/h (median of the first quarter {memory['median_first_quarter']}, of the last "
            f"{memory['median_last_quarter']})",
            f"open files        {files['least']} to {files['most']}, slope {record['files_slope_per_hour']} an hour",
        ]
    )


if __name__ == "__main__":
    main()
