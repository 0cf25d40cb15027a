"""What the commands on nerfdiff runs do; see :mod:`factorkit.cli.commands`."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from factorkit.cli.flag_types import Result
from factorkit.cli.words import duration, failures, load_run, saying_what_is_saved
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.run_folder import write_json
from factorkit.nerfdiff.evaluate import training_errors
from factorkit.nerfdiff.export.frames import write_frames
from factorkit.nerfdiff.partial_run import newest_stage, snapshot
from factorkit.nerfdiff.previews.views import disparity_image, novel_sheet, views_sheet
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.train import PROCEDURAL, train_nerfdiff
from factorkit.nerfdiff.training_views import kept_views
from factorkit.nerfdiff.verdict import write_report
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels

if TYPE_CHECKING:
    from factorkit.nerfdiff.viewer import Shown

POLL = 5.0  # seconds between looks for a later checkpoint
DEMO_DEGREES = 1.0  # the demo's mark: median of the found cameras' rotation errors
DEMO_HELD_OUT = 20  # further views of the procedural scene
SHOWN = 10  # steps of a trajectory, pictures on a contact sheet


def train(data: Path | None, out: Path, preset: str | None, changes: dict[str, Any]) -> Result:
    """Train, or resume; see :func:`factorkit.train_nerfdiff`."""
    start = time.perf_counter()
    with saying_what_is_saved(out):
        run = train_nerfdiff(data, out=out, preset=preset, **changes)
    failed = failures(out)
    found = {"run": str(out), "report": str(out / "report.html"), "failures": failed, "scores": run.scores}
    lines = ["No alarm went off."] if not failed else ["This run FAILED:", *(f"  - {words}" for words in failed)]
    lines += ["", f"run     {out}", f"report  {found['report']}", f"time    {duration(time.perf_counter() - start)}"]
    return found, "\n".join(lines)


def demo(out: Path, seed: int) -> Result:
    """Find the cameras of the procedural scene and judge them."""
    start = time.perf_counter()
    training, held_out = demo_views(32)
    with saying_what_is_saved(out):
        run = train_nerfdiff(training, out=out, preset="demo", seed=seed)
    scores = run.evaluate(held_out)
    around = run.render_path("orbit", size=64, frames=30).images

    def write() -> Path:
        write_report(out)
        return write_frames(out / "orbit.gif", around)

    orbit = distributed.run_on_first(write)
    failed = failures(out)
    if scores["rotation_median_deg"] > DEMO_DEGREES or scores["under_10_deg"] < 1:
        failed = [f"cameras {scores['rotation_median_deg']:.2f} degrees off in the median", *failed]
    found = {
        **scores,
        "failures": failed,
        "seed": seed,
        "seconds": time.perf_counter() - start,
        "orbit": str(orbit),
        "report": str(out / "report.html"),
    }
    words = "It worked: every camera was found." if not failed else "This run FAILED: " + "; ".join(failed)
    lines = [
        score_table(scores),
        "",
        words,
        "",
        f"time    {duration(found['seconds'])}",
        f"orbit   {orbit}",
        f"report  {out / 'report.html'}",
    ]
    return found, "\n".join(lines)


def demo_views(size: int) -> tuple[Views, Views]:
    """Views of the procedural scene to train on, and further ones."""
    views = make_procedural_views(PROCEDURAL + DEMO_HELD_OUT, size)
    return views.select(slice(0, PROCEDURAL)), views.select(slice(PROCEDURAL, None))


def evaluate(path: Path, views: Path, split: str | None, refine: int, device: str) -> Result:
    """Scores on views with true poses."""
    start, run = time.perf_counter(), load(path, device)
    opened = open_views(views, split, max(run.model.size), background_of(run))
    scores = run.evaluate(opened, refine=refine)
    if run.folder is not None:
        distributed.run_on_first(lambda: write_report(run.folder))
    return {**scores, "seconds": time.perf_counter() - start}, score_table(scores)


def pose(path: Path, paths: Sequence[Path], out: Path | None, refine: int, check: bool, device: str) -> Result:
    """Camera-to-world matrices of pictures."""
    run = load(path, device)
    views = pictures_of(run, paths)
    found = run.predict_pose(views, refine=refine, check=check)
    frames = [
        {"name": name, "camera_to_world": matrix, "scores": scores}
        for name, matrix, scores in zip(views.names, found.poses.tolist(), found.scores.tolist(), strict=True)
    ]
    if out is not None:
        distributed.run_on_first(lambda: write_json(out, {"frames": frames}))
    lines = [f"{f['name']}: at " + ", ".join(f"{row[3]:.3f}" for row in f["camera_to_world"][:3]) for f in frames]
    return {"frames": frames, "out": None if out is None else str(out)}, "\n".join(lines)


def reconstruct(path: Path, paths: Sequence[Path], out: Path, size: int | None, device: str) -> Result:
    """Renders from the predicted poses of pictures."""
    run = load(path, device)
    views = pictures_of(run, paths)
    seen = run.reconstruct(views, size)
    sheet, first = out / "contact_sheet.png", slice(0, SHOWN)

    def write() -> None:
        out.mkdir(parents=True, exist_ok=True)
        disparities = disparity_image(seen.depth, seen.opacity)
        for name, image, depth in zip(views.names, images_to_pixels(seen.images), disparities, strict=True):
            place = out / name.replace("/", "_")
            Image.fromarray(image).save(place.with_suffix(".png"))
            Image.fromarray(depth).save(place.with_name(place.stem + "_depth.png"))
        beside = views.resize(tuple(seen.images.shape[2:])).images[first]
        views_sheet(beside, seen.images[first], seen.depth[first], seen.opacity[first], views.names[first]).save(sheet)

    distributed.run_on_first(write)
    found = {"out": str(out), "reconstructed": len(views), "contact_sheet": str(sheet)}
    return found, f"{len(views)} reconstructed: {out}\ncontact sheet: {sheet}"


def render(path: Path, out: Path, kind: str, frames: int, size: int | None, device: str) -> Result:
    """Frames along a camera path."""
    images = load(path, device).render_path(kind, size, frames).images
    distributed.run_on_first(lambda: write_frames(out, images))
    return {"out": str(out), "frames": frames}, f"{frames} frames: {out}"


def sample(path: Path, out: Path, device: str, **options: Any) -> Result:
    """Views from noise; options are those of ``NerfdiffRun.sample``."""
    run = load(path, device)
    drawn, layout = run.sample(**options), run.scene["layout"]
    found = {"out": str(out), "views": len(drawn.images), "poses": str(out / "poses.json")}
    sheet = None
    if drawn.trajectory is not None:
        picked = np.linspace(0, len(drawn.trajectory) - 1, min(SHOWN, len(drawn.trajectory))).round().astype(int)
        steps = [drawn.trajectory[i] for i in picked]
        found["trajectory"] = str(out / "trajectory.png")
        sheet = novel_sheet(
            [s.images[:SHOWN].clamp(0, 1) for s in steps],
            [s.cameras.best[:SHOWN] for s in steps],
            [s.t for s in steps],
            [((s.noisy[:SHOWN] + 1) / 2).clamp(0, 1) for s in steps],
            layout,
        )

    def write() -> None:
        out.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images_to_pixels(drawn.images)):
            Image.fromarray(image).save(out / f"view_{i:04d}.png")
        write_json(out / "poses.json", {"poses": drawn.poses.tolist()})
        if sheet is not None:
            sheet.save(found["trajectory"])

    distributed.run_on_first(write)
    return found, f"{found['views']} views: {out}"


def export(path: Path, out: Path, kind: str | None, device: str) -> Result:
    """Points, mesh or cameras for other programs."""
    written = load(path, device).export(out, kind=kind)
    return {"out": str(written)}, f"written: {written}"


def view(path: Path, host: str, port: int, device: str) -> Result:
    """Serve the scene to a browser until Ctrl-C; what a training finds is shown as it finds it."""
    from factorkit.nerfdiff.viewer import Viewer

    seen, shown = newest(path), what_to_show(path, device)
    with Viewer(shown, host=host, port=port) as viewer:
        print(f"{path} at {viewer.url}; Ctrl-C ends it", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(POLL)
                if newest(path) != seen:
                    seen, shown = newest(path), what_to_show(path, device)
                    viewer.show(shown)
        return {"run": str(path), "url": viewer.url, "step": shown.step}, f"shown up to step {shown.step}"


def newest(path: Path) -> Path | None:
    """The newest checkpoint of a run folder, be it of the run or of one of its stages; None for a file."""
    for folder in (path, newest_stage(path)) if path.is_dir() else ():
        found = [] if folder is None else Checkpoints(folder / "checkpoints").paths()
        if found:
            return found[0]
    return None


def what_to_show(path: Path, device: str) -> Shown:
    """Scene and cameras of a run, and where they are known the true ones; of its newest stage before it has a model."""
    from factorkit.nerfdiff.viewer import Shown

    found = newest(path)
    if found is not None and found.parent.parent != path:
        step, field, views, true = *snapshot(path)[1:], None
        background = torch.zeros(3) if views.background is None else views.background
    else:
        run = load(path, device)
        step, field, views, background = run.step, run.model.field, run.views, run.model.background
        given, errors = kept_views(run.folder), training_errors(run)
        true = None if errors is None else errors.alignment.inverse().apply(given.poses)
    return Shown(step, field, views, background, true)


# --- in and out ---


def load(path: Path, device: str) -> NerfdiffRun:
    """The run. Raises ConfigError where it is another model's."""
    return load_run(path, device, "nerfdiff")


