"""Settings of a segdiff run: given, resolved and checked."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Suppress, arg

from factorkit.diffusion.schedule import Schedule, check_objective
from factorkit.engine.config import MAX_TIMESTEPS, EngineConfig
from factorkit.ops.norm_pytorch import NORMS
from factorkit.segdiff import stored_settings as stored_settings  # registers the names of stored runs
from factorkit.segdiff.backbones import BACKBONES, Backbone, make_backbone
from factorkit.segdiff.hierarchy import HierarchicalDenoiser, SegdiffModel, check_nesting
from factorkit.segdiff.network import FactorizedDenoiser, check_architecture
from factorkit.segdiff.presets import ARCHITECTURES, FORMS, PRESETS
from factorkit.utils.errors import ConfigError, did_you_mean

MIN_LATENT_SIDE = 8  # of the latents of the training images
PIXELS = "no"  # the value of latent= without latents
OPEN_REGIONS = 3  # where none are given; masks="auto" starts from it and may choose 2
MAX_REGIONS = 256  # label images hold one byte per pixel
Prediction = Literal["eps", "v", "x0", "flow"]
NoiseSchedule = Literal["linear", "cosine", "flow"]
Masks = Literal["auto", "network", "mixture"]
BranchNorm = Literal["group", "masked_group", "pixel"]


@dataclass(kw_only=True)
class SegdiffConfig(EngineConfig):
    """Train a factorized diffusion model: it generates images and segments real ones, without labels."""

    resolution: int = 64
    """Side of the training images in pixels. Photos are cropped to their central square and resized. The thesis uses 64
    and 128; 32 suffices for a first look on a CPU."""
    regions: Annotated[int | tuple[int, ...] | None, arg(metavar="INT [INT ...]")] = None
    """Number K of soft regions; 1 is the plain DDPM. By default 2 or 3 with masks="auto", as suits the images, else the
    preset's, or 3 as in the thesis. Several numbers define a hierarchy: 3 3 splits each of 3 regions into 3."""
    form: Literal["regional", "thesis"] = "regional"
    """"thesis" is the model exactly as in the thesis. "regional" adds what makes the regions follow content at modest
    budgets."""
    decoding: Literal["masked_skips", "concat", "masked_mid", "unshared"] = "masked_skips"
    """How the branches see the masks. The last three are the ablations of table 2.6."""
    backbone: Literal["unet", "uvit"] = "unet"
    """Network inside: the thesis' U-Net, or a transformer with long skips (U-ViT). With a preset, its sizes are then
    those of the preset uvit32."""
    model_channels: int = 128
    """Channels of the first level of the U-Net, or of the tokens of the transformer. 128 is the value of the thesis."""
    depth: int | None = None
    """Transformer blocks in all, an odd number: two equal halves and one between them. By default 13, as in U-ViT-S."""
    patch_size: int | None = None
    """Side in pixels of a token of the transformer. By default such that there are 16 x 16 tokens."""
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    """Channels of each level of the U-Net as multiples of model_channels; one number per level. The default is the
    thesis' at 64 pixels."""
    num_res_blocks: int = 3
    """Residual blocks per level of the U-Net. The default is the thesis' at 64 pixels."""
    attention_resolutions: tuple[int, ...] = (16, 8)
    """Resolutions in pixels at which self-attention follows each block of the U-Net. The middle always has it."""
    num_heads: int = 4
    """Number of attention heads."""
    norm_groups: int = 32
    """Upper bound on the number of GroupNorm groups. A level with few channels has fewer groups of at least 4."""
    dropout: float = 0.0
    """Dropout probability in the blocks. Short runs do not overfit, so the default is none."""

    prediction: Prediction | None = None
    """What the network predicts: the noise ("eps"), v, the clean image ("x0"), or the velocity of flow matching
    ("flow"). By default v in the regional form and eps in the thesis'."""
    schedule: NoiseSchedule | None = None
    """Noise schedule. By default "flow", the straight path, if prediction is "flow", else "linear" as in the thesis."""
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    """Weight of the loss per noise level. "min_snr" weighs the error of the clean image by min(SNR, gamma)."""
    min_snr_gamma: float = 5.0
    """Gamma of loss_weighting="min_snr". 5 is the value of its paper (Hang et al. 2023)."""
    masks: Masks | None = None
    """What proposes the regions. "auto": objects, by stages before the training; region 0 is one. "network": a decoder
    of the U-Net, as in the thesis. "mixture": a learned spatial prior and the colours of each region. By default
    "auto", but "network" in the thesis' form, for a hierarchy and beside settings that only a network has."""
    cue_weight: float | None = None
    """Weight of the saliency cue beside the spatial prior, for masks="auto"; 0 turns it off. By default 1, or 0 if the
    cue explains little of the images."""
    mixture_steps: int = 120
    """Steps of the spatial mixture's stage, for masks="auto"."""
    distil_steps: int = 1500
    """Steps of the mask network's stage, for masks="auto"."""
    branch_norm: BranchNorm | None = None
    """Norm of the branch decoder. By default "pixel" in the regional form and "group" in the thesis'."""
    region_tokens: bool | None = None
    """Add the mean local feature of each region to its branch's time embedding. By default in the regional form."""
    normalised_logits: bool | None = None
    """Batch-normalise the mask logits. By default in the regional form with masks="network"."""
    half_resolution_masks: bool | None = None
    """Predict the masks at half the resolution. By default in the regional form with masks="network"."""
    checkpoint_branches: bool = False
    """Train the branches one by one and run them again in the backward pass: slower, with the memory of one branch."""
    mask_learning_rate: float | None = None
    """Factor on the learning rate of the masks. By default 0.3 in the regional form, 1 in the thesis', 100 for
    masks="mixture", whose prior receives a small gradient."""
    t_max: int | None = None
    """Most time steps are drawn from [0, t_max). By default 600 of 1000 in the regional form, 720 from 64 pixels on,
    and the same noise on other schedules; all time steps in the thesis' form."""
    high_noise_fraction: float | None = None
    """Fraction of the samples whose time step is drawn from [t_max, T) instead, so that generation can start from pure
    noise. By default 0.1 in the regional form, and 0 in the thesis' and where t_max leaves no such steps."""
    coarse_to_fine: tuple[int, int] | None = None
    """Steps between which the loss weight goes from (1 - alpha_bar) to 1. By default (50, 150); thesis: (0, 0)."""
    timesteps: int = 1000
    """Length T of the noise schedule. 1000 is the value of the thesis."""
    random_flip: bool = True
    """Flip half of the images left to right. Use False if left and right differ, as when all objects face one way."""

    latent: Annotated[str, arg(metavar="auto|no|PATH")] = "auto"
    """Autoencoder in whose latents the model denoises: a run of `factorkit train autoencoder`, the copy in another run,
    or a .safetensors file in diffusers' AutoencoderKL format. "no": pixels. "auto": from 128 pixels on, one trained on
    the images first, OUT_autoencoder; not with form="thesis", masks="mixture", a hierarchy or preset of 128 pixels."""

    holdout: str | int = "auto"
    """Labelled images held out of training: "masked", "none", a number, the name of an official split, or "auto"."""
    mask_set: str | None = None
    """Which masks are scored, of a data set that has several; by default the first. See factorkit prepare --list."""
    ignore: int | None = None
    """Mask value that is not scored. By default 255 beside small labels, the border of a trimap, else none."""
    foreground: tuple[int, ...] | None = None
    """Mask values of the foreground. By default decided from the values: all above 0, or as in a trimap."""
    mask_threshold: int | None = None
    """Mask value from which on a pixel is foreground, for soft masks. By default 128 where masks are soft."""
    num_fit_images: int = 16
    """Number of labelled images that fit the mapping from regions to foreground; the rest are scored."""
    segment_t: int | None = None
    """Time step at which real images are segmented. By default the noise of step 30 on the linear schedule of 1000,
    and 0 for masks="auto" and "mixture", which measure colours best without noise."""

    class_names: Suppress[tuple[str, ...]] = ()
    """Classes the model is conditioned on, in the order of their labels; `train_segdiff(classes=)` sets it."""
    latent_channels: Suppress[int] = 0
    """Channels of the latents, and by how much their sides are smaller; `train_segdiff(latent=)` sets both."""
    latent_factor: Suppress[int] = 1
    label_dropout: float = 0.1
    """Fraction of the class labels dropped in training, so that generation can be guided (Ho & Salimans 2022)."""

    RESUMABLE = EngineConfig.RESUMABLE | {"checkpoint_branches", "latent"}

    @property
    def nesting(self) -> tuple[int, ...]:
        """Number of regions into which each level splits, the coarsest first; OPEN_REGIONS where it is open."""
        regions = OPEN_REGIONS if self.regions is None else self.regions
        return (regions,) if isinstance(regions, int) else tuple(regions)

    @property
    def num_leaf_regions(self) -> int:
        """Number of regions of the deepest level; K for a single level."""
        return math.prod(self.nesting)

    @property
    def side(self) -> int:
        """Side in pixels of what the network sees: the resolution, or that of the latents."""
        return self.resolution // self.latent_factor

    def choose_masks(self) -> tuple[Masks, str]:
        """Return what proposes the regions, and one line for a user on why it is not "auto".

        The line is empty for the thesis' form and a plain DDPM, which are defined by it.
        """
        if self.masks is not None or self.form == "thesis" or self.num_leaf_regions == 1:
            return self.masks or "network", ""
        if len(self.nesting) > 1:
            note = f'masks="network": regions={self.nesting} split regions, and masks="auto" whole images only'
            return "network", note
        network_settings = ("normalised_logits", "half_resolution_masks", "mask_learning_rate")
        if own := [name for name in network_settings if getattr(self, name) is not None]:
            return "network", f'masks="network": {own[0]}= is given, which masks="auto" does not have'
        return "auto", ""

    def resolved(self) -> ResolvedSegdiffConfig:
        """Fill in every setting that depends on others, and check all of them.

        Raises:
            ConfigError: a setting, or a combination, that cannot work.
        """
        if self.form not in FORMS:
            raise ConfigError(f"form={self.form!r} is unknown; choose one of {', '.join(FORMS)}")
        masks, _ = self.choose_masks()
        defaults = FORMS[self.form] | {"masks": masks}
        if self.decoding == "concat":
            defaults["region_tokens"] = False  # one branch
        if masks == "mixture":
            defaults |= {"normalised_logits": False, "half_resolution_masks": False, "mask_learning_rate": 100.0}
            defaults["segment_t"] = 0  # IoU on horses .684 instead of .674
        if masks == "auto":
            defaults |= {"normalised_logits": False, "half_resolution_masks": False, "segment_t": 0}
        self._check_backbone()
        defaults |= BACKBONES[self.backbone].defaults(self.side, self.patch_size)
        prediction = self.prediction or defaults["prediction"]
        kind = defaults["schedule"] = self.schedule or ("flow" if prediction == "flow" else "linear")
        check_objective(prediction, kind)
        if kind == "linear" and self.timesteps <= 20:
            raise ConfigError(
                f"timesteps={self.timesteps} must be more than 20 with schedule='linear': a shorter one needs beta >= 1"
            )
        schedule, reference = Schedule(self.timesteps, kind), Schedule()
        defaults.setdefault("segment_t", schedule.find_matching_time(30, reference))
        if self.form == "regional" and self.side >= 64:
            defaults["t_max"] = 720  # more pixels show the same shapes through more noise
        # On another length or kind of schedule, train up to the same noise.
        if defaults["t_max"] < 1000 and kind != "linear":
            defaults["t_max"] = max(1, schedule.find_matching_time(defaults["t_max"], reference))
        else:
            defaults["t_max"] = max(1, defaults["t_max"] * self.timesteps // 1000)
        if (defaults["t_max"] if self.t_max is None else self.t_max) >= self.timesteps:
            defaults["high_noise_fraction"] = 0.0
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        settings |= {name: value for name, value in defaults.items() if settings[name] is None}
        settings["latent"] = PIXELS if self.latent == "auto" else self.latent  # train_segdiff settles it before
        settings["regions"] = self.nesting[0] if len(self.nesting) == 1 else self.nesting  # (3,) and 3 are one setting
        settings["cue_weight"] = self.cue_weight if masks == "auto" else None  # nothing else reads it
        config = ResolvedSegdiffConfig(**settings)
        config.validate()
        return config

    def _check_backbone(self) -> None:
        """Raise ConfigError for an unknown backbone, or a setting that only another one has."""
        if self.backbone not in BACKBONES:
            raise ConfigError(f"backbone={self.backbone!r} is unknown; choose one of {', '.join(BACKBONES)}")
        if self.form == "thesis" and self.backbone != "unet":
            raise ConfigError(f"form='thesis' is a U-Net; give form='regional' with backbone={self.backbone!r}")
        usual = {field.name: field.default for field in dataclasses.fields(SegdiffConfig)}
        for name, kind in BACKBONES.items():
            for own in kind.OWN if name != self.backbone else ():
                if getattr(self, own) != usual[own]:
                    raise ConfigError(
                        f"{own}={getattr(self, own)} belongs to backbone={name!r}; backbone={self.backbone!r} does not "
                        f"have it: leave it out, or give backbone={name!r}"
                    )

    def memory_advice(self, at_once: int) -> str:
        """Name the settings that need less memory."""
        cures = [f"micro_batch_size={at_once // 2}, which changes memory only"] if at_once > 1 else []
        if self.num_leaf_regions > 1 and self.decoding != "concat" and not self.checkpoint_branches:
            cures.append("checkpoint_branches=True, for the memory of one branch at a slower pace")
        return "Give " + " or ".join(cures or ["a smaller model_channels= or resolution= in another out="])


@dataclass(kw_only=True)
class ResolvedSegdiffConfig(SegdiffConfig):
    """A configuration without open settings, as :meth:`SegdiffConfig.resolved` returns it and runs store it."""

    regions: int | tuple[int, ...]
    prediction: Prediction
    schedule: NoiseSchedule
    masks: Masks
    branch_norm: BranchNorm
    region_tokens: bool
    normalised_logits: bool
    half_resolution_masks: bool
    mask_learning_rate: float
    t_max: int
    high_noise_fraction: float
    coarse_to_fine: tuple[int, int]
    segment_t: int

    def validate(self) -> None:
        """Raise ConfigError for values that cannot work, naming the setting."""
        super().validate()
        self._check_backbone()
        sizes = ("resolution", "model_channels", "num_res_blocks", "num_heads", "norm_groups", "num_fit_images")
        for name in (*sizes, "mixture_steps", "distil_steps"):
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
        for name in ("label_dropout", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 0 and less than 1")
        if self.branch_norm not in NORMS:
            raise ConfigError(f"branch_norm={self.branch_norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if self.cue_weight is not None and not 0 <= self.cue_weight < math.inf:
            raise ConfigError(f"cue_weight={self.cue_weight} must be a finite number, 0 or more")
        if self.latent_channels and self.masks == "mixture":
            raise ConfigError(
                "masks='mixture' measures colours of pixels, not latents; leave it out, or leave latent= out"
            )
        if self.latent_channels and (self.resolution % self.latent_factor or self.side < MIN_LATENT_SIDE):
            raise ConfigError(
                f"resolution={self.resolution} must be divisible by {self.latent_factor}, the factor of "
                f"latent={self.latent}, and at least {MIN_LATENT_SIDE * self.latent_factor}"
            )
        if self.masks == "auto" and self.form == "thesis":
            raise ConfigError("masks='auto' is not in the thesis; give masks='network' or form='regional'")
        if not 0 <= self.mask_learning_rate < math.inf:
            raise ConfigError(f"mask_learning_rate={self.mask_learning_rate} must be a finite factor, 0 or more")
        if len(self.coarse_to_fine) != 2 or not 0 <= self.coarse_to_fine[0] <= self.coarse_to_fine[1]:
            raise ConfigError(f"coarse_to_fine={self.coarse_to_fine} must be two steps in ascending order")
        if not 1 <= self.t_max <= self.timesteps:
            raise ConfigError(f"t_max={self.t_max} must lie between 1 and timesteps={self.timesteps}")
        fraction = self.high_noise_fraction
        if not 0 <= fraction <= 1 or (fraction and self.t_max == self.timesteps):
            raise ConfigError(
                f"high_noise_fraction={fraction} must lie between 0 and 1, and be 0 with t_max={self.t_max} of "
                f"{self.timesteps}, above which there are no steps"
            )
        if self.timesteps > MAX_TIMESTEPS:
            raise ConfigError(f"timesteps={self.timesteps} must be at most {MAX_TIMESTEPS}")
        if not 0 <= self.segment_t < self.timesteps:
            raise ConfigError(f"segment_t={self.segment_t} must lie between 0 and timesteps-1={self.timesteps - 1}")
        if self.num_leaf_regions > MAX_REGIONS:
            raise ConfigError(
                f"regions={self.regions}: {self.num_leaf_regions} regions in all, but label images and videos hold at "
                f"most {MAX_REGIONS}; give fewer"
            )
        if len(self.nesting) != 1:
            check_nesting(self.nesting, self.decoding, self.masks)
        for regions in self.nesting:
            check_architecture(
                self.make_backbone(),
                regions=regions,
                decoding=self.decoding,
                branch_norm=self.branch_norm,
                region_tokens=self.region_tokens,
                half_resolution_masks=self.half_resolution_masks,
                masks=self.masks,
                normalised_logits=self.normalised_logits,
                latent_factor=self.latent_factor,
            )

    @property
    def size_multiple(self) -> int:
        """What height and width of an image must be divisible by."""
        return max(self.make_backbone().size_multiple, 1 + self.half_resolution_masks) * self.latent_factor

    def counts(self) -> dict[str, int]:
        """Return numbers that no model has more of than weights."""
        return {"regions": math.prod(self.nesting), **self.make_backbone().counts()}

    def make_backbone(self) -> Backbone:
        """Return the sizes of the network inside."""
        sizes = {"resolution": self.side} | ({"image_channels": self.latent_channels} if self.latent_channels else {})
        return make_backbone(self.backbone, vars(self) | sizes)

    def build_schedule(self, device: torch.device | str = "cpu") -> Schedule:
        """Build the noise schedule on a device."""
        return Schedule(self.timesteps, self.schedule, device)

    def build(self) -> SegdiffModel:
        """Build the network with fresh weights, channels last."""
        settings: dict[str, Any] = {
            "decoding": self.decoding,
            "branch_norm": self.branch_norm,
            "region_tokens": self.region_tokens,
            "normalised_logits": self.normalised_logits,
            "half_resolution_masks": self.half_resolution_masks,
            "checkpoint_branches": self.checkpoint_branches,
            "masks": self.masks,
            "classes": len(self.class_names),
        }
        model: SegdiffModel
        if isinstance(self.regions, int):
            model = FactorizedDenoiser(self.make_backbone(), regions=self.regions, **settings)
        else:
            model = HierarchicalDenoiser(self.make_backbone(), self.regions, **settings)
        # In the layout of the features; otherwise a convolution would convert its weights in every call.
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def preset_config(preset: str | None, **changes: Any) -> SegdiffConfig:
    """Return the configuration of a preset (None: the defaults) with ``changes``, not yet resolved.

    Raises:
        ConfigError: an unknown preset or setting.
    """
    if preset is not None and preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise ConfigError(f"preset={preset!r} is unknown. {hint}Choose one of {', '.join(PRESETS)}")
    settings = dict(PRESETS[preset]) if preset else {}
    backbone, usual = changes.get("backbone"), settings.get("backbone", SegdiffConfig.backbone)
    if preset and backbone in ARCHITECTURES and backbone != usual:
        settings = {k: v for k, v in settings.items() if k not in ARCHITECTURES[usual]} | ARCHITECTURES[backbone]
    regions = settings.pop("regions", OPEN_REGIONS)
    config = SegdiffConfig.from_dict({**settings, **changes})
    if config.regions is None and (isinstance(regions, tuple) or config.choose_masks()[0] != "auto"):
        config.regions = regions  # else masks="auto" chooses it
    return config
