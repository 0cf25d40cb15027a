"""Structure from motion: cameras of overlapping, textured images (COLMAP, Schönberger and Frahm 2016; GLOMAP).

Features, matches and the model lie in a database, so that an interrupted run repeats only what is missing. Nothing
depends on the number of threads.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from factorkit.data.files import MAX_EXAMPLES, format_examples
from factorkit.engine.run_folder import read_object, write_json
from factorkit.nerfdiff.stages.feature_images import FeatureImage
from factorkit.nerfdiff.stages.matches import (
    MAX_EXHAUSTIVE,
    MAX_FEATURES,
    MIN_PAIR_MATCHES,
    NEIGHBOURS,
    SIMILAR,
    choose_pairs,
    drop_still_matches,
    extract_features,
    import_pycolmap,
    is_still,
    match_images,
    measure_parallax,
    opened,
    write_images,
)
from factorkit.utils.errors import CheckpointError, DataError, format_count

VERSION = 4  # of this procedure, part of the key of stored results
DATABASE, MODEL, RESULT = "database.db", "sparse/0", "sfm.json"
# Points that half of a model's images must see; cameras that turn on the spot have 0 to 13 by chance, others hundreds.
MIN_IMAGE_POINTS = 20
# Cameras on the spot had 0.009 at most, a wall from an arc of 12 degrees 0.06, 72 frames of it 0.05 (docs/captures.md).
MIN_PARALLAX = 0.02


@dataclass(frozen=True)
class SfmResult:
    """Cameras by structure from motion.

    Attributes:
        registered: names of the images with a camera.
        unregistered: names of the others.
        model: folder of the COLMAP model; None: no images could be registered.
        reason: why there is no model; "" if there is one.
        points: number of points.
        error: mean distance in pixels between points and features.
        other_models: number of images of the other models, which share no points with the largest.
        still_pairs: how many pairs of images have most matches at the same place, and how many match at all.
        plain: names of the images with hardly any features.
        focal_from: what unknown focal lengths were found from; "": none was unknown.
    """

    registered: tuple[str, ...]
    unregistered: tuple[str, ...]
    model: Path | None
    reason: str = ""
    points: int = 0
    error: float = 0.0
    other_models: tuple[int, ...] = ()
    still_pairs: tuple[int, int] = (0, 0)
    plain: tuple[str, ...] = ()
    focal_from: str = ""

    @property
    def share(self) -> float:
        """Share of the images with a camera."""
        return len(self.registered) / max(1, len(self.registered) + len(self.unregistered))

    def describe(self, limit: int = MAX_EXAMPLES) -> list[str]:
        """Return sentences on what was registered, with the names of ``limit`` images that were not."""
        total, still = len(self.registered) + len(self.unregistered), []
        if is_still(*self.still_pairs):
            still = [
                f"In {self.still_pairs[0]} of {format_count(self.still_pairs[1], 'pair')} of images most matches do "
                "not move: the background does not move while the object turns, or images are equal. These matches are "
                "left out; give masks of the object, since such a background is no part of the scene."
            ]
        if self.model is None:
            text = f"Structure from motion registered none of {format_count(total, 'image')}: {self.reason}."
            return [*still, text + self._describe_plain(limit)]
        text = (
            f"Structure from motion registered {len(self.registered)} of {format_count(total, 'image')}, with "
            f"{format_count(self.points, 'point')} and an error of {self.error:.2f} pixels."
        )
        if self.unregistered:
            text += f" Not registered, and left out of the training: {format_examples(self.unregistered, limit)}."
            text += self._describe_plain(limit)
        if self.other_models:
            sizes = ", ".join(map(str, self.other_models))
            text += f" Not used: {format_count(len(self.other_models), 'separate model')} of {sizes} images."
        if self.focal_from:
            text += f" Unknown focal lengths were found from {self.focal_from}."
        return [*still, text]

    def _describe_plain(self, limit: int) -> str:
        if not self.plain:
            return ""
        count = format_count(len(self.plain), "image")
        return (
            f" {count} {'has' if len(self.plain) == 1 else 'have'} fewer than {MIN_PAIR_MATCHES} features, by masks, "
            f"blur or lack of texture: {format_examples(self.plain, limit)}."
        )


def find_cameras(images: Sequence[FeatureImage], folder: Path, ordered: bool, progress: bool) -> SfmResult:
    """Find the cameras of images; what an earlier call with the same images left in the folder is used.

    Args:
        images: in their order.
        folder: of this stage; it is replaced if it holds the result of other images.
        ordered: whether the images are frames of a video or a walk, see :func:`choose_pairs`.
        progress: show progress bars.

    Raises:
        ConfigError: pycolmap is not installed.
        DataError: fewer than two images.
    """
    if len(images) < 2:
        raise DataError(f"{format_count(len(images), 'image')}: structure from motion needs at least 2")
    colmap = import_pycolmap()
    key = _key(images, ordered, colmap.__version__)
    if (result := _load(folder, key)) is not None:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULT, {"key": key})
    database = folder / DATABASE
    write_images(colmap, database, images)
    extract_features(colmap, database, images, progress)
    match_images(colmap, database, choose_pairs(images, ordered), progress)
    still_pairs = drop_still_matches(colmap, database, images, ordered)
    result = replace(_map_images(colmap, database, folder, images, ordered, progress), still_pairs=still_pairs)
    values = asdict(result) | {"model": None if result.model is None else MODEL}
    write_json(folder / RESULT, {"key": key, "result": values})
    database.unlink(missing_ok=True)
    return result


def load_result(folder: Path) -> SfmResult | None:
    """Load a finished result from the folder of this stage; None if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    values = read_object(folder / RESULT).get("result") if (folder / RESULT).is_file() else None
    try:
        if values is None or (values["model"] is not None and not (folder / MODEL / "images.bin").is_file()):
            return None
        names = ("registered", "unregistered", "other_models", "still_pairs", "plain")
        lists = {name: tuple(values.get(name, ())) for name in names}
        return SfmResult(**(values | lists | {"model": None if values["model"] is None else folder / MODEL}))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / RESULT} cannot be read: {error!r}. Restore it, or delete it") from error


