"""What segdiff asks of the training loop: its loss, its parameter groups, its sample sheets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factorkit.diffusion.objective import (
    coarse_to_fine_power,
    denoising_loss,
    loss_weight,
    min_snr_weight,
    training_target,
)
from factorkit.diffusion.schedule import Schedule
from factorkit.engine.step import StepLoss
from factorkit.segdiff import previews as pictures
from factorkit.segdiff.alarms import Alarms, measure_alarms
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.hierarchy import hard_labels, level_labels
from factorkit.segdiff.masks.mixture import noise_error, unexplained_noise
from factorkit.segdiff.network import FactorizedUNet
from factorkit.segdiff.sampling import branch_estimates, draw_images
from factorkit.utils.atomic import save_image
from factorkit.utils.images import pixels_to_signed, signed_to_pixels
from factorkit.utils.rng import BatchDraw, derived_seed

PROBES = 96  # images the alarms are measured on; the position share of N independent masks is 1/N by chance
SHOWN = 8  # images on a sample sheet
AT_ONCE = 32  # squares of the training resolution that are segmented together
SHEET_STEPS = 25  # denoising steps of the generated ones


class SegdiffTask:
    """Denoising as the only teacher: noise an image, ask for v or eps, weigh the squared error.

    Args:
        config: resolved.
        images: uint8 [N, R, R, 3], usually a memory map.
        probes: uint8 [M, R, R, 3], M >= 2, images for sheets and alarms, held-out ones where there are any.
        device: where to train; the images are kept there too when it is a GPU with room for them.
        labels: int64 [N], -1 where an image has none, for a configuration with classes.
    """

    def __init__(
        self,
        config: SegdiffConfig,
        images: np.ndarray,
        probes: np.ndarray,
        device: torch.device,
        labels: np.ndarray | None = None,
    ):
        torch.manual_seed(derived_seed("weights", config.seed))
        self.config, self.device, self.size = config, device, len(images)
        self.model = config.build()
        self.schedule = config.noising(device)
        self.labels = None if labels is None else torch.from_numpy(labels).to(device)
        self.images = resident(images, device)
        self.capturable = isinstance(self.images, Tensor)
        self.probes = pixels_to_signed(torch.from_numpy(np.array(probes[:PROBES])))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The mask generator learns slower: masks that saturate early never move again. Places learn faster: each of
        their numbers hears of a few pixels only."""
        slow = self.model.mask_parameters()
        taken = {id(p) for p in slow}
        groups = [{"params": [p for p in self.model.parameters() if id(p) not in taken], "scale": 1.0}]
        return groups + ([{"params": slow, "scale": self.config.mask_learning_rate}] if slow else [])

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        config = self.config
        x0, eps, t = self._drawn(indices, draw)
        x_t = self.schedule.noise(x0, eps, t)
        out = model(x_t, t, *self._told(indices, draw))
        wanted = training_target(config.prediction, self.schedule, x0, eps, t)
        loss = weighted = denoising_loss(out.prediction, wanted)
        if out.bottleneck.levels is not None:
            # A hierarchy's prediction is a mean over what its levels predict, and its error at most the mean of theirs.
            # Of the mean alone a level would hear what the others leave of twice the noise.
            weighted = torch.stack([denoising_loss(each, wanted) for each in out.bottleneck.levels.unbind(1)]).mean(0)
        if config.coarse_to_fine[1]:
            power = coarse_to_fine_power(step + 1, *config.coarse_to_fine)
            weighted = weighted * loss_weight(self.schedule, t, power)
        if config.loss_weighting == "min_snr":
            weighted = weighted * min_snr_weight(config.prediction, self.schedule, t, config.min_snr_gamma)
        if out.bottleneck.score is not None:
            # what the regions' colours alone take the noise to be: this is what teaches them their places
            weighted = weighted + noise_error(out.bottleneck.score, self.schedule, eps, t)
        return StepLoss(weighted, loss, t / config.timesteps, self._watch(out.bottleneck.masks))

    def _drawn(self, indices: Tensor, draw: BatchDraw) -> tuple[Tensor, Tensor, Tensor]:
        """The pictures [B, 3, R, R], their noise, and its levels [B]."""
        config, x0 = self.config, pixels_to_signed(self._gather(indices))
        mirrored = draw.uniform() < 0.5
        if config.random_flip:
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        t = draw.integers(0, config.t_max)
        if config.high_noise_fraction:
            t = torch.where(
                draw.uniform() < config.high_noise_fraction, draw.integers(config.t_max, config.timesteps), t
            )
        return x0, draw.normal(*x0.shape[1:]), t

    def _told(self, indices: Tensor, draw: BatchDraw) -> tuple[Tensor, ...]:
        """The labels of the images, some of them left out; nothing where the model has no classes."""
        if self.labels is None:
            return ()
        return (torch.where(draw.uniform() < self.config.label_dropout, -1, self.labels[indices.to(self.device)]),)

    def _gather(self, indices: Tensor) -> Tensor:
        if isinstance(self.images, Tensor):
            return self.images[indices.to(self.images.device)].to(self.device)
        # a sorted read keeps a memory map's pages in order
        order = np.argsort(indices.numpy(), kind="stable")
        rows = self.images[indices.numpy()[order]][np.argsort(order, kind="stable")]
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def _watch(self, masks: Tensor) -> dict[str, Tensor]:
        if self.config.num_leaf_regions == 1:
            return {}
        masks = masks.detach()
        entropy = -(masks * masks.clamp_min(1e-8).log()).sum(1).mean() / np.log(self.config.num_leaf_regions)
        return {"areas": masks.mean((0, 2, 3)), "entropy": entropy}

    def inspect(self, model: FactorizedUNet, step: int, folder: Path) -> dict[str, Any]:
        """Sheets of segmented and of generated images; the label-free alarms (nothing for ``regions=1``)."""
        folder.mkdir(parents=True, exist_ok=True)
        shown = torch.arange(SHOWN) % len(self.config.class_names) if self.config.class_names else None
        generated = draw_images(model, self.config, SHOWN, steps=SHEET_STEPS, seed=0, device=self.device, labels=shown)
        masks = generated.bottleneck.masks.float().cpu().numpy()
        sheet = pictures.generation_sheet(signed_to_pixels(generated.images), masks)
        save_image(sheet, folder / f"{step:06d}_generated.png")
        # evenly spaced, so that a folder sorted by class shows all of it
        picked = torch.linspace(0, len(self.probes) - 1, min(SHOWN, len(self.probes))).round().long()
        shown = self.probes[picked].to(self.device)
        x_t, t = noised(shown, self.config.segment_t, self.schedule)
        out = model(x_t, t)
        branches = None
        if out.bottleneck.branches is not None:
            each = branch_estimates(self.config.prediction, self.schedule, x_t, out.bottleneck.branches, t)
            branches = np.stack([signed_to_pixels(b) for b in each.unbind(1)], 1) / 255.0
        masks, nesting = out.bottleneck.masks.float().cpu(), self.config.nesting
        labels = hard_labels(masks, nesting)
        levels = [level_labels(labels, nesting, level + 1).numpy() for level in range(len(nesting))]
        levels = levels if len(nesting) > 1 else ()
        sheet = pictures.segmentation_sheet(signed_to_pixels(shown), masks.numpy(), branches, levels=levels)
        save_image(sheet, folder / f"{step:06d}_segmentation.png")
        return {} if self.config.num_leaf_regions == 1 else self.alarms(model).to_dict()

    def alarms(self, model: FactorizedUNet) -> Alarms:
        """The label-free alarms of ``model`` on the probe images."""
        masks = predict_masks(model, self.probes, self.config.segment_t, self.schedule)
        flipped = predict_masks(model, self.probes.flip(3), self.config.segment_t, self.schedule)
        found = measure_alarms(self.probes, masks, flipped)
        if self.config.masks != "mixture":
            return found
        return dataclasses.replace(found, error=unexplained_noise(model.competition, self.probes, self.schedule))


