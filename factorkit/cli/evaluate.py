"""``factorkit evaluate``, and the verdict that other commands end with too."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from tyro.conf import arg

from factorkit.cli.base import Flag, NoiseLevel, OptionalInt, OptionalName, OptionalPath, Result, RunCommand
from factorkit.cli.score_tables import format_generation, format_pose_scores, format_scores
from factorkit.utils.errors import ConfigError, format_count
from factorkit.utils.files import sibling

if TYPE_CHECKING:
    from factorkit.report.content import ReportContent
    from factorkit.segdiff.run import SegdiffRun

TRAINING_PHOTOS = "TRAINING_PHOTOS"  # in a printed command, for the user to replace


@dataclass(kw_only=True)
class Evaluate(RunCommand):
    """Score a segdiff run against masks, or a nerfdiff run against views with true poses.

    --images and --masks: Acc, IoU and DICE of the foreground, averaged over images.
    --data: scores of each class of a data set whose masks hold classes, such as PASCAL VOC (zero-shot transfer, table
    2.7). Each class is scored on the images that show it.
    --views: errors of the cameras in degrees, PSNR and SSIM of the renders.
    --generation, with --images: how near drawn images are to photos, and whether segmenting them gives the masks that
    they were drawn with. No masks needed.
    --epipolar: whether points matched between the training images agree with a nerfdiff run's cameras. It needs
    neither true poses nor masks; the result becomes part of the run's alarms and verdict.

    The mapping from regions to foreground is fitted on the first --num-fit-images labelled images and then fixed; the
    other images are scored. The oracle chooses the mapping for each image by its own label: it is an upper bound, not
    a result. Images and masks match by name (x.jpg with x.png, x_mask.png or x_seg.png); images without a mask are
    left out. A run folder keeps the scores in scores.json.

    Examples:
        factorkit evaluate runs/flowers --images photos/ --masks masks/ --ignore 128 --num-fit-images 16
        factorkit evaluate runs/flowers --images photos/ --masks masks/ --baselines
        factorkit evaluate runs/imagenet --data VOCdevkit/ --split val
        factorkit evaluate runs/lego --views lego/ --split test --json
        factorkit evaluate runs/lego --epipolar
        factorkit evaluate runs/flowers --generation --images photos/
        factorkit evaluate runs/flowers --generation --images photos/ --ddpm runs/plain
    """

    images: OptionalPath = None
    """Folder, .zip or array of images."""
    masks: OptionalPath = None
    """Folder, .zip or array of masks. What the values mean is decided from them; an unusual meaning is printed."""
    data: OptionalPath = None
    """Data set with masks of classes, in any layout that `factorkit prepare --list` names."""
    views: OptionalPath = None
    """Views with true poses, in any format that `factorkit train nerfdiff` reads."""
    epipolar: Flag = False
    """Check the cameras of a nerfdiff run by matched points. With --data: where its training images are now."""
    generation: Flag = False
    """Score images that a segdiff run draws, against the photos of --images."""
    ddpm: OptionalPath = None
    """With --generation: a run with regions=1, the plain DDPM, to compare with. Train it for as long."""
    split: OptionalName = None
    """With --views: train or test; the default is all views. With --data: the split to score; the default is val."""
    num_fit_images: OptionalInt = None
    """Labelled images that fit the mapping, at most half of them. The default is the run's own (16)."""
    ignore: OptionalInt = None
    """Mask value of pixels that are not scored. The default is the run's own."""
    foreground: Annotated[tuple[int, ...], arg(metavar="INT INT...", help_behavior_hint="")] = ()
    """Mask values of the foreground. By default decided from the values."""
    mask_threshold: OptionalInt = None
    """Mask value from which on a pixel is foreground, for soft masks. By default decided from the values."""
    baselines: Flag = False
    """Also score predictors that learn nothing: all foreground, centre disc, mean mask, colour 2-means, GrabCut."""
    size: OptionalInt = None
    """Pixels a side at which to score. The default is the model's resolution."""
    quality: Literal["fast", "best"] = "fast"
    """See factorkit segment --help."""
    t: NoiseLevel = None
    """Noise level for segmentation, 0 to T-1. The default is the run's own."""
    nesting: Annotated[tuple[int, ...], arg(metavar="INT INT...", help_behavior_hint="")] = ()
    """Score every level of a hierarchy against masks that hold labels within labels, so many at each level. With 3 3,
    label 3 i + j is part j of class i."""
    mask_set: OptionalName = None
    """With --data: the set of masks, for a data set that has several."""
    label_map: OptionalPath = None
    """With --data: a .json file that maps each class of the data set to the class of the run that the model is
    conditioned on. The default is the dissertation's mapping for VOC and a run on ImageNet, and none for others."""
    refine: int = 0
    """With --views: steps that refine the poses that the encoder predicts."""

    BASIC = (
        *(
            "run",
            "images",
            "masks",
            "data",
            "views",
            "epipolar",
            "generation",
            "split",
            "num_fit_images",
            "ignore",
            "foreground",
        ),
        *("mask_threshold", "baselines", "device", "json", "debug"),
    )

    def execute(self) -> Result:
        """Score the run."""
        if self.epipolar:
            return self._check_epipolar()
        if self.generation:
            return self._score_generation()
        if self.views is not None:
            return self._score_views(self.views)
        if self.data is not None:
            return self._score_classes(self.data)
        if self.images is None or self.masks is None:
            raise ConfigError("nothing to score with: give --images and --masks, --data, or --views for a nerfdiff run")
        from factorkit.report.html import check_report
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.segdiff.verdict import REPORT, write_report
        from factorkit.utils import distributed

        check_report(self.run)
        run = SegdiffRun.load(self.run, device=self.device)
        scores = run.evaluate(
            self.images,
            self.masks,
            num_fit_images=self.num_fit_images,
            ignore=self.ignore,
            foreground=self.foreground or None,
            mask_threshold=self.mask_threshold,
            baselines=self.baselines,
            t=self.t,
            size=self.size,
            quality=self.quality,
            nesting=self.nesting or None,
        )
        if (folder := run.folder) is not None:
            distributed.run_on_first(lambda: write_report(folder))
        return _add_verdict(folder, REPORT, scores, format_scores(scores))

    def _score_views(self, path: Path) -> Result:
        import time

        from factorkit.data.views.open import open_views
        from factorkit.nerfdiff.run import NerfdiffRun
        from factorkit.nerfdiff.verdict import REPORT, write_report
        from factorkit.report.html import check_report
        from factorkit.utils import distributed

        if self.split not in (None, "train", "test"):
            raise ConfigError(f"--split {self.split}: views have the splits train and test")
        check_report(self.run)
        start, run = time.perf_counter(), NerfdiffRun.load(self.run, device=self.device)
        split = cast(Literal["train", "test"] | None, self.split)
        background, layout = run.model.background.tolist(), run.scene["layout"]
        views = open_views(path, split, max(run.model.size), background, layout=layout)
        scores = run.evaluate(views, refine=self.refine)
        if (folder := run.folder) is not None:
            distributed.run_on_first(lambda: write_report(folder))
        scores["seconds"] = time.perf_counter() - start
        return _add_verdict(folder, REPORT, scores, format_pose_scores(scores))

    def _score_generation(self) -> Result:
        from factorkit.report.html import check_report
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.segdiff.verdict import REPORT, write_report
        from factorkit.utils import distributed

        if self.images is None:
            raise ConfigError("--generation compares drawn images with photos: give them by --images")
        check_report(self.run)
        run = SegdiffRun.load(self.run, device=self.device)
        plain = None if self.ddpm is None else SegdiffRun.load(self.ddpm, device=self.device)
        if plain is not None and plain.config.num_leaf_regions > 1:
            raise ConfigError(f"--ddpm {self.ddpm} has regions={plain.config.regions}; give a run with regions=1")
        if plain is not None and plain.config.resolution != run.config.resolution:
            sizes = f"{plain.config.resolution} and {run.config.resolution}"
            raise ConfigError(
                f"--ddpm {self.ddpm}: images of {sizes} pixels do not compare; give runs of one resolution"
            )
        factor = max(each.config.latent_factor for each in (run, plain) if each is not None)
        scores = run.evaluate_generation(self.images, latent_factor=factor)
        if plain is not None:
            scores["ddpm"] = plain.evaluate_generation(self.images, latent_factor=factor)
        elif run.folder is not None and run.config.num_leaf_regions > 1:
            scores |= _advise_ddpm(run, run.folder, self.images)
        for scored in (run, plain):
            if scored is not None and (folder := scored.folder) is not None:
                distributed.run_on_first(partial(write_report, folder))
        return _add_verdict(run.folder, REPORT, scores, format_generation(scores))

    def _check_epipolar(self) -> Result:
        from factorkit.nerfdiff.run import NerfdiffRun
        from factorkit.nerfdiff.verdict import REPORT
        from factorkit.report.content import describe_check
        from factorkit.report.html import check_report

        check_report(self.run)
        run = NerfdiffRun.load(self.run, device=self.device)
        result = run.check_epipolar(self.data, progress=not self.json)
        lines = [f"{describe_check(result.check.to_dict())}."]
        if result.median is not None:
            within = f"median distance to the epipolar lines: {result.median:.2f} px, {result.near:.0%} within 2 px"
            lines.append(f"{within}; worst pairs of views:")
            for pair in result.pairs[:3]:
                first, second = pair["views"]
                lines.append(f"  {first} and {second}: {pair['share']:.0%} of {pair['matches']}")
        scores = {
            "share": result.check.value,
            "within_2_px": result.near,
            "median": result.median,
            "pairs": result.pairs,
        }
        return _add_verdict(run.folder, REPORT, scores, "\n".join(lines))

    def _score_classes(self, data: Path) -> Result:
        from factorkit.segdiff.run import SegdiffRun

        label_map = None if self.label_map is None else _read_label_map(self.label_map)
        scores = SegdiffRun.load(self.run, device=self.device).evaluate_zero_shot(
            data,
            num_fit_images=self.num_fit_images,
            t=self.t,
            quality=self.quality,
            mask_set=self.mask_set,
            split=self.split or "val",
            label_map=label_map,
        )
        lines = [f"{'class':<20} {'label':<20} {'images':>6} {'Acc':>6} {'IoU':>6} {'mIoU':>6}"]
        for name, of_class in scores["classes"].items():
            numbers = " ".join(f"{of_class[key]:6.3f}" for key in ("acc", "iou", "miou"))
            lines.append(f"{name:<20} {of_class['label'] or '-':<20} {of_class['images']:6} {numbers}")
        lines.append(f"{'mean':<48} " + " ".join(f"{scores[key]:6.3f}" for key in ("acc", "iou", "miou")))
        if scores["missing"]:
            lines.append("too few images to score: " + ", ".join(scores["missing"]))
        return scores, "\n".join(lines)


