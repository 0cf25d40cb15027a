"""Generate, evaluate, segment and render in one process and in three, joined by gloo as torchrun would. For
test_processes.py.

python process_commands.py FOLDER leaves FOLDER/1 and FOLDER/3 with what each command wrote, and <command>.<process>.txt
with
what each process printed; in FOLDER/lost is what two processes left of which one could not write.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
from PIL import Image

from benchmarks import tiny_runs
from factorkit.cli.main import main as command_line
from factorkit.data import make_procedural_views
from factorkit.utils.output_record import OutputRecord
from tests.engine.processes import leave_out_most, run

IMAGE_FOLDER = 7


def prepare(folder: Path) -> None:
    """A run of each model, and images: one of them broken, some of another size, masks for the rest."""
    tiny_runs.train("segdiff", folder / "segdiff", steps=2)
    tiny_runs.disable_previews()
    views = make_procedural_views(12, 8, seed=1)
    few = {"search_steps": 4, "field_steps": 2, "steps": 2}
    tiny_runs.train_nerfdiff(views.select(slice(0, 8)), out=folder / "nerfdiff", **tiny_runs.NERFDIFF | few)
    noise = np.random.default_rng(1)
    for kind in ("images", "scored", "masks"):
        (folder / kind).mkdir()
    for i in range(IMAGE_FOLDER):
        size = (16, 24 if i % 3 else 16)
        Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(noise.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"scored/{i}.png")
        Image.fromarray(noise.integers(0, 2, (16, 16), np.uint8) * 255).save(folder / f"masks/{i}.png")
    (folder / "images/3.png").write_bytes(b"no image")


def commands(folder: Path, out: Path) -> dict[str, list[str]]:
    segdiff, nerfdiff = str(folder / "segdiff"), str(folder / "nerfdiff")
    return {
        # more than are drawn at once, and with noise at every step
        "generate": ["generate", segdiff, "-n", "67", "--sampler", "ddpm", "--steps", "3", "--trajectory"],
        "few": ["generate", segdiff, "-n", "2", "--steps", "2"],
        "evaluate": [
            "evaluate",
            segdiff,
            "--images",
            str(folder / "scored"),
            "--masks",
            str(folder / "masks"),
            "--num-fit-images",
            "2",
            "--baselines",
        ],
        "segment": ["segment", segdiff, str(folder / "images"), "--formats", "labels", "masks", "coco"],
        "again": ["segment", segdiff, str(folder / "images"), "--formats", "labels", "masks", "coco"],
        "render": ["render", nerfdiff, "--frames", "4", "--size", "12"],
        "sample": ["sample", nerfdiff, "-n", "5", "--steps", "3", "--trajectory"],
        "pose": ["pose", nerfdiff, str(folder / "scored"), "--refine", "2"],
    }


def run_command(arguments: list[str], printed: Path) -> None:
    """Run a command line and write its output to a file."""
    with open(printed, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(sys.stderr):
        code = command_line([*arguments, "--device", "cpu", "--json"])
    if code:
        raise SystemExit(code)


def work(folder: Path, out: Path, rank: int) -> None:
    for name, arguments in commands(folder, out).items():
        where = {"again": "segment", "pose": "pose.json"}.get(name, name)
        place = [] if name == "evaluate" else ["--out", str(out / where)]
        run_command(arguments + place, out / f"{name}.{rank}.txt")


def full(folder: Path, rank: int) -> None:
    """The disk is full for one process alone."""

    def write(*arguments, **options):
        raise OSError(28, "No space left on device", "here")

    if rank == 1:
        OutputRecord.write = write
    run_command(
        ["segment", str(folder / "segdiff"), str(folder / "images"), "--out", str(folder / "lost")],
        folder / f"lost.{rank}.txt",
    )


def main(folder: Path) -> None:
    leave_out_most()
    assert run(1, lambda rank: prepare(folder)) == [0]
    for world in (1, 3):
        out = folder / str(world)
        out.mkdir()
        codes = run(world, lambda rank, out=out: work(folder, out, rank))
        assert codes == [0] * world, (world, codes)
    codes = run(2, lambda rank: full(folder, rank))
    assert codes == [1, 1], codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
