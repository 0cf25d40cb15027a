"""``factorkit.choose_regions``: choose the number of regions without labels.

A spatial mixture (:mod:`factorkit.segdiff.masks.spatial_mixture`) is a denoiser by itself, without any U-Net, and
trains in seconds. The noise that it cannot separate from held-out images falls with its number of regions K: steeply
until everything that the images share has a region of its own, and hardly after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from factorkit.engine.config import cpu_threads, resolve_device
from factorkit.engine.run_folder import claimed, write_json
from factorkit.engine.step import StepLoss
from factorkit.engine.trainer import Trainer
from factorkit.report.image_grid import draw_image_grid, overlay_enlarged
from factorkit.segdiff.config import ResolvedSegdiffConfig, SegdiffConfig, preset_config
from factorkit.segdiff.inference.segment import add_noise
from factorkit.segdiff.masks.spatial_mixture import SpatialMixture, noise_error, unexplained_noise
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.training_images import DATA_NAME, describe_data, hold_out, load_data
from factorkit.utils.errors import ConfigError
from factorkit.utils.files import save_image
from factorkit.utils.images import signed_to_pixels
from factorkit.utils.rng import BatchDraw

CHOICE_FILE, GRID_FILE = "choice.json", "regions.png"
MIN_IMPROVEMENT = 0.02  # share of the error; see docs/results.md
NUM_PREVIEW_IMAGES = 8
#: the U-Net is built but not trained, so it is tiny; a mixture converges within some hundred steps
SETTINGS: dict[str, Any] = {
    "preset": "fast32",
    "masks": "mixture",
    "model_channels": 8,
    "channel_mult": (1,),
    "warmup_steps": 20,
    "log_every": 50,
}


@dataclass(frozen=True)
class RegionChoice:
    """The result of :func:`choose_regions`.

    Attributes:
        regions: the recommended K.
        errors: of each candidate, the unexplained noise of held-out images for each seed.
        improvements: of each candidate but the last, the share of its error that the next one removes (best seeds).
        reason: the rule and the figures behind the recommendation.
        folder: where choice.json, regions.png and the trainings are.
    """

    regions: int
    errors: dict[int, list[float]]
    improvements: dict[int, float]
    reason: str
    folder: Path

    def table(self) -> str:
        """Format the result, one line per candidate."""
        lines = [f"{'K':>3} {'error':>8} {'to the next':>12}   each seed"]
        for k, errors in self.errors.items():
            change = f"{-self.improvements[k]:+12.1%}" if k in self.improvements else " " * 12
            each = " ".join(f"{error:.4f}" for error in errors)
            lines.append(f"{k:>3} {min(errors):8.4f} {change}   {each}{'   <' * (k == self.regions)}")
        return "\n".join(lines)


class MixtureTask(SegdiffTask):
    """Train a spatial mixture by its own denoising loss alone."""

    def __init__(self, config: ResolvedSegdiffConfig, images: np.ndarray, probes: np.ndarray, device: torch.device):
        super().__init__(config, images, probes, device)
        self.model = cast(SpatialMixture, self.model.masks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the one group of the mixture."""
        return [{"params": list(self.model.parameters()), "scale": self.config.mask_learning_rate}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the denoising loss of the mixture."""
        x0, eps, t = self._draw_batch(indices, draw)
        logits, score = model(self.schedule.noise(x0, eps, t))
        error = noise_error(score, self.schedule, eps, t)
        return StepLoss(error, error.detach(), t / self.config.timesteps, self._watch(logits.softmax(1)))

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Return the error for the log."""
        return {"error": unexplained_noise(cast(SpatialMixture, model), self.probes, self.schedule)}


def choose_regions(
    data: Any = None,
    *,
    out: str | Path = "runs/regions",
    candidates: Sequence[int] = (2, 3, 4, 5),
    seed_trials: int = 2,
    min_improvement: float = MIN_IMPROVEMENT,
    resolution: int = 32,
    random_flip: bool = True,
    steps: int = 200,
    holdout: str | int = "auto",
    device: str = "auto",
    progress: bool = True,
) -> RegionChoice:
    """Choose K without labels: the smallest after which one more region hardly improves denoising.

    For every candidate and seed a spatial mixture is trained for seconds, each in a folder of its own under ``out``.
    The same call again trains only what is not finished; candidates, seeds and steps may be added. The method counts
    regions that are at much the same place in all images, whatever their colours; docs/results.md says where that is
    right and where not.

    Args:
        data: as for :func:`factorkit.train_segdiff`; None: the procedural flowers. Labels are not used, except that
            labelled images are held out; without any, up to a quarter of all images is.
        out: folder of the result and the trainings.
        candidates: numbers of regions, at least two of them, each at least 2.
        seed_trials: trainings of each candidate, from different seeds; the best represents it.
        min_improvement: the share of the error that one more region must remove to be recommended.
        resolution: side of the images in pixels.
        random_flip: flip half of the images; False if all objects face one way, as in training.
        steps: of each training.
        holdout: as in training.
        device: as in training.
        progress: show progress bars.

    Raises:
        ConfigError: fewer than two candidates, one below 2, or a setting out of range.
        DataError: fewer than 8 images, or none that can be read.
        CheckpointError: ``out`` holds something else, or cannot be written.

    Example:
        >>> choice = factorkit.choose_regions(images, out="runs/k", candidates=(2, 3), seed_trials=1, resolution=16,
        ...                                   steps=2, progress=False)
        >>> choice.regions in (2, 3), sorted(choice.errors), list(choice.improvements)
        (True, [2, 3], [2])
    """
    candidates = sorted({int(k) for k in candidates})
    if len(candidates) < 2 or candidates[0] < 2:
        raise ConfigError(f"candidates={tuple(candidates)}: give two numbers of regions or more, each at least 2")
    if seed_trials < 1 or not 0 < min_improvement < 1:
        raise ConfigError(
            f"seed_trials={seed_trials} must be at least 1 and min_improvement={min_improvement} between 0 and 1"
        )
    changes: dict[str, Any] = {"resolution": resolution, "random_flip": random_flip, "steps": steps, "device": device}
    configs = [preset_config(**SETTINGS, **changes, holdout=holdout, regions=k).resolved() for k in candidates]
    torch_device, folder = resolve_device(device), Path(out)
    dataset, prepared, probes = load_data(data, resolution, holdout, None, progress)
    images, probes = hold_out(dataset, prepared.images, probes)
    settings = {"model": "choose_regions", **configs[0].to_dict(), "data": describe_data(dataset, prepared)}
    with claimed(folder, settings, SegdiffConfig.RESUMABLE | {"regions", DATA_NAME}), cpu_threads(configs[0].threads):
        errors: dict[int, list[float]] = {}
        best: list[SpatialMixture] = []
        for k, config in zip(candidates, configs, strict=True):
            trials: list[tuple[float, SpatialMixture]] = []
            for seed in range(seed_trials):
                task = MixtureTask(dataclasses.replace(config, seed=seed), images, probes, torch_device)
                trial_folder, meta = folder / f"k{k}_seed{seed}", {"model": "places", **task.config.to_dict()}
                trainer = Trainer(task, task.config, trial_folder, meta, device=torch_device, progress=progress)
                model = cast(SpatialMixture, trainer.run())
                trials.append((unexplained_noise(model, task.probes, task.schedule), model))
            errors[k] = [error for error, _ in trials]
            best.append(min(trials, key=lambda trial: trial[0])[1])
        improvements, regions, reason = recommend({k: min(each) for k, each in errors.items()}, min_improvement)
        result = {"regions": regions, "errors": errors, "improvements": improvements, "reason": reason, "steps": steps}
        write_json(folder / CHOICE_FILE, result)
        save_image(draw_comparison(best, task, candidates, regions), folder / GRID_FILE)
    return RegionChoice(regions, errors, improvements, reason, folder)


def recommend(errors: dict[int, float], min_improvement: float) -> tuple[dict[int, float], int, str]:
    """Return the improvement from each K to the next, the recommended K, and the reason."""
    order = sorted(errors)
    improvements = {k: 1 - errors[larger] / errors[k] for k, larger in pairwise(order)}
    for (k, share), larger in zip(improvements.items(), order[1:], strict=True):
        if share < min_improvement:
            change = f"lowers the error by {share:.1%}" if share > 0 else f"raises the error by {-share:.1%}"
            reason = f"K = {k} is the smallest after which the next, {larger}, {change}: under {min_improvement:.1%}"
            return improvements, k, reason
    last = order[-1]
    reason = f"up to K = {last} each lowers the error by {min_improvement:.1%} or more; try larger candidates too"
    return improvements, last, reason


def draw_comparison(
    models: Sequence[SpatialMixture], task: MixtureTask, candidates: Sequence[int], regions: int
) -> Image.Image:
    """Draw held-out images and the regions of the best seed of every K."""
    chosen = torch.linspace(0, len(task.probes) - 1, min(NUM_PREVIEW_IMAGES, len(task.probes))).round().long()
    images = task.probes[chosen]
    pixels = signed_to_pixels(images)
    x_t, _ = add_noise(images.to(task.device), task.config.segment_t, task.schedule)
    rows = [list(pixels)]
    for model in models:
        with torch.no_grad():
            labels = model(x_t).logits.argmax(1).cpu().numpy()
        rows.append([overlay_enlarged(image, label) for image, label in zip(pixels, labels, strict=True)])
    captions = ["images", *(f"K = {k}{', chosen' * (k == regions)}" for k in candidates)]
    return draw_image_grid(rows, None, captions)
