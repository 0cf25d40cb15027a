"""What the commands do: each function answers a `Result`, the files it wrote lie in the folder it was given."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from factorkit.command_words import duration, failures, load_run, saying_what_is_saved
from factorkit.data.datasets import open_dataset, procedural_dataset
from factorkit.data.images import BrokenImage
from factorkit.data.sources import FileSource, Source, open_source
from factorkit.engine.config import cpu_threads
from factorkit.engine.report import verdict, write_report
from factorkit.errors import DataError
from factorkit.flag_types import Result
from factorkit.metrics.baselines import BASELINES
from factorkit.segdiff import pictures
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.run import Generation, SegdiffRun
from factorkit.segdiff.train import estimate, load_data, train_segdiff

DEMO_MARK = 0.80  # IoU on the held-out procedural flowers
DEMO_SEGMENTED, DEMO_GENERATED = 8, 16
SHEET_IMAGES, SHEET_CELL = 32, 128  # on the contact sheet of segmented images: at most so many, of so many pixels
FRAMES, FRAME_SAMPLES = 10, 8  # of a trajectory: columns and samples shown
NAMED = 20  # skipped images named in a warning; the JSON result has them all
RESULT_NAME = re.compile(r"_(labels|overlay|recomposed|estimate|(mask|branch)_\d+)\.png$|^contact_sheet\.png$")


def train(
    data: Path | None, out: Path, preset: str | None, seeds: int, baselines: bool, changes: dict[str, Any]
) -> Result:
    """Train, or resume; see :func:`factorkit.train_segdiff`."""
    with saying_what_is_saved(out):
        run = train_segdiff(data, out=out, preset=preset, seeds=seeds, baselines=baselines, **changes)
    judged = verdict(run.folder)
    found = {
        "run": str(run.folder), "report": str(_report(run)), "steps": run.config.steps, "scores": run.scores,
        "failures": failures(run.folder), "verdict": judged.headline,
    }  # fmt: skip
    lines = [score_table(run.scores), ""] if run.scores else []
    lines += [f"{judged.headline}.", *judged.details, "", f"run     {run.folder}", f"report  {_report(run)}"]
    return found, "\n".join(lines)


def dry_run(data: Path | None, preset: str | None, seeds: int, changes: dict[str, Any]) -> Result:
    """What a training would take; a few steps are timed on noise, nothing is written."""
    found = {}
    if data is not None:
        dataset = open_dataset(data, holdout=changes["holdout"])
        found = {"images": len(dataset.train), "held_out": len(dataset.test_images or ())}
    found |= estimate(data, preset=preset, **changes)
    lines = [
        f"model   {found['parameters'] / 1e6:.2f} M parameters (preset {found['preset']})",
        f"memory  {found['memory_gib']:.2f} GiB with {found['trial_images']} images at once, on {found['device']}",
        f"speed   {found['images_per_second']:.1f} images/s",
        f"time    {duration(found['seconds'])} for {found['steps']} steps of {found['batch_size']} images",
    ]
    if seeds > 1:
        lines.append(f"        and up to half of that for each further one of the {seeds} heats")
    if data is not None:
        lines.append(f"data    {found['images']} images to train on, {found['held_out']} labelled ones held out")
    return found, "\n".join(lines)


def segment(run: Path, paths: Sequence[Path], out: Path, t: int | None, device: str) -> Result:
    """Label images, masks and overlays of every picture, and one contact sheet."""
    found = write_segments(load_run(run, device, "segdiff"), open_inputs(paths, out), out, t)
    skipped = f", {len(found['skipped'])} skipped" if found["skipped"] else ""
    return found, f"{found['segmented']} segmented{skipped}: {out}\ncontact sheet: {found['contact_sheet']}"


def generate(run: Path, out: Path, device: str, **options: Any) -> Result:
    """Generated images with labels and masks, and one contact sheet; options are those of ``SegdiffRun.generate``."""
    drawn = load_run(run, device, "segdiff").generate(**options, progress=True)
    found = write_generated(drawn, out)
    return found, f"{found['generated']} generated: {out}\ncontact sheet: {found['contact_sheet']}"


def evaluate(run: Path, images: Path, masks: Path, device: str, **options: Any) -> Result:
    """Scores; options are those of ``SegdiffRun.evaluate``."""
    model = load_run(run, device, "segdiff")
    scores = model.evaluate(images, masks, **options)
    if model.folder is not None:
        write_report(model.folder)
    return scores, score_table(scores)


def prepare(data: Path, resolution: int, holdout: str | int) -> Result:
    """Decode a data set into the cache, split as training will split it."""
    dataset, prepared, _ = load_data(data, SegdiffConfig(resolution=resolution, holdout=holdout), progress=True)
    held_out = len(dataset.test_images or ())
    where = str(prepared.path) if prepared.path else None
    found = {
        "path": where, "images": len(prepared), "held_out": held_out, "resolution": resolution,
        "skipped": dict(prepared.skipped),
    }  # fmt: skip
    lines = [
        f"{len(prepared)} images of {resolution} px to train on, {held_out} labelled ones held out",
        f"kept in {where}" if where else "used where they are: the array has this size already",
    ]
    return found, "\n".join(lines)


def demo(out: Path, seed: int) -> Result:
    """Train on the procedural flowers, segment held-out ones, generate, and judge the result."""
    start = time.perf_counter()
    with saying_what_is_saved(out):
        run = train_segdiff(out=out, preset="demo", seed=seed, baselines=True)
    flowers = procedural_dataset(run.config.resolution, train=1, test=DEMO_SEGMENTED).test_images
    with cpu_threads(run.config.threads):
        segmented = write_segments(run, flowers, out / "segmented", None)
        generated = write_generated(run.generate(DEMO_GENERATED, progress=True), out / "generated")
    scores, failed = run.scores, failures(out)
    if scores["iou"] < DEMO_MARK:
        failed = [f"IoU {scores['iou']:.3f} on held-out flowers, below the demo's mark of {DEMO_MARK:.2f}", *failed]
    found = {
        **{name: scores[name] for name in ("acc", "iou", "dice")}, "failures": failed, "seed": seed,
        "seconds": time.perf_counter() - start, "report": str(_report(run)), "scores": scores,
        "segmented": segmented["contact_sheet"], "generated": generated["contact_sheet"],
    }  # fmt: skip
    lines = [score_table(scores), ""]
    if failed:
        lines += ["This run FAILED:", *(f"  - {failure}" for failure in failed)]
        lines += [f"Another seed: factorkit demo --seed {seed + 1} --out {out}-{seed + 1}"]
        lines += ["Seeds that sort themselves out: factorkit train segdiff --preset demo --seeds 3 --out runs/heats"]
    else:
        lines += [f"It worked: IoU {scores['iou']:.3f}, at least {DEMO_MARK:.2f}, and no alarm went off."]
    lines += ["", f"time       {duration(found['seconds'])}"]
    lines += [f"{name:<9}  {found[name]}" for name in ("segmented", "generated", "report")]
    return found, "\n".join(lines)


# --- pictures in and out ---


def open_inputs(paths: Sequence[Path], out: Path) -> Source:
    """The images a user named, without what an earlier call wrote into ``out``.

    Raises:
        DataError: nothing there, or nothing but results.
    """
    source = open_source(paths[0] if len(paths) == 1 else list(paths))
    if not isinstance(source, FileSource) or not out.exists():
        return source
    written = out.resolve()
    fresh = [
        i for i, path in enumerate(source.paths)
        if not (RESULT_NAME.search(path.name) and written in path.resolve().parents)
    ]  # fmt: skip
    if not fresh:
        raise DataError(f"{out}: nothing but results of an earlier call to segment. Give the folder of photographs.")
    return source.subset(fresh)


def output_names(names: Sequence[str]) -> list[str]:
    """For each image the path its results begin with: its own without the suffix, made distinct where two are equal."""
    taken: set[str] = set()
    found = []
    for name in names:
        # a zip may name its members as it likes, the results stay below --out
        path = PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
        choices = (path.with_suffix("").as_posix(), path.as_posix(), *(f"{path}-{i}" for i in range(2, len(names) + 2)))
        chosen = next(choice for choice in choices if choice.casefold() not in taken)  # some disks fold case
        taken.add(chosen.casefold())
        found.append(chosen)
    return found


def write_segments(run: SegdiffRun, source: Source, out: Path, t: int | None) -> dict[str, Any]:
    """Segment picture by picture, so that memory does not grow with their number.

    Raises:
        DataError: none of the pictures can be decoded.
    """
    skipped: dict[str, str] = {}
    rows: list[list[np.ndarray]] = []
    captions: list[str] = []
    areas = np.zeros(run.config.regions)
    for i, name in enumerate(tqdm(output_names(source.names), desc="segmenting", unit="image")):
        try:
            picture = source.read(i)
        except BrokenImage as error:
            skipped[source.names[i]] = str(error).removeprefix(f"{source.names[i]}: ")
            continue
        masks = run.segment(picture, t=t).masks[0].numpy()
        labels = masks.argmax(0)
        areas += np.bincount(labels.ravel(), minlength=len(masks)) / labels.size
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_regions(path, labels, masks)
        Image.fromarray(pictures.overlay(np.asarray(picture), labels)).save(f"{path}_overlay.png")
        if len(rows) < SHEET_IMAGES:
            rows.append(_sheet_row(picture, masks))
            captions.append(PurePosixPath(source.names[i]).name[-24:])
    named = "; ".join(f"{name} ({reason})" for name, reason in list(skipped.items())[:NAMED])
    if not rows:
        raise DataError(f"none of {len(source)} images could be decoded: {named}. Check the files.")
    if skipped:
        more = f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else ""
        warnings.warn(f"{len(skipped)} of {len(source)} images could not be decoded: {named}{more}", stacklevel=2)
    colors = pictures.palette(len(areas))
    columns = ["image", "regions", *((f"mask {k}", colors[k]) for k in range(len(areas)))]
    sheet = out / "contact_sheet.png"
    pictures.contact_sheet(rows, columns, captions, cell=SHEET_CELL).save(sheet)
    segmented = len(source) - len(skipped)
    return {
        "out": str(out), "segmented": segmented, "skipped": skipped, "regions": len(areas),
        "areas": (areas / segmented).tolist(), "contact_sheet": str(sheet),
    }  # fmt: skip


def write_generated(drawn: Generation, out: Path) -> dict[str, Any]:
    """Write generated images; labels and masks too where there is more than one region."""
    out.mkdir(parents=True, exist_ok=True)
    images, masks, labels = _pixels(drawn.images), drawn.masks.numpy(), drawn.labels.numpy()
    plain = masks.shape[1] == 1
    for i, image in enumerate(images):
        path = out / f"generated_{i:04d}"
        Image.fromarray(image).save(f"{path}.png")
        if not plain:
            _write_regions(path, labels[i], masks[i])
    rows = [list(images[first : first + 8]) for first in range(0, len(images), 8)]
    sheet = pictures.contact_sheet(rows) if plain else pictures.generation_sheet(images, masks, labels)
    found = {"out": str(out), "generated": len(images), "contact_sheet": str(out / "contact_sheet.png")}
    sheet.save(found["contact_sheet"])
    if drawn.trajectory is not None:
        picked = np.linspace(0, len(drawn.trajectory) - 1, min(FRAMES, len(drawn.trajectory))).round().astype(int)
        frames = [drawn.trajectory[i] for i in picked]
        regions = None if plain else [frame.masks[:FRAME_SAMPLES].argmax(1).numpy() for frame in frames]
        found["trajectory"] = str(out / "trajectory.png")
        shown = [_pixels(frame.images[:FRAME_SAMPLES]) for frame in frames]
        pictures.trajectory_sheet(shown, regions, [frame.t for frame in frames]).save(found["trajectory"])
    return found


def _write_regions(path: Path, labels: np.ndarray, masks: np.ndarray) -> None:
    pictures.label_image(labels).save(f"{path}_labels.png")
    for k, mask in enumerate(masks):
        pictures.mask_image(mask).save(f"{path}_mask_{k}.png")


def _sheet_row(picture: Image.Image, masks: np.ndarray) -> list[np.ndarray]:
    """A picture, its regions and its masks at the size of the sheet's cells; small ones grow by whole factors."""
    longest = max(picture.size)
    scale = SHEET_CELL / longest if longest > SHEET_CELL else SHEET_CELL // longest
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    resize = lambda image: np.asarray(image.resize(size, Image.Resampling.BOX))  # noqa: E731
    image, small = resize(picture), np.stack([resize(Image.fromarray(mask)) for mask in masks])
    return [image, pictures.overlay(image, small.argmax(0)), *(np.asarray(pictures.mask_image(mask)) for mask in small)]


