"""Peak memory of preparing a data set, for a few images and for many.

    python -m benchmarks.prepare            # runs, writes benchmarks/results/prepare.json, prints the table
    python -m benchmarks.prepare --show     # prints the table of the stored results

Generated images of 128 x 96 px, laid out as ImageNet is with 100 per class, are prepared at 64 px, each count in a
process of its own. Then links to images are listed and their time stamps read, the remaining cost of a prepared data
set. The table has the peak, and its growth over a process that has only imported everything.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.recording import commit, processor

RESULTS = Path(__file__).with_name("results") / "prepare.json"
PREPARED, LISTED = (2_000, 20_000), (20_000, 200_000)
PER_CLASS, RESOLUTION = 100, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], Path(args.child[1]))))
        return
    if not args.show:
        results = {f"prepare {count}": measure("prepare", count) for count in PREPARED}
        results |= {f"list {count}": measure("list", count) for count in LISTED}
        results["machine"] = {"processor": processor(), "logical_cores": os.cpu_count(), "commit": commit()}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


def measure(what: str, count: int) -> dict:
    """The record of one child process on `count` new images."""
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "imagenet", count, linked=what == "list")
        environment = {**os.environ, "FACTORKIT_CACHE": str(Path(folder) / "cache")}
        command = [sys.executable, "-m", "benchmarks.prepare", "--child", what, folder]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output)


def make(root: Path, count: int, linked: bool) -> None:
    """Images of smooth colours, or in each class one of them and links to it."""
    rng = np.random.default_rng(0)
    first = root
    for i in range(count):
        wnid = f"n{i // PER_CLASS:08d}"
        path = root / "train" / wnid / f"{wnid}_{i}.JPEG"
        if i % PER_CLASS == 0:
            path.parent.mkdir(parents=True)
        if linked and i % PER_CLASS:
            os.link(first, path)
        else:
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
            small.resize((128, 96)).save(path, quality=90)
            first = path


def child(what: str, folder: Path) -> dict:
    from factorkit.data import open_dataset, prepare

    before, start = peak(), time.perf_counter()
    dataset = open_dataset(folder / "imagenet")
    if what == "prepare":
        done = prepare(dataset.train, RESOLUTION, progress=False)
        assert isinstance(done.images, np.memmap) and len(done) == len(dataset.train)
        size = done.images.nbytes
    else:
        dataset.train.fingerprint()
        size = 0
    seconds = time.perf_counter() - start
    images = len(dataset.train)
    return {
        "images": images,
        "peak_mib": peak(),
        "growth_mib": peak() - before,
        "written_mib": size / 2**20,
        "seconds": round(seconds, 1),
    }


def peak() -> float:
    """The most memory this process ever held, in MiB."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def table(results: dict) -> str:
    lines = ["| | images | written, MiB | peak, MiB | growth, MiB | seconds |", "|---|---|---|---|---|---|"]
    for name, r in results.items():
        if name != "machine":
            lines.append(
                f"| {name.split()[0]} | {r['images']} | {r['written_mib']:.0f} | {r['peak_mib']:.0f} | "
                f"{r['growth_mib']:.0f} | {r['seconds']:.0f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
