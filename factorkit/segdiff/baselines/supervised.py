"""The upper mark of tables 2.3 to 2.5: a U-Net of the same layout that is taught with labels, by cross-entropy."""

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
from factorkit.metrics.class_matching import IGNORE_LABEL
from factorkit.nn.unet import Decoder, Encoder, Middle, TimeEmbedding
from factorkit.report.image_grid import draw_image_grid
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.previews import overlay_enlarged
from factorkit.segdiff.task import MASK_BATCH_SIZE, move_if_it_fits
from factorkit.utils.atomic import save_image
from factorkit.utils.errors import DataError
from factorkit.utils.images import pixels_to_signed
from factorkit.utils.rng import BatchDraw, derived_seed

SHOWN = 8  # images on a sheet


class ClassUNet(nn.Module):
    """Encoder, middle and decoder of the plain DDPM, shown clean images at t = 0; answers a logit for every class."""

    def __init__(self, config: ResolvedSegdiffConfig, classes: int):
        super().__init__()
        common = {"num_heads": config.num_heads, "norm_groups": config.norm_groups, "dropout": config.dropout}
        embed = 4 * config.model_channels
        shape = (
            config.model_channels,
            config.channel_mult,
            config.num_res_blocks,
            config.attention_resolutions,
            config.resolution,
            embed,
        )
        self.time = TimeEmbedding(config.model_channels)
        self.encoder = Encoder(3, *shape, **common)
        channels = self.encoder.out_channels
        self.middle = Middle(channels, embed, **common)
        self.decoder = Decoder(channels, self.encoder.skip_channels, *shape, classes, **common)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to logits [B, classes, H, W]."""
        embedding = self.time(torch.zeros(len(images), dtype=torch.int64, device=images.device))
        skips = self.encoder(images, embedding)
        return self.decoder(self.middle(skips[-1], embedding), skips, embedding).float()


class SupervisedTask:
    """Cross-entropy of pixels, mirrored images among them.

    Args:
        images: uint8 [N, R, R, 3]; truth: int [N, R, R], classes or IGNORE_LABEL.
    """

    def __init__(
        self, config: ResolvedSegdiffConfig, images: np.ndarray, truth: np.ndarray, classes: int, device: torch.device
    ):
        torch.manual_seed(derived_seed("weights", config.seed))
        self.config, self.device, self.size = config, device, len(images)
        self.model = ClassUNet(config, classes)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images, self.truth = move_if_it_fits(images, device), torch.from_numpy(truth.astype(np.int64)).to(device)
        self.capturable = isinstance(self.images, Tensor)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        rows = self.images[indices] if self.capturable else torch.from_numpy(self.images[indices.numpy()])
        images, truth = pixels_to_signed(rows.to(self.device)), self.truth[indices.to(self.device)]
        mirrored = draw.uniform() < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        truth = torch.where(mirrored[:, None, None], truth.flip(2), truth)
        each = F.cross_entropy(model(images), truth, ignore_index=IGNORE_LABEL, reduction="none")
        counted = (truth != IGNORE_LABEL).sum((1, 2)).clamp_min(1)
        loss = each.sum((1, 2)) / counted
        return StepLoss(loss, loss, torch.zeros_like(loss), {})

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """A sheet of training images with the classes found in them."""
        folder.mkdir(parents=True, exist_ok=True)
        images = np.array(self.images[:SHOWN].cpu() if self.capturable else self.images[:SHOWN])
        found = predict_classes(model, images, self.device)
        rows = [list(images), [overlay_enlarged(i, labels) for i, labels in zip(images, found, strict=True)]]
        save_image(draw_image_grid(rows), folder / f"{step:06d}_classes.png")
        return {}


def train_supervised(
    images: np.ndarray,
    truth: np.ndarray,
    classes: int,
    config: ResolvedSegdiffConfig,
    out: str | Path,
    progress: bool = True,
) -> ClassUNet:
    """Train a U-Net on labelled images by the engine; the same call again resumes, or takes up what is finished.

    Args:
        images: uint8 [N, R, R, 3] at the configuration's resolution.
        truth: int [N, R, R] in [0, classes), IGNORE_LABEL where a pixel does not count.
        config: resolved; its architecture, optimiser and seed are used, its regions and noise are not.

    Raises:
        DataError: images and truth that do not go together, or classes out of range.
        CheckpointError: the folder holds another run.
    """
    side = config.resolution
    if images.shape != (len(images), side, side, 3) or truth.shape != images.shape[:3] or not len(images):
        raise DataError(f"images {images.shape} and truth {truth.shape}: give [N, {side}, {side}, 3] and the same N")
    if truth.max() >= classes or truth.min() < IGNORE_LABEL:
        raise DataError(f"truth runs from {truth.min()} to {truth.max()}, the classes from 0 to {classes - 1}")
    device, folder = resolve_device(config.device), Path(out)
    digests = [hashlib.sha256(np.ascontiguousarray(a)).hexdigest()[:16] for a in (images, truth.astype(np.int64))]
    data = {"classes": classes, "images": len(images), "sha256": digests[0], "truth_sha256": digests[1]}
    settings = {"model": "supervised", **config.to_dict(), "data": data}
    task = SupervisedTask(config, images, truth, classes, device)
    with cpu_threads(config.threads), claimed(folder, settings, config.RESUMABLE):
        trained = Trainer(task, config, folder, settings, device=device, progress=progress).run()
        return cast(ClassUNet, trained.eval())


@torch.no_grad()
def predict_classes(model: ClassUNet, images: np.ndarray, device: torch.device | str | None = None) -> np.ndarray:
    """The most probable class of each pixel, int64 [N, R, R], of pictures uint8 [N, R, R, 3]."""
    device = next(model.parameters()).device if device is None else device
    parts = torch.from_numpy(np.ascontiguousarray(images)).split(MASK_BATCH_SIZE)
    return np.concatenate([model(pixels_to_signed(part.to(device))).argmax(1).cpu().numpy() for part in parts])