def _advise_ddpm(run: SegdiffRun, folder: Path, photos: Path) -> dict[str, Any]:
    """Return the command that trains a plain DDPM for as long as the run, its folder, and the seconds of its steps.

    It trains on the images of the run: ``photos`` if these are the same, else the user has to say where they are, and
    ``ddpm_data`` names them.
    """
    from factorkit.engine.run_folder import read_settings
    from factorkit.segdiff.equal_compute import choose_plain_ddpm
    from factorkit.segdiff.training_images import is_training_data

    choice = choose_plain_ddpm(run, folder)
    if choice is None:
        return {}
    settings, seconds = choice
    data: dict[str, Any] = read_settings(folder).get("data", {})
    name, advice = str(data.get("name")), {}
    if not name.startswith("procedural "):
        names = photos.resolve().name, photos.resolve().parent.name
        path = photos.parent if names[1] == name != names[0] else photos  # of PHOTOS/images
        known = is_training_data(path, data, run.config)
        settings["data"] = path if known else TRAINING_PHOTOS
        if not known:
            count = f" ({format_count(data['images'], 'image')})" if "images" in data else ""
            advice = {"ddpm_data": f"the photos that the run was trained on, {name}{count}"}
    settings["out"] = sibling(folder, "_plain")
    words = ["factorkit", "train", "segdiff"]
    for option, value in settings.items():
        words.append(f"--{'no-' if value is False else ''}{option.replace('_', '-')}")
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, tuple) else [value])
    return advice | {"ddpm_command": shlex.join(words), "ddpm_out": str(settings["out"]), "ddpm_seconds": seconds}


