"""Settings of a nerfdiff run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from factorkit.engine.config import MAX_TIMESTEPS, EngineConfig, register_renamed_settings
from factorkit.nerfdiff.cameras.poses import POSE_PARAMETERS
from factorkit.nerfdiff.fields.base import BACKGROUNDS
from factorkit.nerfdiff.fields.kinds import FIELDS
from factorkit.nerfdiff.presets import FAST, JOINT, JOINT_SHARES, PRESETS
from factorkit.utils.errors import ConfigError, did_you_mean


@dataclass(kw_only=True)
class NerfdiffConfig(EngineConfig):
    """Train a model that denoises views by finding their cameras and a radiance field of the scene, without poses.

    `steps`, `batch_size` and `learning_rate` apply to the encoder; with search="joint", to encoder and field together.
    """

    resolution: int = 32
    """Longer side of the views in pixels; larger views are averaged down to it. 32 trains in minutes on a CPU."""
    poses: Literal["predicted", "known", "learned"] = "predicted"
    """Where the poses of the training views come from. "predicted": the model finds them (the thesis). "known": they
    come with the views (supervised NeRF). "learned": they are free parameters from the start (NeRF--)."""
    search: Literal["auto", "dictionary", "sfm", "joint"] = "auto"
    """How poses are found. "dictionary": a balanced search over fixed directions, then refinement, the flip test and an
    encoder distilled from the result. "sfm": structure from motion by COLMAP, refined with the field (needs the extra
    sfm). "joint": encoder and field trained together from scratch (algorithms 3 and 4), which depends on the seed.
    "auto", the default, chooses "sfm" for large textured images, else "dictionary"."""
    noise: bool = True
    """Add noise to the views that the encoder reads. False trains an autoencoder, the ablation of the thesis."""
    timesteps: int = 100
    """Length T of the noise schedule. The thesis uses 100."""

    timestep_power: float = 1.5
    """Noise levels are sampled as T * u**timestep_power with u uniform in [0, 1). Above 1, low noise levels, where the
    pose is still visible, are sampled more often; 1 is uniform (the thesis)."""

    num_candidates: int = 8
    """Number N of candidate cameras for each view. 8 cells cover the directions around an object."""
    candidate_type: Literal["look_at", "thesis", "single"] = "look_at"
    """Parametrisation of candidate cameras. "look_at": overlapping cells around distinct anchors. "thesis": one
    octant each (code 3.3). "single": one camera by Rodrigues' formula (algorithm 3)."""
    classification_weight: float = 0.1
    """Weight lambda of the candidate classification loss (eq. 3.4). 0.1 is the value of the thesis."""
    balance_candidates: bool = True
    """With search="joint", assign every candidate an equal share of the views during the first half of training. False
    always takes the best of N (the thesis), which collapsed in 15 of 15 small runs."""
    elevation_range: tuple[float, float] = (5.0, 70.0)
    """Lowest and highest elevation of the cameras in degrees above the horizon. The default excludes the zenith."""
    num_azimuths: int = 24
    """Number of directions on each elevation of the search dictionary. 24 directions are 15 degrees apart."""
    num_elevations: int = 4
    """Number of elevations in the search dictionary, evenly spaced over elevation_range."""
    optimize_camera: tuple[Literal["roll", "aim", "distance", "focal", "distortion"], ...] | None = None
    """Camera parameters that are optimised in addition to the direction: "roll" about the viewing axis, "aim" off the
    origin and "distance" for each view, and one "focal" length for all views, with which the distances change so that
    an object keeps its size. () assumes upright cameras that look at the origin from one distance. "distortion" is one
    radial term of all lenses beyond that of structure from motion (search="sfm", without cameras in the data). None,
    the default, is () with search="sfm", else ("aim", "distance", "roll") if masks or a plain background show an object
    off the centre or of changing size, and "focal" if neither cameras, EXIF nor fov= give the focal length; otherwise
    (). With "aim" the search compares views that are recentred by their foreground."""
    ordered: Literal["auto", "yes", "no"] = "auto"
    """Whether the views were taken in the order of their names, or if these do not order them of the times in their
    EXIF data, on a walk around the object. "yes": even walks are tried as starts too, of one turn and unless the last
    views return to the first ones of as many turns as the views suggest, in both directions and at several elevations,
    and an uneven walk if the best fit shows one; the start is kept from which a short fit explains held-out views best.
    "auto", the default: "yes" if consecutive views are more alike than others. With search="sfm", "yes" is for a walk
    as well: each view is compared with the ten before it by name, and every tenth with every other tenth; "auto" is
    "yes" for the frames of a video."""
    flip_rounds: int = 8
    """Maximum number of rounds of the flip test, which corrects views placed on the wrong side of a nearly symmetric
    scene. It stops at the first round that changes nothing. 0 runs one round that only reports."""

    field: Literal["auto", "grid", "hashgrid", "mlp", "siren", "tcnn", "gaussians"] = "grid"
    """Representation of the scene: a dense voxel grid, a hash grid, NeRF's MLP, a SIREN, tiny-cuda-nn's hash grid and
    fused MLPs (needs tinycudann), or 3D Gaussians, for a splat file. The pose search always uses a grid, and Gaussians
    start from one. "auto", the default of the presets "demo" and "fast": Gaussians for views of 64 pixels or more,
    the grid for smaller ones and search="joint"."""
    num_gaussians: int = 10_000
    """Number of Gaussians, with field="gaussians". Training moves them, but neither adds nor removes any."""
    gaussian_steps: int = 4000
    """Steps of one whole view each that fit the Gaussians, after the grid that they start from."""
    occupancy: bool = False
    """Skip empty space with an occupancy grid in training and rendering. The presets "demo" and "fast" enable it for
    all fields except the grid, whose samples are cheap."""
    background: Literal["given", "learned", "field"] = "given"
    """Background behind the scene. "given": the colour stored with the views, black by default. "learned": one learned
    colour. "field": a learned colour for each viewing direction."""
    unbounded: Literal["auto", "yes", "no"] = "auto"
    """Whether the field covers all of space by contraction, as for photos around an object in a room, instead of a box
    around the object. "auto", the default: "yes" if cameras with known poses (given, or by structure from motion)
    surround what they look at, neither masks nor a background of one colour show an object, and background= is
    "given"."""
    appearance_dim: int = 0
    """Size of the appearance code of each training view, for collections with varying exposure or time of day. 0 gives
    all views the same appearance."""
    search_grid_resolution: int = 24
    """Vertices along each side of the voxel grid used in the pose search. A coarse grid suffices to compare poses."""
    grid_resolution: int = 32
    """Vertices along each side of the final voxel grid, or cells of the finest level of the hash grid. The default
    matches resolution."""
    samples_per_ray: int = 32
    """Samples along each ray. The default matches grid_resolution."""
    views_per_step: int = 16
    """Views in each step of search and refinement, over all processes together."""
    rays_per_view: int = 256
    """Rays of each view in each step."""
    tv_weight: float = 3e-4
    """Weight of the total variation of the voxel grid (mean squared difference of neighbours) beside the mean squared
    error, 6 times as much of an unbounded field. It suppresses detail that no view shows; the thesis presets use 0."""
    opacity_weight: float = 1e-3
    """Weight of the mean opacity of the rays of object scenes beside the mean squared error. It removes fog in
    front of the background that no training view shows; on Lego, ten times as much cost 0.6 dB."""
    search_steps: int = 600
    """Steps of the dictionary search."""
    search_learning_rate: float = 0.05
    """Learning rate of the field in the dictionary search."""
    field_steps: int = 600
    """Steps of the refinement of field and poses. The default matches resolution; where the dictionary search looks for
    cameras in order, of unevenly framed views or of unknown focal length, it draws each view 240 times at least."""
    field_learning_rate: float = 0.03
    """Learning rate of the field in the refinement, and with search="joint"."""
    pose_learning_rate: float = 0.005
    """Learning rate of the poses of the views in the refinement."""

    encoder: Literal["unet", "vit"] = "unet"
    """Network that reads the views: the encoder of a U-Net, as in the thesis, or a transformer."""
    encoder_depth: int = 4
    """Blocks of the transformer."""
    encoder_patch_size: int = 4
    """Side in pixels of the patches that are the transformer's tokens."""
    encoder_resolution: int = 64
    """Longer side in pixels at which the encoder reads the views."""
    encoder_stem_size: int = 1
    """Side in pixels of the squares that the U-Net's encoder reads as one pixel with more channels. The presets "demo"
    and "fast" use a sixteenth of the views' side, at most 4. 1 reads single pixels (the thesis)."""
    model_channels: int = 24
    """Channels C of the encoder's first level, or of the transformer's tokens (a multiple of 8; presets use 64). The
    thesis uses 64."""
    channel_mult: tuple[int, ...] = (1, 2, 2)
    """Channels of each level of the U-Net's encoder, in units of model_channels."""
    num_res_blocks: int = 1
    """Residual blocks in each level of the U-Net's encoder."""
    encoder_pooling: Literal["flatten", "average"] = "flatten"
    """How the encoder's last feature map reaches its heads: flattened, or averaged over space (fig. 3.12). Small
    encoders need the positions that the average discards."""
    num_rendered_views: int = 1000
    """Number of rendered views of the fitted scene that are added to the encoder's training data."""
    finetune_steps: int = 0
    """Steps of denoising that finetune the distilled encoder while the field stays fixed. 0 skips the stage."""

    def validate(self) -> None:
        """Raise ConfigError for settings that cannot work."""
        super().validate()
        least = {
            "resolution": 4,
            "timesteps": 21,
            "num_candidates": 1,
            "num_azimuths": 2,
            "num_elevations": 1,
            "flip_rounds": 0,
            "search_grid_resolution": 4,
            "grid_resolution": 4,
            "samples_per_ray": 1,
            "views_per_step": 1,
            "rays_per_view": 1,
            "search_steps": 1,
            "field_steps": 1,
            "encoder_resolution": 4,
            "encoder_depth": 1,
            "encoder_patch_size": 1,
            "encoder_stem_size": 1,
            "model_channels": 2,
            "num_res_blocks": 1,
            "num_rendered_views": 0,
            "finetune_steps": 0,
            "appearance_dim": 0,
            "num_gaussians": 1,
            "gaussian_steps": 1,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {low}")
        for field in dataclasses.fields(self):
            options = CHOICES.get(field.name)
            if options and getattr(self, field.name) not in options:
                value = getattr(self, field.name)
                raise ConfigError(f"{field.name}={value!r} is unknown; choose one of {', '.join(options)}")
        unknown = set(self.optimize_camera or ()) - {*POSE_PARAMETERS, *SHARED_PARAMETERS}
        if unknown:
            known = ", ".join([*POSE_PARAMETERS, *SHARED_PARAMETERS])
            raise ConfigError(
                f"optimize_camera={self.optimize_camera}: {', '.join(sorted(unknown))} is none of {known}"
            )
        if self.timesteps > MAX_TIMESTEPS:
            raise ConfigError(f"timesteps={self.timesteps} must be at most {MAX_TIMESTEPS}")
        lowest, highest = self.elevation_range
        if not -89 <= lowest < highest <= 89:
            raise ConfigError(
                f"elevation_range={self.elevation_range} must be two rising numbers from -89 to 89 degrees"
            )
        if self.model_channels % 2:
            raise ConfigError(
                f"model_channels={self.model_channels} must be even: half of the time embedding is cosines, half sines"
            )
        usual = {field.name: field.default for field in dataclasses.fields(NerfdiffConfig)}
        for name, settings in ENCODER_SETTINGS.items():
            for own in settings if name != self.encoder else ():
                if getattr(self, own) != usual[own]:
                    raise ConfigError(
                        f"{own}={getattr(self, own)} belongs to encoder={name!r}; encoder={self.encoder!r} does not "
                        f"have it: leave it out, or give encoder={name!r}"
                    )
        if self.encoder == "vit" and self.model_channels % (2 * NUM_HEADS):
            raise ConfigError(f"model_channels={self.model_channels} must be a multiple of {2 * NUM_HEADS} for tokens")
        if not self.timestep_power > 0:
            raise ConfigError(f"timestep_power={self.timestep_power} must be positive")
        for name in ("classification_weight", "tv_weight", "opacity_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be 0 or more")

    @property
    def encoder_stride(self) -> int:
        """Pixels of a view, per side, for each feature that the heads read."""
        if self.encoder == "vit":
            return self.encoder_patch_size
        return self.encoder_stem_size * 2 ** min(len(self.channel_mult), 30)

    @property
    def pose_parameters(self) -> tuple[str, ...]:
        """The settings of ``optimize_camera`` that each view has its own values of."""
        return tuple(name for name in self.optimize_camera or () if name in POSE_PARAMETERS)

    def with_field(
        self, field: Any, unbounded: Any = "auto", stored: Mapping[str, Any] = MappingProxyType({})
    ) -> NerfdiffConfig:
        """Return the configuration with a field; settings that the preset sized for the old one follow it.

        Args:
            field: kind of the field.
            unbounded: "auto", "yes" or "no".
            stored: settings of a run that is resumed, whose sizes come before those of the preset.
        """
        old, new = _sized(self.resolution, self.field), _sized(self.resolution, field, unbounded == "yes")
        sizes = {name: stored.get(name, new[name]) for name, value in old.items() if getattr(self, name) == value}
        return dataclasses.replace(self, field=field, unbounded=unbounded, **sizes)

    def with_steps_for(self, views: int) -> NerfdiffConfig:
        """Return the configuration with ``field_steps`` for a capture of so many views, unless it has its own."""
        usual = _sized(self.resolution, self.field, self.unbounded == "yes")["field_steps"]
        if self.field_steps != usual:
            return self
        return dataclasses.replace(self, field_steps=max(usual, -(-VIEW_DRAWS * views // self.views_per_step)))

    def with_choices(self, stored: Mapping[str, Any]) -> NerfdiffConfig:
        """Return the configuration with those choices by the views that the stored settings of a run have."""
        if "scene" not in stored:
            return self
        field = stored["field"] if self.field == "auto" else self.field
        unbounded = stored.get("unbounded", "no") if self.unbounded == "auto" else self.unbounded
        return self.with_field(field, unbounded, stored)


SHARED_PARAMETERS = ("focal", "distortion")  # of optimize_camera, one value for all views
NUM_HEADS = 4  # of the transformer
#: settings of one encoder alone
ENCODER_SETTINGS = {
    "unet": ("channel_mult", "num_res_blocks", "encoder_stem_size"),
    "vit": ("encoder_depth", "encoder_patch_size"),
}

CHOICES = {
    "encoder": ("unet", "vit"),
    "poses": ("predicted", "known", "learned"),
    "search": ("auto", "dictionary", "sfm", "joint"),
    "candidate_type": ("look_at", "thesis", "single"),
    "ordered": ("auto", "yes", "no"),
    "field": ("auto", *FIELDS),
    "background": BACKGROUNDS,
    "unbounded": ("auto", "yes", "no"),
    "encoder_pooling": ("flatten", "average"),
}
MAX_START_GRID = 64  # vertices along each side of the grid that Gaussians start from: finer ones gain nothing
VIEW_DRAWS = 240  # of each view of a capture, at least: its camera moves only then (docs/captures.md)
MIN_GAUSSIAN_VIEWS = 64  # pixels of the longer side from which Gaussians are chosen: more dB, a better encoder
SIZES = ("grid_resolution", "samples_per_ray", "field_steps")  # of the presets "demo" and "fast", by the views


def _sized(resolution: int, field: str, unbounded: bool = False) -> dict[str, Any]:
    """Return settings of the final grid at a resolution: one vertex and one sample along a ray per pixel.

    Rays of an unbounded scene are sampled twice, the second time where something is, so that half as many samples
    suffice; more vertices would cost time and show nothing, since few views see each of them.
    """
    side = min(max(resolution, 32), MAX_START_GRID if field in ("auto", "gaussians") else 128)
    half = max(32, side // 2)
    sizes = (
        (max(32, 3 * side // 4), half, round(600 * half / 32)) if unbounded else (side, side, round(600 * side / 32))
    )
    return dict(zip(SIZES, sizes, strict=True))


def preset_config(preset: str | None, **changes: Any) -> NerfdiffConfig:
    """Return the configuration of a preset (None: the class's defaults) with ``changes``, validated.

    Raises:
        ConfigError: an unknown preset or setting, or an invalid value.
    """
    if preset is not None and preset not in PRESETS:
        meant = did_you_mean(preset, PRESETS)
        raise ConfigError(f"preset={preset!r} is unknown. {meant}Choose one of {', '.join(PRESETS)}")
    settings = PRESETS[preset] if preset else {}
    if settings is FAST:
        field, resolution = changes.get("field", "auto"), changes.get("resolution", NerfdiffConfig.resolution)
        if field == "auto" and (resolution < MIN_GAUSSIAN_VIEWS or changes.get("search") == "joint"):
            field = "grid"
        changes = {**changes, "field": field}
        settings = settings | _sized(resolution, field)
        settings = settings | {"occupancy": field not in ("auto", "grid", "gaussians")}
        settings = settings | {"encoder_stem_size": max(1, min(resolution, 64) // 16)}
    if changes.get("search") == "joint" and preset in ("demo", "fast"):
        settings = settings | JOINT | {k: round(share * settings[k]) for k, share in JOINT_SHARES.items()}
    if changes.get("encoder") == "vit":
        settings = {k: v for k, v in settings.items() if k not in ENCODER_SETTINGS["unet"]} | {"model_channels": 64}
        if preset in ("demo", "fast"):
            settings = settings | {"encoder_resolution": 32, "learning_rate": 1e-3}
    config = NerfdiffConfig.from_dict({**settings, **changes})
    config.validate()
    return config


# Settings of stored runs that have changed since: old name -> name of today; (name of today, old value) -> new value.
register_renamed_settings(
    ["nerfdiff"],
    names={
        "width": "model_channels",
        "multipliers": "channel_mult",
        "blocks": "num_res_blocks",
        "cameras": "num_candidates",
        "candidates": "candidate_type",
        "balance": "balance_candidates",
        "elevations": "elevation_range",
        "azimuths": "num_azimuths",
        "rings": "num_elevations",
        "freedom": "optimize_camera",
        "appearance": "appearance_dim",
        "search_field": "search_grid_resolution",
        "grid": "grid_resolution",
        "samples": "samples_per_ray",
        "views": "views_per_step",
        "rays": "rays_per_view",
        "roughness": "tv_weight",
        "fog": "opacity_weight",
        "rendered": "num_rendered_views",
        "tuning_steps": "finetune_steps",
        "pooling": "encoder_pooling",
        "t_power": "timestep_power",
    },
    values={("encoder_pooling", "whole"): "flatten"},
    added={"encoder": "unet", "encoder_depth": 4, "encoder_patch_size": 4, "encoder_stem_size": 1, "unbounded": "no"},
    tensors={"occupancy.looks": "occupancy.num_updates"},
)
