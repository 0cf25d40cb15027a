"""Figures 3.4 to 3.9: the cameras and the scene of one joint training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from factorkit.nerfdiff.evaluate import training_errors
from factorkit.nerfdiff.previews.cameras import draw_plane, draw_sphere
from factorkit.nerfdiff.previews.views import draw_denoising_grid, draw_view_grid
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce.experiment import CellResult, CellUnavailableError, Experiment, Row, Setup
from factorkit.reproduce.nerfdiff_runs import DATA, DURATION, JOINT, open_posed_views, train
from factorkit.utils.images import images_to_pixels

RECONSTRUCTED_VIEWS, ORBIT_FRAMES, SAMPLED_VIEWS, DENOISING_COLUMNS = 6, 12, 3, 10

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
    _figure("fig3.4", "reconstructions of held-out views", draw_reconstructions, ("fig3.5",)),
    _figure("fig3.6", "predicted cameras beside the true ones", draw_cameras),
    _figure("fig3.7", "cameras during the training, from its own previews", copy_camera_previews),
    _figure("fig3.8", "new views along a circle", draw_orbit),
    _figure("fig3.9", "new views and their cameras from noise", draw_denoising),
)
