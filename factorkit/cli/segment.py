"""``factorkit segment`` and ``factorkit choose-regions``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from factorkit.cli.base import (
    Command,
    Device,
    Flag,
    NoiseLevel,
    OptionalInt,
    OutputCommand,
    Paths,
    Result,
    report_interruption,
)
from factorkit.cli.data import parse_holdout
from factorkit.utils.errors import ConfigError, format_count

if TYPE_CHECKING:
    from factorkit.segdiff.run import SegdiffRun

OTHER_BASIC = ("device", "video", "smooth", "overwrite", "json")


@dataclass(kw_only=True)
class Segment(OutputCommand):
    """Segment images or a video with a trained model.

    For each image, OUT receives these files, at the image's own size:
        NAME_labels.png     palette image: the value of a pixel is the number of its region, from 0
        NAME_mask_K.png     grey image: how much each pixel belongs to region K
        NAME_overlay.png    the image tinted by region
        overview.png        the first 32 images beside their regions
        segments.jsonl      the list of finished images

    With --formats also these:
        grey-labels         NAME_labels_grey.png, grey image: the value of a pixel is the number of its region
        cutout              NAME_cutout_K.png, the region of --region on a transparent background
        coco                annotations.json: run lengths, areas and boxes in COCO's format
        coco-polygons       polygons.json: the same with polygons; run lengths for regions with holes
        labelme             labelme/NAME.json: polygons that labelme opens beside the image
        yolo                yolo/labels/NAME.txt and yolo/classes.txt: polygons in YOLO's segmentation format

    With --video the result is one video with its regions laid over it.

    Subfolders are kept. Images that cannot be read are skipped, counted and listed. The same command again continues
    where the first one stopped, and processes again only what has changed.

    Examples:
        factorkit segment runs/photos holiday.jpg --out segmented
        factorkit segment runs/photos more_photos/ --out segmented -t 50
        factorkit segment runs/photos archive/ --out segmented --formats labels coco --size 128
        factorkit segment runs/photos product_photos/ --out cutouts --formats cutout
        factorkit segment runs/photos walk.mp4 --video --out walk_regions.mp4
    """

    BASIC = ("run", "paths", "out", "formats", "region", "tolerance", "size", "quality", "t", *OTHER_BASIC)

    paths: Paths
    """Images and folders of images, or one .zip, .npz or .npy file."""
    out: Path
    """Folder to write to. It is created if needed."""
    formats: tuple[
        Literal["labels", "grey-labels", "masks", "overlays", "cutout", "coco", "coco-polygons", "labelme", "yolo"], ...
    ] = ("labels", "masks", "overlays")
    """What to write for each image."""
    region: str = "auto"
    """With cutout: the number of the region to cut out. auto is the foreground of the run's scores, or without labels
    the object by a rule; the output says which."""
    tolerance: float = 1.0
    """With polygons: pixels by which a corner may be off the line that replaces it. 0 keeps every corner."""
    size: OptionalInt = None
    """Pixels of the short side that the network sees. The default is the training resolution; more shows smaller
    objects."""
    quality: Literal["fast", "best"] = "fast"
    """best also segments the mirrored image and averages both, if training used mirrored images."""
    upsample: Literal["guided", "bilinear"] = "guided"
    """guided: masks follow the edges of large images. bilinear: masks stay smooth."""
    t: NoiseLevel = None
    """Noise level for segmentation, 0 to T-1. The default is the run's own."""
    workers: OptionalInt = None
    """Threads that read images, and as many that write results. The default is one per core, at most 8."""
    video: Flag = False
    """PATHS is one video, an animated GIF or WebP, or a folder of frames in the order of their names; OUT is an .mp4,
    .mkv or .mov file."""
    smooth: float = 0.8
    """With --video: how strongly masks are averaged over time where the video does not move, 0 to below 1."""

    partial: Flag = False
    """With --video: use a video that is cut off or damaged as far as it goes."""

    def execute(self) -> Result:
        """Write the labels of the images or the video."""
        if not self.paths:
            raise ConfigError("no images are given. Use: factorkit segment RUN PATHS... --out DIR")
        from factorkit.segdiff.run import SegdiffRun

        run = SegdiffRun.load(self.run, device=self.device)
        options = {"t": self.t, "size": self.size, "upsample": self.upsample, "quality": self.quality}
        options["overwrite"] = self.overwrite
        return self._segment_video(run, options) if self.video else self._segment_images(run, options)

    def _segment_images(self, run: SegdiffRun, options: dict[str, Any]) -> Result:
        from factorkit.data.files import VIDEO_SUFFIXES, escape_name, format_examples
        from factorkit.data.open import open_source

        if videos := [path for path in self.paths if path.suffix.lower() in VIDEO_SUFFIXES]:
            name = escape_name(str(videos[0]))
            raise ConfigError(f"{name} is a video: add --video, and let --out be an .mp4, .mkv or .mov")
        images = open_source(self.paths[0] if len(self.paths) == 1 else list(self.paths))
        segments = run.segment_folder(
            images,
            self.out,
            formats=self.formats,
            workers=self.workers,
            region=self.region,
            tolerance=self.tolerance,
            **options,
        )
        data = segments._asdict() | {"out": str(self.out)}
        before = f", {segments.already} of them before" if segments.already else ""
        skipped = f", {len(segments.skipped)} skipped" if segments.skipped else ""
        lines = [f"{segments.segmented} segmented{before}{skipped}: {self.out}"]
        if segments.unlike:
            count, examples = len(segments.unlike), format_examples(segments.unlike)
            lines.append(f"{format_count(count, 'image')} unlike the training set; check the regions: {examples}")
        if segments.cutout:
            lines.append(f"cut-outs: {segments.cutout}")
        for name in ("overview", "annotations", "polygons"):
            if data[name] is not None:
                data[name] = str(data[name])
                lines.append(f"{name.replace('_', ' ')}: {data[name]}")
        return data, "\n".join(lines)

    def _segment_video(self, run: SegdiffRun, options: dict[str, Any]) -> Result:
        if len(self.paths) > 1:
            raise ConfigError(f"--video takes one video or one folder of frames, not {len(self.paths)} paths")
        segments = run.segment_video(self.paths[0], self.out, smooth=self.smooth, partial=self.partial, **options)
        areas = "/".join(f"{area:.2f}" for area in segments.areas)
        text = (
            f"{format_count(segments.frames, 'frame')} segmented: {self.out}\nareas of the regions {areas}; "
            f"{segments.changes:.1%} of "
            "the pixels change region from frame to frame"
        )
        return segments._asdict() | {"out": str(self.out)}, text


