"""The flags of every command. A command is a dataclass, its fields are the flags, its docstring is the manual page.

torch takes seconds to import, so nothing that needs it is imported before a command runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from factorkit.cli.flag_types import Command, Flag, OptionalInt, OptionalPath, Result, RunCommand, read_flags
from factorkit.cli.flags_checkpoint import Checkpoint
from factorkit.cli.flags_choose import ChooseRegions
from factorkit.cli.flags_editing import Branches, Interpolate, Recompose
from factorkit.cli.flags_nerfdiff import Export, Pose, Reconstruct, Render, Sample, TrainNerfdiff, View
from factorkit.cli.flags_reproduce import Reproduce
from factorkit.utils.errors import ConfigError, did_you_mean

Config = TypeVar("Config")
Level = Annotated[int | None, arg(aliases=["-t"], metavar="INT", help_behavior_hint="")]


@dataclass(kw_only=True)
class Train(Command, Generic[Config]):
    """Train a model on unlabelled photographs, or take an interrupted training up again.

    This page is of `train segdiff`; `factorkit train nerfdiff --help` has the other one, for views of a scene.

    The run is a folder: settings, checkpoints, sample sheets, log, scores.json and report.html, to open in a browser.
    The same command again resumes it, exactly, from the newest checkpoint.

    Data are a folder of images (nested, of any sizes, modes and formats), a .zip, a .npz or .npy array. Where there are
    images/ and masks/ in it, labelled images are kept out of training and scored at the end. Published data sets are
    read in their authors' layout and splits: factorkit prepare --list.

    PRESETS
        A preset sets the defaults of the flags below; --help together with --preset shows them.
        demo, fast32, fast64      the regional form: small models whose regions follow content within minutes
        rooms32                   regions within regions (--regions 3 3); without --data: procedural rooms
        flowers64, flowers128, cub64, cub128, ffhq64, ffhq128, imagenet64
                                  the thesis' settings, to the letter; they want a GPU

    EXAMPLES
        factorkit train segdiff
        factorkit train segdiff --data photos/ --out runs/photos --preset fast64 --steps 2000
        factorkit train segdiff --data photos/ --out runs/photos --seed-trials 3
        factorkit train segdiff --data photos/ --preset flowers64 --dry-run
        torchrun --nproc-per-node 8 -m factorkit train segdiff --data photos.zip --preset ffhq64
    """

    model: Positional[Literal["segdiff"]]
    """What to train."""
    data: OptionalPath = None
    """Images to train on; without: the procedural flowers the package ships."""
    out: OptionalPath = None
    """The run folder; without: runs/PRESET."""
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Settings to start from; without: fast64, or demo where no data is given."""
    classes: Annotated[str | None, arg(metavar="folders|auto|FILE", help_behavior_hint="")] = None
    """Tell the model of what class each image is: by its folder, by a .csv, .tsv or .json of names and classes, or as
    the data set says; without: of none."""
    seed_trials: int = 1
    """Number of short trainings from different seeds; the best by the label-free alarms continues."""
    baselines: Flag = False
    """At the end score trivial predictors beside the model, where there are labels."""
    dry_run: Flag = False
    """Train nothing: print parameters, memory, images/s and the time the run will take here."""
    config: OmitArgPrefixes[Config]

    @classmethod
    def parse(cls, prog: str, args: Sequence[str]) -> Command:
        model = next(iter(args), "")
        if model == "nerfdiff":
            return TrainNerfdiff.parse(f"{prog} {model}", args)
        if model == "segdiff":
            prog = f"{prog} {model}"
        elif not {"-h", "--help"} & {*args}:
            named = model and not model.startswith("-")
            said = f"{model!r} is no model. {did_you_mean(model, ('segdiff', 'nerfdiff'))}" if named else ""
            raise ConfigError(
                f"{said}Say first what to train: segdiff, on photographs, or nerfdiff, on views of a scene"
            )
        basis, _ = tyro.cli(_Basis, prog=prog, args=args, add_help=False, return_unknown_args=True)
        from factorkit.segdiff.config import SegdiffConfig, preset_config

        default = cls(model=tyro.MISSING, config=preset_config(_preset(basis)))
        return read_flags(cls[SegdiffConfig], cls, prog, args, default=default)

    def run_command(self) -> Result:
        from factorkit.cli import commands

        changes = self.config.to_dict() | {"holdout": _holdout(self.config.holdout)}
        if self.dry_run:
            return commands.dry_run(self.data, self.preset, self.seed_trials, self.classes, changes)
        out = self.out or Path("runs") / _preset(self)
        return commands.train(self.data, out, self.preset, self.seed_trials, self.baselines, self.classes, changes)


