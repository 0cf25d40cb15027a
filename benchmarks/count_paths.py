"""How many files must a reader open to follow one thing through the code?

    python -m benchmarks.count_paths [--list]

Each path runs in a process of its own under ``sys.setprofile``. A file of ``factorkit/`` or ``kernels/`` counts if one
of its functions runs; module bodies and functions that run during an import do not count. The paths:

- segment: ``factorkit segment RUN photo.png``, up to the label PNG
- train-segdiff, train-nerfdiff: the training function, up to the first ``optimizer.step()``
- op: ``group_norm_silu``, forward and backward, on its Triton kernels (interpreted on the CPU)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import factorkit

ROOT = Path(factorkit.__file__).resolve().parents[1]
PACKAGES = (str(ROOT / "factorkit") + os.sep, str(ROOT / "kernels") + os.sep)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", choices=PATHS, help="only this one, in this process")
    parser.add_argument("--list", action="store_true", help="print the files too")
    args = parser.parse_args()
    if args.path is None:
        options = ["--list"] if args.list else []
        for name in PATHS:
            command = [sys.executable, "-m", "benchmarks.count_paths", name, *options]
            subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FACTORKIT_CACHE"] = folder
        files = record_files(PATHS[args.path](Path(folder)))
    lines = {file: len(Path(file).read_text(encoding="utf-8").splitlines()) for file in files}
    print(f"{args.path}: {len(files)} files, {sum(lines.values())} lines", flush=True)
    if args.list:
        print(
            "".join(f"  {count:5d} {Path(file).relative_to(ROOT)}\n" for file, count in sorted(lines.items())),
            flush=True,
        )


def record_files(function: Callable[[], object]) -> set[str]:
    """Return the package's files of which a function runs during the call, in any thread."""
    files: set[str] = set()

    def profile(frame, event, argument) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file not in files and file.startswith(PACKAGES) and not is_importing(frame):
            files.add(file)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return files


def is_importing(frame) -> bool:
    """Return whether the frame is a module's body, or runs because one is imported."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(PACKAGES):
            return True
        if "importlib._bootstrap" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class FirstStepError(Exception):
    """Raised in place of the first step of the optimizer."""


def until_first_step(train: Callable[[], object]) -> Callable[[], None]:
    def step(*args, **kwargs):
        sys.setprofile(None)
        threading.setprofile(None)
        raise FirstStepError

    def run() -> None:
        torch.optim.Adam.step = step
        try:
            train()
        except FirstStepError:
            return
        raise RuntimeError("the training ended without a step of Adam")

    return run


def noise_images(folder: Path) -> Path:
    """Write three small PNG files."""
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


SETTINGS = {"preset": "demo", "device": "cpu", "progress": False}


def segment(folder: Path) -> Callable[[], object]:
    from factorkit.cli.main import main as cli

    images = noise_images(folder / "images")
    settings = SETTINGS | {"steps": 2, "batch_size": 2, "sample_every": 0}
    factorkit.train_segdiff(images, out=folder / "run", **settings)
    words = ["segment", str(folder / "run"), str(images / "0.png"), "--out", str(folder / "out"), "--formats", "labels"]
    return lambda: cli(words)


def train_segdiff(folder: Path) -> Callable[[], object]:
    images = noise_images(folder / "images")
    return until_first_step(lambda: factorkit.train_segdiff(images, out=folder / "run", **SETTINGS))


def train_nerfdiff(folder: Path) -> Callable[[], object]:
    from factorkit.data.procedural.scene import make_procedural_views

    views = make_procedural_views(12, 16)
    return until_first_step(lambda: factorkit.train_nerfdiff(views, out=folder / "run", **SETTINGS))


def op(folder: Path) -> Callable[[], object]:
    from factorkit import ops
    from factorkit.ops import dispatch

    dispatch.run_triton_kernels_on("cpu")
    x, weight = torch.randn(2, 8, 4, 4, requires_grad=True), torch.ones(8, requires_grad=True)
    return lambda: ops.group_norm_silu(x, weight, weight, groups=2).sum().backward()


PATHS = {"segment": segment, "train-segdiff": train_segdiff, "train-nerfdiff": train_nerfdiff, "op": op}

if __name__ == "__main__":
    main()
