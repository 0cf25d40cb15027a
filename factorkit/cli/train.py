"""``factorkit train``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from factorkit.cli.base import (
    Command,
    Flag,
    OptionalFloat,
    OptionalName,
    OptionalPath,
    Result,
    format_duration,
    report_interruption,
)
from factorkit.cli.data import parse_holdout
from factorkit.utils.errors import ConfigError, did_you_mean, format_count
from factorkit.utils.files import sibling

if TYPE_CHECKING:
    from factorkit.engine.config import EngineConfig

MODELS = {"segdiff": "images", "nerfdiff": "views of a scene", "autoencoder": "what segdiff's --latent takes"}
COMMON = ("data", "out", "preset", "dry_run", "resolution", "steps", "batch_size", "learning_rate", "seed", "device")


@dataclass(kw_only=True)
class TrainSegdiff(Command):
    """Train a segmentation model on unlabelled images, or resume an interrupted training.

    For views of a scene see factorkit train nerfdiff --help.

    The run is a folder with settings, checkpoints, sample grids, log, scores.json and report.html, to open in a
    browser. The same command again resumes it exactly, from the newest checkpoint.

    The data are a folder of images (with subfolders, of any size, mode and format), a .zip, or a .npz or .npy array. If
    the folder has images/ and masks/, the labelled images are kept out of training and scored at the end. Published
    data sets are read in their original layout and splits: factorkit prepare --list.

    From --resolution 128 on an autoencoder is trained first, in OUT_autoencoder, and the model denoises its latents.
    Presets of such a resolution denoise pixels, as does --latent no.

    Presets:
        A preset sets the defaults of the options below. --help together with --preset shows them.
        demo, fast32, fast64      the regional form: small models that segment within minutes of training
        rooms32                   regions within regions (--regions 3 3); without --data: procedural rooms
        flowers64, flowers128, cub64, cub128, ffhq64, ffhq128, imagenet64
                                  the settings exactly as in the thesis; they need a GPU

    Examples:
        factorkit train segdiff
        factorkit train segdiff --data photos/ --out runs/photos --preset fast64 --steps 2000
        factorkit train segdiff --data photos/ --out runs/photos --seed-trials 3
        factorkit train segdiff --data photos/ --preset flowers64 --dry-run
        torchrun --nproc-per-node 8 -m factorkit train segdiff --data photos.zip --preset ffhq64
    """

    model: Positional[Literal["segdiff"]]
    """Which model to train."""
    data: OptionalPath = None
    """Images to train on. The default is the procedural flowers of the package."""
    out: OptionalPath = None
    """Run folder. The default is runs/PRESET."""
    preset: OptionalName = None
    """Settings to start from. The default is fast64, or demo without --data."""
    dry_run: Flag = False
    """Train nothing: print parameters, memory, images/s and the duration of the run on this machine."""
    seed_trials: int = 1
    """Number of short seed trials to train first. Those that fail the label-free alarms are dropped, and the best one
    is continued."""
    classes: Annotated[str | None, arg(metavar="folders|auto|FILE", help_behavior_hint="")] = None
    """Condition the model on the class of each image: the name of its folder, a .csv, .tsv or .json file of names and
    classes, or auto for the classes of the data set. The default is no classes."""
    baselines: Flag = False
    """Also score trivial predictors at the end, if there are labels."""

    PROCESSES = "all"
    BASIC = (*COMMON, "model", "seed_trials", "regions", "masks", "form", "backbone", "json")
    HAS_RESOLUTION = True  # on the command line

    def execute(self) -> Result:
        """Train, and return the verdict of the run."""
        from factorkit.cli.evaluate import judge_run
        from factorkit.cli.score_tables import format_scores
        from factorkit.segdiff.config import SegdiffConfig
        from factorkit.segdiff.settle import OWN_SUFFIX
        from factorkit.segdiff.train import train_segdiff
        from factorkit.segdiff.verdict import REPORT

        settings = _settings(self, SegdiffConfig)
        settings["holdout"] = parse_holdout(settings["holdout"])
        if not self.HAS_RESOLUTION:
            del settings["resolution"]  # latent= multiplies the preset's
        if self.dry_run:
            return self._estimate(settings)
        out = self.out or Path("runs") / _preset_name(self, "fast64")
        options: dict[str, Any] = {
            "preset": self.preset,
            "seed_trials": self.seed_trials,
            "baselines": self.baselines,
            "classes": self.classes,
        }
        with report_interruption(out, sibling(out, OWN_SUFFIX)):
            run = train_segdiff(self.data, out=out, **options, **settings)
        (judgement, lines), report = judge_run(out, REPORT), str(out / "report.html")
        data = {"run": str(out), "report": report, "steps": run.config.steps, "scores": run.scores, **judgement}
        lines += ["", f"run     {out}", f"report  {report}"]
        if run.scores:
            lines = [format_scores(run.scores), "", *lines]
        return data, "\n".join(lines)

    def _estimate(self, settings: dict[str, Any]) -> Result:
        from factorkit.data.datasets import open_dataset
        from factorkit.segdiff.train import estimate, find_classes

        data: dict[str, Any] = {}
        classes = None
        if self.data is not None:
            dataset = open_dataset(self.data, holdout=settings["holdout"], mask_set=settings["mask_set"])
            classes = find_classes(self.classes, dataset, dataset.train.names)
            data = {"images": len(dataset.train), "held_out": len(dataset.test_images or ())}
        settings |= {"out": self.out, "preset": self.preset, "classes": classes, "num_images": data.get("images")}
        data |= estimate(self.data, **settings)
        lines = [
            f"model   {data['parameters'] / 1e6:.2f} M parameters (preset {data['preset']})",
            f"memory  {data['memory_gib']:.2f} GiB with {format_count(data['trial_images'], 'image')} at once, "
            f"on {data['device']}",
            f"speed   {data['images_per_second']:.1f} images/s",
            f"time    {format_duration(data['seconds'])} for {format_count(data['steps'], 'step')} of "
            f"{format_count(data['batch_size'], 'image')}",
        ]
        if data["stage_seconds"]:
            lines.append(f"        of which {format_duration(data['stage_seconds'])} for finding the objects first")
        if data["autoencoder_seconds"]:
            lines.append(f"        of which {format_duration(data['autoencoder_seconds'])} for the autoencoder first")
        if data["latent_note"]:
            lines.append(f"latents {data['latent_note']}")
        if data["regions"] is None:
            lines.append("regions 2 or 3, by the images; estimated with 3")
        if self.seed_trials > 1:
            each = format_duration(data["stage_seconds"]) if data["stage_seconds"] else "up to half of that"
            lines.append(f"        and {each} for each of the other {self.seed_trials - 1} seed trials")
        if self.data is not None:
            lines.append(
                f"data    {format_count(data['images'], 'image')} to train on, {data['held_out']} labelled held out"
            )
        return data, "\n".join(lines)


@dataclass(kw_only=True)
class TrainNerfdiff(Command):
    """Find the cameras and the scene behind views of one object or place, or resume an interrupted training.

    The run is a folder with settings, checkpoints of every stage, sample grids, log, scores.json and report.html. The
    same command again resumes it exactly, from the newest checkpoint.

    The data are a scene of NeRF's synthetic set, a nerfstudio, LLFF, COLMAP, NeuS, NSVF or ShapeNet-SRN folder, an .npz
    like tiny_nerf_data, a folder of images, or a video. Poses that come with the data are used only with --poses known;
    otherwise they serve to score the result.

    Presets:
        demo, fast                the robust method: search over fixed directions, refinement, flip test, encoder
        lego, drums, car, llff    the settings exactly as in the thesis; they need a GPU

    Examples:
        factorkit train nerfdiff
        factorkit train nerfdiff --data lego/ --out runs/lego --preset fast
        factorkit train nerfdiff --data lego/ --out runs/supervised --preset fast --poses known
        factorkit train nerfdiff --data lego/ --out runs/thesis --preset lego
        torchrun --nproc-per-node 8 -m factorkit train nerfdiff --data lego/ --preset lego
    """

    model: Positional[Literal["nerfdiff"]]
    """Which model to train."""
    data: OptionalPath = None
    """Views to train on. The default is the procedural scene of the package."""
    out: OptionalPath = None
    """Run folder. The default is runs/nerfdiff-PRESET."""
    preset: OptionalName = None
    """Settings to start from. The default is fast, or demo without --data."""
    dry_run: Flag = False
    """Train nothing: print parameters, memory and the duration of each stage on this machine."""
    layout: Literal["auto", "object", "forward"] = "auto"
    """What the cameras look at. auto decides by their viewing directions and refuses cameras that look at nothing in
    common; object and forward read them as they are."""
    masks: OptionalName = None
    """Folder of foreground masks (0 is transparent), matched by name. The default is masks/ or mask/ beside the images;
    none uses no masks; segdiff trains a segdiff model on the views first, in OUT_masks, and uses its masks."""
    loss_masks: OptionalPath = None
    """Folder of masks of pixels that do not count (0 is not scored), matched by name."""
    fov: OptionalFloat = None
    """Field of view in degrees along the longer side, for images without cameras. The default is EXIF's, else 50."""
    box: OptionalFloat = None
    """With known poses around an object: length of the sides of the field's box in the units of the poses. By default
    it holds the foreground and the sparse points, and at least 90% of the image."""

    PROCESSES = "all"
    BASIC = (*COMMON, "model", "layout", "poses", "search", "field", "field_steps", "json")

    def execute(self) -> Result:
        """Train, and return the verdict of the run."""
        from factorkit.cli.evaluate import judge_run
        from factorkit.nerfdiff.config import NerfdiffConfig
        from factorkit.nerfdiff.verdict import REPORT
        from factorkit.object_masks import train_nerfdiff

        settings = _settings(self, NerfdiffConfig)
        if self.dry_run:
            return self._estimate(settings)
        out = self.out or Path("runs") / f"nerfdiff-{_preset_name(self, 'fast')}"
        start = time.perf_counter()
        with report_interruption(out, sibling(out, "_masks")):
            run = train_nerfdiff(self.data, out=out, preset=self.preset, **self._reading(), **settings)
        (judgement, lines), report = judge_run(out, REPORT), str(out / "report.html")
        data = {"run": str(out), "report": report, "scores": run.scores, **judgement}
        duration = format_duration(time.perf_counter() - start)
        return data, "\n".join([*lines, "", f"run     {out}", f"report  {report}", f"time    {duration}"])

    def _reading(self) -> dict[str, Any]:
        """Return how the views are read."""
        return {name: getattr(self, name) for name in ("layout", "masks", "loss_masks", "fov", "box")}

    def _estimate(self, settings: dict[str, Any]) -> Result:
        from factorkit.object_masks import estimate

        data = estimate(self.data, preset=self.preset, **self._reading(), **settings)
        lines = [
            f"model   {data['parameters'] / 1e6:.2f} M parameters of encoder and field (preset {data['preset']})",
            f"memory  {data['memory_gib']:.2f} GiB on {data['device']}",
            f"data    {format_count(data['views'], 'view')}",
            *(f"        {note}" for note in data["notes"]),
            f"time    at most {format_duration(data['seconds'])}",
        ]
        lines += [
            f"        {stage['name']:<12} {format_duration(stage['seconds'])} for {stage['steps']} steps, "
            f"{stage['views_per_second']:.1f} views/s"
            for stage in data["stages"]
        ]
        return data, "\n".join(lines)