@dataclass(kw_only=True)
class _Basis:
    """The flags of `train` that decide the defaults of its others."""

    data: OptionalPath = None
    preset: str | None = None


def _preset(flags: _Basis | Train) -> str:
    return flags.preset or ("demo" if flags.data is None else "fast64")


def _holdout(value: str) -> str | int:
    # of `str | int` a parser takes the first that fits, and everything is a string
    return int(value) if value.isdecimal() else value


@dataclass(kw_only=True)
class Segment(RunCommand):
    """Segment photographs with a trained model.

    For each image, at its own size, OUT receives
        NAME_labels.png     palette image: a pixel's value is the number of its region, from 0
        NAME_mask_K.png     grey image: how much each pixel belongs to region K
        NAME_overlay.png    the photograph tinted by region
        contact_sheet.png   the first 32 images beside their regions
        annotations.json    with --formats coco: run lengths, areas and boxes in COCO's form
        segments.jsonl      what is finished

    With --video a moving picture becomes a video with its regions laid over it, in colours that stay.

    Folders keep their structure. Images that cannot be read are skipped, counted and named. The same command again
    goes on where the first one stopped, and does again only what has changed.

    EXAMPLES
        factorkit segment runs/photos holiday.jpg --out segmented
        factorkit segment runs/photos more_photos/ --out segmented -t 50
        factorkit segment runs/photos archive/ --out segmented --formats labels coco --size 128
        factorkit segment runs/photos walk.mp4 --video --out walk_regions.mp4
    """

    paths: Positional[Annotated[tuple[Path, ...], arg(metavar="PATHS...", help_behavior_hint="(required)")]]
    """Images and folders of images; or one .zip, .npz or .npy."""
    out: Path
    """Where to write; made if it is not there."""
    t: Level = None
    """Noise level at which to look, 0 to T-1; without: the run's own, 30 on the linear schedule and 0 of a
    mixture."""
    size: OptionalInt = None
    """Pixels of the short side at which the network looks; without: the training's. More shows it smaller things."""
    upsample: Literal["guided", "bilinear"] = "guided"
    """guided: masks follow the edges of large photographs; bilinear: they stay smooth."""
    quality: Literal["fast", "best"] = "fast"
    """best looks at the mirror image too, where training showed any, and averages the masks."""
    formats: tuple[Literal["labels", "masks", "overlays", "coco"], ...] = ("labels", "masks", "overlays")
    """What to write of each image."""
    workers: OptionalInt = None
    """Threads that read, and as many that write; without: one a core, at most 8."""
    video: Flag = False
    """PATHS is one video, an animated GIF or WebP, or a folder of frames in the order of their names, 2 before 10; OUT
    an .mp4, .mkv or .mov."""
    smooth: float = 0.8
    """With --video: how much masks are averaged over time where the picture stands still, from 0 to below 1."""

    def run_command(self) -> Result:
        if not self.paths:
            raise ConfigError("no images are named. The form is: factorkit segment RUN PATHS... --out DIR")
        from factorkit.cli import commands

        options: dict[str, Any] = {"t": self.t, "size": self.size, "upsample": self.upsample, "quality": self.quality}
        if self.video:
            return commands.segment_video(self.run, self.paths, self.out, self.device, smooth=self.smooth, **options)
        options |= {"formats": self.formats, "workers": self.workers}
        return commands.segment(self.run, self.paths, self.out, self.device, **options)


