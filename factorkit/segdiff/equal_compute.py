"""The plain DDPM to compare a run with: the same training without regions, for as long."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from factorkit.engine.config import cpu_threads
from factorkit.engine.run_folder import read_settings, sum_step_seconds
from factorkit.segdiff.config import PIXELS, ResolvedSegdiffConfig, SegdiffConfig, preset_config
from factorkit.segdiff.latents import COPY_NAME
from factorkit.segdiff.presets import PRESETS
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.train import make_trial
from factorkit.utils.errors import ConfigError
from factorkit.utils.files import read_log, timeline

#: Settings that a plain DDPM does not read.
REGION_SETTINGS = {
    *("masks", "cue_weight", "mixture_steps", "distil_steps", "mask_learning_rate", "normalised_logits"),
    *("half_resolution_masks", "decoding", "branch_norm", "region_tokens", "checkpoint_branches"),
    *("segment_t", "ignore", "foreground", "mask_threshold", "num_fit_images"),
}
#: Settings that train_segdiff() sets by itself.
SETTLED = {"class_names", "latent_channels", "latent_factor"}
MAX_TIMED_IMAGES = 16  # in a step: a machine that evaluates may have less memory than the one that trained


def choose_plain_ddpm(run: SegdiffRun, folder: Path) -> tuple[dict[str, Any], float] | None:
    """Return the settings of a plain DDPM like the run in ``folder`` that differ from its preset, and the preset.

    Its latents are those of the run, so that it takes as long if its steps take as long as those of the run and of its
    stages together, the seconds that are returned too. None without a log.
    """
    preset = read_settings(folder).get("preset")
    preset = preset if preset in PRESETS else "fast64"
    last = timeline(read_log(folder), "step")[-1:]
    if not last or not (own := sum_step_seconds(folder)):
        return None
    seconds = sum_step_seconds(folder, *folder.glob("stages/*"))
    latent = str(folder / COPY_NAME) if run.config.latent_channels else PIXELS
    plain, changes = find_changes(run.config, preset)
    ratio = time_image(run.config, run.device) / time_image(plain, run.device)
    steps = max(1, round(seconds / own * last[0]["step"] * ratio))
    sizes = {"regions": 1, "resolution": run.config.resolution, "latent": latent, "steps": steps}
    return {"preset": preset, **sizes, **changes}, seconds


def find_changes(config: ResolvedSegdiffConfig, preset: str) -> tuple[ResolvedSegdiffConfig, dict[str, Any]]:
    """Return the settings of a plain DDPM like ``config``, and those that differ from the preset's beside its sizes."""
    same = {"regions": 1, **{name: getattr(config, name) for name in ("resolution", "steps", "latent", *SETTLED)}}
    names = {field.name for field in dataclasses.fields(SegdiffConfig)} - same.keys() - REGION_SETTINGS
    changes = {name: getattr(config, name) for name in sorted(names)}
    plain = preset_config(preset, **same, **changes).resolved()
    for name in sorted(names):
        fewer = {other: value for other, value in changes.items() if other != name}
        with suppress(ConfigError):
            changes = fewer if preset_config(preset, **same, **fewer).resolved() == plain else changes
    return plain, changes


def time_image(config: ResolvedSegdiffConfig, device: torch.device) -> float:
    """Return the seconds that a training step takes for an image. Collective."""
    count = min(MAX_TIMED_IMAGES, config.micro_batch_size or config.batch_size)
    trainer = make_trial(dataclasses.replace(config, micro_batch_size=count), device)
    with cpu_threads(config.threads):
        return trainer.measure_step_seconds(steps=3) / trainer.config.batch_size
