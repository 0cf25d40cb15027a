"""What segdiff gives to the training loop: its loss, parameter groups, previews and alarms."""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from factorkit.diffusion.schedule import (
    coarse_to_fine_power,
    denoising_loss,
    loss_weight,
    min_snr_weight,
    training_target,
)
from factorkit.engine.step import StepLoss
from factorkit.segdiff import previews
from factorkit.segdiff.alarms import Alarms, measure_alarms
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.segment import add_noise, hard_labels, level_labels, predict_masks
from factorkit.segdiff.masks.objects import measured_side, resize
from factorkit.segdiff.masks.proposal import MaskProposer
from factorkit.segdiff.masks.spatial_mixture import noise_error, unexplained_noise
from factorkit.segdiff.network import FactorizedDenoiser, PixelSpace
from factorkit.segdiff.sampling import draw_images, estimate_branches
from factorkit.utils.files import save_image
from factorkit.utils.images import pixels_to_signed, signed_to_pixels
from factorkit.utils.rng import BatchDraw, derived_seed

NUM_PROBES = 96  # images the alarms are measured on; by chance the position share of N independent masks is 1/N
NUM_PREVIEW_IMAGES = 8
PREVIEW_SIDE = 128  # pixels at which photos are drawn and segmented in them, unless the network sees more
PREVIEW_SAMPLER, NUM_PREVIEW_STEPS = "ddim", 25  # of the generated images


class ImageTask:
    """What tasks that train on images share.

    Args:
        model: to train.
        images: uint8 [N, R, R, 3], usually a memory map.
        probes: uint8 [M, R, R, 3], M >= 2, images for previews and alarms, held-out ones if there are any.
        device: where to train; the images are kept there too if it is a GPU with enough memory.
    """

    def __init__(self, model: nn.Module, images: np.ndarray, probes: np.ndarray, device: torch.device):
        self.model, self.device, self.size = model, device, len(images)
        self.images = move_if_it_fits(images, device)
        self.capturable = isinstance(self.images, Tensor)
        self.probes = pixels_to_signed(torch.from_numpy(np.array(probes[:NUM_PROBES])))

    def _draw_images(self, indices: Tensor, draw: BatchDraw, random_flip: bool) -> Tensor:
        """Return the images [B, 3, R, R], half of them mirrored if ``random_flip``."""
        images, flip = pixels_to_signed(self._gather(indices)), draw.uniform() < 0.5
        return torch.where(flip[:, None, None, None], images.flip(3), images) if random_flip else images

    def _gather(self, indices: Tensor) -> Tensor:
        if isinstance(self.images, Tensor):
            return self.images[indices.to(self.images.device)].to(self.device)
        # Read a memory map in order.
        order = np.argsort(indices.numpy(), kind="stable")
        rows = self.images[indices.numpy()[order]][np.argsort(order, kind="stable")]
        return torch.from_numpy(rows).to(self.device, non_blocking=True)

    def choose_probes(self, count: int) -> Tensor:
        """Return the rows of ``count`` probes, evenly spaced, so that a folder sorted by class shows all classes."""
        return torch.linspace(0, len(self.probes) - 1, min(count, len(self.probes))).round().long()


