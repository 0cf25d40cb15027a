"""Count true and false alarms over small runs of both models that are right or wrong.

    python -m benchmarks.alarms --data FOLDER
    python -m benchmarks.alarms

The first trains and records each run that is not recorded yet in benchmarks/results/alarms.json; FOLDER holds
flowers17_128, weizmann_horse_128, nerf_lego_200 and llff_fern_504. The second prints the recorded table.

segdiff: U-Nets, mixtures, object masks, and the teacher's masks of these, at 16 and 32 px on drawn flowers, photos,
noise images, objects that only texture separates from the ground, large centred objects ("persons"), images that share
a horizon ("landscape"), smooth gradients ("plain"), smooth textures without an object ("smooth"), and these changed.
A run is right from IoU .6 and .05 above the mean
mask of the labels on; wrong where there is no object, or below the mean mask, or below .5; the rest is undecided and
not counted. nerfdiff: fields fitted to halves of the views, for true cameras and for cameras, lenses, layouts or images
made wrong. "refined" cameras are optimised with a field from wrong ones on; they are wrong where their median error
stays above 5 degrees, right below 2, else undecided.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.alarm_inputs import damage, make_images, open_scene_views
from benchmarks.alarm_runs import NERFDIFF, SEGDIFF, NerfdiffRun, SegdiffRuns
from benchmarks.recording import commit, machine, read_results, write_result
from factorkit.engine.trainer import Trainer
from factorkit.metrics.baselines import score_baselines
from factorkit.metrics.pose import pose_errors
from factorkit.metrics.segmentation import evaluate_masks
from factorkit.nerfdiff.alarms import pose_alarms, silhouette_check, silhouette_offset
from factorkit.nerfdiff.cameras.poses import FreePoses
from factorkit.nerfdiff.config import preset_config as nerfdiff_preset
from factorkit.nerfdiff.held_out import forward_direction_check, held_out_checks
from factorkit.nerfdiff.scene import choose_unbounded, open_scene
from factorkit.nerfdiff.stages.pipeline import Training
from factorkit.report.content import all_failures
from factorkit.segdiff.alarms import MIN_JUDGED_STEPS, Alarms, measure_alarms
from factorkit.segdiff.choose_regions import SETTINGS, MixtureTask
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.masks.spatial_mixture import SpatialMixture, unexplained_noise
from factorkit.segdiff.object_stages import ObjectStages
from factorkit.segdiff.task import SegdiffTask, add_noise, predict_masks
from factorkit.utils.errors import DataError

RESULTS = Path(__file__).with_name("results") / "alarms.json"
FIT_IMAGES = 16
WRONG_DEGREES, RIGHT_DEGREES = 5.0, 2.0  # median errors of refined cameras
CPU = torch.device("cpu")
QUANTITIES = {  # name of the value -> (model, layout or kind of masks, whether right runs have the greater values)
    "color_share": ("segdiff", "", True),
    "flip_agreement": ("segdiff", "", True),
    "eta_gap, objects": ("segdiff", "objects", True),
    "color_share, objects": ("segdiff", "objects", True),
    "place_gain, objects": ("segdiff", "objects", True),
    "place_share, objects": ("segdiff", "objects", True),
    "held_out_cross, object": ("nerfdiff", "object", False),
    "held_out_cross, forward": ("nerfdiff", "forward", False),
    "held_out_cross, unbounded": ("nerfdiff", "unbounded", False),
}


def judge_truth(iou: float | None, mean_mask: float) -> bool | None:
    """Return whether a run is right by its labels; None: undecided."""
    if iou is None or iou < max(0.5, mean_mask):
        return False
    return True if iou >= max(0.6, mean_mask + 0.05) else None


def judge_masks(alarms: Alarms, probes: np.ndarray, masks: Tensor, truth: np.ndarray | None, steps: int) -> dict:
    """Return the record of a run with these masks [N, K, H, W] of the probes."""
    iou, baselines = None, {}
    if truth is not None:
        iou = evaluate_masks(masks.argmax(1).numpy(), truth, None, masks.shape[1], FIT_IMAGES)["iou"]
        rows = score_baselines(probes, truth, None, FIT_IMAGES, ["mean_mask", "two_means_image"])
        baselines = {name: row["iou"] for name, row in rows.items()}
    right = judge_truth(iou, baselines.get("mean_mask", 0.0))
    result = {"model": "segdiff", "right": right, "iou": iou, "baselines": baselines, **alarms.to_dict(steps)}
    decided = any(check["decisive"] and check["status"] == "passed" for check in result["checks"])
    return result | {"unchecked": "" if decided or alarms.failures() else "no check that decides has run"}


def train_segdiff(runs: SegdiffRuns, data: Path) -> None:
    """Train, and record the state at each stop."""
    training, probes, truth = make_images(runs.images, runs.seed, runs.resolution, data)
    common = {"resolution": runs.resolution, "steps": runs.stops[-1], "seed": runs.seed, "device": "cpu"}
    common |= {"checkpoint_every": 100_000, "sample_every": 0, **dict(runs.changes)}
    small = {"preset": "demo", "model_channels": 8, "channel_mult": (1, 2), "batch_size": 8, "norm_groups": 4}
    if runs.kind in ("objects", "teacher"):
        small |= {"masks": "auto", "distil_steps": runs.stops[-1]}
    else:
        small["masks"] = "network"
    config = preset_config(**({**SETTINGS} if runs.kind == "mixture" else small) | common).resolved()
    task_class: Any = MixtureTask if runs.kind == "mixture" else SegdiffTask
    task = task_class(config, training, probes, CPU)
    task.inspect = lambda model, step, folder: {}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        if runs.kind == "teacher":
            stages = ObjectStages(config, training, run, {}, CPU, False)
            if "regions" in dict(runs.changes):
                mixture, weight = stages.train_mixtures(SpatialMixture(config.num_leaf_regions, object_first=True))
            else:
                config = replace(config, regions=stages.choose_regions())
                stages = ObjectStages(config, training, run, {}, CPU, False)
                mixture, weight = stages.find_mixture(stages.new_masks().mixture)
            both = np.concatenate([probes, probes[:, :, ::-1], training])
            masks = ObjectStages(config, both, run, {}, CPU, False).teach(mixture, weight)[: 2 * len(probes)] / 255
            masks, flipped = masks.split(len(probes))
            alarms = measure_alarms(task.probes, masks, flipped, objects=True)
            record(runs.key(runs.stops[-1]), judge_masks(alarms, probes, masks, truth, MIN_JUDGED_STEPS))
            return
        if runs.kind == "objects":
            task.model.masks = ObjectStages(config, training, run, {}, CPU, False).run()
            masks = predict_masks(task.model, task.probes, config.segment_t, task.schedule)
            record(runs.key(runs.stops[-1]), judge_masks(task.alarms(task.model), probes, masks, truth, runs.stops[-1]))
            return
        for stop in runs.stops:
            model: Any = Trainer(task, config, run, {}, device=CPU, progress=False, stop_at=stop).run()
            with torch.no_grad():
                if runs.kind == "mixture":
                    noisy = [
                        add_noise(i, config.segment_t, task.schedule)[0] for i in (task.probes, task.probes.flip(3))
                    ]
                    masks, flipped = (model(images)[0].softmax(1) for images in noisy)
                    error = unexplained_noise(model, task.probes, task.schedule)
                    alarms = dataclasses.replace(measure_alarms(task.probes, masks, flipped), error=error)
                else:
                    masks = predict_masks(model, task.probes, config.segment_t, task.schedule)
                    alarms = task.alarms(model)
            record(runs.key(stop), judge_masks(alarms, probes, masks, truth, stop))


def fit_nerfdiff(run: NerfdiffRun, data: Path) -> None:
    """Fit fields to halves of the views, and record the checks of these cameras."""
    result: dict[str, Any] = {"model": "nerfdiff", "right": not run.fault}
    fault = run.fault.removeprefix("refined ")
    try:
        true = open_scene_views(run.scene, run.seed, data)
        views = damage(true, fault, run.seed, data)
        config = nerfdiff_preset("fast", poses="known", resolution=max(views.size), samples_per_ray=24, field_steps=60)
        config = replace(config, steps=30, seed=run.seed, device="cpu", threads=1, sample_every=0)
        scene = open_scene(views, max(views.size), CPU)
        config = replace(config, unbounded=choose_unbounded(config, scene))
        unbounded = config.unbounded == "yes"
        with tempfile.TemporaryDirectory() as folder:
            training = Training(config, scene, Path(folder), {"scene": {}}, False)
            poses = scene.poses
            if fault != run.fault:
                poses = refine_poses(training)
                degrees = pose_errors(poses, true.poses).rotation_median_deg
                right = False if degrees > WRONG_DEGREES else True if degrees < RIGHT_DEGREES else None
                result |= {"right": right, "rotation_median_deg": degrees}
            fixed = FreePoses(poses).requires_grad_(False)
            field = training.fit("all", training.new_field("grid", 20), fixed, steps=30)
            model: Any = SimpleNamespace(views=poses, camera=scene.camera, field=field.field)
            errors, noise, reason = training.measure_held_out(model)
            shared = training.check_shared_error(model, errors, reason)
    except DataError as error:
        record(run.key(), result | {"failures": [f"refused: {error}"]})
        return
    checks = [*held_out_checks(scene.layout, errors, noise, reason, unbounded), shared]
    failures = [] if scene.layout == "forward" else pose_alarms(poses, images=scene.images)["failures"]
    if scene.layout == "forward":
        checks.append(forward_direction_check(poses))
    else:
        checks.append(silhouette_check(silhouette_offset(field.field, scene, poses, 24)))
    values = {} if errors is None else {"held_out_cross": errors.cross, "held_out_nearest": errors.nearest}
    result |= {
        "layout": "unbounded" if unbounded else scene.layout,
        "unchecked": reason,
        **values,
        "shared_ratio": shared.value,
    }
    record(run.key(), result | {"failures": [*failures, *all_failures(checks)]})


def refine_poses(training: Training) -> Tensor:
    """Return the poses of the scene after a fit of a field that starts blurred, with all six numbers of a pose free."""
    poses = training.scene.poses
    assert poses is not None
    field = training.new_field("grid", 24)
    fitted = training.fit("refine", field, FreePoses(poses), steps=300, initial_coarseness=1.0)
    return fitted.poses().detach()


def record(key: str, result: dict[str, Any]) -> None:
    """Write one run, so that an interruption loses no other."""
    write_result(RESULTS, key, result | {"machine": machine(1), "commit": commit()})


def choose_limit(right: list[float], wrong: list[float]) -> float:
    """Return the limit above which all wrong values should be: the middle of the widest gap with the fewest errors."""
    values = sorted({*right, *wrong})
    gaps = list(pairwise(values))
    errors = {(a, b): sum(r > a for r in right) + sum(w < b for w in wrong) for a, b in gaps}
    best = min(errors.values())
    low, high = max((gap for gap in gaps if errors[gap] == best), key=lambda gap: gap[1] - gap[0])
    return (low + high) / 2


def format_limits(results: dict[str, dict]) -> list[str]:
    """Return lines: each quantity's limit chosen on every second run, and its errors on the other runs."""
    lines = [
        "",
        "| quantity | limit chosen on half of the runs | right ones beyond it, other half | wrong ones beyond it |",
    ]
    lines.append("|---|---|---|---|")
    for name, (model, group, greater) in QUANTITIES.items():
        key, sign = name.split(",")[0], -1 if greater else 1
        rows = [r for _, r in sorted(results.items()) if r["model"] == model]
        rows = [r for r in rows if group == r.get("layout", "objects" if "place_gain" in r else "")]
        rows = [r for r in rows if r["right"] is not None and r.get(key) is not None]
        halves = [
            {right: [sign * r[key] for r in rows if r["right"] is right][half::2] for right in (True, False)}
            for half in (0, 1)
        ]
        limit, other = choose_limit(halves[0][True], halves[0][False]), halves[1]
        false, true = sum(v > limit for v in other[True]), sum(v > limit for v in other[False])
        lines.append(f"| {name} | {sign * limit:.2f} | {false} of {len(other[True])} | {true} of {len(other[False])} |")
    return lines


