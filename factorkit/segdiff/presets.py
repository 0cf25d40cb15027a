"""The values behind ``form=`` and ``preset=`` of segdiff: changes to the defaults of its settings."""

from __future__ import annotations

from typing import Any

FORMS: dict[str, dict[str, Any]] = {
    "regional": {
        "prediction": "v",
        "branch_norm": "pixel",
        "region_tokens": True,
        "normalised_logits": True,
        "half_resolution_masks": True,
        "mask_learning_rate": 0.3,
        "t_max": 600,
        "high_noise_fraction": 0.1,
        "coarse_to_fine": (50, 150),
    },
    "thesis": {
        "prediction": "eps",
        "branch_norm": "group",
        "region_tokens": False,
        "normalised_logits": False,
        "half_resolution_masks": False,
        "mask_learning_rate": 1.0,
        "t_max": 1000,
        "high_noise_fraction": 0.0,
        "coarse_to_fine": (0, 0),
    },
}

#: small networks of each backbone, for a CPU
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "unet": {
        "model_channels": 16,
        "channel_mult": (1, 2, 3),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "norm_groups": 8,
    },
    "uvit": {"backbone": "uvit", "model_channels": 128, "depth": 7, "patch_size": 4},
}
_SMALL = ARCHITECTURES["unet"] | {
    "resolution": 32,
    "regions": 2,
    "steps": 400,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "distil_steps": 300,
    "lr_decay_fraction": 0.3,
    "gradient_clip": 1.0,
    "ema_decay": 0.99,
    "threads": 1,
    "checkpoint_every": 100,
    "sample_every": 200,
    "log_every": 20,
}
_UVIT = {k: v for k, v in _SMALL.items() if k not in ARCHITECTURES["unet"]} | ARCHITECTURES["uvit"]
_THESIS64 = {"form": "thesis", "resolution": 64}
_THESIS128 = {"form": "thesis", "resolution": 128, "channel_mult": (1, 1, 2, 3, 4), "num_res_blocks": 2}

#: The thesis' models share Adam with 1e-4, EMA 0.9999, batch size 128 and K = 3, which are the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": _SMALL,
    "fast32": _SMALL | {"steps": 800},
    # a hierarchy, for the procedural rooms
    "rooms32": _SMALL | {"regions": (3, 3), "steps": 800},
    "fast64": _SMALL | {"resolution": 64, "channel_mult": (1, 2, 3, 4), "steps": 1500, "distil_steps": 1500},
    # transformers; a step takes as long as one of fast32 and fast64; 8 x 8, 16 x 16 and 16 x 16 tokens
    "uvit32": _UVIT | {"steps": 800},
    "uvit64": _UVIT | {"resolution": 64, "steps": 1500, "distil_steps": 1500},
    "uvit128": _UVIT | {"resolution": 128, "patch_size": 8, "steps": 1500, "distil_steps": 1500},
    "flowers64": _THESIS64 | {"steps": 50_000},
    "flowers128": _THESIS128 | {"steps": 50_000},
    "cub64": _THESIS64 | {"steps": 50_000},
    "cub128": _THESIS128 | {"steps": 50_000},
    "ffhq64": _THESIS64 | {"steps": 500_000},
    "ffhq128": _THESIS128 | {"steps": 500_000},
    "imagenet64": _THESIS64 | {"steps": 500_000, "batch_size": 512},
}