@dataclass(kw_only=True)
class TrainAutoencoder(Command):
    """Train an autoencoder on unlabelled images, or resume an interrupted training.

    A segdiff model denoises its small latents in place of pixels: factorkit train segdiff --latent RUN. The run is a
    folder with settings, checkpoints, photos beside their reconstructions, log and report.html. The same
    command again resumes it exactly, from the newest checkpoint. The data are those of factorkit train segdiff.

    Examples:
        factorkit train autoencoder --data photos/ --out runs/autoencoder
        factorkit train autoencoder --data photos/ --resolution 256 --downsample 8 --out runs/autoencoder8
    """

    model: Positional[Literal["autoencoder"]]
    """Which model to train."""
    data: OptionalPath = None
    """Images to train on. The default is the procedural flowers of the package."""
    out: Path = Path("runs/autoencoder")
    """Run folder."""
    dry_run: Flag = False
    """Train nothing: print parameters, images/s and the duration of the run on this machine."""

    PROCESSES = "all"
    BASIC = (*COMMON, "model", "downsample", "latent_channels", "json")

    def execute(self) -> Result:
        """Train, and return the verdict of the run."""
        from factorkit.cli.evaluate import judge_run
        from factorkit.segdiff.autoencoder import REPORT, AutoencoderConfig, estimate, train_autoencoder

        settings = _settings(self, AutoencoderConfig)
        if self.dry_run:
            data = estimate(**settings)
            lines = [
                f"model   {data['parameters'] / 1e6:.2f} M parameters",
                f"speed   {data['images_per_second']:.1f} images/s on {data['device']}",
                f"time    {format_duration(data['seconds'])} for {format_count(data['steps'], 'step')} of "
                f"{format_count(data['batch_size'], 'image')}",
            ]
            return data, "\n".join(lines)
        settings["holdout"] = parse_holdout(settings["holdout"])
        with report_interruption(self.out):
            run = train_autoencoder(self.data, out=self.out, **settings)
        (judgement, lines), report = judge_run(self.out, REPORT), str(self.out / "report.html")
        data = {"run": str(self.out), "report": report, "steps": run.step, **judgement}
        return data, "\n".join([*lines, "", f"run     {self.out}", f"report  {report}"])