def format_table(results: dict[str, dict]) -> str:
    """Return the table of alarms by kind of run, and the runs that the alarms got wrong."""
    lines = ["| runs | with an alarm | no alarm | not decided without labels |", "|---|---|---|---|"]
    undecided = {key for key, r in results.items() if not r["failures"] and r.get("unchecked")}
    for model in ("segdiff", "nerfdiff"):
        for right in (True, False):
            rows = {key: r for key, r in results.items() if r["model"] == model and r["right"] is right}
            alarms, silent = sum(bool(r["failures"]) for r in rows.values()), undecided & rows.keys()
            numbers = f"{alarms} | {len(rows) - alarms - len(silent)} | {len(silent)} |"
            lines.append(f"| {model}, {len(rows)} {'right' if right else 'wrong'} | {numbers}")
    wrong = [key for key, r in results.items() if r["right"] is not None and bool(r["failures"]) is r["right"]]
    return "\n".join(lines + format_limits(results) + ["", "Missed or false:", *(f"- {key}" for key in sorted(wrong))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the photos and scenes; without it, print what is recorded")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for runs in SEGDIFF if args.data else ():
        if not {runs.key(stop) for stop in runs.stops} <= read_results(RESULTS).keys():
            train_segdiff(runs, args.data)
    for run in NERFDIFF if args.data else ():
        if run.key() not in read_results(RESULTS):
            fit_nerfdiff(run, args.data)
    print(format_table(read_results(RESULTS)))


if __name__ == "__main__":
    main()