class SegdiffTask(ImageTask):
    """Train by denoising alone: add noise, predict v or eps, weigh the squared error.

    Args:
        images, probes, device: as of :class:`ImageTask`.
            In a space of latents, the images are theirs: fp16 [N, V, C, h, w], with those of mirror images if V is 2.
        labels: int64 [N], -1 where an image has none, for a configuration with classes.
        space: in which the model denoises; None: pixels.
    """

    def __init__(
        self,
        config: ResolvedSegdiffConfig,
        images: np.ndarray,
        probes: np.ndarray,
        device: torch.device,
        labels: np.ndarray | None = None,
        space: PixelSpace | None = None,
    ):
        torch.manual_seed(derived_seed("weights", config.seed))
        model = config.build()
        model.space = space or model.space
        super().__init__(model, images, probes, device)
        self.config, self.schedule = config, config.build_schedule(device)
        self.labels = None if labels is None else torch.from_numpy(labels).to(device)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups: the mask proposer learns at a rate of its own.

        The mask generator learns slower, since masks that saturate early never move again. The prior of the mixture
        learns faster, since each of its parameters receives gradient from a few pixels only.
        """
        proposer = cast(FactorizedDenoiser, self.model).mask_parameters()
        ids = {id(p) for p in proposer}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.model.parameters() if id(p) not in ids], "scale": 1.0}
        ]
        return groups + ([{"params": proposer, "scale": self.config.mask_learning_rate}] if proposer else [])

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the denoising loss of the images ``indices``; see :class:`factorkit.engine.step.Task`."""
        config = self.config
        x0, eps, t = self._draw_batch(indices, draw)
        x_t = self.schedule.noise(x0, eps, t)
        out = model(x_t, t, *self._draw_labels(indices, draw))
        target = training_target(config.prediction, self.schedule, x0, eps, t)
        loss = weighted = denoising_loss(out.prediction, target)
        if out.bottleneck.levels is not None:
            # Each level predicts the whole target. The loss of their mean alone would train a level on the residual of
            # the others.
            weighted = torch.stack([denoising_loss(level, target) for level in out.bottleneck.levels.unbind(1)]).mean(0)
        if config.coarse_to_fine[1]:
            power = coarse_to_fine_power(step + 1, *config.coarse_to_fine)
            weighted = weighted * loss_weight(self.schedule, t, power)
        if config.loss_weighting == "min_snr":
            weighted = weighted * min_snr_weight(config.prediction, self.schedule, t, config.min_snr_gamma)
        if out.bottleneck.score is not None:
            # The mixture as a denoiser: this alone trains its prior.
            weighted = weighted + noise_error(out.bottleneck.score, self.schedule, eps, t)
        return StepLoss(weighted, loss, t / config.timesteps, self._watch(out.bottleneck.masks))

    def _draw_batch(self, indices: Tensor, draw: BatchDraw) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images [B, 3, R, R], their noise, and time steps [B]."""
        config, x0 = self.config, self._draw_images(indices, draw, self.config.random_flip)
        t = draw.integers(0, config.t_max)
        if config.high_noise_fraction:
            high = draw.uniform() < config.high_noise_fraction
            t = torch.where(high, draw.integers(config.t_max, config.timesteps), t)
        return x0, draw.normal(*x0.shape[1:]), t

    def _draw_images(self, indices: Tensor, draw: BatchDraw, random_flip: bool) -> Tensor:
        if not self.config.latent_channels:
            return super()._draw_images(indices, draw, random_flip)
        views, flip = self._gather(indices).float(), draw.uniform() < 0.5
        return torch.where(flip[:, None, None, None], views[:, -1], views[:, 0])

    def _draw_labels(self, indices: Tensor, draw: BatchDraw) -> tuple[Tensor, ...]:
        """Return the labels of the images with some dropped; nothing for a model without classes."""
        if self.labels is None:
            return ()
        return (torch.where(draw.uniform() < self.config.label_dropout, -1, self.labels[indices.to(self.device)]),)

    def _watch(self, masks: Tensor) -> dict[str, Tensor]:
        if self.config.num_leaf_regions == 1:
            return {}
        masks = masks.detach()
        entropy = -(masks * masks.clamp_min(1e-8).log()).sum(1).mean() / np.log(self.config.num_leaf_regions)
        return {"areas": masks.mean((0, 2, 3)), "entropy": entropy}

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Write previews of segmented and generated images; return the label-free alarms (none for ``regions=1``)."""
        config, count = self.config, NUM_PREVIEW_IMAGES
        folder.mkdir(parents=True, exist_ok=True)
        labels = torch.arange(count) % len(config.class_names) if config.class_names else None
        generated = draw_images(
            model,
            config,
            count,
            sampler=PREVIEW_SAMPLER,
            steps=NUM_PREVIEW_STEPS,
            seed=0,
            device=self.device,
            labels=labels,
        )
        side = max(config.side, min(config.resolution, PREVIEW_SIDE))
        drawn, masks = (resize(x, side, side) for x in (generated.images, generated.bottleneck.masks.float()))
        grid = previews.draw_generation_grid(signed_to_pixels(drawn), masks.cpu().numpy())
        save_image(grid, folder / f"{step:06d}_generated.png")
        network, rows = cast(SegdiffModel, model), self.choose_probes(count)
        images = resize(self.probes[rows], side, side).to(self.device)
        latents = None if self.encoded_probes is None else self.encoded_probes[0][rows].to(self.device)
        x_t, t = add_noise(images if latents is None else latents, config.segment_t, self.schedule)
        regions = model(x_t, t).bottleneck
        branches = None
        if regions.branches is not None:
            estimates = estimate_branches(config.prediction, self.schedule, x_t, regions.branches, t)
            decoded = (resize(network.space.decode(b), side, side) for b in estimates.unbind(1))
            branches = np.stack([signed_to_pixels(images) for images in decoded], 1) / 255.0
        masks, nesting = predict_masks(model, images, config.segment_t, self.schedule, latents=latents), config.nesting
        leaf_labels = hard_labels(masks, nesting)
        levels = [level_labels(leaf_labels, nesting, level + 1).numpy() for level in range(len(nesting))]
        grid = previews.draw_segmentation_grid(
            signed_to_pixels(images), masks.numpy(), branches, levels=levels if len(nesting) > 1 else ()
        )
        save_image(grid, folder / f"{step:06d}_segmentation.png")
        if config.num_leaf_regions == 1:
            return {}
        return self.alarms(model).to_dict(config.distil_steps if config.masks == "auto" else step)

    @cached_property
    def encoded_probes(self) -> tuple[Tensor, Tensor] | None:
        """The latents of the probes and of their mirror images, on the CPU; None where the model denoises pixels."""
        if not self.config.latent_channels:
            return None

        def encode(images: Tensor) -> Tensor:
            encode_part = cast(SegdiffModel, self.model).space.encode
            return torch.cat([encode_part(part.to(self.device)).cpu() for part in images.split(NUM_PREVIEW_IMAGES)])

        return encode(self.probes), encode(self.probes.flip(3))

    def alarms(self, model: nn.Module) -> Alarms:
        """Measure the label-free alarms of ``model`` on the probe images."""
        side = measured_side(self.config.resolution, self.config.side)
        predict = partial(predict_masks, model, t=self.config.segment_t, schedule=self.schedule)
        probes, objects = resize(self.probes, side, side), self.config.masks == "auto"
        latents, mirrored = self.encoded_probes or (None, None)
        masks, of_mirrored = predict(probes, latents=latents), predict(probes.flip(3), latents=mirrored)
        alarms = measure_alarms(probes, masks, of_mirrored, objects)
        if self.config.masks == "network" or self.config.latent_channels:
            return alarms
        proposer = cast(MaskProposer, model.masks)
        error = unexplained_noise(proposer, self.probes, self.schedule)
        return dataclasses.replace(alarms, error=error)


def move_if_it_fits(images: np.ndarray, device: torch.device) -> Tensor | np.ndarray:
    """Return the images on the GPU if they take less than a third of its free memory, else unchanged."""
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 3:
        return torch.from_numpy(np.array(images)).to(device)
    return images