def training_options(args: Sequence[str], show_help: bool) -> tuple[str, Any, Any]:
    """Find what `factorkit train` is asked to train, and the options with the defaults of the preset.

    Returns:
        The word of the model, the class of the options and an instance that holds the defaults.

    Raises:
        ConfigError: no such model or preset.
    """
    model = next(iter(args), "")
    if model not in MODELS:
        if show_help:
            model = "segdiff"
        else:
            named = model and not model.startswith("-")
            problem = f"{model!r} is not a model. {did_you_mean(model, MODELS)}" if named else ""
            listed = ", ".join(f"{name} for {purpose}" for name, purpose in MODELS.items())
            raise ConfigError(f"{problem}Name the model to train first: {listed}")
    early, _ = tyro.cli(
        _EarlyOptions, prog=f"factorkit train {model}", args=args, add_help=False, return_unknown_args=True
    )
    command: type[Command]
    config: type[EngineConfig]
    if model == "segdiff":
        from factorkit.segdiff.config import SegdiffConfig, preset_config

        command, config = TrainSegdiff, SegdiffConfig
        backbone = {} if early.backbone is None else {"backbone": early.backbone}
        settings: EngineConfig = preset_config(_preset_name(early, "fast64"), **backbone)
    elif model == "autoencoder":
        from factorkit.segdiff.autoencoder import SETTINGS, AutoencoderConfig

        command, config, settings = TrainAutoencoder, AutoencoderConfig, AutoencoderConfig.from_dict(SETTINGS)
    else:
        from factorkit.nerfdiff import config as nerfdiff

        command, config = TrainNerfdiff, nerfdiff.NerfdiffConfig
        changes = {name: getattr(early, name) for name in ("search", "resolution", "field", "encoder")}
        changes = {name: value for name, value in changes.items() if value is not None}
        settings = nerfdiff.preset_config(_preset_name(early, "fast"), **changes)
    known = {"HAS_RESOLUTION": early.resolution is not None}
    options = dataclasses.make_dataclass(command.__name__, [], bases=(config, command), namespace=known, kw_only=True)
    options.__doc__ = command.__doc__
    return model, options, options(model=tyro.MISSING, **_settings(settings, config))


@dataclass(kw_only=True)
class _EarlyOptions:
    """The options of `factorkit train` on which the defaults of others depend."""

    data: OptionalPath = None
    preset: str | None = None
    backbone: str | None = None
    search: str | None = None
    resolution: int | None = None
    field: str | None = None
    encoder: str | None = None


def _preset_name(options: Any, default: str) -> str:
    return options.preset or ("demo" if options.data is None else default)


def _settings(options: Any, config: type[EngineConfig]) -> dict[str, Any]:
    """The options that are settings of ``config``."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(config)}
