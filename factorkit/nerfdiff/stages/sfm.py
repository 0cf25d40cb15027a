"""Structure from motion by COLMAP (Schönberger and Frahm 2016): cameras of overlapping, textured images.

Features, matches and the model lie in a database, so that an interrupted run repeats only what is missing. Nothing
depends on the number of threads: images have fixed numbers, and every random choice its own seed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from factorkit.data.files import format_examples
from factorkit.engine.run_folder import read_object, write_json
from factorkit.nerfdiff.stages.feature_images import FeatureImage
from factorkit.utils.errors import ConfigError, DataError, format_count

VERSION = 1  # of this procedure, part of the key of stored results
MAX_FEATURES = 4096  # of each image; more cost time in matching and register no more
MAX_EXHAUSTIVE = 100  # images, from which on only some pairs are compared
NEIGHBOURS = 10  # frames before each frame that it is compared with; and every 10th frame with every other 10th
PAIRS_PER_BLOCK = 64  # matched before they are stored
SIMILAR = 20  # most similar images that each of many images in no order is compared with
SIMILARITY_SIDE = 16  # pixels of the images whose difference says how similar they are
DATABASE, MODEL, RESULT = "database.db", "sparse/0", "sfm.json"


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
    """

    registered: tuple[str, ...]
    unregistered: tuple[str, ...]
    model: Path | None
    reason: str = ""
    points: int = 0
    error: float = 0.0
    other_models: tuple[int, ...] = ()

    @property
    def share(self) -> float:
        """Share of the images with a camera."""
        return len(self.registered) / max(1, len(self.registered) + len(self.unregistered))

    def describe(self) -> str:
        """Return sentences on what was registered."""
        total = len(self.registered) + len(self.unregistered)
        if self.model is None:
            return f"Structure from motion registered none of {format_count(total, 'image')}: {self.reason}."
        text = (
            f"Structure from motion registered {len(self.registered)} of {format_count(total, 'image')}, with "
            f"{format_count(self.points, 'point')} and an error of {self.error:.2f} pixels."
        )
        if self.unregistered:
            text += f" Not registered, and left out of the training: {format_examples(self.unregistered)}."
        if self.other_models:
            sizes = ", ".join(map(str, self.other_models))
            text += f" Not used: {format_count(len(self.other_models), 'separate model')} of {sizes} images."
        return text


def import_pycolmap() -> ModuleType:
    """Return pycolmap.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise ConfigError(
            'search="sfm" needs pycolmap: pip install "factorkit[sfm]", or use search="dictionary"'
        ) from error
    pycolmap.logging.minloglevel = 2  # errors; COLMAP logs every step
    return pycolmap


def find_cameras(images: Sequence[FeatureImage], folder: Path, ordered: bool, progress: bool) -> SfmResult:
    """Find the cameras of images; what an earlier call with the same images left in the folder is used.

    Args:
        images: in their order.
        folder: of this stage; it is replaced if it holds the result of other images.
        ordered: whether the images are frames of a video or a walk: then neighbours are compared, and every tenth
            frame with every other tenth, which finds closed loops.
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
    _write_images(colmap, database, images)
    _extract_features(colmap, database, images, progress)
    _match_images(colmap, database, _choose_pairs(images, ordered), progress)
    result = _map_images(colmap, database, folder, images, progress)
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
    if values is None or (values["model"] is not None and not (folder / MODEL / "images.bin").is_file()):
        return None
    lists = {name: tuple(values[name]) for name in ("registered", "unregistered", "other_models")}
    return SfmResult(**(values | lists | {"model": None if values["model"] is None else folder / MODEL}))


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


def _name(index: int) -> str:
    """Return the name of an image in the database, whose lists of pairs have names without spaces."""
    return f"{index:06d}"


@contextmanager
def _opened(colmap: ModuleType, path: Path) -> Iterator[Any]:
    database = colmap.Database.open(path)
    try:
        yield database
    finally:
        database.close()