@dataclass(kw_only=True)
class Generate(RunCommand):
    """Draw new images, with the masks they were made through.

    OUT receives generated_0000.png, generated_0000_labels.png, generated_0000_mask_K.png and so on, and
    contact_sheet.png of them all.

    EXAMPLES
        factorkit generate runs/photos -n 16 --out generated
        factorkit generate runs/photos -n 4 --out generated --sampler ddpm --steps 250 --trajectory
        factorkit generate runs/photos -n 16 --out generated --sampler dpm++ --steps 20
        factorkit generate runs/kinds -n 64 --out generated --classes all --guidance 2
    """

    out: Path
    """Where to write; made if it is not there."""
    count: Annotated[int, arg(aliases=["-n"])] = 16
    """How many."""
    sampler: Literal["ddim", "ddpm", "heun", "dpm++"] = "ddim"
    """ddim adds no noise on the way and needs few steps; dpm++ is of second order; heun too, at two
    calls of the network a step; ddpm is ancestral sampling. Each goes with whatever the model predicts."""
    steps: int = 50
    """Denoising steps."""
    seed: int = 0
    """The same seed draws the same images."""
    classes: Annotated[tuple[str, ...], arg(metavar="NAMES...", help_behavior_hint="")] = ()
    """Of a run with classes: what the images are to be of, taken in turn, or all; without: of anything."""
    guidance: float = 1.0
    """How strongly they are pushed to their class: 1 is not at all, 2 to 4 is usual, at twice the cost."""
    trajectory: Flag = False
    """Also write trajectory.png: how the first 8 and their regions take shape while noise is removed."""

    def run_command(self) -> Result:
        from factorkit.cli import commands

        options = {"sampler": self.sampler, "steps": self.steps, "seed": self.seed, "trajectory": self.trajectory}
        options["classes"] = "all" if self.classes == ("all",) else self.classes or None
        return commands.generate(self.run, self.out, self.device, n=self.count, guidance=self.guidance, **options)


@dataclass(kw_only=True)
class Evaluate(RunCommand):
    """Score a segdiff run against foreground masks, or a nerfdiff run against views with true poses.

    With --images and --masks: Acc, IoU and DICE of the regions, means over images. With --views: degrees, PSNR and SSIM
    of cameras and renders. With --data: of a data set whose masks hold classes, such as PASCAL VOC, each class by
    itself, over the pictures that show it (zero-shot transfer, table 2.7).

    Which regions are foreground is fitted on the first FIT labelled images and then fixed; the rest are scored. The
    oracle chooses anew for each image by its own label: an upper bound, no result. Images and masks match by name
    (x.jpg with x.png, x_mask.png or x_seg.png); images without a mask are left out. A run folder keeps the scores in
    scores.json.

    EXAMPLES
        factorkit evaluate runs/flowers --images photos/ --masks masks/ --ignore 128 --num-fit-images 16
        factorkit evaluate runs/flowers --images photos/ --masks masks/ --baselines
        factorkit evaluate runs/imagenet --data VOCdevkit/ --split val
        factorkit evaluate runs/lego --views lego/ --split test --json
    """

    views: OptionalPath = None
    """Views with true poses, of any kind that `train nerfdiff` reads."""
    data: OptionalPath = None
    """A data set with masks of classes, of any layout that `factorkit prepare --list` names."""
    label_map: OptionalPath = None
    """With --data: a .json of the data set's classes and the run's class the model is told for each; without: the
    dissertation's for VOC and a run on ImageNet, nothing for others."""
    mask_set: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """With --data: which set of masks, of a data set that has several."""
    split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Which of the views, train or test; without: all. With --data: whose pictures are scored; without: val."""
    refine: int = 0
    """Of nerfdiff: steps by which the encoder's poses are refined."""
    images: OptionalPath = None
    """Folder, .zip or array of images."""
    masks: OptionalPath = None
    """Folder, .zip or array of masks; every value above 0 is foreground."""
    num_fit_images: OptionalInt = None
    """Labelled images that fit the mapping; without: the run's own (16), at most half of them."""
    ignore: OptionalInt = None
    """Mask value of pixels that are not scored; without: the run's own."""
    baselines: Flag = False
    """Score beside it: all foreground, centre disc, mean mask, colour 2-means per image and per set, GrabCut."""
    t: Level = None
    """Noise level at which to segment, 0 to T-1; without: the run's own, 30 on the linear schedule and 0 of a
    mixture."""
    size: OptionalInt = None
    """Pixels a side at which to score; without: the model's resolution."""
    quality: Literal["fast", "best"] = "fast"
    """As of factorkit segment."""
    nesting: Annotated[tuple[int, ...], arg(metavar="INT INT...", help_behavior_hint="")] = ()
    """The masks are labels within labels, so many at each level: score every level of a hierarchy. 3 3: label 3 i + j
    is part j of class i."""

    def run_command(self) -> Result:
        if self.views is not None:
            from factorkit.cli import commands_nerfdiff

            if self.split not in (None, "train", "test"):
                raise ConfigError(f"--split {self.split}: views have the splits train and test")
            return commands_nerfdiff.evaluate(self.run, self.views, self.split, self.refine, self.device)
        if self.data is not None:
            from factorkit.cli import commands

            options: dict[str, Any] = {
                "num_fit_images": self.num_fit_images,
                "t": self.t,
                "quality": self.quality,
                "mask_set": self.mask_set,
            }
            options |= {"split": self.split or "val", "label_map": self.label_map}
            return commands.zero_shot(self.run, self.data, self.device, **options)
        if self.images is None or self.masks is None:
            raise ConfigError("nothing to score with: give --images and --masks, --data, or --views for a nerfdiff run")
        from factorkit.cli import commands

        options = {
            "num_fit_images": self.num_fit_images,
            "ignore": self.ignore,
            "baselines": self.baselines,
            "t": self.t,
            "size": self.size,
            "quality": self.quality,
            "nesting": self.nesting or None,
        }
        return commands.evaluate(self.run, self.images, self.masks, self.device, **options)