def background_of(run: NerfdiffRun) -> list[float]:
    """What transparent pictures are put over: the colour the run was trained with."""
    return run.model.background.tolist()


def pictures_of(run: NerfdiffRun, paths: Sequence[Path]) -> Views:
    """The pictures a user named, at the run's size."""
    if not paths:
        raise ConfigError("no pictures are named; give files or a folder after the run")
    source = paths[0] if len(paths) == 1 else [str(path) for path in paths]
    return open_views(source, None, max(run.model.size), background_of(run), fov=50.0)


def score_table(scores: dict[str, Any]) -> str:
    """Degrees and decibels for a person."""
    lines = []
    if "rotation_median_deg" in scores:
        lines.append(f"training cameras  {_degrees(scores, '')}")
    lines.append(f"encoder's cameras {_degrees(scores, 'encoder_')}, of {scores['views']} views")
    for name, suffix in (("true cameras", ""), ("encoder's cameras", "_encoder")):
        parts = [f"{k.upper()} {scores[k + suffix]:.3f}" for k in ("ssim", "lpips") if k + suffix in scores]
        lines.append(f"views from {name:<18} PSNR {scores['psnr' + suffix]:.2f} dB  " + "  ".join(parts))
    return "\n".join(lines)


def _degrees(scores: dict[str, Any], prefix: str) -> str:
    median, share = scores[f"{prefix}rotation_median_deg"], scores[f"{prefix}under_10_deg"]
    return f"{median:6.2f} degrees in the median, {share:.0%} under 10"
