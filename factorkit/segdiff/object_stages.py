"""The stages that find objects before a run trains: spatial mixture, shapes, mask network.

1. A spatial mixture learns where the regions are, with the saliency cue in the logit of region 0 (`stages/mixture`),
   and another without the cue (`stages/mixture_without_cue`). The cue is used if it explains enough. A third one, of
   two regions in place of three or the reverse (`stages/mixture_of_other_regions`), shows which number suits better.
   A run without `regions=` takes that number; its choice is in `regions.json`.
2. Its masks of the clean images give the shapes of the set, and these the teacher's masks; nothing is trained.
3. The mask network learns to give the teacher's masks of noised images (`stages/distil`).
4. Its masks of the clean images, with place and cue, give the shapes that segmenting uses.

The mask network of a latent run sees latents; everything else measures the pixels of the images.

A stage that is finished is loaded; what is not trained is computed again and is the same each time.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from factorkit.engine.run_folder import read_object, write_json
from factorkit.engine.run_log import RunLog
from factorkit.engine.step import Task
from factorkit.engine.trainer import Trainer
from factorkit.segdiff.config import OPEN_REGIONS, ResolvedSegdiffConfig
from factorkit.segdiff.masks.cued_mixture import CuedMixtureTask
from factorkit.segdiff.masks.distil import DistilTask
from factorkit.segdiff.masks.objects import (
    LOGITS_SIDE,
    MaskNetwork,
    ObjectMasks,
    fit_colors,
    measure_cue,
    measured_side,
    pool_masks,
    resize,
    scale_lab,
)
from factorkit.segdiff.masks.shape import ShapeDenoiser, to_coarse
from factorkit.segdiff.masks.spatial_mixture import SpatialMixture, unexplained_noise
from factorkit.segdiff.masks.typical import MIN_IMAGES, measure_appearance
from factorkit.utils import distributed
from factorkit.utils.images import pixels_to_signed, signed_to_pixels
from factorkit.utils.rng import derived_seed

MAX_IMAGES = 1024  # of the training set that the stages use
MAX_MIXTURE_SIDE = 32  # pixels; the mixture learns nothing finer
MAX_CUE_SIDE = 64  # pixels of the cues that are kept
STAGE_BATCH_SIZE = 16
TYPICAL_IMAGES = 200  # about so many give the limits beyond which an image is unlike the training set
# The cue is used if it explains so much of the noise that the mixture leaves unexplained without it (docs/results.md).
MIN_CUE_GAIN = 0.015
MIN_CUE_IMAGES, MAX_CUE_IMAGES = 16, 200  # of the training set that decide; with fewer the cue is used
# Three regions suit the images if the third explains so much of the noise that two leave (docs/results.md).
MIN_REGION_GAIN = 0.03
REGIONS_FILE = "regions.json"  # of a run without `regions=`: the choice, and the mixture and the cue it was made with
MIN_EXPLAINED = 0.05  # by place and cue together, below which the log trusts neither (docs/results.md)
OTHER_STAGE = "mixture_of_other_regions"
SHAPE_WEIGHT = 1.5  # of the shape in the prior of the teacher's second EM
BATCH_SIZE = 32  # images of EM at a time

MIXTURE_STAGE: dict[str, Any] = {"learning_rate": 0.1, "warmup_steps": 20, "lr_decay_fraction": 0.3, "ema_decay": 0.9}
DISTIL_STAGE: dict[str, Any] = {"learning_rate": 3e-3, "warmup_steps": 30, "lr_decay_fraction": 0.5, "ema_decay": 0.99}
COMMON: dict[str, Any] = {
    "gradient_clip": 1.0,
    "precision": "fp32",
    "micro_batch_size": None,
    "extra_ema_decays": (),
    "sample_every": 0,
    "stop_on_failure": False,
    "shard": False,
}


class ObjectStages:
    """Train the stages in the folder of a run.

    Args:
        config: of the run.
        images: uint8 [N, R, R, 3], of the training.
        folder: of the run.
        settings: stored with every checkpoint.
        device: of the training.
        progress: show progress bars.
        latents: fp16 [N, V, C, h, w] of a latent run; those of the first view are of the images.
    """

    def __init__(
        self,
        config: ResolvedSegdiffConfig,
        images: np.ndarray,
        folder: Path,
        settings: dict[str, Any],
        device: torch.device,
        progress: bool,
        latents: np.ndarray | None = None,
    ):
        self.config, self.folder, self.settings = config, folder, settings
        self.device, self.progress, self.schedule = device, progress, config.build_schedule(device)
        rows = np.arange(len(images))
        if len(images) > MAX_IMAGES:
            rows = np.linspace(0, len(images) - 1, MAX_IMAGES).round().astype(int)
        self.num_images = len(images)
        all_used = len(rows) == len(images)
        self.images = shrink(images if all_used else images[rows], measured_side(config.resolution, config.side))
        self.latents = latents if latents is None or all_used else latents[rows]
        #: what led to the masks is in the log already
        self.is_logged = distributed.run_on_first((folder / "stages" / "distil").exists)

    def run(self) -> ObjectMasks:
        """Train every stage that is not finished, and return the masks of the run."""
        if self.num_images > MAX_IMAGES:
            self.log(f"the object stages use {MAX_IMAGES} of {self.num_images} images, evenly spaced")
        masks = self.new_masks()
        masks.mixture, weight = self.find_mixture(masks.mixture)
        self.explain_masks(masks.mixture, weight)
        masks.cue_weight.fill_(weight)
        masks.network = self.train_network(masks.network, masks.mixture, weight)
        masks = masks.to(self.device).eval().requires_grad_(False)

        def segment_coarsely(images: Tensor, rows: slice) -> Tensor:
            t = torch.zeros(len(images), dtype=torch.int64, device=self.device)
            coarse = masks.network(self.find_inputs(images, rows), t).softmax(1)
            return to_coarse(masks.align_coarsely(images, resize(coarse, *images.shape[2:])))

        masks.shape.fit(self.map_images(segment_coarsely))
        every = max(1, len(self.images) // TYPICAL_IMAGES)

        def measure(images: Tensor, rows: slice) -> Tensor:
            t = torch.zeros(len(images), dtype=torch.int64, device=self.device)
            inputs = self.find_inputs(images, rows, every)
            doubts = masks.measure_doubts(inputs, masks.segment(inputs, t=t, images=images))
            return torch.cat([doubts, measure_appearance(scale_lab(images))], 1)

        figures = self.map_images(measure, every)
        masks.typical.fit(figures[:, :2], figures[:, 2:])
        if masks.typical.limits.isinf().any():
            self.log(f"photos unlike the training set will not be named: that takes at least {MIN_IMAGES} images")
        return masks

    def find_inputs(self, images: Tensor, rows: slice, every: int = 1) -> Tensor:
        """Return what the mask network sees of images of :meth:`map_images`: themselves, or their latents."""
        if self.latents is None:
            return images
        return torch.from_numpy(np.array(self.latents[::every][rows, 0])).float().to(self.device)

    def new_masks(self) -> ObjectMasks:
        """Return untrained masks of the run, always the same."""
        torch.manual_seed(derived_seed("object masks", self.config.seed))
        return ObjectMasks(self.config.num_leaf_regions, self.config.side, self.config.latent_channels or 3)

    def choose_regions(self) -> int:
        """Return the number of regions that suits the images, 2 or 3, and keep the choice in the folder. Collective.

        The configuration must have OPEN_REGIONS regions. The mixture of the chosen number is that of :meth:`run`.
        """
        path = self.folder / REGIONS_FILE
        if not distributed.run_on_first(path.exists):
            mixture, weight = self.train_mixtures(self.new_masks().mixture)
            regions = self.compare_regions(mixture, weight, choose=True)
            stage = "mixture" if regions == OPEN_REGIONS else OTHER_STAGE
            choice = {"regions": regions, "stage": stage, "cue_weight": weight}
            distributed.run_on_first(lambda: write_json(path, choice))
        return int(distributed.run_on_first(lambda: read_object(path))["regions"])

    def find_mixture(self, start: SpatialMixture) -> tuple[SpatialMixture, float]:
        """Return the trained spatial mixture of the run, and the weight of its cue; ``start`` is untrained."""
        path = self.folder / REGIONS_FILE
        if choice := distributed.run_on_first(lambda: read_object(path) if path.exists() else None):
            return self.train_mixture(choice["stage"], start, choice["cue_weight"]), choice["cue_weight"]
        mixture, weight = self.train_mixtures(start)
        self.compare_regions(mixture, weight)
        return mixture, weight

    @cached_property
    def cues(self) -> Tensor:
        """The cue of every image [N, S, S] on the CPU, S at most MAX_CUE_SIDE."""
        side = min(MAX_CUE_SIDE, self.images.shape[1])
        return self.map_images(lambda images, rows: measure_cue(resize(images, side, side)))

    @cached_property
    def small_images(self) -> tuple[Tensor, Tensor]:
        """Small copies of the images [N, 3, S, S] and their cues [N, S, S], on the device."""
        side = min(MAX_MIXTURE_SIDE, self.images.shape[1])
        images = self.map_images(lambda images, rows: resize(images, side, side))
        return images.to(self.device), resize(self.cues[:, None], side, side)[:, 0].to(self.device)

    def train_mixtures(self, start: SpatialMixture) -> tuple[SpatialMixture, float]:
        """Return the trained spatial mixture and the weight of its cue, which is chosen unless it is configured."""
        weight = self.config.cue_weight
        if weight is not None or len(self.images) < MIN_CUE_IMAGES:
            reason = f"fewer than {MIN_CUE_IMAGES} images decide nothing" if weight is None else "as configured"
            weight = 1.0 if weight is None else weight
            self.log_weight(weight, reason)
            return self.train_mixture("mixture", start, weight), weight
        mixtures, errors = [], []
        for name, weight in (("mixture_without_cue", 0.0), ("mixture", 1.0)):
            mixtures.append(self.train_mixture(name, copy.deepcopy(start), weight))
            errors.append(self.measure_error(mixtures[-1], weight))
        gain = 1 - errors[1] / errors[0]
        use = int(gain >= MIN_CUE_GAIN)
        self.log_weight(use, f"the cue explains {gain:.2%} of the unexplained noise, the limit is {MIN_CUE_GAIN:.1%}")
        return mixtures[use], float(use)

    def log_weight(self, weight: float, reason: str) -> None:
        """Log the weight of the cue and its reason, once."""
        if not self.is_logged:
            self.log(f"object masks with cue_weight={weight:g}: {reason}")

    def measure_error(self, mixture: SpatialMixture, weight: float) -> float:
        """Return the noise that a mixture, whose cue has this weight, leaves unexplained in some of the images."""
        images, cues = (values[:: max(1, len(self.images) // MAX_CUE_IMAGES)] for values in self.small_images)
        return unexplained_noise(mixture.to(self.device), images, self.schedule, weight * cues)

    def compare_regions(self, mixture: SpatialMixture, weight: float, choose: bool = False) -> int:
        """Return which number of regions suits the images, and log it with its reason, once.

        Args:
            mixture: of the configured number.
            weight: of its cue.
            choose: the number is open, and the result is used; else the configured one is.
        """
        regions = self.config.num_leaf_regions
        if not choose and self.is_logged:
            return regions
        checked = len(self.images) >= MIN_CUE_IMAGES
        if choose and not checked:
            self.log(f"regions={regions}, chosen: fewer than {MIN_CUE_IMAGES} images decide nothing")
            return regions
        if regions not in (2, 3) or not checked:
            reason = "beyond 2 and 3" if checked else f"with fewer than {MIN_CUE_IMAGES} images"
            self.log(f"whether another number than regions={regions} suits the images was not checked {reason}")
            return regions
        other = self.train_mixture(OTHER_STAGE, SpatialMixture(5 - regions, object_first=True), weight)
        errors = {regions: self.measure_error(mixture, weight), 5 - regions: self.measure_error(other, weight)}
        gain = 1 - errors[3] / errors[2]
        suited = 3 if gain >= MIN_REGION_GAIN else 2
        advice = "as configured" if suited == regions else f"try regions={suited} in another out="
        self.log(
            f"a third region explains {gain:.1%} of the unexplained noise, the limit is {MIN_REGION_GAIN:.1%}: "
            f"{suited} regions suit the images, {'chosen' if choose else advice}"
        )
        return suited

    def explain_masks(self, mixture: SpatialMixture, weight: float) -> None:
        """Log once whether place or cue leads the masks, by the noise that each explains beside the other."""
        if self.is_logged or len(self.images) < MIN_CUE_IMAGES:
            return
        flat = copy.deepcopy(mixture).requires_grad_(False)
        flat.prior_logits.copy_(flat.prior_logits.mean((1, 2), keepdim=True).expand_as(flat.prior_logits))
        error = self.measure_error(mixture, weight)
        without = (flat, weight), (mixture, 0.0), (flat, 0.0)
        place, cue, both = (1 - error / self.measure_error(*each) for each in without)
        message = f"the place explains {place:.1%} of the noise that is unexplained without it, the cue {cue:.1%}"
        if both < MIN_EXPLAINED:
            advice = f"both together {both:.1%} < {MIN_EXPLAINED:.0%}: neither is trustworthy, check the masks"
        else:
            advice = "place-led masks" if place >= cue else "colour-led masks"
        self.log(f"{message}: {advice}")

    def train_mixture(self, name: str, mixture: SpatialMixture, weight: float) -> SpatialMixture:
        """Train a spatial mixture whose cue has this weight on small copies of the images."""

        def load() -> tuple[Tensor, Tensor]:
            images, cues = self.small_images
            return images, weight * cues

        def build_task(config: ResolvedSegdiffConfig) -> Task:
            return CuedMixtureTask(config, mixture, len(self.images), load, self.schedule)

        return self.train_stage(name, build_task, mixture, steps=self.config.mixture_steps, **MIXTURE_STAGE)

    def train_network(self, network: MaskNetwork, mixture: SpatialMixture, weight: float) -> MaskNetwork:
        """Train the mask network to give the teacher's masks; the cue has this weight."""

        def build_task(config: ResolvedSegdiffConfig) -> Task:
            teach = partial(self.teach, mixture, weight)
            inputs = self.images if self.latents is None else self.latents
            return DistilTask(config, network, inputs, teach, self.config.random_flip, self.schedule)

        return self.train_stage("distil", build_task, network, steps=self.config.distil_steps, **DISTIL_STAGE)

    def teach(self, mixture: SpatialMixture, weight: float) -> Tensor:
        """Return the teacher's masks of every image, uint8 [N, K, LOGITS_SIDE, LOGITS_SIDE]."""

        def segment(images: Tensor, rows: slice) -> Tensor:
            cue = resize(self.cues[rows, None].to(self.device), *images.shape[2:])[:, 0]
            return fit_colors(scale_lab(images), mixture.cued_prior(weight * cue))

        shape = ShapeDenoiser(self.config.num_leaf_regions)
        shape = shape.fit(self.map_images(lambda images, rows: to_coarse(segment(images, rows)))).to(self.device)

        def refine(images: Tensor, rows: slice) -> Tensor:
            prior = pool_masks((SHAPE_WEIGHT, shape(segment(images, rows))))
            masks = resize(fit_colors(scale_lab(images), prior, smooth=True), LOGITS_SIDE, LOGITS_SIDE)
            return masks.mul(255).round().byte()

        return self.map_images(refine)

    @torch.no_grad()
    def map_images(self, work: Callable[[Tensor, slice], Tensor], every: int = 1) -> Tensor:
        """Return ``work(images, rows)`` of all or ``every`` so many images [n, 3, S, S], in batches, on the CPU.

        Collective. ``rows`` are those of the images used.
        """
        used = self.images[::every]

        def share(rows: slice) -> Tensor:
            parts = []
            for start in range(rows.start, rows.stop, BATCH_SIZE):
                batch = slice(start, min(start + BATCH_SIZE, rows.stop))
                images = pixels_to_signed(torch.from_numpy(np.array(used[batch]))).contiguous()
                parts.append(work(images.to(self.device), batch).cpu())
            return torch.cat(parts)

        return distributed.map_shares(share, len(used))

    def train_stage(
        self,
        name: str,
        build_task: Callable[[ResolvedSegdiffConfig], Task],
        model: nn.Module,
        steps: int,
        **changes: Any,
    ) -> Any:
        """Train a stage to its end and return its averaged model.

        Args:
            name: of the stage; it determines its random numbers.
            build_task: from the stage's configuration to its task.
            model: that the task trains.
            steps: of the stage.
            **changes: to the configuration.
        """
        return self.make_trainer(name, build_task, steps, **changes).run()

    def make_trainer(
        self, name: str, build_task: Callable[[ResolvedSegdiffConfig], Task], steps: int, **changes: Any
    ) -> Trainer:
        """Make the trainer of a stage. Arguments as of :meth:`train_stage`."""
        world = distributed.world_size()
        batch_size = -(-STAGE_BATCH_SIZE // world) * world
        config = self.config.stage(name, steps=steps, batch_size=batch_size, **COMMON, **changes)
        folder, meta = self.folder / "stages" / name, self.settings | {"stage": name}
        return Trainer(build_task(config), config, folder, meta, device=self.device, progress=self.progress)

    def log(self, message: str) -> None:
        """Write an event of the stages into the log of the run."""
        if distributed.rank() == 0:
            with RunLog(self.folder) as log:
                log.event("objects", step=0, message=message)


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Return images uint8 [N, R, R, 3] averaged to ``side`` pixels; themselves where they have as many."""
    if images.shape[1] == side:
        return images
    starts = range(0, len(images), BATCH_SIZE)
    batches = (pixels_to_signed(torch.from_numpy(np.array(images[i : i + BATCH_SIZE]))) for i in starts)
    return np.concatenate([signed_to_pixels(resize(batch, side, side)) for batch in batches])


class TimedStages(ObjectStages):
    """Take a few steps of every stage on noise, for an estimate; nothing is written.

    Attributes:
        seconds: that the trainings of the stages take.
    """

    def __init__(self, config: ResolvedSegdiffConfig, device: torch.device):
        shape = (STAGE_BATCH_SIZE, config.resolution, config.resolution, 3)
        noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        latents = None
        if config.latent_channels:
            latents = np.zeros((STAGE_BATCH_SIZE, 1, config.latent_channels, config.side, config.side), np.float16)
        super().__init__(config, noise, Path(os.devnull), {}, device, False, latents)
        self.seconds = 0.0

    def train_stage(self, name: str, build_task: Any, model: nn.Module, steps: int, **changes: Any) -> Any:
        """Time the stage and return its model, nearly untrained."""
        self.seconds += steps * self.make_trainer(name, build_task, steps, **changes).measure_step_seconds(steps=3)
        return model

    def log(self, message: str) -> None:
        """Log nothing."""
