"""What settings leave open, settled before a run starts: pixels or latents, what proposes regions, and how many."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.config import to_python
from factorkit.engine.run_folder import CONFIG, check_claim, read_settings
from factorkit.engine.run_log import RunLog
from factorkit.engine.trainer import check_steps
from factorkit.nn.autoencoder import Autoencoder
from factorkit.report.content import judged_alarms
from factorkit.segdiff.autoencoder import DOWNSAMPLING, SETTINGS, AutoencoderConfig, AutoencoderRun, train_autoencoder
from factorkit.segdiff.config import PIXELS, ResolvedSegdiffConfig, SegdiffConfig, preset_config
from factorkit.segdiff.latents import COPY_NAME, open_autoencoder, read_space
from factorkit.segdiff.object_stages import REGIONS_FILE
from factorkit.segdiff.training_images import DATA_NAME, MIN_IMAGES
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError, format_count
from factorkit.utils.files import read_log, sibling

FEW_LATENTS = 16  # a side
#: Sides of photos from which latents are the default, and from which their sides are 8 times smaller in place of 4
MANY_PIXELS, VERY_MANY_PIXELS = 128, 256
OWN_SUFFIX = "_autoencoder"  # of the folder of the autoencoder that a run trains first
NEAREST_WITHIN = 512  # pixels: so far from a resolution that latents do not suit others are searched
LATENTS_EVENT = "latents"  # in the log of a run: what it denoises, and why
#: Settings that an autoencoder of a run's own shares with the run.
SHARED_SETTINGS = ("resolution", "random_flip", "holdout", "mask_set", "seed", "device", "precision", "threads")


class Latents(NamedTuple):
    """In what a run denoises.

    Attributes:
        config: the settings, with the sizes of the latents; ``latent`` is "no" or a path.
        note: why in a line, or nothing.
        autoencoder: None for pixels, and where it is to be trained.
        training: settings of the autoencoder that is to be trained on the images first, in the folder ``latent``.
        trained_steps: of these steps, that it has already.
    """

    config: SegdiffConfig
    note: str = ""
    autoencoder: Autoencoder | None = None
    training: dict[str, Any] | None = None
    trained_steps: int = 0

    def for_images(self, count: int, data: dict[str, Any] | None = None) -> Latents:
        """Return the same with as many images: too few train no autoencoder, so that the run denoises pixels.

        Collective. ``data`` describes the images; None: unknown, any will do.

        Raises:
            CheckpointError: the folder of the autoencoder holds that of other images or settings, or something else.
        ConfigError: it has more steps already.
        """
        if not self.training:
            return self
        if count >= MIN_IMAGES:
            distributed.run_on_first(partial(check_own_autoencoder, Path(self.config.latent), self.training, data))
            return self
        note = f'latent="{PIXELS}": {format_count(count, "image")}, and an autoencoder takes {MIN_IMAGES}'
        return Latents(dataclasses.replace(set_sizes(self.config, 0, 1), latent=PIXELS), note)


def read_stored(folder: Path, model: str = "segdiff") -> dict[str, Any]:
    """Return the settings of the run of this model in a folder; {} without one. Collective."""
    stored = distributed.run_on_first(lambda: read_settings(folder) if (folder / CONFIG).exists() else {})
    return stored if stored.get("model") == model else {}


def settle_latents(preset: str, changes: dict[str, Any], folder: Path, stored: dict[str, Any]) -> Latents:
    """Return in what a run in ``folder``, which ``stored`` may have the settings of, denoises. Collective.

    With latent="auto" a run goes on as it was started. With a path the resolution of a preset is that of the latents,
    unless ``changes`` have one of the photos; the run has a copy of the autoencoder, should that be gone.
    """
    config, own = preset_config(preset, **changes), sibling(folder, OWN_SUFFIX)
    if config.latent_channels or config.latent_factor != 1:
        raise ConfigError(
            "latent_channels= and latent_factor= are set by train_segdiff(latent=...); give latent= instead"
        )
    if not config.latent.strip():
        raise ConfigError(f'latent={config.latent!r} names nothing; give "auto", "{PIXELS}" or an autoencoder\'s path')
    note, read_copy = "", distributed.run_on_first((folder / COPY_NAME).exists)
    if config.latent == "auto":
        reason = find_obstacle(preset, config)
        note, default = reason or "", str(own) if reason is None else PIXELS
        latent = stored["latent"] if stored else default
        if latent != default:
            note = f'latent="{latent}": {folder} was started with it'
        config = dataclasses.replace(config, latent=latent)
        if reason is None and latent == default and not read_copy:
            return settle_own_autoencoder(config, own)
    elif read_copy:
        read_copy = not distributed.run_on_first(Path(config.latent).expanduser().exists)
    if config.latent == PIXELS:
        return Latents(config, note)
    autoencoder = read_space(folder).autoencoder if read_copy else open_autoencoder(config.latent)
    sizes = autoencoder.sizes
    if "resolution" not in changes:
        config = dataclasses.replace(config, resolution=config.resolution * sizes.downsample)
    return Latents(set_sizes(config, sizes.latent_channels, sizes.downsample), note, autoencoder)


def find_obstacle(preset: str, config: SegdiffConfig) -> str | None:
    """Return why latent="auto" means pixels, in a line; None if it means latents.

    The line is empty where nobody would expect latents.
    """
    if config.resolution < MANY_PIXELS or config.form == "thesis":
        return ""
    pixels = f'latent="{PIXELS}": '
    if preset_config(preset).resolution >= MANY_PIXELS:
        faster = "A step on latents is many times faster: `factorkit train autoencoder`, then latent="
        return f'{pixels}preset="{preset}" is a network for pixels. {faster}'
    if config.masks == "mixture":
        return f'{pixels}masks="mixture" is for pixels'
    if len(config.nesting) > 1:
        return f"{pixels}regions={config.nesting} was measured on pixels alone; latent= takes an autoencoder"
    return None


def settle_own_autoencoder(config: SegdiffConfig, folder: Path) -> Latents:
    """Return the latents of an autoencoder that is trained in ``folder``, unless that is done. Collective.

    Raises:
        ConfigError: a resolution that they do not suit; the message names the nearest that works.
    """
    try:
        training, config = add_autoencoder(config)
    except ConfigError as error:
        raise ConfigError(advise_resolution(config)) from error
    steps, done = training["steps"], 0
    if read_stored(folder, AutoencoderRun.MODEL):
        done = min(steps, distributed.run_on_first(Checkpoints(folder / "checkpoints").newest_step))
    state = f"is trained on these images first, for {steps} steps, in {folder}"
    if done:
        state = (
            "is finished, and used again for the same images"
            if done == steps
            else f"goes on from step {done} of {steps}"
        )
        state = f"in {folder} {state}"
    note = (
        f"resolution={config.resolution}: the model denoises latents, many times faster than pixels. Their autoencoder "
        f'{state}; latent="{PIXELS}" denoises pixels'
    )
    return Latents(config, note, None, training, done)


def check_own_autoencoder(folder: Path, training: dict[str, Any], data: dict[str, Any] | None) -> None:
    """Raise the errors of training the autoencoder with these settings in a folder, without writing anything."""
    config = AutoencoderConfig.from_dict(training)
    if data is None and (folder / CONFIG).exists():
        data = read_settings(folder).get("data")
    settings = {"model": AutoencoderRun.MODEL, **config.to_dict(), "data": data}
    check_claim(folder, settings, config.RESUMABLE | {DATA_NAME})
    check_steps(folder, Checkpoints(folder / "checkpoints").newest_step(), config.steps)


def add_autoencoder(config: SegdiffConfig) -> tuple[dict[str, Any], SegdiffConfig]:
    """Return the settings of the autoencoder that latent="auto" trains, and those of the run with its latents.

    Raises:
        ConfigError: they cannot work.
    """
    very_many, processes = config.resolution >= VERY_MANY_PIXELS, distributed.world_size()
    training = SETTINGS | {name: getattr(config, name) for name in SHARED_SETTINGS}
    training |= {"downsample": 8, "latent_channels": 8} if very_many else {"downsample": 4, "latent_channels": 4}
    training["batch_size"] = -(-SETTINGS["batch_size"] // processes) * processes
    AutoencoderConfig.from_dict(training).validate()
    config = set_sizes(config, training["latent_channels"], training["downsample"])
    config.resolved()
    return training, config


def advise_resolution(config: SegdiffConfig) -> str:
    """Return why latents do not suit the resolution, and what works instead, in pixels of the photos.

    Raises:
        ConfigError: what is wrong beside the resolution.
    """
    sizes, nearest = find_nearest(config, add_autoencoder), find_nearest(config, SegdiffConfig.resolved)
    try:
        config.resolved()
        slow = f'latent="{PIXELS}"'
    except ConfigError:
        if not nearest:
            raise
        slow = f'resolution={min(nearest, key=lambda size: abs(size - config.resolution))} with latent="{PIXELS}"'
    reason = f'resolution={config.resolution} does not suit the latents that latent="auto" denoises from {MANY_PIXELS} '
    reason += "pixels on" if sizes else f"pixels on, nor does any within {NEAREST_WITHIN} pixels of it"
    listed = "".join(f"{' or ' * bool(i)}resolution={size}" for i, size in enumerate(sizes)) + ", or " * bool(sizes)
    return f"{reason}; use {listed}{slow} to denoise pixels, which takes many times longer"


def find_nearest(config: SegdiffConfig, check: Callable[[SegdiffConfig], object]) -> list[int]:
    """Return the nearest resolutions that ``check`` does not refuse, one below and one above, as far as there are any.

    They are divisible by 4, as those of latents are.
    """
    size, step = config.resolution, DOWNSAMPLING[0]
    low, high = max(MANY_PIXELS, size - NEAREST_WITHIN), size + NEAREST_WITHIN

    def suits(resolution: int) -> bool:
        try:
            check(dataclasses.replace(config, resolution=resolution))
        except ConfigError:
            return False
        return True

    below, above = reversed(range(-(-low // step) * step, size, step)), range((size // step + 1) * step, high, step)
    return [suited for sizes in (below, above) if (suited := next(filter(suits, sizes), None))]


def set_sizes(config: SegdiffConfig, channels: int, factor: int) -> SegdiffConfig:
    """Return the settings with the sizes of latents."""
    return dataclasses.replace(config, latent_channels=channels, latent_factor=factor)


def train_own_autoencoder(data: Any, folder: Path, training: dict[str, Any], progress: bool) -> Autoencoder:
    """Train the autoencoder of a run on its images, or resume it, or read it if it is finished. Collective."""
    train_autoencoder(data, out=folder, progress=progress, **training)

    def warn() -> None:
        for failure in judged_alarms(read_log(folder))[1]:
            print(f"autoencoder: {failure}", file=sys.stderr)

    distributed.run_on_first(warn)
    return open_autoencoder(folder)


def log_latents(folder: Path, note: str) -> None:
    """Write into the log of a run, once, what was decided about latents."""
    if note and not any(event.get("event") == LATENTS_EVENT for event in read_log(folder)):
        with RunLog(folder) as log:
            log.event(LATENTS_EVENT, step=0, message=note)


def advise_size(preset: str, config: ResolvedSegdiffConfig) -> str:
    """Return a line on latents that are too few to show anything, or nothing."""
    size, side, wide = config.resolution, config.side, preset_config(preset).resolution * config.latent_factor
    few = f"latent=: photos of {size} pixels are {side} x {side} latents, which show little; without resolution= "
    return f"{few}photos of {wide} pixels are taken" if config.latent_channels and side < FEW_LATENTS else ""


def settle_regions(config: SegdiffConfig, folder: Path, stored: dict[str, Any]) -> tuple[SegdiffConfig, str]:
    """Return the settings with ``masks`` and ``regions`` as a run in ``folder`` needs them, and why in lines.

    A run, of which ``stored`` are the settings, that was started with masks="network", once the default, resumes with
    it, and one with a number of regions too. ``regions`` stays None where masks="auto" chooses the number.
    """
    masks, note = config.choose_masks()
    regions, notes = config.regions, [note] if note else []
    if stored:
        if config.masks is None and masks == "auto" and stored.get("masks") == "network":
            masks, notes = "network", [f'masks="network": {folder} was started with it']
        if regions is None and stored.get("regions") is not None:
            regions = to_python(stored["regions"])
            if not (folder / REGIONS_FILE).exists():
                notes.append(f"regions={regions}: {folder} was started with it")
    return dataclasses.replace(config, masks=masks, regions=regions), "\n".join(notes)