def _add_verdict(folder: Path | None, content: ReportContent, scores: dict[str, Any], text: str) -> Result:
    """Add the verdict on the run, and which checks ran; a checkpoint outside a run folder has no log of them."""
    if folder is None:
        return scores, f"{text}\n\nNo verdict: this is no run folder, so there is no log of checks."
    judgement, lines = judge_run(folder, content)
    return scores | judgement, "\n".join([text, "", *lines])


def judge_run(folder: Path, content: ReportContent) -> tuple[dict[str, Any], list[str]]:
    """Return the verdict on a run for --json, and in lines: the headline, which checks ran, and which did not."""
    from factorkit.report.content import judged_alarms, read_checks
    from factorkit.report.html import read_verdict
    from factorkit.utils.files import read_log

    verdict, log = read_verdict(folder, content), read_log(folder)
    data = {"failures": judged_alarms(log)[1], "verdict": verdict.headline, "status": verdict.status}
    return data | {"checks": read_checks(log)}, [f"{verdict.headline}.", *verdict.details]


def _read_label_map(path: Path) -> dict[str, Any]:
    from factorkit.utils.files import read_json

    try:
        label_map = read_json(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(label_map, dict):
        raise ConfigError(f'{path}: give an object of classes, such as {{"dog": "Maltese dog"}}')
    return label_map