@dataclass(kw_only=True)
class Demo(Command):
    """See it work: train on pictures made on the spot, use the model, report.

    Takes a few minutes on two CPU cores. Segdiff is scored on 200 held-out flowers beside trivial baselines, 8 of them
    are segmented, and 16 new ones generated. Nerfdiff finds the cameras of 80 views of a procedural scene, is scored by
    their true poses on 20 others, and flies around what it found. Where it did not work, it says so. The same command
    again resumes, or shows the finished run.

    EXAMPLES
        factorkit demo
        factorkit demo nerfdiff
        factorkit demo --seed 3 --out runs/demo3
    """

    model: Positional[Literal["segdiff", "nerfdiff"]] = "segdiff"
    """What to show."""
    out: OptionalPath = None
    """The run folder; without: runs/demo, or runs/demo-nerfdiff."""
    seed: int = 0
    """Of the weights, the data order and the noise."""

    def run_command(self) -> Result:
        if self.model == "nerfdiff":
            from factorkit.cli import commands_nerfdiff

            return commands_nerfdiff.demo(self.out or Path("runs/demo-nerfdiff"), self.seed)
        from factorkit.cli import commands

        return commands.demo(self.out or Path("runs/demo"), self.seed)


@dataclass(kw_only=True)
class Prepare(Command):
    """Decode a data set once, so that a training on it starts at once.

    Crops every image to its centred square, resizes it and keeps all of them in the cache, as training would. A
    training with the same data, resolution and holdout finds them there. Where the data changed since, they are
    decoded again.

    EXAMPLES
        factorkit prepare photos/ --resolution 64
        factorkit prepare CUB_200_2011/ --resolution 128 --holdout val
        factorkit prepare --list
    """

    data: Positional[Annotated[Path | None, arg(metavar="DATA", help_behavior_hint="")]] = None
    """Folder of images, .zip, .npz, .npy, or a data set in the layout its authors publish (--list)."""
    resolution: int = 64
    """Pixels a side."""
    holdout: str = "auto"
    """Labelled images kept out of training: masked, none, a number, the name of an official split, or auto."""
    list: Flag = False
    """Say which published data sets are known, what each expects on the disk and where it is published."""

    def run_command(self) -> Result:
        if not self.list and self.data is None:
            raise ConfigError("nothing to prepare: give a folder, or --list to see which data sets are known")
        from factorkit.cli import commands_data

        if self.list:
            return commands_data.list_layouts()
        return commands_data.prepare(self.data, self.resolution, _holdout(self.holdout))


@dataclass(kw_only=True)
class Doctor(Command):
    """Say what is installed, what it runs on, what is missing, what that costs, and how to get it."""

    def run_command(self) -> Result:
        from factorkit.cli import doctor

        report = doctor.report()
        return report, doctor.format_report(report)


COMMANDS: dict[str, type[Command]] = {
    "demo": Demo,
    "train": Train,
    "segment": Segment,
    "generate": Generate,
    "interpolate": Interpolate,
    "branches": Branches,
    "recompose": Recompose,
    "pose": Pose,
    "reconstruct": Reconstruct,
    "render": Render,
    "sample": Sample,
    "export": Export,
    "view": View,
    "reproduce": Reproduce,
    "evaluate": Evaluate,
    "choose-regions": ChooseRegions,
    "checkpoint": Checkpoint,
    "prepare": Prepare,
    "doctor": Doctor,
}