@dataclass(kw_only=True)
class ChooseRegions(Command):
    """Recommend a number of regions for a set of images, without labels.

    For every candidate K and seed, a spatial mixture model of colours is trained for seconds and judged on held-out
    images by the share of noise that it cannot separate from the image. The recommended K is the smallest one after
    which the next K lowers that error by less than --min-improvement. It counts things that have much the same position
    in all images, whatever their colours.

    OUT receives choice.json, regions.png (images and their regions, one row per candidate) and the trainings. The same
    command again trains only what is not finished; candidates, seeds and steps may be added.

    Examples:
        factorkit choose-regions photos/
        factorkit choose-regions horses/ --no-random-flip --candidates 2 3 4 5 6 --seed-trials 3
    """

    data: Positional[Annotated[Path | None, arg(metavar="DATA", help_behavior_hint="")]] = None
    """Images, in any format that `factorkit train segdiff` reads. The default is the procedural flowers."""
    out: Path = Path("runs/regions")
    """Folder to write to."""
    candidates: Annotated[tuple[int, ...], arg(metavar="K K...")] = (2, 3, 4, 5)
    """Numbers of regions to try."""
    seed_trials: int = 2
    """Trainings of each candidate; the best one counts."""
    min_improvement: float = 0.02
    """Share of the error that one more region must remove."""
    resolution: int = 32
    """Pixels a side."""
    random_flip: bool = True
    """Mirror half of the training images. Turn it off for objects that all face one way."""
    steps: int = 200
    """Steps of each training."""
    holdout: str = "auto"
    """Labelled images to judge on, see factorkit prepare --help. Without labels up to a quarter of all images."""
    device: Device = "auto"
    """Where to train. auto uses a GPU if there is one."""

    def execute(self) -> Result:
        """Train with each number of regions, and return the recommended one."""
        from factorkit.segdiff.choose_regions import GRID_FILE, choose_regions

        with report_interruption(self.out):
            choice = choose_regions(
                self.data,
                out=self.out,
                candidates=self.candidates,
                seed_trials=self.seed_trials,
                min_improvement=self.min_improvement,
                resolution=self.resolution,
                random_flip=self.random_flip,
                steps=self.steps,
                holdout=parse_holdout(self.holdout),
                device=self.device,
            )
        image = self.out / GRID_FILE
        data = {
            "regions": choice.regions,
            "errors": choice.errors,
            "improvements": choice.improvements,
            "reason": choice.reason,
        }
        text = f"{choice.table()}\n\n{choice.reason}\nregions  {choice.regions}\nimage    {image}"
        return {**data, "out": str(self.out), "image": str(image)}, text
