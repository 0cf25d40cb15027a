"""A trained segdiff model in memory, and how it is read from a file or run folder."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorkit.data.decode import crop_square
from factorkit.data.open import read_images
from factorkit.engine.run_folder import check_plausible, read_weights
from factorkit.segdiff.config import ResolvedSegdiffConfig, SegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.utils.errors import CheckpointError, ConfigError
from factorkit.utils.images import pixels_to_signed


class LoadedModel:
    """A model, its settings and its noise schedule on a device: what segmenting, generating and editing share."""

    def __init__(self, config: ResolvedSegdiffConfig, model: SegdiffModel, device: torch.device) -> None:
        self.config, self.device = config, device
        # torch does not type memory_format together with a device.
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.schedule = config.build_schedule(device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _check_time(self, t: int | None) -> int:
        t = self.config.segment_t if t is None else t
        if not 0 <= t < self.config.timesteps:
            raise ConfigError(f"t={t} must lie between 0 and {self.config.timesteps - 1}")
        return t

    def _read_squares(self, images: Any) -> Tensor:
        """Images cropped as in training, [n, 3, R, R] in [-1, 1]."""
        decoded, _ = read_images(images)
        squares = [crop_square(image, self.config.resolution) for image in decoded]
        return pixels_to_signed(torch.from_numpy(np.stack(squares)))


def load_model(path: Path, weights: str | float) -> tuple[ResolvedSegdiffConfig, SegdiffModel, int]:
    """Load settings, model and step; nothing is allocated before the settings are known to be plausible.

    Raises:
        CheckpointError: nothing there, damaged, or not a segdiff model.
        ConfigError: unknown ``weights``.
    """
    tensors, meta = read_weights(path, "segdiff", weights)
    fields = {f.name for f in dataclasses.fields(SegdiffConfig)}
    try:
        config = SegdiffConfig.from_dict({k: v for k, v in meta.items() if k in fields}).resolved()
        check_plausible(
            path,
            tensors,
            blocks=config.num_res_blocks,
            levels=len(config.channel_mult),
            regions=math.prod(config.nesting),
            channels=config.model_channels * max(config.channel_mult),
        )
        with torch.device("meta"):
            model = config.build()
        model.load_state_dict(tensors, assign=True)
        step = int(meta["step"])
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the weights in {path} do not match the model of its settings: {error}") from error
    return config, model, step
