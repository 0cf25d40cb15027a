"""``factorkit.train_autoencoder``: an autoencoder of photos, in whose latents segdiff can denoise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from factorkit.data.open import read_squares
from factorkit.engine.config import EngineConfig, autocast, cpu_threads, resolve_device
from factorkit.engine.run_folder import TrainedRun, claimed, load_trained, select_settings
from factorkit.engine.step import StepLoss
from factorkit.engine.trainer import Trainer
from factorkit.metrics.image import psnr
from factorkit.nn.autoencoder import (
    IMAGE_CHANNELS,
    Autoencoder,
    AutoencoderSizes,
    enlarge_copy,
    kl_divergence,
    small_copy,
)
from factorkit.report import html
from factorkit.report.content import (
    Check,
    Curve,
    Log,
    Record,
    ReportContent,
    Tile,
    Verdict,
    format_number,
    judged_alarms,
    log_checks,
    passed_decisively,
    summarise_checks,
)
from factorkit.report.image_grid import draw_image_grid
from factorkit.segdiff.alarms import MIN_JUDGED_STEPS
from factorkit.segdiff.task import ImageTask
from factorkit.segdiff.training_images import DATA_NAME, describe_data, hold_out, load_data
from factorkit.utils import distributed
from factorkit.utils.distributed import join_processes
from factorkit.utils.errors import ConfigError
from factorkit.utils.files import save_image
from factorkit.utils.images import pixels_to_signed, signed_to_pixels, signed_to_unit
from factorkit.utils.rng import BatchDraw, derived_seed

NUM_PREVIEW_IMAGES = 8
ROUND_TRIP = "round trip"  # the check's name
# Training starts at the round trip of the small copy. After 300 steps it was 5 dB above on photos (docs/backbones.md).
MIN_GAIN = 1.0  # dB above it
GOOD_ROUND_TRIP = 40.0  # dB; images so smooth leave little to gain
DOWNSAMPLING = (4, 8)

#: changes to the settings that all models share: a small network, and minutes of a CPU
SETTINGS: dict[str, Any] = {
    "steps": 2000,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "warmup_steps": 50,
    "lr_decay_fraction": 0.5,
    "gradient_clip": 1.0,
    "ema_decay": 0.99,
    "threads": 1,
    "checkpoint_every": 200,
    "sample_every": 500,
}


@dataclass(kw_only=True)
class AutoencoderConfig(EngineConfig):
    """Train an autoencoder of images: an encoder to small latents, and a decoder back."""

    resolution: int = 128
    """Side of the training images in pixels. Photos are cropped to their central square and resized. The autoencoder
    then takes images of any size."""
    downsample: int = 4
    """Factor by which the sides of latents are smaller, 4 or 8. 4 keeps more: photos of 128 pixels become latents of
    32."""
    latent_channels: int = 4
    """Channels of the latents. More keep more of the photo, and are harder to generate."""
    model_channels: int = 32
    """Channels of the first of two levels of the decoder, a pixel of which is a square of downsample / 2 pixels of the
    photo. The second, at the sides of the latents, has twice as many. The encoder has about a quarter."""
    num_res_blocks: int = 1
    """Residual blocks per level of the encoder. The decoder has one more."""
    norm_groups: int = 8
    """Number of GroupNorm groups; it divides model_channels."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence of the latents from a standard normal, in nats a latent, beside the mean absolute
    error of the pixels in [-1, 1]."""
    crop_size: int | None = 64
    """Side in pixels of the square that a step takes from each training image, at random. Smaller squares give more
    steps in the same time. None takes whole images, as does a side above the resolution."""
    random_flip: bool = True
    """Flip half of the images left to right."""
    holdout: str | int = "auto"
    """Images held out of training, on which the round trip is measured: as for segdiff, and up to a quarter of all
    where none is labelled."""
    mask_set: str | None = None
    """Which masks say what is labelled, of a data set that has several; by default the first."""

    def validate(self) -> None:
        """Raise ConfigError for values that cannot work, naming the setting."""
        super().validate()
        for name in ("resolution", "latent_channels", "model_channels", "num_res_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.downsample not in DOWNSAMPLING:
            raise ConfigError(f"downsample={self.downsample} must be one of {', '.join(map(str, DOWNSAMPLING))}")
        if self.resolution % self.downsample or self.resolution < 2 * self.downsample:
            nearest = max(2, round(self.resolution / self.downsample)) * self.downsample
            raise ConfigError(
                f"resolution={self.resolution} must be divisible by downsample={self.downsample} and at least twice as "
                f"much; use resolution={nearest}"
            )
        if self.crop_size is not None and (self.crop_size % self.downsample or self.crop_size < 2 * self.downsample):
            raise ConfigError(
                f"crop_size={self.crop_size} must be divisible by downsample={self.downsample} and at least twice as "
                "much, or None for whole images"
            )
        if self.model_channels % self.norm_groups:
            raise ConfigError(
                f"model_channels={self.model_channels} must be divisible by norm_groups={self.norm_groups}"
            )
        if not 0 <= self.kl_weight < math.inf:
            raise ConfigError(f"kl_weight={self.kl_weight} must be a finite weight, 0 or more")

    def resolved(self) -> AutoencoderConfig:
        """Return the settings, checked."""
        self.validate()
        return self

    @property
    def sizes(self) -> AutoencoderSizes:
        """The sizes of the network; the encoder has about a quarter of the decoder's channels."""
        # More gain .1 dB, and encoding takes about three times as long (docs/backbones.md).
        first = max(1, self.model_channels // (4 * self.norm_groups)) * self.norm_groups
        return AutoencoderSizes(
            channels=(self.model_channels, 2 * self.model_channels),
            encoder_channels=(first, 2 * first),
            num_res_blocks=self.num_res_blocks,
            latent_channels=self.latent_channels,
            norm_groups=self.norm_groups,
            shortcuts=self.latent_channels >= IMAGE_CHANNELS,
            patch_size=self.downsample // 2,  # levels of convolutions at all pixels took most of the time
        )

    def counts(self) -> dict[str, int]:
        """Return numbers that no model has more of than weights."""
        return {name: getattr(self, name) for name in ("model_channels", "num_res_blocks", "latent_channels")}

    def build(self) -> Autoencoder:
        """Build the network with fresh weights, channels last."""
        return Autoencoder(self.sizes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def read_config(meta: Mapping[str, Any]) -> AutoencoderConfig:
    """Return the configuration of stored settings."""
    return AutoencoderConfig.from_dict(select_settings(AutoencoderConfig, meta)).resolved()


class AutoencoderTask(ImageTask):
    """Train by the mean absolute error of the pixels, and the KL divergence of the latents.

    Arguments as of :class:`~factorkit.segdiff.task.ImageTask`; the probes are photos kept out of the training.
    """

    def __init__(self, config: AutoencoderConfig, images: np.ndarray, probes: np.ndarray, device: torch.device):
        torch.manual_seed(derived_seed("weights", config.seed))
        super().__init__(config.build(), images, probes, device)
        self.config = config

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return all parameters at the learning rate."""
        return [{"params": list(self.model.parameters()), "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw: BatchDraw, step: Tensor) -> StepLoss:
        """Return the loss of the images ``indices``; see :class:`factorkit.engine.step.Task`."""
        config, images = self.config, self._draw_images(indices, draw, self.config.random_flip)
        images = crop_randomly(images, min(config.crop_size or config.resolution, config.resolution), draw)
        side = images.shape[2] // config.downsample
        output, mean, log_variance = model(images, draw.normal(config.latent_channels, side, side))
        error, kl = (output - images).abs().mean((1, 2, 3)), kl_divergence(mean, log_variance)
        return StepLoss(error + config.kl_weight * kl, error.detach(), torch.zeros_like(kl), {"kl": kl.detach().mean()})

    def inspect(self, model: nn.Module, step: int, folder: Path) -> dict[str, Any]:
        """Write photos beside their reconstructions; return the alarm on the round trip of all probes."""
        network = cast(Autoencoder, model)
        photos = self.probes[self.choose_probes(NUM_PREVIEW_IMAGES)].to(self.device)
        columns = [signed_to_pixels(images) for images in (photos, round_trip(network, photos))]
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(zip(*columns, strict=True))
        save_image(draw_image_grid(rows, ["photo", "reconstruction"]), folder / f"{step:06d}_round_trip.png")
        parts = self.probes.split(NUM_PREVIEW_IMAGES)
        own = [measure_psnr(round_trip(network, part.to(self.device)), part) for part in parts]
        small = [measure_psnr(shrink(part, self.config.downsample), part) for part in parts]
        decibels, baseline = (torch.cat(values).mean().item() for values in (own, small))
        return {"psnr": decibels, "error": -decibels, **log_checks([check_round_trip(decibels, baseline, step)])}


def crop_randomly(images: Tensor, side: int, draw: BatchDraw) -> Tensor:
    """Return a random square of ``side`` pixels of each image [B, 3, R, R]."""
    starts = (draw.uniform(2) * (images.shape[2] - side + 1)).long()
    rows, columns = (starts[:, i, None] + torch.arange(side, device=images.device) for i in range(2))
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def round_trip(model: Autoencoder, images: Tensor) -> Tensor:
    """Return what is decoded from the mean latents of images [B, 3, H, W] in [-1, 1]."""
    return model.decode(model.encode(images)[0]).clamp(-1, 1)


def shrink(images: Tensor, factor: int) -> Tensor:
    """Return images [B, 3, H, W] averaged over squares of ``factor`` pixels, and interpolated back."""
    return enlarge_copy(small_copy(images, factor), factor).clamp(-1, 1)


def measure_psnr(images: Tensor, photos: Tensor) -> Tensor:
    """Return the PSNR [B] in dB of images in [-1, 1]."""
    return psnr(signed_to_unit(images), signed_to_unit(photos))


def check_round_trip(decibels: float, baseline: float, step: int) -> Check:
    """Return the alarm of an autoencoder that keeps hardly more than the photo made small, which is ``baseline`` dB."""
    if step < MIN_JUDGED_STEPS:
        reason = f"since it takes {MIN_JUDGED_STEPS} training steps, and there were {step}"
        return Check(ROUND_TRIP, not_run=reason)
    limit = min(baseline + MIN_GAIN, GOOD_ROUND_TRIP)
    failure = (
        f"{ROUND_TRIP}: {decibels:.1f} dB, less than {limit:.1f}; the photo averaged to the size of the latents has "
        f"{baseline:.1f} dB. Train longer, or with more channels"
    )
    failures = (failure,) if decibels < limit else ()
    return Check(ROUND_TRIP, decibels, low=limit, failures=failures, decisive=True)


class AutoencoderRun(TrainedRun):
    """A trained autoencoder: its averaged weights after ``step`` steps, and its run folder if any."""

    MODEL = "autoencoder"

    def __init__(
        self, config: AutoencoderConfig, model: Autoencoder, device: torch.device, step: int, folder: Path | None = None
    ):
        self.config, self.device, self.step, self.folder = config, device, step, folder
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "auto", weights: str | float = "average"
    ) -> AutoencoderRun:
        """Load a run folder or a single ``.safetensors`` file; arguments and errors as of :func:`factorkit.load`."""
        path = Path(path)
        config, model, step = load_trained(path, cls.MODEL, weights, read_config)
        torch_device = device if isinstance(device, torch.device) else resolve_device(device)
        return cls(config, model, torch_device, step, path if path.is_dir() and weights == "average" else None)

    @torch.no_grad()
    def reconstruct(self, images: Any) -> Tensor:
        """Return images decoded from their latents, [n, 3, R, R] in [0, 1].

        Args:
            images: as for :meth:`factorkit.SegdiffRun.segment`, cropped to their central squares.

        Raises:
            DataError: nothing to read.

        Example:
            >>> autoencoder.reconstruct(images[:2]).shape
            torch.Size([2, 3, 16, 16])
        """
        squares = pixels_to_signed(torch.from_numpy(read_squares(images, self.config.resolution)))
        with autocast(self.config, self.device):
            parts = [signed_to_unit(round_trip(self.model, part.to(self.device))) for part in squares.split(8)]
        return torch.cat(parts)


def train_autoencoder(
    data: Any = None, *, out: str | Path = "runs/autoencoder", progress: bool = True, **changes: Any
) -> AutoencoderRun:
    """Train an autoencoder on unlabelled images; the same call again resumes, exactly.

    Args:
        data: as for :func:`factorkit.train_segdiff`.
        out: the run folder.
        progress: show a progress bar with the time left.
        **changes: any field of :class:`~factorkit.segdiff.autoencoder.AutoencoderConfig`, such as ``downsample=``,
            ``latent_channels=``, ``resolution=``, ``steps=``, ``seed=``, ``device=``.

    Returns:
        The finished run. Its report shows photos that were kept out beside their reconstructions, and the round trip
        in dB; the alarm goes off if that is hardly more than of the photo averaged to the size of the latents.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: no usable images, or fewer than 8.
        CheckpointError, KeyboardInterrupt, SystemExit: as for :func:`factorkit.train_segdiff`.

    Example:
        >>> tiny = {"resolution": 16, "model_channels": 8, "batch_size": 4, "steps": 2}
        >>> autoencoder = factorkit.train_autoencoder(images, out="runs/autoencoder", progress=False, **tiny)
        >>> autoencoder.step
        2
    """
    config, folder = AutoencoderConfig.from_dict({**SETTINGS, **changes}).resolved(), Path(out)
    device = distributed.local_device(resolve_device(config.device))
    join_processes(device)
    distributed.check_batch(config.batch_size)
    with distributed.first_on_machine():
        dataset, prepared, probes = load_data(data, config.resolution, config.holdout, config.mask_set, progress)
    images, probes = hold_out(dataset, prepared.images, probes)
    settings = {"model": AutoencoderRun.MODEL, **config.to_dict(), "data": describe_data(dataset, prepared)}
    run_folder = claimed(folder, settings, config.RESUMABLE | {DATA_NAME})
    with cpu_threads(config.threads), distributed.enter_on_first(run_folder):
        task = AutoencoderTask(config, images, probes, device)
        Trainer(task, config, folder, settings, device=device, progress=progress, report=write_report).run()
        return AutoencoderRun.load(folder, device=device)


def estimate(**changes: Any) -> dict[str, Any]:
    """Estimate parameters and time for ``--dry-run``, by a few training steps on random images; nothing is written.

    Returns:
        parameters, steps, batch_size, device, images_per_second, seconds (of the whole run).
    """
    config = AutoencoderConfig.from_dict({**SETTINGS, **changes}).resolved()
    device = resolve_device(config.device)
    shape = (config.batch_size, config.resolution, config.resolution, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    task = AutoencoderTask(config, images, images, device)
    with cpu_threads(config.threads):
        seconds = Trainer(task, config, Path("."), {}, device=device, progress=False).measure_step_seconds(steps=3)
    return {
        "parameters": sum(parameter.numel() for parameter in task.model.parameters()),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "device": str(device),
        "images_per_second": config.batch_size / seconds,
        "seconds": seconds * config.steps,
    }


def judge_round_trip(log: Log, scores: Record) -> Verdict:
    """Judge a run by the alarm on its round trip."""
    alarms, failures = judged_alarms(log)
    details = [] if alarms is None else summarise_checks(log)
    if failures:
        return Verdict("bad", "Failed: the latents keep hardly more than a small copy of the photo", details)
    if passed_decisively(log):
        return Verdict("good", "The latents keep more than a small copy of the photo", details)
    return Verdict("open", "No verdict yet", details or ["The round trip was not measured yet."])


def headline_tiles(alarms: Record, scores: Record) -> list[Tile]:
    """Return the round trip in dB."""
    return [Tile("round trip, dB", format_number(alarms.get("psnr"), 1), "PSNR of photos kept out")]


REPORT = ReportContent(
    judge=judge_round_trip,
    tiles=headline_tiles,
    curves=(Curve("KL divergence, nats a latent", "It rises while the latents learn.", "kl"),),
    first_grids=("round_trip",),
)
write_report = partial(html.write_report, content=REPORT)
