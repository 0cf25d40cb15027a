"""``factorkit.choose_regions``: how many regions photographs fall into, asked of the photographs alone.

Regions that compete by place and colour (:mod:`factorkit.segdiff.masks.mixture`) are a denoiser by themselves, without
any U-Net, and learn in seconds. How much noise they cannot tell from photographs kept out of training falls with their
number K, steeply until every thing that the photographs share has a region of its own, and hardly after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from factorkit.engine.config import cpu_threads, resolve_device
from factorkit.engine.run_folder import claimed, write_json
from factorkit.engine.step import StepLoss
from factorkit.engine.trainer import Trainer
from factorkit.segdiff import previews as pictures
from factorkit.segdiff.config import SegdiffConfig, preset_config
from factorkit.segdiff.masks.mixture import RegionCompetition, noise_error, unexplained_noise
from factorkit.segdiff.task import PROBES, SegdiffTask, noised
from factorkit.segdiff.train import describe, load_data
from factorkit.utils.atomic import save_image
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import signed_to_pixels
from factorkit.utils.rng import BatchDraw

CHOICE, SHEET = "choice.json", "regions.png"
LEAST_FALL = 0.02  # of the error, by which a further region has to lower it
SHOWN = 8  # photographs in the picture
LEAST_IMAGES = 8
#: the U-Net is built and left alone, so it may be any; a competition settles in some hundred steps
SETTINGS = {
    "preset": "fast32",
    "masks": "mixture",
    "model_channels": 8,
    "channel_mult": (1,),
    "warmup_steps": 20,
    "log_every": 50,
}


@dataclass(frozen=True)
class RegionChoice:
    """What :func:`choose_regions` found.

    Attributes:
        regions: the K it recommends.
        errors: of each candidate, the noise that each seed could not tell from photographs kept out of training.
        falls: of each candidate but the last, the share of its error that the next one takes off; best seeds compared.
        reason: the rule, and what it saw.
        folder: where choice.json and regions.png lie, and the trainings.
    """

    regions: int
    errors: dict[int, list[float]]
    falls: dict[int, float]
    reason: str
    folder: Path

    def table(self) -> str:
        """A line a candidate."""
        lines = [f"{'K':>3} {'error':>8} {'to the next':>12}   each seed"]
        for k, errors in self.errors.items():
            fall = f"{-self.falls[k]:+12.1%}" if k in self.falls else " " * 12
            each = " ".join(f"{error:.4f}" for error in errors)
            lines.append(f"{k:>3} {min(errors):8.4f} {fall}   {each}{'   <' * (k == self.regions)}")
        return "\n".join(lines)


class PlacesTask(SegdiffTask):
    """A competition taught by its own denoising loss alone."""

    def __init__(self, config: SegdiffConfig, images: np.ndarray, held_out: np.ndarray, device: torch.device):
        super().__init__(config, images, held_out, device)
        self.model: RegionCompetition = self.model.competition

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "scale": self.config.mask_learning_rate}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        x0, eps, t = self._drawn(indices, draw)
        contest = model(self.schedule.noise(x0, eps, t))
        error = noise_error(contest.score, self.schedule, eps, t)
        return StepLoss(error, error.detach(), t / self.config.timesteps, self._watch(contest.logits.softmax(1)))

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        return {"error": unexplained_noise(model, self.probes, self.schedule)}


def choose_regions(
    data: Any = None,
    *,
    out: str | Path = "runs/regions",
    candidates: Sequence[int] = (2, 3, 4, 5),
    seed_trials: int = 2,
    min_improvement: float = LEAST_FALL,
    resolution: int = 32,
    random_flip: bool = True,
    steps: int = 200,
    holdout: str | int = "auto",
    device: str = "auto",
    progress: bool = True,
) -> RegionChoice:
    """Choose K without labels: the smallest after which a further region hardly helps to denoise.

    For every candidate and seed a competition of so many regions is trained for seconds, each in a folder of its own
    under ``out``; the same call again trains only what is not finished, and more candidates, seeds or steps may be
    asked for. It counts regions that lie at much the same place in all photographs, whatever their colours; see
    docs/results.md for where that is right and where not.

    Args:
        data: as :func:`factorkit.train_segdiff` takes it; None: the procedural flowers. Labels are not used, except
            that labelled images are the ones kept out; where there are none, up to a quarter of all are.
        out: folder of the result and the trainings.
        candidates: numbers of regions, at least two, from 2 on.
        seed_trials: trainings of each candidate, from different seeds; the best represents it.
        min_improvement: the share of the error that a further region must take off to be worth having.
        resolution: pixels a side.
        random_flip: show half of the photographs mirrored; False where all face one way, as in training.
        steps: of each training.
        holdout: as in training.
        device: as in training.
        progress: show progress bars.

    Raises:
        ConfigError: fewer than two candidates, one below 2, or a setting out of range.
        DataError: fewer than 8 images, or none that can be read.
        CheckpointError: ``out`` holds something else, or cannot be written.

    Example:
        >>> choice = factorkit.choose_regions(pictures, out="runs/k", candidates=(2, 3), seed_trials=1, resolution=16,
        ...                                   steps=2, progress=False)
        >>> choice.regions in (2, 3), sorted(choice.errors), list(choice.falls)
        (True, [2, 3], [2])
    """
    candidates = sorted({int(k) for k in candidates})
    if len(candidates) < 2 or candidates[0] < 2:
        raise ConfigError(f"candidates={tuple(candidates)}: give two numbers of regions or more, each at least 2")
    if seed_trials < 1 or not 0 < min_improvement < 1:
        raise ConfigError(
            f"seed_trials={seed_trials} must be at least 1 and min_improvement={min_improvement} between 0 and 1"
        )
    changes = SETTINGS | {"resolution": resolution, "random_flip": random_flip, "steps": steps, "device": device}
    configs = [preset_config(**changes, holdout=holdout, regions=k).resolved() for k in candidates]
    chosen, folder = resolve_device(device), Path(out)
    dataset, prepared, probes = load_data(data, configs[0], progress)
    images = prepared.images
    if len(images) < LEAST_IMAGES:
        raise DataError(f"{len(images)} images are too few to train on some and judge on others; give {LEAST_IMAGES}")
    if dataset.test_images is None or len(dataset.test_images) < 2:
        apart = np.linspace(0, len(images) - 1, min(PROBES, len(images) // 4)).round().astype(int)
        probes, images = images[apart], np.delete(images, apart, 0)
    settings = {"model": "choose_regions", **configs[0].to_dict(), "data": describe(dataset, prepared)}
    with claimed(folder, settings, SegdiffConfig.RESUMABLE | {"regions"}), cpu_threads(configs[0].threads):
        errors: dict[int, list[float]] = {}
        best: list[RegionCompetition] = []
        for k, config in zip(candidates, configs, strict=True):
            found: list[tuple[float, RegionCompetition]] = []
            for seed in range(seed_trials):
                task = PlacesTask(dataclasses.replace(config, seed=seed), images, probes, chosen)
                where, meta = folder / f"k{k}_seed{seed}", {"model": "places", **task.config.to_dict()}
                trainer = Trainer(task, task.config, where, meta, device=chosen, progress=progress)
                model = cast(RegionCompetition, trainer.run())
                found.append((unexplained_noise(model, task.probes, task.schedule), model))
            errors[k] = [error for error, _ in found]
            best.append(min(found, key=lambda pair: pair[0])[1])
        falls, regions, reason = recommended({k: min(each) for k, each in errors.items()}, min_improvement)
        facts = {"regions": regions, "errors": errors, "falls": falls, "reason": reason, "steps": steps}
        write_json(folder / CHOICE, facts)
        save_image(sheet(best, task, candidates, regions), folder / SHEET)
    return RegionChoice(regions, errors, falls, reason, folder)


def recommended(errors: dict[int, float], min_improvement: float) -> tuple[dict[int, float], int, str]:
    """The falls from each K to the next, the K recommended, and why."""
    order = sorted(errors)
    falls = {k: 1 - errors[after] / errors[k] for k, after in zip(order, order[1:], strict=False)}
    for k, fall in falls.items():
        if fall < min_improvement:
            after = order[order.index(k) + 1]
            changes = f"lowers the error by {fall:.1%}" if fall > 0 else f"raises the error by {-fall:.1%}"
            return (
                falls,
                k,
                f"K = {k} is the smallest after which the next, {after}, {changes}: under {min_improvement:.1%}",
            )
    last = order[-1]
    return (
        falls,
        last,
        f"up to K = {last} each lowers the error by {min_improvement:.1%} or more; try larger candidates too",
    )


def sheet(best: list[RegionCompetition], task: PlacesTask, candidates: Sequence[int], regions: int):
    """Photographs kept out of training, and how the best seed of every K parts them."""
    picked = torch.linspace(0, len(task.probes) - 1, min(SHOWN, len(task.probes))).round().long()
    shown = task.probes[picked]
    photos = signed_to_pixels(shown)
    x_t, _ = noised(shown.to(task.device), task.config.segment_t, task.schedule)
    rows = [list(photos)]
    for model in best:
        with torch.no_grad():
            labels = model(x_t).logits.argmax(1).cpu().numpy()
        rows.append([pictures.outlined(photo, label) for photo, label in zip(photos, labels, strict=True)])
    captions = ["photographs", *(f"K = {k}{', chosen' * (k == regions)}" for k in candidates)]
    return pictures.draw_image_grid(rows, None, captions)
