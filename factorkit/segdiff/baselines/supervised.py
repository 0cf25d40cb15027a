"""The upper bound of tables 2.3 to 2.5: a network of the same layout, trained with labels by cross-entropy."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.engine.config import cpu_threads, resolve_device
from factorkit.engine.run_folder import claimed
from factorkit.engine.step import StepLoss
from factorkit.engine.trainer import Trainer
from factorkit.metrics.segmentation import IGNORE_LABEL
from factorkit.report.image_grid import draw_image_grid, overlay_enlarged
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.inference.segment import MASK_BATCH_SIZE
from factorkit.segdiff.task import move_if_it_fits
from factorkit.utils.errors import DataError
from factorkit.utils.files import save_image
from factorkit.utils.images import pixels_to_signed
from factorkit.utils.rng import BatchDraw, derived_seed

PREVIEW_IMAGES = 8


class ClassNetwork(nn.Module):
    """Encoder, middle and decoder of the plain DDPM on clean images at t = 0; its outputs are class logits."""

    def __init__(self, config: ResolvedSegdiffConfig, num_classes: int):
        super().__init__()
        backbone = config.make_backbone()
        self.time, self.encoder, self.middle = (
            backbone.build_time(),
            backbone.build_encoder(),
            backbone.build_middle(),
        )
        self.decoder = backbone.build_decoder(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [-1, 1] to logits [B, classes, H, W]."""
        embedding = self.time(torch.zeros(len(images), dtype=torch.int64, device=images.device))
        skips = self.encoder(images, embedding)
        return self.decoder(self.middle(skips[-1], embedding), skips, embedding).float()


class SupervisedTask:
    """Training by the cross-entropy of pixels, with random flips.

    Args:
        images: uint8 [N, R, R, 3].
        truth: int [N, R, R], classes or IGNORE_LABEL.
        num_classes: number of logits.
    """

    def __init__(
        self,
        config: ResolvedSegdiffConfig,
        images: np.ndarray,
        truth: np.ndarray,
        num_classes: int,
        device: torch.device,
    ):
        torch.manual_seed(derived_seed("weights", config.seed))
        self.config, self.device, self.size = config, device, len(images)
        self.model: nn.Module = ClassNetwork(config, num_classes)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images, self.truth = move_if_it_fits(images, device), torch.from_numpy(truth.astype(np.int64)).to(device)
        self.capturable = isinstance(self.images, Tensor)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return one group of all parameters."""
        return [{"params": list(self.model.parameters()), "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Compute the mean cross-entropy over the labelled pixels of each image."""
        images = self.images
        rows = images[indices] if isinstance(images, Tensor) else torch.from_numpy(images[indices.numpy()])
        x, truth = pixels_to_signed(rows.to(self.device)), self.truth[indices.to(self.device)]
        flipped = draw.uniform() < 0.5
        x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        truth = torch.where(flipped[:, None, None], truth.flip(2), truth)
        per_pixel = F.cross_entropy(model(x), truth, ignore_index=IGNORE_LABEL, reduction="none")
        loss = per_pixel.sum((1, 2)) / (truth != IGNORE_LABEL).sum((1, 2)).clamp_min(1)
        return StepLoss(loss, loss, torch.zeros_like(loss), {})

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Write a preview of training images with their predicted classes."""
        folder.mkdir(parents=True, exist_ok=True)
        images = self.images[:PREVIEW_IMAGES]
        images = np.array(images.cpu() if isinstance(images, Tensor) else images)
        labels = predict_classes(cast(ClassNetwork, model), images, self.device)
        rows = [list(images), list(map(overlay_enlarged, images, labels))]
        save_image(draw_image_grid(rows), folder / f"{step:06d}_classes.png")
        return {}


def train_supervised(
    images: np.ndarray,
    truth: np.ndarray,
    num_classes: int,
    config: ResolvedSegdiffConfig,
    out: str | Path,
    progress: bool = True,
) -> ClassNetwork:
    """Train a network on labelled images; the same call again resumes, or loads what is finished.

    Args:
        images: uint8 [N, R, R, 3] at the configuration's resolution.
        truth: int [N, R, R] in [0, num_classes), IGNORE_LABEL for pixels that are not counted.
        config: resolved; its architecture, optimiser and seed are used, its regions and noise are not.

    Raises:
        DataError: images and truth of different sizes, or classes out of range.
        CheckpointError: the folder holds another run.
    """
    side = config.resolution
    if images.shape != (len(images), side, side, 3) or truth.shape != images.shape[:3] or not len(images):
        raise DataError(f"images {images.shape} and truth {truth.shape}: give [N, {side}, {side}, 3] and the same N")
    if truth.max() >= num_classes or truth.min() < IGNORE_LABEL:
        raise DataError(f"truth runs from {truth.min()} to {truth.max()}; use 0 to {num_classes - 1}")
    device, folder = resolve_device(config.device), Path(out)
    digests = [hashlib.sha256(np.ascontiguousarray(a)).hexdigest()[:16] for a in (images, truth.astype(np.int64))]
    data = {"classes": num_classes, "images": len(images), "sha256": digests[0], "truth_sha256": digests[1]}
    settings = {"model": "supervised", **config.to_dict(), "data": data}
    task = SupervisedTask(config, images, truth, num_classes, device)
    with cpu_threads(config.threads), claimed(folder, settings, config.RESUMABLE):
        trained = Trainer(task, config, folder, settings, device=device, progress=progress).run()
        return cast(ClassNetwork, trained.eval())


@torch.no_grad()
def predict_classes(model: ClassNetwork, images: np.ndarray, device: torch.device | str | None = None) -> np.ndarray:
    """Return the most probable class of each pixel, int64 [N, R, R], of images uint8 [N, R, R, 3]."""
    device = next(model.parameters()).device if device is None else device
    parts = torch.from_numpy(np.ascontiguousarray(images)).split(MASK_BATCH_SIZE)
    return np.concatenate([model(pixels_to_signed(part.to(device))).argmax(1).cpu().numpy() for part in parts])