def make_camera(colmap: ModuleType, image: FeatureImage, number: int) -> Any:
    """Return COLMAP's camera of an image: one focal length and one radial term to be found, or the exact intrinsics."""
    (height, width), k = image.pixels.shape, image.intrinsics
    model = "PINHOLE" if image.focal == "exact" else "SIMPLE_RADIAL"
    camera = colmap.Camera.create_from_model_name(number, model, float(k[0, 0]), width, height)
    if image.focal == "exact":
        camera.params = [k[0, 0], k[1, 1], k[0, 2], k[1, 2]]
    camera.has_prior_focal_length = image.focal != "unknown"
    return camera


def _write_images(colmap: ModuleType, path: Path, images: Sequence[FeatureImage]) -> None:
    """Write cameras and images to a new database; images of one size and focal length have one camera."""
    with _opened(colmap, path) as database:
        if database.num_images() == len(images):
            return
        database.clear_all_tables()
        with colmap.DatabaseTransaction(database):
            numbers: dict[tuple[object, ...], int] = {}
            for i, image in enumerate(images):
                number = numbers.setdefault(image.camera_key, len(numbers) + 1)
                if not database.exists_camera(number):
                    camera = make_camera(colmap, image, number)
                    database.write_camera(camera, True)
                    rig = colmap.Rig(rig_id=number)
                    rig.add_ref_sensor(camera.sensor_id)
                    database.write_rig(rig, True)
                entry = colmap.Image(name=_name(i), camera_id=number, image_id=i + 1)
                database.write_image(entry, True)
                frame = colmap.Frame(frame_id=i + 1, rig_id=number)
                frame.add_data_id(entry.data_id)
                database.write_frame(frame, True)


class FeatureExtractor:
    """SIFT features (Lowe 2004) on the CPU."""

    def __init__(self, colmap: ModuleType) -> None:
        self.colmap = colmap
        options = colmap.FeatureExtractionOptions(use_gpu=False, num_threads=1)
        options.sift.max_num_features = MAX_FEATURES
        self.extractor = colmap.FeatureExtractor.create(options, colmap.Device.cpu)

    def __call__(self, image: FeatureImage) -> tuple[np.ndarray, Any]:
        """Return keypoints float32 [F, 4 or 6] and descriptors of an image, outside of masked parts."""
        keypoints, descriptors = self.extractor.extract_from_uint8_array(image.pixels)
        values = self.colmap.keypoints_to_matrix(keypoints)
        if image.mask is None or not len(values):
            return values, descriptors
        height, width = image.mask.shape
        columns, rows = values[:, 0].astype(int).clip(0, width - 1), values[:, 1].astype(int).clip(0, height - 1)
        kept = image.mask[rows, columns]
        data = np.ascontiguousarray(descriptors.data[kept])
        return values[kept], self.colmap.FeatureDescriptors(type=descriptors.type, data=data)


def _extract_features(colmap: ModuleType, path: Path, images: Sequence[FeatureImage], progress: bool) -> None:
    extract = FeatureExtractor(colmap)
    with _opened(colmap, path) as database:
        for i in tqdm(range(len(images)), desc="sfm: features", disable=not progress, leave=False):
            if not database.exists_descriptors(i + 1):
                keypoints, descriptors = extract(images[i])
                with colmap.DatabaseTransaction(database):
                    database.write_keypoints(i + 1, keypoints)
                    database.write_descriptors(i + 1, descriptors)


def _choose_pairs(images: Sequence[FeatureImage], ordered: bool) -> list[tuple[int, int]]:
    """Return pairs of indices to compare: all, or of many images or frames those that probably overlap."""
    count = len(images)
    if count < MAX_EXHAUSTIVE and not ordered:
        return [(i, j) for j in range(count) for i in range(j)]
    pairs = {(i, j) for j in range(count) for i in range(max(0, j - NEIGHBOURS), j)}
    pairs |= {(i, j) for j in range(0, count, NEIGHBOURS) for i in range(0, j, NEIGHBOURS)}
    if not ordered:
        for i, row in enumerate(np.argsort(differences(images), axis=1, kind="stable")[:, :SIMILAR].tolist()):
            pairs |= {(min(i, j), max(i, j)) for j in row if i != j}
    return sorted(pairs, key=lambda pair: pair[::-1])


