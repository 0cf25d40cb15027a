"""The presets of nerfdiff, and what search="joint" changes in the small ones."""

from __future__ import annotations

from typing import Any

FAST = {
    "steps": 750,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "timestep_power": 3.0,
    "lr_decay_fraction": 1.0,
    "ema_decay": 0.98,
    "precision": "fp32",
    "threads": 1,
    "checkpoint_every": 100,
    "sample_every": 0,
    "log_every": 20,
    "keep_checkpoints": 2,
}
THESIS = {
    "search": "joint",
    "balance_candidates": False,
    "candidate_type": "thesis",
    "field": "mlp",
    "samples_per_ray": 64,
    "resolution": 128,
    "steps": 200_000,
    "learning_rate": 2e-5,
    "field_learning_rate": 1e-4,
    "ema_decay": 0.9999,
    "precision": "fp32",
    "batch_size": 16,
    "rays_per_view": 256,
    "timestep_power": 1.0,
    "model_channels": 64,
    "channel_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "encoder_pooling": "average",
    "encoder_resolution": 128,
    "tv_weight": 0.0,
    "opacity_weight": 0.0,
}
#: changes of search="joint" to the presets "demo" and "fast"
JOINT = {
    "steps": 1500,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "lr_decay_fraction": 0.4,
    "encoder_resolution": 32,
    "encoder_stem_size": 1,
    "model_channels": 16,
    "channel_mult": (1, 2, 2, 2),
    "num_candidates": 12,
    "classification_weight": 0.01,
    "rays_per_view": 128,
    "sample_every": 300,
}
JOINT_SHARES = {"grid_resolution": 3 / 4, "samples_per_ray": 7 / 8}  # factors on the same presets

PRESETS: dict[str, dict[str, Any]] = {
    "demo": FAST,
    "fast": FAST,
    "lego": THESIS | {"num_candidates": 12},
    "drums": THESIS | {"num_candidates": 12},
    "car": THESIS | {"num_candidates": 8, "elevation_range": (-70.0, 70.0)},
    "llff": THESIS | {"num_candidates": 1, "candidate_type": "single", "resolution": 504, "encoder_resolution": 504},
}
