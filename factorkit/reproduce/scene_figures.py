"""The pictures of chapter 3 from one trained scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from factorkit.nerfdiff.evaluate import training_errors
from factorkit.nerfdiff.previews.plane import plane_picture
from factorkit.nerfdiff.previews.views import novel_sheet, sphere_picture, views_sheet
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.report.image_grid import draw_image_grid
from factorkit.reproduce import views
from factorkit.reproduce.experiment import Experiment, Found, NotRun, Row
from factorkit.reproduce.setup import Setup
from factorkit.utils.images import images_to_pixels

SHOWN, FRAMES, STEPS = 6, 12, 10


def figure(
    name: str, title: str, work: Callable[[Setup, NerfdiffRun, int], Sequence[str]], figures: Sequence[str] = ()
) -> Experiment:
    """An experiment of pictures, by ``work`` from the run that the ablations call usual."""

    def cell(setup: Setup, seed: int) -> Found:
        return Found(pictures=work(setup, views.train(setup, seed, views.JOINT), seed))

    return Experiment(
        name=name,
        title=title,
        data=views.DATA,
        duration=views.DURATION,
        columns=(),
        rows=lambda setup: [Row("ours", cell)],
        figures=figures,
        seeds=1,
    )


def reconstructions(setup: Setup, run: NerfdiffRun, seed: int) -> list[str]:
    """Unseen views, what the scene looks like from their predicted poses, and its depth."""
    unseen = views.views(setup)[1].select(slice(0, SHOWN))
    seen = run.reconstruct(unseen)
    given = unseen.resize(tuple(seen.images.shape[2:])).images
    sheet = views_sheet(given, seen.images, seen.depth, seen.opacity, unseen.names)
    return [setup.save(sheet, f"reconstructions-seed{seed}.png")]


def cameras(setup: Setup, run: NerfdiffRun, seed: int) -> list[str]:
    """Where the found cameras stand beside the true ones: on a sphere, those that face forward in their plane."""
    true = training_errors(run).alignment.inverse().apply(views.views(setup)[0].poses)
    forward = run.scene["layout"] == "forward"
    picture = plane_picture(run.poses, candidates=true) if forward else sphere_picture(run.poses, true=true)
    return [setup.save(picture, f"cameras-seed{seed}.png")]


def evolution(setup: Setup, run: NerfdiffRun, seed: int) -> list[str]:
    """The sheets of cameras that the training drew as it went, in order.

    Raises:
        NotRun: the training drew none.
    """
    drawn = sorted((run.folder / "samples").glob("*_cameras_encoder.png"))
    if not drawn:
        raise NotRun("the training drew no cameras on its way; it takes sample_every above 0")
    names = []
    for path in drawn:
        with Image.open(path, formats=("PNG",)) as picture:
            names.append(setup.save(picture.convert("RGB"), f"seed{seed}-{path.name}"))
    return names


def trajectory(setup: Setup, run: NerfdiffRun, seed: int) -> list[str]:
    """New views along a circle."""
    frames = list(images_to_pixels(run.render_path("orbit", frames=FRAMES).images))
    sheet = draw_image_grid([frames[: FRAMES // 2], frames[FRAMES // 2 :]])
    return [setup.save(sheet, f"orbit-seed{seed}.png")]


def from_noise(setup: Setup, run: NerfdiffRun, seed: int) -> list[str]:
    """Views and their cameras out of noise, step by step."""
    steps = run.sample(3, seed=seed, trajectory=True).trajectory
    picked = [steps[i] for i in np.linspace(0, len(steps) - 1, min(STEPS, len(steps))).round().astype(int)]
    sheet = novel_sheet(
        [s.images.clamp(0, 1) for s in picked],
        [s.cameras.best for s in picked],
        [s.t for s in picked],
        [((s.noisy + 1) / 2).clamp(0, 1) for s in picked],
        run.scene["layout"],
    )
    return [setup.save(sheet, f"noise-seed{seed}.png")]
