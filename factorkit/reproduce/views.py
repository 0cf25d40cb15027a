"""What the experiments of chapter 3 share: views, trainings, and their scores beside true poses."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.train import PROCEDURAL, train_nerfdiff
from factorkit.reproduce.experiment import Column, Experiment, Found, NotRun, Row, percent
from factorkit.reproduce.setup import Setup

RESOLUTIONS = {"small": 32, "gpu": 64, "full": None}  # None: the thesis' own
HELD_OUT = 20  # further views of the procedural scene
JOINT = {"search": "joint"}  # encoder and field together from nothing, as in the dissertation

CAMERAS = (Column("rotation_median_deg", "cameras, degrees", lower=True), percent("under_10_deg", "% under 10"))
AT_TRUTH = (Column("psnr", "PSNR"), Column("ssim", "SSIM"), Column("lpips", "LPIPS", lower=True))
AT_ENCODER = (
    Column("encoder_rotation_median_deg", "encoder, degrees", lower=True),
    Column("psnr_encoder", "PSNR, its pose"),
    Column("ssim_encoder", "SSIM, its pose"),
    Column("lpips_encoder", "LPIPS, its pose", lower=True),
)
NOTE = (
    "cameras: rotation errors of the training views, their median and the share under 10 degrees. PSNR, SSIM, LPIPS: "
    "unseen views rendered from their true poses, aligned; with 'its pose' from where the encoder sees them taken. "
    "LPIPS only where its weights are."
)
DURATION = {
    "small": "2 to 6 minutes a training on one CPU core",
    "gpu": "not measured",
    "full": "not measured (thesis: 200 000 steps for each)",
}
DATA = "views with true poses: NeRF's Lego or Drums, a car, LLFF's scenes; without: the procedural scene"


def views(setup: Setup) -> tuple[Views, Views]:
    """The views to train on and those held out, at the scale's resolution.

    Raises:
        NotRun: views without poses, beside which nothing can be scored.
    """
    found = _views(setup.data, setup.identity, setup.changes.get("resolution", RESOLUTIONS[setup.scale]))
    if any(part.poses is None for part in found):
        raise NotRun("the views come without poses, so there is nothing to score with; give a scene that has them")
    return found


@functools.lru_cache(maxsize=2)
def _views(data: Path | None, identity: str, size: int | None) -> tuple[Views, Views]:
    if data is not None:
        return open_views(data, "train", size), open_views(data, "test", size)
    drawn = make_procedural_views(PROCEDURAL + HELD_OUT, size or 128)
    return drawn.select(slice(0, PROCEDURAL)), drawn.select(slice(PROCEDURAL, None))


def train(setup: Setup, seed: int, setting: Mapping[str, Any]) -> NerfdiffRun:
    """Train, or take up, the run of one setting. What all experiments vary around lies there once, as "usual"."""
    training, _ = views(setup)
    forward = training.layout == "forward"
    preset = ("llff" if forward else "lego") if setup.scale == "full" else "fast"
    common = {"device": setup.device, **({} if setup.scale == "full" else {"resolution": max(training.size)})}
    common |= setup.changes
    if forward and setting.get("search") == "joint":
        setting = {"candidate_type": "single", "num_candidates": 1} | setting
    given = common | setting
    usual = preset_config(preset, **common, **JOINT)
    asked = preset_config(preset, **given)
    departs = {
        f.name: getattr(asked, f.name)
        for f in fields(asked)
        if f.name in setting and getattr(asked, f.name) != getattr(usual, f.name)
    }
    label = " ".join(f"{key}={value}" for key, value in departs.items()) or "usual"
    return train_nerfdiff(
        training, out=setup.run_folder(label, seed), preset=preset, seed=seed, progress=setup.progress, **given
    )


def score(setup: Setup, run: NerfdiffRun) -> Found:
    """Everything the columns ask for that the run can tell."""
    scores = run.evaluate(views(setup)[1])
    wanted = {column.key for column in (*CAMERAS, *AT_TRUTH, *AT_ENCODER)}
    return Found({key: value for key, value in scores.items() if key in wanted})


def ablation(name: str, title: str, settings: Mapping[str, Mapping[str, Any]], **more: Any) -> Experiment:
    """An experiment that changes one setting of the joint training."""

    def rows(setup: Setup) -> Sequence[Row]:
        return [
            Row(row, lambda s, seed, setting=setting: score(s, train(s, seed, {**JOINT, **setting})))
            for row, setting in settings.items()
        ]

    return Experiment(
        name=name,
        title=title,
        data=DATA,
        duration=DURATION,
        columns=(*CAMERAS, *AT_TRUTH, *AT_ENCODER),
        rows=rows,
        **{"notes": (NOTE,), **more},
    )