def differences(images: Sequence[FeatureImage]) -> np.ndarray:
    """Return how much images differ at a small size, [V, V]; infinity on the diagonal."""
    import torch

    from factorkit.data.views.views import resize_area

    side = SIMILARITY_SIDE
    small = torch.stack([resize_area(torch.from_numpy(x.pixels).float(), side, side).flatten() for x in images])
    distances: np.ndarray = torch.cdist(small, small).fill_diagonal_(torch.inf).numpy()
    return distances


def geometry_options(colmap: ModuleType) -> Any:
    """Return the options of the geometric verification of matches."""
    options = colmap.TwoViewGeometryOptions()
    options.ransac.random_seed = 0
    return options


def _match_images(colmap: ModuleType, path: Path, pairs: Sequence[tuple[int, int]], progress: bool) -> None:
    """Match the features of pairs of images and check each pair's geometry; pairs in the database are skipped."""
    matching = colmap.FeatureMatchingOptions(use_gpu=False, num_threads=_num_threads())
    listing = path.with_name("pairs.txt")
    with tqdm(total=len(pairs), desc="sfm: matches", disable=not progress, leave=False) as bar:
        for start in range(0, len(pairs), PAIRS_PER_BLOCK):
            block = pairs[start : start + PAIRS_PER_BLOCK]
            listing.write_text("".join(f"{_name(i)} {_name(j)}\n" for i, j in block))
            pairing = colmap.ImportedPairingOptions(match_list_path=listing)
            colmap.match_image_pairs(path, matching, pairing, geometry_options(colmap), colmap.Device.cpu)
            bar.update(len(block))
    listing.unlink(missing_ok=True)


def _num_threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map_images(
    colmap: ModuleType, path: Path, folder: Path, images: Sequence[FeatureImage], progress: bool
) -> SfmResult:
    """Register one image after another; write the largest model with the names of the views."""
    with _opened(colmap, path) as database:
        exact = {x.camera_id for x in database.read_all_cameras() if x.model_name == "PINHOLE"}
        reason = _explain_no_model(colmap, database)
    options = colmap.IncrementalPipelineOptions(
        num_threads=1, random_seed=0, extract_colors=False, constant_cameras=exact
    )
    # sums of several threads depend on their order
    options.mapper.num_threads = 1
    options.mapper.random_seed = options.triangulation.random_seed = 0
    options.mapper.constant_cameras = exact
    work = folder / "models"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with tqdm(total=len(images), desc="sfm: cameras", disable=not progress, leave=False) as bar:
        found = colmap.incremental_mapping(path, folder, work, options, next_image_callback=bar.update)
    shutil.rmtree(work)
    models = sorted(found.values(), key=lambda model: (-model.num_reg_images(), -model.num_points3D()))
    names = [image.name for image in images]
    if not models:
        return SfmResult((), tuple(names), None, reason)
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
    )


def _explain_no_model(colmap: ModuleType, database: Any) -> str:
    """Return why no model might be found, from the geometry of the pairs."""
    kinds = colmap.TwoViewGeometryConfiguration
    geometries = [x for x in database.read_two_view_geometries()[1] if len(x.inlier_matches)]
    if not geometries:
        return "no two images show enough of the same texture"
    rotations = {int(kinds.PANORAMIC), int(kinds.PLANAR_OR_PANORAMIC)}
    if sum(int(x.config) in rotations for x in geometries) > len(geometries) / 2:
        return "the camera turned on the spot, or the scene is flat: there is no parallax"
    return f"{format_count(len(geometries), 'pair')} of images match, but too weakly or from too near each other"
