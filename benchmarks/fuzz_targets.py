"""The fuzzed kinds of input: how a malformed one is made, and the code that reads it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.fuzz_files import encoded, labelled, mask_values, pixels, small
from benchmarks.fuzz_runs import good_runs
from benchmarks.malformed import (
    Rng,
    damage,
    damage_json,
    damage_npy,
    damage_npz,
    damage_tree,
    damage_words,
    mend_png,
    pick,
)
from factorkit.cli import main as cli
from factorkit.data import open_views, read_classes
from factorkit.data.datasets import open_dataset
from factorkit.engine.checkpoint import read_checkpoint, write_checkpoint
from factorkit.rendering import orbit
from factorkit.segdiff.verdict import write_report

Outcome = tuple[str, str] | None  # outcome and message, where the reader returns them itself
GOOD = "a_good.png"  # beside a malformed image
FORMATS = (
    ("png", "RGB"),
    ("png", "P"),
    ("png", "I;16"),
    ("png", "RGBA"),
    ("png", "1"),
    ("jpg", "RGB"),
    ("jpg", "L"),
    ("jpg", "CMYK"),
    ("gif", "P"),
    ("bmp", "RGB"),
    ("bmp", "P"),
    ("tif", "RGB"),
    ("tif", "F"),
    ("tif", "I;16"),
    ("webp", "RGBA"),
    ("tga", "RGB"),
    ("ppm", "RGB"),
    ("jp2", "RGB"),
)
MASKS = (("png", "L"), ("png", "P"), ("png", "1"), ("png", "I;16"), ("gif", "P"), ("bmp", "L"), ("jpg", "L"))
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 20\nshowpage\n"
FOREIGN = (POSTSCRIPT, b"<svg/>", b"\x7fELF", b"", b"MZ", b"%PDF-1.7")


class UnclearMessageError(Exception):
    """An error message that does not name what is wrong, or names it twice."""


class Target(NamedTuple):
    """A kind of input.

    Attributes:
        name: of the kind.
        make: lays a malformed input into a folder.
        feed: reads that folder. Returns outcome and message, or None where warnings and exceptions give them.
    """

    name: str
    make: Callable[[Path, Rng], None]
    feed: Callable[[Path, Rng], Outcome]


def targets(folder: Path) -> list[Target]:
    """Every kind; good runs, which some of them need, are trained into ``folder`` first."""
    runs = good_runs(folder)
    segdiff, nerfdiff = runs["segdiff"], runs["nerfdiff"]
    weights = segdiff.parent / "segdiff.safetensors"

    def image(place: Path, rng: Rng) -> Outcome:
        way = rng.random()
        if way < 0.6:
            return command("prepare", place / "in", "--resolution", 8)
        if way < 0.85:
            return command("segment", weights, place / "in", "--out", place / "out")
        open_views(place / "in", resolution=8)
        return None

    def mask(place: Path, rng: Rng) -> Outcome:
        return command(
            "evaluate", weights, "--images", place / "in/images", "--masks", place / "in/masks", "--num-fit-images", 1
        )

    def archive(place: Path, rng: Rng) -> Outcome:
        return command("prepare", place / "x.zip", "--resolution", 8)

    def array(place: Path, rng: Rng) -> Outcome:
        return command("prepare", next(place.glob("x.np?")), "--resolution", 8)

    def shards(place: Path, rng: Rng) -> Outcome:
        dataset = open_dataset(place / "in")
        for i in range(len(dataset.train)):
            dataset.train.read(i)
        return None

    def views(place: Path, rng: Rng) -> Outcome:
        open_views(place / "in" if (place / "in").exists() else place / "x.npz", pick(rng, (None, "train")), 8)
        return None

    def classes(place: Path, rng: Rng) -> Outcome:
        read_classes(next(place.glob("x.*")), [f"{i}.png" for i in range(6)])
        return None

    def run(place: Path, rng: Rng) -> Outcome:
        if not (place / "run/views.npz").exists():
            return command("segment", place / "run", place / GOOD, "--out", place / "out")
        if rng.random() < 0.5:
            return command("render", place / "run", "--frames", 2, "--out", place / "out.gif")
        return command("export", place / "run", place / "out/transforms.json")

    def report_from_files(place: Path, rng: Rng) -> Outcome:
        if rng.random() < 0.7:
            write_report(place / "run")
            return None
        images, masks = place / "in/images", place / "in/masks"
        return command("evaluate", place / "run", "--images", images, "--masks", masks, "--num-fit-images", 1)

    def words(place: Path, rng: Rng) -> Outcome:
        result = damage_words(pick(rng, command_lines(weights, nerfdiff, place)), rng)
        if result and result[0] in ("demo", "train", "view", "reproduce"):  # too long, or for ever
            cli.parse(result[0], result[1:])
            return None
        return command(*result)

    def run_with(name: str, change: Callable[[Path, Rng], None]) -> Callable[[Path, Rng], None]:
        def make(place: Path, rng: Rng) -> None:
            shutil.copytree(runs[name], place / "run")
            small(place / GOOD)
            change(place / "run", rng)

        return make

    def report_files(place: Path, rng: Rng) -> None:
        run_with("segdiff", change_notes)(place, rng)
        labelled(place / "in", 3)

    return [
        Target("image", make_image, image),
        Target("mask", make_mask, mask),
        Target("zip", make_zip, archive),
        Target("array", make_array, array),
        Target("tar", make_tar, shards),
        Target("transforms", make_transforms, views),
        Target("llff", make_llff, views),
        Target("srn", make_srn, views),
        Target("posed npz", make_posed, views),
        Target("classes", make_classes, classes),
        Target("config", run_with("segdiff", change_config), run),
        Target("config 3d", run_with("nerfdiff", change_config), run),
        Target("weights", run_with("segdiff", change_weights), run),
        Target("weights 3d", run_with("nerfdiff", change_weights), run),
        Target("views.npz", run_with("nerfdiff", change_views), run),
        Target("run's notes", report_files, report_from_files),
        Target("command line", lambda place, rng: labelled(place / "in", 2), words),
    ]


def command(*words: object) -> tuple[str, str]:
    """Run a command line; return its outcome and its message.

    Raises:
        UnclearMessageError: an exit code without one line of `error:`, or the other way round.
    """
    out, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(stderr):
        code = cli.main([str(word) for word in words])
    text = stderr.getvalue()
    errors = text.split("error: ")[1:] if code or text.startswith("error: ") else []
    silent = len(errors) != (code != 0) or any(len(error) < 15 for error in errors)
    has_traceback = "Traceback" in text and "--debug" not in words  # which asks for it
    if silent or code not in (0, 1, 2) or has_traceback:
        raise UnclearMessageError(f"exit code {code} of {words}:\n{text}")
    return ("refused" if code else "skipped" if "warning: " in text else "read"), text


def command_lines(weights: Path, nerfdiff: Path, place: Path) -> list[list[str]]:
    """Lines that work."""
    run, scene, out = str(weights), str(nerfdiff), str(place / "out")
    images, masks = str(place / "in/images"), str(place / "in/masks")
    first = f"{images}/0.png"
    return [
        ["segment", run, images, "--out", out, "-t", "40", "--size", "16"],
        ["prepare", images, "--resolution", "8"],
        ["generate", run, "-n", "1", "--steps", "2", "--seed", "1", "--out", out],
        ["evaluate", run, "--images", images, "--masks", masks, "--num-fit-images", "1", "--ignore", "7", "--t", "3"],
        ["recompose", run, first, "--region", "1", "--steps", "2", "--out", out, "--from", first],
        ["interpolate", run, first, first, "--frames", "3", "--steps", "2", "--out", out],
        ["doctor", "--json"],
        ["branches", run, first, "--out", out, "-t", "10"],
        ["pose", scene, first, "--refine", "1", "--json"],
        ["render", scene, "--frames", "2", "--size", "8", "--out", f"{out}.gif"],
        ["sample", scene, "-n", "1", "--steps", "2", "--out", out],
        ["export", scene, f"{out}.ply"],
        ["train", "segdiff", "--data", images, "--preset", "demo", "--steps", "3", "--distil-steps", "2"],
        ["train", "nerfdiff", "--data", images, "--preset", "fast", "--field", "grid"],
        ["demo", "--seed", "1"],
        ["evaluate", scene, "--views", images],
        ["reconstruct", scene, first, "--out", out, "--size", "8"],
    ]


# --- malformed ones ---


def make_image(place: Path, rng: Rng) -> None:
    small(place / "in" / GOOD)
    bad_image(place / "in", rng)


def bad_image(
    folder: Path,
    rng: Rng,
    name: str = "bad",
    formats: Sequence[tuple[str, str]] = FORMATS,
    values: np.ndarray | None = None,
) -> None:
    suffix, mode = pick(rng, formats)
    values = pixels() if values is None else values
    data = pick(rng, FOREIGN) if rng.random() < 0.05 else damage(encoded(suffix, mode, values), rng)
    if suffix == "png" and rng.random() < 0.5:
        data = mend_png(data)
    if rng.random() < 0.1:
        suffix = pick(rng, FORMATS)[0]
    (folder / f"{name}.{suffix}").write_bytes(data)


def make_mask(place: Path, rng: Rng) -> None:
    labelled(place / "in", 3)
    (place / "in/masks/1.png").unlink()
    bad_image(place / "in/masks", rng, "1", MASKS, mask_values(1))


def make_zip(place: Path, rng: Rng) -> None:
    labelled(place / "in", 4)
    masked = rng.random() < 0.7
    method = pick(rng, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(place / "x.zip", "w", method) as archive:
        for path in sorted((place / "in").rglob("*.png")):
            if path.parent.name == "images" or (masked and path.stem in "01"):
                archive.write(path, path.relative_to(place / "in").as_posix())
        archive.writestr("near_duplicates.txt", pick(rng, ("0 1\n", "0\n", "a b c\n", "\xff")))
    (place / "x.zip").write_bytes(damage((place / "x.zip").read_bytes(), rng))


def make_array(place: Path, rng: Rng) -> None:
    images = np.stack([pixels(i) for i in range(3)])
    if rng.random() < 0.5:
        (place / "x.npy").write_bytes(damage_npy(images, rng))
    else:
        (place / "x.npz").write_bytes(damage_npz({"images": images, "names": np.array(list("abc"))}, rng))


def make_tar(place: Path, rng: Rng) -> None:
    (place / "in").mkdir()
    with tarfile.open(place / "in/set-train-0000.tar", "w") as archive:
        for i in range(3):
            for suffix, data in (("png", encoded("png", "RGB", pixels())), ("cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    path = place / "in/set-train-0000.tar"
    path.write_bytes(damage(path.read_bytes(), rng))


def make_transforms(place: Path, rng: Rng) -> None:
    names = [small(place / "in/images" / f"{i}.png", i).name for i in range(3)]
    content = {
        "camera_model": "OPENCV",
        "fl_x": 30.0,
        "fl_y": 30.0,
        "cx": 12.0,
        "cy": 10.0,
        "w": 24,
        "h": 20,
        "k1": 0.01,
        "frames": [
            {"file_path": f"images/{name}", "transform_matrix": pose.tolist()}
            for name, pose in zip(names, orbit(3, 4.0, 30.0), strict=True)
        ],
        "train_filenames": [f"images/{name}" for name in names],
    }
    if rng.random() < 0.3:
        content = {"camera_angle_x": 0.7, "frames": content["frames"]}
    name = pick(rng, ("transforms.json", "transforms_train.json"))
    (place / "in" / name).write_bytes(damage_json(content, rng))


def make_llff(place: Path, rng: Rng) -> None:
    for i in range(4):
        small(place / "in/images" / f"{i}.png", i)
    rows = np.zeros((4, 17))
    rows[:, :15] = np.array([[0, 1, 0, 0, 20], [-1, 0, 0, 0, 24], [0, 0, 1, 0, 30]]).reshape(-1)
    rows[:, 3] = np.arange(4) * 0.1
    rows[:, 15:] = (1.0, 9.0)
    (place / "in/poses_bounds.npy").write_bytes(damage_npy(rows, rng))


def make_srn(place: Path, rng: Rng) -> None:
    folder = place / "in"
    opencv = orbit(3, 2.0, 30.0).numpy() @ np.diag([1.0, -1.0, -1.0, 1.0])
    for i, pose in enumerate(opencv.tolist()):
        small(folder / "rgb" / f"{i:06d}.png", i)
        (folder / "pose").mkdir(exist_ok=True)
        (folder / "pose" / f"{i:06d}.txt").write_text(" ".join(str(x) for row in pose for x in row))
    (folder / "intrinsics.txt").write_text("30 12 10 0.\n0. 0. 0.\n1.\n20 24\n")
    path = pick(rng, (folder / "intrinsics.txt", folder / "pose/000001.txt"))
    result = path.read_text().split(" ")
    if rng.random() < 0.6:
        at = int(rng.integers(len(result)))
        result[at] = pick(rng, (result[at], "nan", "inf", "0", "-1", "1e400", "x", "", "\n", "1_0", "٣"))
        path.write_text(" ".join(result))
    else:
        path.write_bytes(damage(path.read_bytes(), rng))


def make_posed(place: Path, rng: Rng) -> None:
    arrays = {
        "images": np.stack([pixels(i) for i in range(4)]),
        "poses": orbit(4, 4.0, 30.0).numpy(),
        "focal": np.array(30.0),
        "names": np.array(list("abcd")),
    }
    (place / "x.npz").write_bytes(damage_npz(arrays, rng))


def make_classes(place: Path, rng: Rng) -> None:
    words = {f"{i}.png": "ab"[i % 2] for i in range(6)}
    suffix = pick(rng, ("csv", "tsv", "json"))
    if suffix == "json":
        data = damage_json(words, rng)
    else:
        between = "," if suffix == "csv" else "\t"
        text = f"name{between}class\n" + "".join(f"{name}{between}{word}\n" for name, word in words.items())
        data = pick(rng, (damage(text.encode(), rng), b'"' * 10_001, b"a," * 70_000 + b"\n", b"x" * 200_000 + b",1\n"))
    (place / f"x.{suffix}").write_bytes(data)


def change_config(run: Path, rng: Rng) -> None:
    path = run / "config.json"
    path.write_bytes(damage_json(json.loads(path.read_text()), rng))


def change_weights(run: Path, rng: Rng) -> None:
    """Damaged bytes, or settings within the file that somebody chose, under a checksum that is right."""
    newest = max((run / "checkpoints").glob("*.safetensors"))
    for path in (run / "checkpoints").glob("*.safetensors"):
        if path != newest:
            path.unlink()
    if rng.random() < 0.4:
        newest.write_bytes(damage(newest.read_bytes(), rng))
        return
    tensors, meta = read_checkpoint(newest)
    if rng.random() < 0.3:
        name = pick(rng, sorted(tensors))
        tensors[name] = pick(rng, (tensors[name].reshape(-1), tensors[name].double(), tensors[name][..., None]))
    else:
        meta = damage_tree(meta, rng)
        meta = meta if isinstance(meta, dict) else {"model": meta}
    write_checkpoint(newest, tensors, meta)


def change_views(run: Path, rng: Rng) -> None:
    with np.load(run / "views.npz", allow_pickle=False) as result:
        arrays = dict(result)
    (run / "views.npz").write_bytes(damage_npz(arrays, rng))


def change_notes(run: Path, rng: Rng) -> None:
    """Damage one of the files of which a report is made."""
    path = run / pick(rng, ("scores.json", "log.jsonl", "log.jsonl", "checkpoints/best.json", "samples", "config.json"))
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        changed = [damage_json(line, rng) if rng.random() < 0.3 else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"\n".join(changed))
    elif path.name == "samples":
        image_grid = pick(rng, sorted(path.glob("*.png")))
        image_grid.write_bytes(damage(image_grid.read_bytes(), rng))
    else:
        tree = json.loads(path.read_text()) if path.exists() else {"step": 2, "error": 0.5}
        path.write_bytes(damage_json(tree, rng))