def _pixels(images) -> np.ndarray:
    """[n, 3, R, R] in [0, 1] to uint8 [n, R, R, 3]."""
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


# --- words ---


def score_table(scores: dict[str, Any]) -> str:
    """Acc, IoU and DICE of the model, its oracle and the baselines, and what they were measured on."""
    oracle = {key: scores[f"oracle_{key}"] for key in ("acc", "iou", "dice")}
    rows = [("model", scores), ("  oracle, best for each image", oracle)]
    baselines = scores.get("baselines", {})
    rows += [(name.replace("_", " "), baselines[name]) for name in BASELINES if name in baselines]
    lines = [f"{'':<30} {'Acc':>6} {'IoU':>6} {'DICE':>6}"]
    for name, values in rows:
        if "unavailable" in values:
            lines.append(f"{name:<30} {values['unavailable']}")
        else:
            lines.append(f"{name:<30} " + " ".join(f"{values[key]:6.3f}" for key in ("acc", "iou", "dice")))
    foreground = ", ".join(map(str, scores["mapping"]))
    regions = "/".join(f"{area:.2f}" for area in scores["areas"])
    lines.append(
        f"{scores['scored']} images scored at {scores['size']} px; foreground is region {foreground}, fitted on "
        f"{scores['fitted_on']} others; areas of the regions {regions}"
    )
    return "\n".join(lines)


def _report(run: SegdiffRun) -> Path:
    return run.folder / "report.html"
