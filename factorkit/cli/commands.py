"""What the commands do: each function answers a `Result`, the files it wrote lie in the folder it was given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.cli.flag_types import Result
from factorkit.cli.words import duration, failures, load_run, saying_what_is_saved
from factorkit.data.datasets import make_procedural_dataset, open_dataset
from factorkit.data.open import open_source
from factorkit.data.sources import Source, escape_name
from factorkit.data.video import is_video
from factorkit.engine.config import cpu_threads
from factorkit.metrics.baselines import BASELINES
from factorkit.segdiff import previews
from factorkit.segdiff.choose_regions import GRID_FILE, choose_regions
from factorkit.segdiff.inference.outputs import without_results
from factorkit.segdiff.run import Generation, SegdiffRun
from factorkit.segdiff.train import estimate, find_classes, train_segdiff
from factorkit.segdiff.verdict import read_verdict, write_report
from factorkit.utils import distributed
from factorkit.utils.atomic import save_image
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels
from factorkit.utils.safe_reading import read_json

DEMO_MARK = 0.80  # IoU on the held-out procedural flowers
DEMO_SEGMENTED, DEMO_GENERATED = 8, 16
FRAMES, FRAME_SAMPLES = 10, 8  # of a trajectory: columns and samples shown


def train(
    data: Path | None,
    out: Path,
    preset: str | None,
    seed_trials: int,
    baselines: bool,
    classes: str | None,
    changes: dict[str, Any],
) -> Result:
    """Train, or resume; see :func:`factorkit.train_segdiff`."""
    with saying_what_is_saved(out):
        run = train_segdiff(
            data, out=out, preset=preset, seed_trials=seed_trials, baselines=baselines, classes=classes, **changes
        )
    judged = read_verdict(run.folder)
    found = {
        "run": str(run.folder),
        "report": str(_report(run)),
        "steps": run.config.steps,
        "scores": run.scores,
        "failures": failures(run.folder),
        "verdict": judged.headline,
    }
    lines = [score_table(run.scores), ""] if run.scores else []
    lines += [f"{judged.headline}.", *judged.details, "", f"run     {run.folder}", f"report  {_report(run)}"]
    return found, "\n".join(lines)


def dry_run(
    data: Path | None, preset: str | None, seed_trials: int, classes: str | None, changes: dict[str, Any]
) -> Result:
    """What a training would take; a few steps are timed on noise, nothing is written."""
    found, known = {}, None
    if data is not None:
        dataset = open_dataset(data, holdout=changes["holdout"], mask_set=changes["mask_set"])
        known = find_classes(classes, dataset, dataset.train.names)
        found = {"images": len(dataset.train), "held_out": len(dataset.test_images or ())}
    found |= estimate(data, preset=preset, known=known, **changes)
    lines = [
        f"model   {found['parameters'] / 1e6:.2f} M parameters (preset {found['preset']})",
        f"memory  {found['memory_gib']:.2f} GiB with {found['trial_images']} images at once, on {found['device']}",
        f"speed   {found['images_per_second']:.1f} images/s",
        f"time    {duration(found['seconds'])} for {found['steps']} steps of {found['batch_size']} images",
    ]
    if seed_trials > 1:
        lines.append(f"        and up to half of that for each further one of the {seed_trials} seed trials")
    if data is not None:
        lines.append(f"data    {found['images']} images to train on, {found['held_out']} labelled ones held out")
    return found, "\n".join(lines)


def choose(data: Path | None, out: Path, **options: Any) -> Result:
    """The number of regions; options are those of :func:`factorkit.choose_regions`."""
    with saying_what_is_saved(out):
        choice = choose_regions(data, out=out, **options)
    found = {"regions": choice.regions, "errors": choice.errors, "falls": choice.falls, "reason": choice.reason}
    picture = out / SHEET
    text = f"{choice.table()}\n\n{choice.reason}\nregions  {choice.regions}\npicture  {picture}"
    return {**found, "out": str(out), "picture": str(picture)}, text


def segment(run: Path, paths: Sequence[Path], out: Path, device: str, **options: Any) -> Result:
    """Label images, masks and overlays of every picture, and one contact sheet; options are those of
    ``SegdiffRun.segment_folder``.

    Raises:
        ConfigError: one of the paths is a video.
    """
    if videos := [path for path in paths if is_video(path)]:
        raise ConfigError(
            f"{escape_name(str(videos[0]))} is a video: add --video, and let --out be an .mp4, .mkv or .mov"
        )
    segments = load_run(run, device, "segdiff").segment_folder(open_inputs(paths, out), out, **options)
    found = segments._asdict() | {"out": str(out)}
    lines = [f"{segments.segmented} segmented"]
    lines[0] += f", {segments.already} of them before" if segments.already else ""
    lines[0] += f", {len(segments.skipped)} skipped" if segments.skipped else ""
    lines[0] += f": {out}"
    for name in ("contact_sheet", "annotations"):
        if found[name] is not None:
            found[name] = str(found[name])
            lines.append(f"{name.replace('_', ' ')}: {found[name]}")
    return found, "\n".join(lines)


def segment_video(run: Path, paths: Sequence[Path], out: Path, device: str, **options: Any) -> Result:
    """A video with the regions laid over it; options are those of ``SegdiffRun.segment_video``.

    Raises:
        ConfigError: more than one path.
    """
    if len(paths) > 1:
        raise ConfigError(f"--video takes one video or one folder of frames, not {len(paths)} paths")
    made = load_run(run, device, "segdiff").segment_video(paths[0], out, **options)
    areas = "/".join(f"{area:.2f}" for area in made.areas)
    text = (
        f"{made.frames} frames segmented: {out}\nareas of the regions {areas}; {made.changes:.1%} of the pixels change "
        "region from frame to frame"
    )
    return made._asdict() | {"out": str(out)}, text


def generate(run: Path, out: Path, device: str, **options: Any) -> Result:
    """Generated images with labels and masks, and one contact sheet; options are those of ``SegdiffRun.generate``."""
    drawn = load_run(run, device, "segdiff").generate(**options, progress=True)
    found = distributed.on_first(lambda: write_generated(drawn, out))
    return found, f"{found['generated']} generated: {out}\ncontact sheet: {found['contact_sheet']}"


def evaluate(run: Path, images: Path, masks: Path, device: str, **options: Any) -> Result:
    """Scores; options are those of ``SegdiffRun.evaluate``."""
    model = load_run(run, device, "segdiff")
    scores = model.evaluate(images, masks, **options)
    if model.folder is not None:
        distributed.on_first(lambda: write_report(model.folder))
    return scores, score_table(scores)


def zero_shot(run: Path, data: Path, device: str, *, label_map: Path | None, **options: Any) -> Result:
    """Scores of each class of another data set; options are those of ``SegdiffRun.evaluate_zero_shot``.

    Raises:
        ConfigError: a label map that is no JSON object.
    """
    told = None
    if label_map is not None:
        try:
            told = read_json(label_map)
        except ValueError as error:
            raise ConfigError(f"{label_map}: no JSON: {error}") from error
        if not isinstance(told, dict):
            raise ConfigError(f'{label_map}: give an object of classes, such as {{"dog": "Maltese dog"}}')
    found = load_run(run, device, "segdiff").evaluate_zero_shot(data, label_map=told, **options)
    lines = [f"{'class':<20} {'told':<20} {'images':>6} {'Acc':>6} {'IoU':>6} {'mIoU':>6}"]
    for name, one in found["classes"].items():
        figures = " ".join(f"{one[key]:6.3f}" for key in ("acc", "iou", "miou"))
        lines.append(f"{name:<20} {one['told'] or '-':<20} {one['images']:6} {figures}")
    lines.append(f"{'mean':<48} " + " ".join(f"{found[key]:6.3f}" for key in ("acc", "iou", "miou")))
    if found["missing"]:
        lines.append("too few pictures to score: " + ", ".join(found["missing"]))
    return found, "\n".join(lines)


def demo(out: Path, seed: int) -> Result:
    """Train on the procedural flowers, segment held-out ones, generate, and judge the result."""
    start = time.perf_counter()
    with saying_what_is_saved(out):
        run = train_segdiff(out=out, preset="demo", seed=seed, baselines=True)
    flowers = make_procedural_dataset(run.config.resolution, train=1, test=DEMO_SEGMENTED).test_images
    with cpu_threads(run.config.threads):
        segmented = run.segment_folder(flowers, out / "segmented")
        drawn = run.generate(DEMO_GENERATED, progress=True)
        generated = distributed.on_first(lambda: write_generated(drawn, out / "generated"))
    scores, failed = run.scores, failures(out)
    if scores["iou"] < DEMO_MARK:
        failed = [f"IoU {scores['iou']:.3f} on held-out flowers, below the demo's mark of {DEMO_MARK:.2f}", *failed]
    found = {
        **{name: scores[name] for name in ("acc", "iou", "dice")},
        "failures": failed,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "report": str(_report(run)),
        "scores": scores,
        "segmented": str(segmented.contact_sheet),
        "generated": generated["contact_sheet"],
    }
    lines = [score_table(scores), ""]
    if failed:
        lines += ["This run FAILED:", *(f"  - {failure}" for failure in failed)]
        lines += [f"Another seed: factorkit demo --seed {seed + 1} --out {out}-{seed + 1}"]
        lines += [
            "Let the best of three seeds continue: factorkit train segdiff --preset demo --seed-trials 3 --out runs/trials"
        ]
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
    return without_results(open_source(paths[0] if len(paths) == 1 else list(paths)), out)


def write_generated(drawn: Generation, out: Path) -> dict[str, Any]:
    """Write generated images; labels and masks too where there is more than one region.

    The sheet has a row for each class where classes were asked for.
    """
    out.mkdir(parents=True, exist_ok=True)
    images, masks, labels = images_to_pixels(drawn.images), drawn.masks.numpy(), drawn.labels.numpy()
    plain = masks.shape[1] == 1
    for i, image in enumerate(images):
        path = out / f"generated_{i:04d}"
        save_image(Image.fromarray(image), Path(f"{path}.png"))
        if not plain:
            _write_regions(path, labels[i], masks[i])
    rows = [list(images[first : first + 8]) for first in range(0, len(images), 8)]
    if drawn.classes is not None:
        sheet = previews.draw_class_grid(images, masks, drawn.classes)
    else:
        sheet = previews.draw_image_grid(rows) if plain else previews.draw_generation_grid(images, masks, labels)
    found: dict[str, Any] = {"out": str(out), "generated": len(images), "contact_sheet": str(out / "contact_sheet.png")}
    save_image(sheet, Path(found["contact_sheet"]))
    if drawn.classes is not None:
        found["classes"] = drawn.classes
    if drawn.trajectory is not None:
        picked = np.linspace(0, len(drawn.trajectory) - 1, min(FRAMES, len(drawn.trajectory))).round().astype(int)
        frames = [drawn.trajectory[i] for i in picked]
        regions = None if plain else [frame.masks[:FRAME_SAMPLES].argmax(1).numpy() for frame in frames]
        found["trajectory"] = str(out / "trajectory.png")
        escape_name = [images_to_pixels(frame.images[:FRAME_SAMPLES]) for frame in frames]
        sheet = previews.draw_trajectory_grid(escape_name, regions, [frame.t for frame in frames])
        save_image(sheet, Path(found["trajectory"]))
    return found


def _write_regions(path: Path, labels: np.ndarray, masks: np.ndarray) -> None:
    save_image(previews.make_label_image(labels), Path(f"{path}_labels.png"))
    for k, mask in enumerate(masks):
        save_image(previews.make_mask_image(mask), Path(f"{path}_mask_{k}.png"))


# --- words ---


def score_table(scores: dict[str, Any]) -> str:
    """Acc, IoU and DICE of the model, its oracle and the baselines, and what they were measured on."""
    if "within" in scores:
        return nested_table(scores)
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
    if "level" in scores:
        foreground += f" of level {scores['level']}"
    lines.append(
        f"{scores['scored']} images scored at {scores['size']} px; foreground is region {foreground}, fitted on "
        f"{scores['fitted_on']} others; areas of the regions {regions}"
    )
    return "\n".join(lines)


def nested_table(scores: dict[str, Any]) -> str:
    """Accuracy at each level of a hierarchy."""
    lines = [f"{'':<10} {'accuracy':>9} {'within':>7} {'largest class':>14}"]
    figures = zip(scores["accuracy"], scores["within"], scores["chance"], strict=True)
    lines += [f"level {n:<4} {a:9.3f} {w:7.3f} {c:14.3f}" for n, (a, w, c) in enumerate(figures, start=1)]
    lines.append("accuracy: right at this level and all above; within: right among those right at the level above")
    lines.append(f"{scores['scored']} images scored at {scores['size']} px; matched on {scores['fitted_on']} others")
    return "\n".join(lines)


def _report(run: SegdiffRun) -> Path:
    return run.folder / "report.html"
