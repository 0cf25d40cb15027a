"""Settings of a nerfdiff run, and the presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from factorkit.engine.config import MOST_STEPS, EngineConfig
from factorkit.nerfdiff.cameras.poses import FREEDOMS
from factorkit.nerfdiff.fields.background import BACKGROUNDS
from factorkit.nerfdiff.fields.grid import FIELDS
from factorkit.utils.errors import ConfigError, did_you_mean
from factorkit.utils.rng import derived_seed

#: old name -> name today, of settings in stored runs
RENAMED_SETTINGS = {"width": "model_channels", "multipliers": "channel_mult", "blocks": "num_res_blocks"}


@dataclass(kw_only=True)
class NerfdiffConfig(EngineConfig):
    """Find the cameras and the scene of views whose poses nobody knows; the model denoises views on the way.

    `steps`, `batch_size` and `learning_rate` are those of the encoder, or of encoder and field together with
    search="joint".
    """

    resolution: int = 32
    """Pixels along the longer side the views are brought to."""
    poses: Literal["predicted", "known", "learned"] = "predicted"
    """Where a training view's pose comes from: the model finds it (the thesis), it comes with the views (a supervised
    field), or it is a free parameter from the start (NeRF--)."""
    search: Literal["dictionary", "joint"] = "dictionary"
    """How poses are found: by a balanced search over fixed directions, refinement, flip test and an encoder distilled
    from the result; or by encoder and field trained together from nothing (algorithms 3 and 4)."""
    noise: bool = True
    """Off: the encoder reads clean views, an autoencoder."""
    timesteps: int = 100
    """T, the length of the noise schedule."""

    t_power: float = 1.5
    """Levels of noise are T u^t_power of even u; 1: all alike (the thesis)."""

    cameras: int = 8
    """N, candidate cameras for each view."""
    candidates: Literal["look_at", "thesis", "single"] = "look_at"
    """How candidates are parametrised: overlapping cells around anchors, the thesis' octants (code 3.3), or one camera
    by Rodrigues' formula (algorithm 3)."""
    classification_weight: float = 0.1
    """Lambda of eq. 3.4, beside errors of colours in [0, 1] or of unit directions."""
    balance: bool = True
    """With search="joint": in the first half every candidate gets its share of the views; off: plain best-of-N."""
    elevations: tuple[float, float] = (5.0, 70.0)
    """Lowest and highest elevation of the cameras, degrees above the horizon."""
    azimuths: int = 24
    """Directions on each circle of the dictionary."""
    rings: int = 4
    """Circles of the dictionary."""
    freedom: tuple[Literal["roll", "aim", "distance", "focal"], ...] = ()
    """What is refined and predicted beyond the direction of cameras that look at the origin from one distance, upright:
    a turn about the viewing axis, a place aside of it, a distance for each view, and one focal length for all."""
    flip_rounds: int = 8
    """Most rounds of the flip test, for scenes that nearly look alike from two sides and for views that went astray; it
    ends with the first that changes nothing. 0: one round that tells and changes nothing."""

    field: Literal["grid", "hashgrid", "mlp", "siren", "tcnn"] = "grid"
    """What holds the scene: a dense grid, a hash grid, NeRF's network, one of sines, or tiny-cuda-nn's hash grid and
    fused networks where those can be imported. The search has a grid anyway."""
    occupancy: bool = False
    """Leave out of training and pictures the steps through space that the field has found empty. The robust recipe's
    presets do so for all fields but the grid, whose steps cost little."""
    background: Literal["given", "learned", "field"] = "given"
    """What lies behind everything: the one colour that comes with the views (black where none does), one to be learned,
    or a colour to be learned for every viewing direction."""
    appearance: int = 0
    """Numbers of a code that each training view has for its tone, for collections from many cameras or hours; 0: all
    views are of one tone."""
    search_field: int = 24
    """Vertices along each side of the grid that is searched with."""
    grid: int = 32
    """Vertices along each side of the final grid, or cells of the hash grid's finest level."""
    samples: int = 32
    """Steps along a ray."""
    views: int = 16
    """Views a step of search and refinement."""
    rays: int = 256
    """Rays of each view a step."""
    roughness: float = 3e-4
    """Weight of the differences of neighbouring numbers of the grid, beside the mean squared error."""
    fog: float = 1e-3
    """Weight of the mean opacity seen, where cameras stand around an object, beside the mean squared error."""
    search_steps: int = 600
    """Of the dictionary search."""
    search_learning_rate: float = 0.05
    """Of the field in the search."""
    field_steps: int = 600
    """Of the refinement of field and poses."""
    field_learning_rate: float = 0.03
    """Of the field in the refinement, and with search="joint"."""
    pose_learning_rate: float = 0.005
    """Of the views' poses in the refinement."""

    encoder_resolution: int = 32
    """Pixels along the longer side the encoder reads at."""
    model_channels: int = 16
    """C, the encoder's channels at the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, in units of C."""
    num_res_blocks: int = 1
    """Residual blocks a level."""
    pooling: Literal["whole", "average"] = "whole"
    """How the encoder's last features reach its heads: all of them, or their mean (fig. 3.12)."""
    rendered: int = 300
    """Further views of the found scene the encoder learns from."""
    tuning_steps: int = 0
    """After the encoder is distilled, so many further steps of denoising, the field held."""

    def validate(self) -> None:
        super().validate()
        least = {
            "resolution": 4,
            "timesteps": 21,
            "cameras": 1,
            "azimuths": 2,
            "rings": 1,
            "flip_rounds": 0,
            "search_field": 4,
            "grid": 4,
            "samples": 1,
            "views": 1,
            "rays": 1,
            "search_steps": 1,
            "field_steps": 1,
            "encoder_resolution": 4,
            "model_channels": 2,
            "num_res_blocks": 1,
            "rendered": 0,
            "tuning_steps": 0,
            "appearance": 0,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {low}")
        for field in dataclasses.fields(self):
            options = CHOICES.get(field.name)
            if options and getattr(self, field.name) not in options:
                value = getattr(self, field.name)
                raise ConfigError(f"{field.name}={value!r} is unknown; choose one of {', '.join(options)}")
        unknown = set(self.freedom) - {*FREEDOMS, "focal"}
        if unknown:
            options = ", ".join([*FREEDOMS, "focal"])
            raise ConfigError(f"freedom={self.freedom}: {', '.join(sorted(unknown))} is none of {options}")
        if self.timesteps > MOST_STEPS:
            raise ConfigError(f"timesteps={self.timesteps} must be at most {MOST_STEPS}")
        low, high = self.elevations
        if not -89 <= low < high <= 89:
            raise ConfigError(f"elevations={self.elevations} must rise and lie within -89 and 89 degrees")
        if self.model_channels % 2:
            raise ConfigError(
                f"model_channels={self.model_channels} must be even: half of the time embedding is cosines, half sines"
            )
        if not 0 < self.t_power:
            raise ConfigError(f"t_power={self.t_power} must be positive")
        for name in ("classification_weight", "roughness", "fog"):
            if not 0 <= getattr(self, name):
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")

    @property
    def pose_freedom(self) -> tuple[str, ...]:
        """The freedoms that every view has for itself."""
        return tuple(name for name in self.freedom if name in FREEDOMS)

    def stage(self, name: str, **changes: Any) -> NerfdiffConfig:
        """The configuration of one stage of the run, with random numbers of its own."""
        return dataclasses.replace(self, seed=derived_seed(name, self.seed) % 2**31, **changes)


CHOICES = {
    "poses": ("predicted", "known", "learned"),
    "search": ("dictionary", "joint"),
    "candidates": ("look_at", "thesis", "single"),
    "field": FIELDS,
    "background": BACKGROUNDS,
    "pooling": ("whole", "average"),
}

_FAST = {
    "steps": 500,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "decay": 1.0,
    "ema": 0.98,
    "precision": "fp32",
    "threads": 1,
    "checkpoint_every": 100,
    "sample_every": 0,
    "log_every": 20,
    "keep_checkpoints": 2,
}
_THESIS = {
    "search": "joint",
    "balance": False,
    "candidates": "thesis",
    "field": "mlp",
    "samples": 64,
    "resolution": 128,
    "steps": 200_000,
    "learning_rate": 2e-5,
    "field_learning_rate": 1e-4,
    "ema": 0.9999,
    "precision": "fp32",
    "batch_size": 16,
    "rays": 256,
    "t_power": 1.0,
    "model_channels": 64,
    "channel_mult": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
    "pooling": "average",
    "encoder_resolution": 128,
    "roughness": 0.0,
    "fog": 0.0,
}


def _sized(resolution: int) -> dict[str, Any]:
    """The robust recipe's final field at a resolution: a vertex a pixel, as many steps along a ray, and longer."""
    side = min(max(resolution, 32), 128)
    return {"grid": side, "samples": side, "field_steps": round(600 * side / 32)}


#: what search="joint" changes of a preset of the robust recipe
_JOINT = {
    "steps": 1500,
    "batch_size": 16,
    "decay": 0.4,
    "cameras": 12,
    "classification_weight": 0.01,
    "t_power": 3.0,
    "rays": 128,
    "sample_every": 300,
}
_JOINT_SHARES = {"grid": 3 / 4, "samples": 7 / 8}  # of the robust recipe's

PRESETS: dict[str, dict[str, Any]] = {
    "demo": _FAST,
    "fast": _FAST,
    "lego": _THESIS | {"cameras": 12},
    "drums": _THESIS | {"cameras": 12},
    "car": _THESIS | {"cameras": 8, "elevations": (-70.0, 70.0)},
    "llff": _THESIS | {"cameras": 1, "candidates": "single", "resolution": 504, "encoder_resolution": 504},
}


def preset_config(preset: str | None, **changes: Any) -> NerfdiffConfig:
    """The configuration of a preset (None: the class's defaults) with ``changes``, checked.

    Raises:
        ConfigError: an unknown preset or setting, or one that cannot work.
    """
    if preset is not None and preset not in PRESETS:
        meant = did_you_mean(preset, PRESETS)
        raise ConfigError(f"preset={preset!r} is unknown. {meant}Choose one of {', '.join(PRESETS)}")
    settings = PRESETS[preset] if preset else {}
    if settings is _FAST:
        settings = settings | _sized(changes.get("resolution", NerfdiffConfig.resolution))
        settings = settings | {"occupancy": changes.get("field", NerfdiffConfig.field) != "grid"}
    if changes.get("search") == "joint" and preset in ("demo", "fast"):
        settings = settings | _JOINT | {k: round(share * settings[k]) for k, share in _JOINT_SHARES.items()}
    config = NerfdiffConfig.from_dict({**settings, **changes})
    config.validate()
    return config
