"""A model out of the file or folder that holds its weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch

from factorkit.engine.run_folder import check_plausible, read_weights
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.network import FactorizedUNet
from factorkit.utils.errors import CheckpointError, ConfigError


def stored_model(path: Path, weights: str | float) -> tuple[SegdiffConfig, FactorizedUNet, int]:
    """Settings, model and step of what lies at ``path``; nothing is allocated before its settings are found plausible.

    Raises:
        CheckpointError: nothing there, damaged, or not a segdiff model.
        ConfigError: other ``weights`` than there are.
    """
    found, meta = read_weights(path, "segdiff", weights)
    fields = {f.name for f in dataclasses.fields(SegdiffConfig)}
    try:
        config = SegdiffConfig.from_dict({k: v for k, v in meta.items() if k in fields}).resolved()
        check_plausible(
            path,
            found,
            blocks=config.num_res_blocks,
            levels=len(config.channel_mult),
            regions=math.prod(config.nesting),
            channels=config.model_channels * max(config.channel_mult),
        )
        with torch.device("meta"):
            model = config.build()
        model.load_state_dict(found, assign=True)
        step = int(meta["step"])
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"the weights in {path} do not fit the model of its settings: {error}") from error
    return config, model, step
