"""What the experiments of chapter 3 share: views, trainings, and their scores beside true poses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.train import NUM_PROCEDURAL_VIEWS, train_nerfdiff
from factorkit.reproduce.experiment import CellResult, CellUnavailableError, Column, Setup, percent

RESOLUTIONS = {"small": 32, "gpu": 64, "full": None}  # pixels; None for the thesis' own
HELD_OUT_VIEWS = 20  # of the procedural scene
JOINT = {"search": "joint"}  # encoder and field are trained together from the start, as in the dissertation

COLUMNS = (
    Column("rotation_median_deg", "cameras, degrees", lower=True),
    percent("under_10_deg", "% under 10"),
    Column("psnr", "PSNR"),
    Column("ssim", "SSIM"),
    Column("lpips", "LPIPS", lower=True),
    Column("encoder_rotation_median_deg", "encoder, degrees", lower=True),
    Column("psnr_encoder", "PSNR, its pose"),
    Column("ssim_encoder", "SSIM, its pose"),
    Column("lpips_encoder", "LPIPS, its pose", lower=True),
)
NOTE = (
    "cameras: rotation errors of the training views, their median and the share under 10 degrees. PSNR, SSIM, LPIPS: "
    "held-out views rendered from their true poses, aligned; 'its pose' is the one that the encoder predicts. LPIPS "
    "only if its weights are installed."
)
DURATION = {
    "small": "2 to 6 minutes a training on one CPU core",
    "gpu": "not measured",
    "full": "not measured (thesis: 200 000 steps for each)",
}
DATA = "views with true poses: NeRF's Lego or Drums, a car, LLFF's scenes; the default is the procedural scene"


def open_posed_views(setup: Setup) -> tuple[Views, Views]:
    """Open the training views and the held-out views at the resolution of the scale.

    Raises:
        CellUnavailableError: the views have no poses, so that nothing can be scored.
    """
    size = setup.changes.get("resolution", RESOLUTIONS[setup.scale])
    views = _open_views(setup.data, setup.fingerprint, size)
    if any(part.poses is None for part in views):
        raise CellUnavailableError("the views have no poses, so nothing can be scored; give a scene that has them")
    return views


@functools.lru_cache(maxsize=2)
def _open_views(data: Path | None, fingerprint: str, size: int | None) -> tuple[Views, Views]:
    if data is not None:
        return open_views(data, "train", size), open_views(data, "test", size)
    views = make_procedural_views(NUM_PROCEDURAL_VIEWS + HELD_OUT_VIEWS, size or 128)
    return views.select(slice(0, NUM_PROCEDURAL_VIEWS)), views.select(slice(NUM_PROCEDURAL_VIEWS, None))


def train(setup: Setup, seed: int, changes: Mapping[str, Any]) -> NerfdiffRun:
    """Train, or resume or load, the run of some changed settings. The unchanged joint training is called "usual"."""
    views, _ = open_posed_views(setup)
    forward_facing = views.layout == "forward"
    preset = "fast"
    common = {"device": setup.device, **setup.changes}
    if setup.scale == "full":
        preset = "llff" if forward_facing else "lego"
    else:
        common = {"resolution": max(views.size), **common}
    if forward_facing and changes.get("search") == "joint":
        changes = {"candidate_type": "single", "num_candidates": 1} | dict(changes)
    settings = {**common, **changes}
    usual, config = preset_config(preset, **{**common, **JOINT}), preset_config(preset, **settings)
    differences = {
        f.name: getattr(config, f.name)
        for f in fields(config)
        if f.name in changes and getattr(config, f.name) != getattr(usual, f.name)
    }
    label = " ".join(f"{key}={value}" for key, value in differences.items()) or "usual"
    folder = setup.run_folder(label, seed)
    return train_nerfdiff(views, out=folder, preset=preset, seed=seed, progress=setup.progress, **settings)


def train_and_score(setup: Setup, changes: Mapping[str, Any], seed: int) -> CellResult:
    """Train with some changed settings and score the run on the held-out views."""
    scores = train(setup, seed, changes).evaluate(open_posed_views(setup)[1])
    return CellResult({column.key: scores[column.key] for column in COLUMNS if column.key in scores})