def _load(folder: Path, key: str) -> SfmResult | None:
    """Return the stored result of the same images; remove what is there of others."""
    if (folder / RESULT).is_file() and read_object(folder / RESULT).get("key") == key:
        return load_result(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _key(images: Sequence[FeatureImage], ordered: bool, version: str) -> str:
    settings = repr((VERSION, version, MAX_FEATURES, MAX_EXHAUSTIVE, NEIGHBOURS, SIMILAR, ordered))
    parts = hashlib.sha256(settings.encode())
    for image in images:
        parts.update(image.digest())
    return parts.hexdigest()


def _map_images(
    colmap: ModuleType, path: Path, folder: Path, images: Sequence[FeatureImage], ordered: bool, progress: bool
) -> SfmResult:
    """Find all cameras at once (GLOMAP, Pan et al. 2024); write the largest model with the names of the views.

    Registering one image after another found 43 of Lego's 100 cameras where this finds 97, and no ring of cameras.
    """
    with opened(colmap, path) as database:
        cameras = database.read_all_cameras()
        parallax = measure_parallax(colmap, database, images, ordered)
        reason = _explain_no_model(database, parallax)
        plain = [x.name for i, x in enumerate(images) if database.num_keypoints_for_image(i + 1) < MIN_PAIR_MATCHES]
    names = [image.name for image in images]
    if parallax is not None and parallax < MIN_PARALLAX:  # COLMAP would invent positions
        return SfmResult((), tuple(names), None, reason, plain=tuple(plain))
    # sums of several threads depend on their order
    options = colmap.GlobalPipelineOptions(num_threads=1, random_seed=0)
    mapper = options.mapper
    mapper.num_threads = mapper.bundle_adjustment.ceres.solver_options.num_threads = 1
    for part in (mapper, mapper.rotation_averaging, mapper.global_positioning, mapper.retriangulation):
        part.random_seed = 0
    mapper.global_positioning.use_gpu = mapper.bundle_adjustment.ceres.use_gpu = False
    if all(camera.model_name == "PINHOLE" for camera in cameras):
        mapper.bundle_adjustment.refine_focal_length = mapper.bundle_adjustment.refine_extra_params = False
    work = folder / "models"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    starts = _list_starts(colmap, path, work, cameras)
    runs: dict[str, list[Any]] = {}
    # without a bar: COLMAP reports nothing in between
    line = f"sfm: cameras of {format_count(len(images), 'image')}, all at once"
    with tqdm(desc=line, bar_format="{desc}", disable=not progress, leave=False):
        for name, database_path in starts.items():
            mapped = colmap.global_mapping(database_path, folder, work, options).values()
            models = [model for model in mapped if _median_points(model) >= MIN_IMAGE_POINTS]
            models.sort(key=lambda model: (-model.num_reg_images(), -model.num_points3D()))
            runs[name] = models
    shutil.rmtree(work)
    start = min(filter(runs.get, runs), key=lambda name: _rank_run(runs[name]), default="")
    models = runs.get(start, [])
    if not models:
        return SfmResult((), tuple(names), None, reason, plain=tuple(plain))
    largest = models[0]
    for number, entry in largest.images.items():
        entry.name = names[number - 1]
    registered = {largest.image(number).name for number in largest.reg_image_ids()}
    target = folder / MODEL
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    largest.write_binary(target)
    return SfmResult(
        tuple(name for name in names if name in registered),
        tuple(name for name in names if name not in registered),
        target,
        points=largest.num_points3D(),
        error=largest.compute_mean_reprojection_error(),
        other_models=tuple(model.num_reg_images() for model in models[1:]),
        plain=tuple(name for name in plain if name not in registered),
        focal_from=start,
    )


def _list_starts(colmap: ModuleType, path: Path, work: Path, cameras: Sequence[Any]) -> dict[str, Path]:
    """Return the database, and where focal lengths are unknown a copy with ones that suit the pairs (GLOMAP).

    Keys say where unknown focal lengths come from; "" where none is unknown.

    A wrong guess bends the poses of the pairs, of which all others are made: of four turntables with an unknown focal
    length one had a seventh of its cameras wrong. But pairs of few or similar views give wrong focal lengths too.
    The database itself stays as it is: an interrupted call starts from the same guesses.
    """
    if all(camera.has_prior_focal_length for camera in cameras):
        return {"": path}
    starts, calibrated = {"guesses": path}, work / DATABASE
    shutil.copyfile(path, calibrated)
    options = colmap.ViewGraphCalibrationOptions(random_seed=0)
    if colmap.calibrate_view_graph(calibrated, options):
        starts["the pairs of images"] = calibrated
    return starts


def _rank_run(models: Sequence[Any]) -> tuple[int, float]:
    """Return what is lower for the better of two mappings, by its largest model."""
    return -models[0].num_reg_images(), models[0].compute_mean_reprojection_error()


def _median_points(model: Any) -> float:
    """Return how many points half of the images of a model see at least: without parallax, hardly any."""
    return float(np.median([model.image(number).num_points3D for number in model.reg_image_ids()]))


def _explain_no_model(database: Any, parallax: float | None) -> str:
    """Return why no model might be found, from the geometry of the pairs."""
    geometries = [x for x in database.read_two_view_geometries()[1] if len(x.inlier_matches)]
    if not geometries:
        return "no two images show enough of the same texture"
    if parallax is not None:
        return "the camera turned on the spot, or the scene is flat: there is no parallax"
    return f"{format_count(len(geometries), 'pair')} of images match, but too weakly or from too near each other"
