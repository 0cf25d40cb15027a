"""Settings of a segdiff run, and the presets: one line each over the defaults."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Suppress, arg

from factorkit.diffusion.objective import check_objective
from factorkit.diffusion.schedule import Schedule
from factorkit.engine.config import MAX_TIMESTEPS, EngineConfig
from factorkit.engine.migration import register_renamed_settings
from factorkit.ops.norm import NORMS
from factorkit.segdiff.hierarchy import HierarchicalUNet, check_nesting, nesting_of
from factorkit.segdiff.network import FactorizedUNet, check_architecture
from factorkit.utils.errors import ConfigError, did_you_mean

MOST_REGIONS = 256  # a label is a byte in every file


@dataclass(kw_only=True)
class SegdiffConfig(EngineConfig):
    """Train a factorized diffusion model: it generates images and segments real ones, without labels."""

    resolution: int = 64
    """Pixels a side the model works at; photos are cropped to their centred square and resized."""
    regions: Annotated[int | tuple[int, ...], arg(metavar="INT [INT ...]")] = 3
    """K, the number of soft regions; 1 is the plain DDPM. Several numbers are a hierarchy: 3 3 splits into 3 regions,
    and each of them into 3."""
    form: Literal["regional", "thesis"] = "regional"
    """"thesis" is the letter of chapter 2; "regional" adds what makes the regions follow content at modest budgets."""
    decoding: Literal["masked_skips", "concat", "masked_mid", "unshared"] = "masked_skips"
    """How the branches see the masks; the last three are the ablations of table 2.6."""

    model_channels: int = 128
    """C, the channels of the first level."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level, in units of C."""
    num_res_blocks: int = 3
    """Residual blocks a level."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Resolutions with self-attention (the middle always has it)."""
    num_heads: int = 4
    """Attention heads."""
    norm_groups: int = 32
    """Most groups of a GroupNorm."""
    dropout: float = 0.0
    """In the residual blocks."""

    prediction: Literal["eps", "v", "x0", "flow"] | None = None
    """What the network predicts: the noise, v, the clean image, or the velocity of flow matching; None: v for the
    regional form, eps for the thesis'."""
    schedule: Literal["linear", "cosine", "flow"] | None = None
    """The path from image to noise; None: flow, the straight one, where the flow is predicted, else linear."""
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    """What each noise level counts in the loss; min_snr is min(SNR, gamma) times the error of the clean image."""
    min_snr_gamma: float = 5.0
    """Gamma of min_snr."""
    masks: Literal["network", "mixture"] = "network"
    """What proposes the regions: the U-Net, or a learned place of each, by whose colours in the picture at hand they
    compete for its pixels. For objects that colour does not tell, in photographs that are all framed alike."""
    branch_norm: Literal["group", "masked_group", "pixel"] | None = None
    """Norm of the branch decoder; None: pixel in the regional form, group in the thesis'."""
    region_tokens: bool | None = None
    """Add each region's mean local feature to its branch's time embedding; None: in the regional form."""
    normalised_logits: bool | None = None
    """Batch-normalise the mask logits; None: in the regional form."""
    half_resolution_masks: bool | None = None
    """Predict masks at half the resolution; None: in the regional form."""
    checkpoint_branches: bool = False
    """Run the branches one by one in training and again in the backward pass: slower, in the memory of one branch."""
    mask_learning_rate: float | None = None
    """Factor on the learning rate of what makes the masks; None: 0.3 in the regional form, 1 in the thesis', 100 of a
    mixture."""
    t_max: int | None = None
    """Most time steps are drawn from [0, t_max); None: in the regional form 600 of 1000, 720 from 64 pixels on, on
    another schedule than the linear one up to the same noise; all in the thesis'."""
    high_noise_fraction: float | None = None
    """Share of the samples whose time step is drawn from [t_max, T) instead, so that generation can start from pure
    noise; None: 0.1 in the regional form, 0 in the thesis' and where t_max leaves no tail."""
    coarse_to_fine: tuple[int, int] | None = None
    """Steps between which the loss weight goes from (1 - alpha_bar) to 1; None: (50, 150) in the regional form, else
    off."""
    timesteps: int = 1000
    """T, the length of the noise schedule."""
    random_flip: bool = True
    """Show half of the pictures mirrored; False where left and right mean something, as when all face one way."""

    holdout: str | int = "auto"
    """Labelled images kept out of training: "masked", "none", a number, the name of an official split, or "auto"."""
    mask_set: str | None = None
    """Which masks are scored, of a data set that has several; None: its first. See factorkit prepare --list."""
    ignore: int | None = None
    """Mask value of pixels that are not scored."""
    num_fit_images: int = 16
    """Labelled images that fit the mapping from regions to foreground; the rest are scored."""
    segment_t: int | None = None
    """Noise level at which real images are segmented; None: that of 30 on the linear schedule of 1000, and 0 of a
    mixture."""

    class_names: Suppress[tuple[str, ...]] = ()
    """The classes the model can be told of, in the order of their labels; `train_segdiff(classes=)` fills it."""
    label_dropout: float = 0.1
    """Share of the labels that are left out in training, so that generation can be guided; where there are classes."""

    RESUMABLE = EngineConfig.RESUMABLE | {"checkpoint_branches"}

    @property
    def nesting(self) -> tuple[int, ...]:
        """How many regions each level splits into, the coarsest first."""
        return nesting_of(self.regions)

    @property
    def num_leaf_regions(self) -> int:
        """How many regions the deepest level has in all; K where there is one level."""
        return math.prod(self.nesting)

    def resolved(self) -> SegdiffConfig:
        """The same configuration with every "None: by the form" filled in, checked.

        Raises:
            ConfigError: a setting, or a combination, that cannot work.
        """
        if self.form not in FORMS:
            raise ConfigError(f"form={self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        defaults = dict(FORMS[self.form])
        if len(self.nesting) == 1:
            self = dataclasses.replace(self, regions=self.nesting[0])  # (3,) and 3 are one setting
        if self.decoding == "concat":
            defaults["region_tokens"] = False  # one branch
        if self.masks == "mixture":
            defaults |= {"normalised_logits": False, "half_resolution_masks": False, "mask_learning_rate": 100.0}
            defaults["segment_t"] = 0  # colours are measured best without noise: horses .684 instead of .674
        prediction = self.prediction or defaults["prediction"]
        kind = defaults["schedule"] = self.schedule or ("flow" if prediction == "flow" else "linear")
        check_objective(prediction, kind)
        if kind == "linear" and self.timesteps <= 20:
            raise ConfigError(
                f"timesteps={self.timesteps} must be more than 20 with schedule='linear': a shorter one needs beta >= 1"
            )
        path, reference = Schedule(self.timesteps, kind), Schedule()
        defaults.setdefault("segment_t", path.find_matching_time(30, reference))
        if self.form == "regional" and self.resolution >= 64:
            defaults["t_max"] = 720  # more pixels show the same shapes through more noise
        # another length or kind of schedule is drawn from up to the same noise
        if defaults["t_max"] < 1000 and kind != "linear":
            defaults["t_max"] = max(1, path.find_matching_time(defaults["t_max"], reference))
        else:
            defaults["t_max"] = max(1, defaults["t_max"] * self.timesteps // 1000)
        t_max = defaults["t_max"]
        if (t_max if self.t_max is None else self.t_max) >= self.timesteps:
            defaults["high_noise_fraction"] = 0.0
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        config = dataclasses.replace(self, **missing)
        config.validate()
        return config

    def validate(self) -> None:
        super().validate()
        for name in ("resolution", "model_channels", "num_res_blocks", "num_heads", "norm_groups", "num_fit_images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.model_channels % 2:
            raise ConfigError(
                f"model_channels={self.model_channels} must be even: half of the time embedding is cosines, half sines"
            )
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ConfigError(f"channel_mult={self.channel_mult} must be one positive number for each level")
        check_objective(self.prediction, self.schedule)
        if self.loss_weighting not in ("uniform", "min_snr"):
            raise ConfigError(f"loss_weighting={self.loss_weighting!r} is unknown; choose uniform or min_snr")
        if not 0 < self.min_snr_gamma < math.inf:
            raise ConfigError(f"min_snr_gamma={self.min_snr_gamma} must be positive and finite")
        if not 0 <= self.label_dropout < 1:
            raise ConfigError(f"label_dropout={self.label_dropout} must lie between 0 and 1, without 1")
        if self.branch_norm not in NORMS:
            raise ConfigError(f"branch_norm={self.branch_norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout} must lie between 0 and 1, without 1")
        if not 0 <= self.mask_learning_rate < math.inf:
            raise ConfigError(f"mask_learning_rate={self.mask_learning_rate} is a factor, 0 or more")
        if len(self.coarse_to_fine) != 2 or not 0 <= self.coarse_to_fine[0] <= self.coarse_to_fine[1]:
            raise ConfigError(f"coarse_to_fine={self.coarse_to_fine} must be two steps, the second not the earlier")
        if not 1 <= self.t_max <= self.timesteps:
            raise ConfigError(f"t_max={self.t_max} must lie between 1 and timesteps={self.timesteps}")
        if not 0 <= self.high_noise_fraction <= 1 or (self.high_noise_fraction and self.t_max == self.timesteps):
            raise ConfigError(
                f"high_noise_fraction={self.high_noise_fraction} must lie between 0 and 1, and be 0 with "
                f"t_max={self.t_max}, which leaves no higher levels"
            )
        if self.timesteps > MAX_TIMESTEPS:
            raise ConfigError(f"timesteps={self.timesteps} must be at most {MAX_TIMESTEPS}")
        if not 0 <= self.segment_t < self.timesteps:
            raise ConfigError(f"segment_t={self.segment_t} must lie between 0 and timesteps-1={self.timesteps - 1}")
        if self.num_leaf_regions > MOST_REGIONS:
            raise ConfigError(
                f"regions={self.regions}: {self.num_leaf_regions} regions in all, but label images and videos hold at "
                f"most {MOST_REGIONS}; give fewer"
            )
        if len(self.nesting) != 1:
            check_nesting(self.nesting, self.decoding, self.masks)
        for regions in self.nesting:
            check_architecture(
                regions,
                self.resolution,
                self.channel_mult,
                self.decoding,
                self.branch_norm,
                self.region_tokens,
                self.half_resolution_masks,
                self.masks,
                self.normalised_logits,
            )

    def memory_advice(self, at_once: int) -> str:
        cures = [f"micro_batch_size={at_once // 2}, which changes memory only"] if at_once > 1 else []
        if self.num_leaf_regions > 1 and self.decoding != "concat" and not self.checkpoint_branches:
            cures.append("checkpoint_branches=True, for the memory of one branch at a slower pace")
        return "Give " + " or ".join(cures or ["a smaller model_channels= or resolution= in another out="])

    def noising(self, device: torch.device | str = "cpu") -> Schedule:
        """The path from image to noise of a resolved configuration."""
        return Schedule(self.timesteps, self.schedule, device)

    def build(self) -> FactorizedUNet | HierarchicalUNet:
        """The network of a resolved configuration, with fresh weights, channels last."""
        names = (
            "regions",
            "resolution",
            "model_channels",
            "channel_mult",
            "num_res_blocks",
            "attention_resolutions",
            "num_heads",
            "norm_groups",
            "dropout",
            "decoding",
            "branch_norm",
            "region_tokens",
            "normalised_logits",
            "half_resolution_masks",
            "checkpoint_branches",
            "masks",
        )
        kind = FactorizedUNet if isinstance(self.regions, int) else HierarchicalUNet
        model = kind(**{name: getattr(self, name) for name in names}, classes=len(self.class_names))
        # as its features lie: a convolution would otherwise turn its weights round in every call
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


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

_SMALL = {
    "resolution": 32,
    "regions": 2,
    "model_channels": 16,
    "channel_mult": (1, 2, 3),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 8,
    "steps": 400,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 50,
    "lr_decay_fraction": 0.3,
    "gradient_clip": 1.0,
    "ema_decay": 0.99,
    "threads": 1,
    "checkpoint_every": 100,
    "sample_every": 200,
    "log_every": 20,
}
_THESIS64 = {"form": "thesis", "resolution": 64}
_THESIS128 = {"form": "thesis", "resolution": 128, "channel_mult": (1, 1, 2, 3, 4), "num_res_blocks": 2}

#: The thesis' models share Adam 1e-4, EMA 0.9999, batch 128 and K = 3, which are the defaults above.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": _SMALL,
    "fast32": _SMALL | {"steps": 800},
    # regions within regions, on the procedural rooms
    "rooms32": _SMALL | {"regions": (3, 3), "steps": 800},
    "fast64": _SMALL | {"resolution": 64, "channel_mult": (1, 2, 3, 4), "steps": 1500},
    "flowers64": _THESIS64 | {"steps": 50_000},
    "flowers128": _THESIS128 | {"steps": 50_000},
    "cub64": _THESIS64 | {"steps": 50_000},
    "cub128": _THESIS128 | {"steps": 50_000},
    "ffhq64": _THESIS64 | {"steps": 500_000},
    "ffhq128": _THESIS128 | {"steps": 500_000},
    "imagenet64": _THESIS64 | {"steps": 500_000, "batch_size": 512},
}


def preset_config(preset: str | None, **changes: Any) -> SegdiffConfig:
    """The configuration of a preset (None: the class's defaults) with ``changes``, not yet resolved.

    Raises:
        ConfigError: an unknown preset or setting.
    """
    if preset is not None and preset not in PRESETS:
        meant = did_you_mean(preset, PRESETS)
        raise ConfigError(f"preset={preset!r} is unknown. {meant}Choose one of {', '.join(PRESETS)}")
    return SegdiffConfig.from_dict({**(PRESETS[preset] if preset else {}), **changes})


# Settings of stored runs that have changed since: old name -> name of today; (name of today, old value) -> new value.
_STORED_AS = ("segdiff", "choose_regions", "places", "supervised")
register_renamed_settings(
    _STORED_AS,
    names={
        "width": "model_channels",
        "multipliers": "channel_mult",
        "blocks": "num_res_blocks",
        "attention": "attention_resolutions",
        "heads": "num_heads",
        "groups": "norm_groups",
        "mirror": "random_flip",
        "tail": "high_noise_fraction",
        "fit": "num_fit_images",
        "seeds": "seed_trials",
    },
    values={("masks", "competition"): "mixture"},
)
