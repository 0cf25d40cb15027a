"""Object masks of views by a segdiff model that is trained on these very views: ``masks="segdiff"`` of a scene."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from factorkit.data.files import format_examples
from factorkit.data.sources import PillowSource
from factorkit.data.views.foreground import common_folder
from factorkit.data.views.loading import LazyView
from factorkit.data.views.open import list_views
from factorkit.data.views.views import Views, resize_area
from factorkit.engine.run_folder import read_object, write_json
from factorkit.nerfdiff import train as nerfdiff
from factorkit.nerfdiff.mask_checks import COMPARED_SIDE, HELP, MIN_SHARED_COLORS, check_object_masks, shrink
from factorkit.nerfdiff.run import NerfdiffRun
from factorkit.nerfdiff.verdict import MASK_FAILURES, log_alarms
from factorkit.report.content import Check, Record, judged_alarms, log_checks, read_checks
from factorkit.segdiff import train as segdiff
from factorkit.segdiff.alarms import MEAN_MASK, OWN_MEAN
from factorkit.segdiff.inference.cutout_region import choose_cutout_region
from factorkit.segdiff.masks.cosegment import cosegment
from factorkit.segdiff.masks.objects import resize, scale_lab
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils import distributed
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_log, save_image, sibling
from factorkit.utils.images import images_to_pixels, pixels_to_signed, unit_to_uint8

SEGDIFF = "segdiff"  # the value of masks=
#: The stages find the objects; the denoising that follows them does not change the masks.
SETTINGS: dict[str, Any] = {
    "preset": "fast64",
    "masks": "auto",
    "regions": 2,
    "distil_steps": 300,
    "steps": 1,
    "warmup_steps": 0,
}
MAX_TRAINING_SIDE = 256  # pixels of the longer side of the images that segdiff is trained on
OBJECT_SHARES = (0.01, 0.9)  # of the pixels; masks beyond them show no object
MIN_STILL_VIEWS = 8  # that show a background in turn
BACKGROUND_CANDIDATES, MAX_COMPARED_VIEWS = 24, 100  # views whose colours may be the background's, and that confirm it
STILL_TOLERANCE = 12  # of 255, by which a background that does not move differs at most
MIN_STILL_BORDER = 0.9  # share of the border's pixels that must stand still, or have one colour
MASK_FOLDER, RECORD = "masks", "object_masks.json"  # in the folder of the segdiff run


def train_nerfdiff(
    data: Any = None,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    progress: bool = True,
    masks: Any = None,
    **options: Any,
) -> NerfdiffRun:
    """Find the cameras and the scene of views; the same call again resumes, exactly.

    Args:
        data: views, see :func:`factorkit.nerfdiff.train.train_nerfdiff`.
        out: the run folder; None: ``runs/nerfdiff-<preset>``.
        preset: see :data:`factorkit.nerfdiff.config.PRESETS`; None: ``"demo"`` without data, else ``"fast"``.
        progress: show progress bars.
        masks: foreground masks, see :func:`factorkit.data.views.open.open_views`; or "segdiff": of the object in each
            view, by a model that is trained on the views first, in the folder ``<out>_masks``.
        **options: of :func:`factorkit.nerfdiff.train.train_nerfdiff`: ``layout``, ``loss_masks``, ``fov``, ``box`` and
            every field of :class:`~factorkit.nerfdiff.config.NerfdiffConfig`.

    Returns:
        The finished run: predict_pose, reconstruct, render_path, sample, evaluate, save.

    Raises:
        ConfigError: a setting or combination that cannot work.
        DataError: no usable views.
        CheckpointError: the folder holds another run (other settings, images or cameras), or a checkpoint cannot be
            written or read.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once a checkpoint is written.

    Example:
        >>> from factorkit.data import make_procedural_views
        >>> views = make_procedural_views(10, 8, seed=1)    # ten images of 8 x 8 pixels, with true poses
        >>> tiny = {"resolution": 8, "num_candidates": 3, "num_azimuths": 6, "num_elevations": 2, "flip_rounds": 0}
        >>> tiny |= {"search_grid_resolution": 6, "grid_resolution": 8, "samples_per_ray": 6, "encoder_resolution": 8}
        >>> tiny |= {"model_channels": 8, "channel_mult": (1, 2), "num_rendered_views": 4, "batch_size": 4}
        >>> tiny |= {"search_steps": 4, "field_steps": 2, "steps": 2, "views_per_step": 3, "rays_per_view": 8}
        >>> scene = factorkit.train_nerfdiff(views, out="runs/scene", progress=False, **tiny)
        >>> scene.poses.shape
        torch.Size([10, 4, 4])
    """
    if data is None or not isinstance(masks, str) or masks != SEGDIFF:  # masks may be an array
        return nerfdiff.train_nerfdiff(data, out=out, preset=preset, progress=progress, masks=masks, **options)
    nerfdiff.check_options(data, preset, options)
    folder = nerfdiff.choose_folder(data, out, preset)
    made = sibling(folder, "_masks")
    data, masks = add_object_masks(data, made, options, progress)
    run = nerfdiff.train_nerfdiff(data, out=folder, preset=preset, progress=progress, masks=masks, **options)
    distributed.run_on_first(lambda: add_mask_checks(folder, judge_masks(made)))
    return run


def estimate(data: Any = None, *, masks: Any = None, **options: Any) -> dict[str, Any]:
    """Time a few steps of each stage; see :func:`factorkit.nerfdiff.train.estimate` for arguments and result."""
    if data is None or not isinstance(masks, str) or masks != SEGDIFF:  # masks may be an array
        return nerfdiff.estimate(data, masks=masks, **options)
    result = nerfdiff.estimate(data, masks=None if isinstance(data, Views) else "none", **options)
    seconds = segdiff.estimate(data, **SETTINGS)["stage_seconds"]
    note = (
        f'masks="{SEGDIFF}": a segdiff model is trained on the views first, for about {seconds:.0f} seconds. The other '
        "stages are timed without masks."
    )
    return result | {"notes": [note, *result["notes"]], "seconds": seconds + result["seconds"]}


def add_object_masks(data: Any, folder: Path, options: dict[str, Any], progress: bool) -> tuple[Any, Any]:
    """Make the masks of views; return data and ``masks=`` to train with.

    Args:
        data: see :func:`factorkit.data.views.open.open_views`.
        folder: for the segdiff run and the masks.
        options: of :func:`train_nerfdiff`.
        progress: show progress bars and what was done.

    Raises:
        DataError: no views, or data that can be read only once.
        CheckpointError: the folder holds another run, or cannot be written.
    """
    if isinstance(data, Iterator):
        raise DataError(f'masks="{SEGDIFF}" reads the images twice, but data= can be read only once: give a list')
    if isinstance(data, Views):
        files = [f"{i:06d}.png" for i in range(len(data))]
        target = make_object_masks([partial(images_to_pixels, image) for image in data.images], files, folder, progress)
        masks = np.stack([np.asarray(Image.open(target / file, formats=["PNG"])) for file in files])
        opacity = torch.from_numpy(masks)[:, None].float() / 255
        composited = torch.where(opacity > 0, data.images, 1.0)
        return replace(data, images=composited, masks=opacity, background=torch.ones(3)), None
    reading = {name: options[name] for name in ("layout", "fov") if name in options}
    listed, training = (list_views(data, split, masks="none", **reading) for split in (None, "train"))
    names, chosen = [view.name for view in listed.views], {view.name for view in training.views}
    start = len(common_folder(names)) if listed.arrangement is not None else 0
    files = [PurePosixPath(name[start:]).with_suffix(".png").as_posix() for name in names]
    images = [partial(_read_pixels, view) for view in listed.views]
    rows = [i for i, name in enumerate(names) if name in chosen]
    return data, str(make_object_masks(images, files, folder, progress, rows))


def make_object_masks(
    images: Sequence[Callable[[], np.ndarray]],
    files: Sequence[str],
    folder: Path,
    progress: bool,
    training: Sequence[int] | None = None,
) -> Path:
    """Train segdiff on views, and write the mask of the object in each; finished masks of the same images are kept.

    Collective.

    Args:
        images: functions that return the views, uint8 [H, W, 3].
        files: names of their masks.
        folder: of the segdiff run.
        progress: show progress bars and what was done.
        training: numbers of the views to train on; None: all.

    Returns:
        The folder of the masks.

    Raises:
        DataError: an image that cannot be decoded, or no object in any view.
        CheckpointError: the folder holds another run, or cannot be written.
    """
    with ThreadPoolExecutor() as pool:
        small = list(pool.map(_read_small, images))
    small, is_still = remove_still_background(small)
    run = segdiff.train_segdiff(
        [small[i] for i in training or range(len(small))], out=folder, progress=progress, **SETTINGS
    )
    digest = hashlib.sha256(repr((files, run.config.to_dict())).encode())
    for image in small:
        digest.update(image.tobytes())
    key, target = digest.hexdigest(), folder / MASK_FOLDER
    note = distributed.run_on_first(lambda: _write_masks(run, images, small, is_still, files, target, key, progress))
    if not distributed.rank():
        if progress:
            print(f"masks: {note}", file=sys.stderr)
        result = judge_masks(folder)
        if failures := result["failures"]:
            print(f"masks: probably not of one object: {'; '.join(failures)}. {HELP}", file=sys.stderr)
        elif progress:
            checked = ", ".join(check["name"] for check in result["checks"] if check["status"] == "passed")
            print(f"masks: no alarm went off, of: {checked or 'no check, since none ran'}", file=sys.stderr)
    return target


def judge_masks(folder: Path) -> Record:
    """Return the "checks" and "failures" of the masks in the folder of a segdiff run, and of the model that made them.

    None is decisive for a scene. Agreement with the mean mask is left out: an object may look alike from all sides.
    The model's own checks are left out where its masks were replaced.
    """
    log, made = read_log(folder), read_object(folder / RECORD)
    if made.get("cosegmented"):
        log = []
    model = [check for check in read_checks(log) if check.get("name") != MEAN_MASK]
    failures = [failure for failure in judged_alarms(log)[1] if not failure.endswith(OWN_MEAN)]
    checks = [check | {"decisive": False} for check in [*made["checks"], *model]]
    return {"checks": checks, "failures": [*made["failures"], *failures]}


def add_mask_checks(folder: Path, masks: Record) -> None:
    """Add the checks of object masks to the newest alarms of a nerfdiff run, once."""
    alarms, failures = judged_alarms(read_log(folder))
    if alarms is None or MASK_FAILURES in alarms:
        return
    named = [f"object masks, {failure}" for failure in masks["failures"]]
    checks = [check | {"name": f"object masks: {check['name']}"} for check in masks["checks"]]
    added = {"checks": [*alarms.get("checks", ()), *checks], "failures": [*failures, *named]}
    log_alarms(folder, alarms | added | {MASK_FAILURES: named})


def remove_still_background(images: Sequence[Image.Image]) -> tuple[list[Image.Image], bool]:
    """Paint a background that does not move in any image, behind an object that turns, in one colour.

    Returns:
        The images, and whether they were changed: not where the sizes differ, most of the border moves, or the
        background has one colour already.
    """
    result = list(images)
    if len(result) < MIN_STILL_VIEWS or len({image.size for image in result}) > 1:
        return result, False
    pixels = [np.asarray(image).astype(np.int16) for image in result]

    def choose_evenly(count: int) -> list[np.ndarray]:
        return [pixels[i] for i in np.unique(np.linspace(0, len(pixels) - 1, count).round().astype(int))]

    others, background = np.stack(choose_evenly(MAX_COMPARED_VIEWS)), pixels[0]
    most = np.zeros(background.shape[:2], int)
    for candidate in choose_evenly(BACKGROUND_CANDIDATES):  # the colour that most views have at a pixel
        count = (np.abs(others - candidate) <= STILL_TOLERANCE).all(-1).sum(0)
        background = np.where((count > most)[..., None], candidate, background)
        most = np.maximum(most, count)
    still = [(np.abs(view - background) <= STILL_TOLERANCE).all(-1) for view in pixels]
    on_border = np.ones(most.shape, bool)
    on_border[1:-1, 1:-1] = False
    border = background[on_border]
    is_plain = (np.abs(border - np.median(border, axis=0)) <= STILL_TOLERANCE).all(-1)
    if np.mean([s[on_border].mean() for s in still]) < MIN_STILL_BORDER or is_plain.mean() >= MIN_STILL_BORDER:
        return result, False
    still = list(connect_to_border(np.stack(still)))
    brightness = np.concatenate([view[~s] for view, s in zip(pixels, still, strict=True)]).mean()
    color = 255 if brightness < 128 else 0  # far from what moves
    painted = [np.where(s[..., None], color, view).astype(np.uint8) for view, s in zip(pixels, still, strict=True)]
    return [Image.fromarray(view) for view in painted], True


def connect_to_border(regions: np.ndarray) -> np.ndarray:
    """Return the parts of regions, bool [N, H, W], that are connected to the border of the image."""
    inside = np.pad(regions, ((0, 0), (1, 1), (1, 1)), constant_values=True)
    reached = np.zeros_like(inside)
    reached[:, [0, -1]] = reached[:, :, [0, -1]] = True
    count = 0
    while count != (count := int(reached.sum())):
        for axis in (1, 2):
            for step in (-1, 1):
                reached |= np.roll(reached, step, axis) & inside
    return reached[:, 1:-1, 1:-1]


def _write_masks(
    run: SegdiffRun,
    images: Sequence[Callable[[], np.ndarray]],
    small: Sequence[Image.Image],
    is_still: bool,
    files: Sequence[str],
    target: Path,
    key: str,
    progress: bool,
) -> str:
    """Write the masks unless those of the same key are there; return a sentence on them."""
    record = target.with_name(RECORD)
    if record.is_file() and (stored := read_object(record)).get("key") == key and "checks" in stored:
        return f"{stored['note']} Made before."
    predict = run.predictor(None, "fast")
    region, reason = choose_cutout_region(run.config, "auto", run.scores, PillowSource(small), predict)

    def segment(i: int, pixels: np.ndarray) -> torch.Tensor:
        return run.segment(small[i] if is_still else pixels).masks[0][list(region)].sum(0)

    shares, compared = _save_masks(images, files, target, segment, progress)
    checks = check_object_masks(*compared)
    if is_shared := bool(checks[0].failures):
        squares = [image.resize((COMPARED_SIDE, COMPARED_SIDE), Image.Resampling.BOX) for image in small]
        places = [resize_area(torch.from_numpy(mask).float(), COMPARED_SIDE, COMPARED_SIDE) for mask in compared[1]]
        colors = scale_lab(pixels_to_signed(torch.from_numpy(np.stack([np.asarray(image) for image in squares]))))
        objects = cosegment(colors, torch.stack(places))
        shares, compared = _save_masks(
            images, files, target, lambda i, pixels: resize(objects[i, None, None], *pixels.shape[:2])[0, 0], progress
        )
        value, (shared, *others) = checks[0].value, check_object_masks(*compared)
        if not shared.failures:
            shared = Check(shared.name, not_run="since the masks were made by the colours that views have in common")
        checks = [shared, *others]
    low, high = OBJECT_SHARES
    odd = [file for file, share in zip(files, shares, strict=True) if not low <= share <= high]
    if len(odd) == len(files):
        raise DataError(
            f'masks="{SEGDIFF}": no view has an object: the masks cover {min(shares):.0%} to {max(shares):.0%} of the '
            "pixels. Give masks of the object, or none"
        )
    note = (
        f"{format_count(len(files), 'mask')} in {target} by a segdiff model trained on these views; the object is "
        f"{reason}, and covers {min(shares):.0%} to {max(shares):.0%} of the pixels."
    )
    if is_still:
        note += " The background does not move in any view, and was painted in one colour before."
    if is_shared:
        note += (
            f" The model's masks followed the background of their views (shared colours {value:.2f} < "
            f"{MIN_SHARED_COLORS:g}), so the object was separated by the colours it has in the other views. Look at "
            "them: few checks can tell whether such masks are right."
        )
    if odd:
        note += f" Hardly an object in {format_count(len(odd), 'view')}: {format_examples(odd)}."
    write_json(record, {"key": key, "note": note, "cosegmented": is_shared, **log_checks(checks)})
    return note


def _save_masks(
    images: Sequence[Callable[[], np.ndarray]],
    files: Sequence[str],
    target: Path,
    segment: Callable[[int, np.ndarray], torch.Tensor],
    progress: bool,
) -> tuple[list[float], tuple[list[np.ndarray], list[np.ndarray]]]:
    """Write the mask of each view by ``segment(number, pixels)``; return the object's shares, small views and masks."""
    shares, views, masks = list[float](), list[np.ndarray](), list[np.ndarray]()
    for i, file in enumerate(tqdm(files, desc="object masks", disable=not progress, leave=False)):
        pixels = images[i]()
        inside = resize_area(segment(i, pixels), *pixels.shape[:2]) > 0.5
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        mask = Image.fromarray(unit_to_uint8(inside))
        save_image(mask, target / file)
        view, small = shrink(Image.fromarray(pixels), mask)
        views.append(view)
        masks.append(small)
        shares.append(float(inside.float().mean()))
    return shares, (views, masks)


def _read_pixels(view: LazyView) -> np.ndarray:
    """Return a view as uint8 [H, W, 3], over white where it is transparent."""
    values = view.read_image()
    if values.shape[2] == 4:
        values = values[..., :3] * values[..., 3:] + 1 - values[..., 3:]
    return unit_to_uint8(values)


def _read_small(read: Callable[[], np.ndarray]) -> Image.Image:
    image = Image.fromarray(read())
    image.thumbnail((MAX_TRAINING_SIDE, MAX_TRAINING_SIDE), Image.Resampling.BOX)
    return image