def resident(images: np.ndarray, device: torch.device) -> Tensor | np.ndarray:
    """The images on the GPU where they take less than a third of its free memory, else where they lie."""
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 3:
        return torch.from_numpy(np.array(images)).to(device)
    return images


def noised(images: Tensor, t: int, schedule: Schedule, draw: int = 0) -> tuple[Tensor, Tensor]:
    """``images`` [B, 3, H, W] at level t, with noise that depends on nothing but ``draw`` and their shape; t as [B]."""
    generator = torch.Generator().manual_seed(derived_seed("segment", t, *([draw] if draw else [])))
    # one picture's noise for all of them: an image's masks must not depend on its place in the batch
    eps = torch.randn(images.shape[1:], generator=generator).to(images.device).expand_as(images)
    times = torch.full((len(images),), t, dtype=torch.int64, device=images.device)
    return schedule.noise(images, eps, times), times


@torch.no_grad()
def predict_masks(
    model: FactorizedUNet, images: Tensor, t: int, schedule: Schedule, draw: int = 0, label: int | None = None
) -> Tensor:
    """Region masks [N, K, H, W] (fp32, CPU) of ``images`` [N, 3, H, W] in [-1, 1]; the decoders are not run.

    draw: of the noise; label: the class the model is told, None for none.
    """
    found = []
    batch = max(1, AT_ONCE * model.resolution**2 // (images.shape[2] * images.shape[3]))
    for part in images.split(batch):
        x_t, times = noised(part.to(schedule.device), t, schedule, draw)
        told = () if label is None else (torch.full_like(times, label),)
        found.append(model.segment(x_t, times, *told).float().cpu())
    return torch.cat(found)
