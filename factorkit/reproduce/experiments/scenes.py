"""Chapter 3: tables 3.1 and 3.2, figures 3.4 to 3.11 and 3.13: trainings, and their scores beside true poses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.evaluate import training_errors
from factorkit.nerfdiff.previews.cameras import draw_plane, draw_sphere
from factorkit.nerfdiff.previews.views import draw_denoising_grid, draw_view_grid
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.train import NUM_PROCEDURAL_VIEWS, train_nerfdiff
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import (
    CellResult,
    CellUnavailableError,
    Citation,
    Column,
    Experiment,
    Row,
    Setup,
    percent,
)
from factorkit.utils.images import images_to_pixels

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
THESIS = "dissertation, table 3.1"
#: PSNR, SSIM and LPIPS of supervised NeRF, NeRF-- and ours; None where it found no poses
PUBLISHED: dict[str, tuple[tuple[float, float, float] | None, ...]] = {
    "Fern": ((22.22, 0.64, 0.47), (21.67, 0.61, 0.50), (17.02, 0.42, 0.55)),
    "Flower": ((25.25, 0.71, 0.36), (25.34, 0.71, 0.37), (22.42, 0.58, 0.43)),
    "Fortress": ((27.60, 0.73, 0.38), (26.20, 0.63, 0.49), (22.02, 0.50, 0.51)),
    "Horns": ((24.25, 0.68, 0.44), (22.53, 0.61, 0.50), (17.48, 0.43, 0.55)),
    "Leaves": ((18.81, 0.52, 0.47), (18.88, 0.53, 0.47), (14.44, 0.42, 0.60)),
    "Orchids": ((19.09, 0.51, 0.46), (16.73, 0.39, 0.55), (14.34, 0.40, 0.58)),
    "Room": ((27.77, 0.87, 0.40), (25.84, 0.84, 0.44), (22.36, 0.48, 0.49)),
    "Trex": ((23.19, 0.74, 0.41), (22.67, 0.72, 0.44), (19.96, 0.62, 0.51)),
    "Car": ((28.98, 0.95, 0.08), None, (26.43, 0.92, 0.08)),
    "Lego": ((25.44, 0.92, 0.09), None, (21.38, 0.86, 0.12)),
    "Drums": ((22.12, 0.89, 0.08), None, (18.65, 0.82, 0.16)),
}
RECONSTRUCTED_VIEWS, ORBIT_FRAMES, SAMPLED_VIEWS, DENOISING_COLUMNS = 6, 12, 3, 10


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


def _cite() -> Iterator[Citation]:
    """Yield the published rows. Only ours is rendered from the poses that an encoder predicts."""
    for scene, methods in PUBLISHED.items():
        for method, values in zip(("supervised", "NeRF--", "ours"), methods, strict=True):
            suffix = "_encoder" if method == "ours" else ""
            numbers = zip(("psnr", "ssim", "lpips"), values or (), strict=False)
            row = f"{method}, {scene}" + ("" if values else ": no poses found")
            yield Citation(row, THESIS, {key + suffix: value for key, value in numbers})


def _table(name: str, title: str, settings: Mapping[str, Mapping[str, Any]], **options: Any) -> Experiment:
    """Make an experiment with one training for each row."""

    def rows(setup: Setup) -> list[Row]:
        return [Row(row, partial(train_and_score, setup, changes)) for row, changes in settings.items()]

    options = {"notes": (NOTE,), **options}
    return Experiment(name=name, title=title, data=DATA, duration=DURATION, columns=COLUMNS, rows=rows, **options)


Images = dict[str, Image.Image]  # by the file name


def draw_reconstructions(setup: Setup, run: NerfdiffRun, seed: int) -> Images:
    """Draw held-out views, the renders from their predicted poses, and the depth."""
    views = open_posed_views(setup)[1].select(slice(0, RECONSTRUCTED_VIEWS))
    renders = run.reconstruct(views)
    height, width = renders.images.shape[2:]
    originals = views.resize((height, width)).images
    grid = draw_view_grid(originals, renders.images, renders.depth, renders.opacity, views.names)
    return {f"reconstructions-seed{seed}.png": grid}


def draw_cameras(setup: Setup, run: NerfdiffRun, seed: int) -> Images:
    """Draw predicted and true cameras on a sphere; forward-facing ones in their plane."""
    poses, errors = open_posed_views(setup)[0].poses, training_errors(run)
    assert errors is not None and poses is not None, "the views have true poses"
    true_poses = errors.alignment.inverse().apply(poses)
    if run.scene["layout"] == "forward":
        return {f"cameras-seed{seed}.png": draw_plane(run.poses, candidates=true_poses)}
    return {f"cameras-seed{seed}.png": draw_sphere(run.poses, true=true_poses)}


def copy_camera_previews(setup: Setup, run: NerfdiffRun, seed: int) -> Images:
    """Copy the previews of the cameras that the training drew.

    Raises:
        CellUnavailableError: the training drew none.
    """
    assert run.folder is not None
    paths = sorted((run.folder / "samples").glob("*_cameras_encoder.png"))
    if not paths:
        raise CellUnavailableError("the training drew no previews of its cameras; give sample_every above 0")
    images = {}
    for path in paths:
        with Image.open(path, formats=("PNG",)) as image:
            images[f"seed{seed}-{path.name}"] = image.convert("RGB")
    return images


def draw_orbit(setup: Setup, run: NerfdiffRun, seed: int) -> Images:
    """Draw new views along a circle."""
    frames = list(images_to_pixels(run.render_path("orbit", frames=ORBIT_FRAMES).images))
    half = ORBIT_FRAMES // 2
    return {f"orbit-seed{seed}.png": draw_image_grid([frames[:half], frames[half:]])}


def draw_denoising(setup: Setup, run: NerfdiffRun, seed: int) -> Images:
    """Draw views and their cameras generated from noise, step by step."""
    trajectory = run.sample(SAMPLED_VIEWS, seed=seed, trajectory=True).trajectory
    assert trajectory is not None
    columns = np.linspace(0, len(trajectory) - 1, min(DENOISING_COLUMNS, len(trajectory))).round().astype(int)
    steps = [trajectory[i] for i in columns]
    grid = draw_denoising_grid(
        [step.images.clamp(0, 1) for step in steps],
        [step.cameras.best_poses for step in steps],
        [step.t for step in steps],
        [((step.noisy + 1) / 2).clamp(0, 1) for step in steps],
        run.scene["layout"],
    )
    return {f"noise-seed{seed}.png": grid}


def _figure(
    name: str, title: str, draw: Callable[[Setup, NerfdiffRun, int], Images], figures: tuple[str, ...] = ()
) -> Experiment:
    def compute(setup: Setup, seed: int) -> CellResult:
        images = draw(setup, train(setup, seed, JOINT), seed)
        return CellResult(images=[setup.save_image(image, name) for name, image in images.items()])

    return Experiment(
        name=name,
        title=title,
        data=DATA,
        duration=DURATION,
        rows=lambda setup: [Row("ours", partial(compute, setup))],
        figures=figures,
        seeds=1,
    )


EXPERIMENTS = (
    _table(
        "table3.1",
        "reconstruction without poses, beside known and learned ones",
        {
            "supervised": {"poses": "known"},
            "NeRF--": {"poses": "learned"},
            "ours, joint as in the thesis": JOINT,
            "ours, balanced search": {"search": "dictionary"},
        },
        citations=tuple(_cite()),
        notes=(NOTE, "One scene a folder; give each its own OUT."),
    ),
    _table(
        "table3.2",
        "the weight of the camera classification",
        {f"lambda {w:g}": {**JOINT, "classification_weight": w} for w in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)},
        notes=(NOTE, "The dissertation's own table has accuracy and PSNR on Car; its numbers are not known here."),
    ),
    _table(
        "fig3.11",
        "4, 8 and 12 candidate cameras",
        {f"{n} candidates": {**JOINT, "num_candidates": n} for n in (4, 8, 12)},
    ),
    _table(
        "fig3.13",
        "training with noise beside the autoencoder",
        {"noise": {**JOINT, "noise": True}, "no noise (autoencoder)": {**JOINT, "noise": False}},
        figures=("fig3.10",),
    ),
    _figure("fig3.4", "reconstructions of held-out views", draw_reconstructions, ("fig3.5",)),
    _figure("fig3.6", "predicted cameras beside the true ones", draw_cameras),
    _figure("fig3.7", "cameras during the training, from its own previews", copy_camera_previews),
    _figure("fig3.8", "new views along a circle", draw_orbit),
    _figure("fig3.9", "new views and their cameras from noise", draw_denoising),
)
