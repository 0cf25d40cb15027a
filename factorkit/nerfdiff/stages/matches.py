"""Features and matches of images in a COLMAP database (Lowe 2004; Schönberger and Frahm 2016).

Nothing depends on the number of threads: images have fixed numbers, every random choice its own seed, and one thread
compares pairs, since COLMAP's threads rarely disagree: with two, 3 of 630 runs had other matches.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from factorkit.data.files import natural_order
from factorkit.nerfdiff.stages.feature_images import FeatureImage
from factorkit.utils.errors import ConfigError

Pair = TypeVar("Pair")
MAX_FEATURES = 4096  # of each image; more cost time in matching and register no more
MAX_EXHAUSTIVE = 100  # images, from which on only some pairs are compared
NEIGHBOURS = 10  # frames before each frame that it is compared with; and every 10th frame with every other 10th
PAIRS_PER_BLOCK = 64  # matched before they are stored
SIMILAR = 20  # most similar images that each of many images in no order is compared with
SIMILARITY_SIDE = 16  # pixels of the images whose difference says how similar they are
MIN_PAIR_MATCHES = 30  # from which on a pair of images counts as matching
STILL_DISTANCE = 2 / 512  # of the longer side, by which a match moves at least that is no part of a still background
FOCAL_FACTORS = np.geomspace(0.5, 2, 41)  # tried on focal lengths that may be guesses
MIN_DISTANT_PAIRS = 3  # of every tenth frame that match, from which on these alone are judged
MAX_STILL = 0.5  # share of a pair's matches, or of the pairs, beyond which they are still


def import_pycolmap() -> ModuleType:
    """Return pycolmap.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise ConfigError('pycolmap is missing: pip install "factorkit[sfm]", or give search="dictionary"') from error
    if not hasattr(pycolmap, "FeatureExtractor"):
        raise ConfigError(
            f'pycolmap {pycolmap.__version__} is too old: pip install "factorkit[sfm]", or give search="dictionary"'
        )
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # that of pycolmap prints a stack trace
    pycolmap.logging.minloglevel = 3  # fatal errors; COLMAP logs every step, and the results show what fails
    return pycolmap


def image_name(index: int) -> str:
    """Return the name of an image in the database, whose lists of pairs have names without spaces."""
    return f"{index:06d}"


@contextmanager
def opened(colmap: ModuleType, path: Path) -> Iterator[Any]:
    """Open a database, and close it after the block."""
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


def write_images(colmap: ModuleType, path: Path, images: Sequence[FeatureImage]) -> None:
    """Write cameras and images to a new database; images of one size and focal length have one camera."""
    with opened(colmap, path) as database:
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
                entry = colmap.Image(name=image_name(i), camera_id=number, image_id=i + 1)
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


def extract_features(colmap: ModuleType, path: Path, images: Sequence[FeatureImage], progress: bool) -> None:
    """Write the features of images; those in the database are kept."""
    extract = FeatureExtractor(colmap)
    with opened(colmap, path) as database:
        for i in tqdm(range(len(images)), desc="sfm: features", disable=not progress, leave=False):
            if not database.exists_descriptors(i + 1):
                keypoints, descriptors = extract(images[i])
                with colmap.DatabaseTransaction(database):
                    database.write_keypoints(i + 1, keypoints)
                    database.write_descriptors(i + 1, descriptors)


def choose_pairs(images: Sequence[FeatureImage], ordered: bool) -> list[tuple[int, int]]:
    """Return pairs of indices to compare: all, or of many images or frames those that probably overlap.

    Args:
        images: in any order.
        ordered: whether the images were taken in the order of their names, numbers by value. Then each is compared with
            the ten before it, and every tenth with every other tenth, which closes loops.
    """
    count = len(images)
    if are_all_compared(count, ordered):
        return [(i, j) for j in range(count) for i in range(j)]
    order = natural_order([image.name for image in images])
    near = {(i, j) for j in range(count) for i in range(max(0, j - NEIGHBOURS), j)}
    near |= {(i, j) for j in range(0, count, NEIGHBOURS) for i in range(0, j, NEIGHBOURS)}
    pairs = {(min(order[i], order[j]), max(order[i], order[j])) for i, j in near}
    if not ordered:
        for i, row in enumerate(np.argsort(differences(images), axis=1, kind="stable")[:, :SIMILAR].tolist()):
            pairs |= {(min(i, j), max(i, j)) for j in row if i != j}
    return sorted(pairs, key=lambda pair: pair[::-1])


def keep_distant(
    pairs: Sequence[tuple[int, int, Pair]], images: Sequence[FeatureImage], ordered: bool
) -> list[tuple[int, int, Pair]]:
    """Return the pairs of indices, and of what belongs to them, that say how far the camera moves in the whole capture.

    Where not all pairs were compared most are of frames next to each other, which are the more alike the denser the
    frames are. Then pairs of every tenth frame are kept, if at least three of them match.
    """
    if are_all_compared(len(images), ordered):
        return list(pairs)
    frames = set(natural_order([image.name for image in images])[::NEIGHBOURS])
    distant = [pair for pair in pairs if pair[0] in frames and pair[1] in frames]
    return distant if len(distant) >= MIN_DISTANT_PAIRS else list(pairs)


def are_all_compared(count: int, ordered: bool) -> bool:
    """Return whether each of so many images is compared with each other one."""
    return count < MAX_EXHAUSTIVE and not ordered


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


def match_images(colmap: ModuleType, path: Path, pairs: Sequence[tuple[int, int]], progress: bool) -> None:
    """Match the features of pairs of images and check each pair's geometry; pairs in the database are skipped."""
    matching = colmap.FeatureMatchingOptions(use_gpu=False, num_threads=1)
    listing = path.with_name("pairs.txt")
    with tqdm(total=len(pairs), desc="sfm: matches", disable=not progress, leave=False) as bar:
        for start in range(0, len(pairs), PAIRS_PER_BLOCK):
            block = pairs[start : start + PAIRS_PER_BLOCK]
            listing.write_text("".join(f"{image_name(i)} {image_name(j)}\n" for i, j in block))
            pairing = colmap.ImportedPairingOptions(match_list_path=listing)
            colmap.match_image_pairs(path, matching, pairing, geometry_options(colmap), colmap.Device.cpu)
            bar.update(len(block))
    listing.unlink(missing_ok=True)


def drop_still_matches(
    colmap: ModuleType, path: Path, images: Sequence[FeatureImage], ordered: bool
) -> tuple[int, int]:
    """Drop matches that do not move if most pairs of images consist of them: a background that does not move.

    A camera that moves has no such pairs, except of equal images and of neighbours among dense frames.

    Returns:
        How many pairs are still, and how many match, of those that :func:`keep_distant` keeps.
    """
    with opened(colmap, path) as database:
        points = [database.read_keypoints(i + 1)[:, :2] for i in range(len(images))]
        pairs = []
        for number, matches in zip(*database.read_all_matches(), strict=True):
            i, j = (k - 1 for k in colmap.pair_id_to_image_pair(number))
            if len(matches) >= MIN_PAIR_MATCHES and images[i].pixels.shape == images[j].pixels.shape:
                distance = np.abs(points[i][matches[:, 0]] - points[j][matches[:, 1]]).max(1)
                pairs.append((i, j, (matches, distance >= STILL_DISTANCE * max(images[i].pixels.shape))))
        distant = keep_distant(pairs, images, ordered)
        still = sum(bool(moving.mean() < 1 - MAX_STILL) for *_, (_, moving) in distant)
        if not is_still(still, len(distant)):
            return still, len(distant)
        with colmap.DatabaseTransaction(database):
            for i, j, (matches, moving) in pairs:
                geometry = colmap.estimate_two_view_geometry(
                    database.read_camera(database.read_image(i + 1).camera_id),
                    points[i],
                    database.read_camera(database.read_image(j + 1).camera_id),
                    points[j],
                    matches[moving],
                    geometry_options(colmap),
                )
                database.update_two_view_geometry(i + 1, j + 1, geometry)
        return still, len(distant)


def measure_parallax(colmap: ModuleType, database: Any, images: Sequence[FeatureImage], ordered: bool) -> float | None:
    """Return the parallax of images in units of their distance, if most pairs fit a homography: a plane or no parallax.

    The pairs are those that :func:`keep_distant` keeps, so that it does not depend on how dense frames are.

    Without parallax the homography of a pair, in normalised coordinates, is a rotation. Otherwise its largest singular
    value exceeds its smallest by about the baseline over the distance of the plane. Focal lengths may be wrong: they
    are multiplied by the factor with the least parallax (Hartley 1997, self-calibration of stationary cameras).

    Returns:
        The upper quartile over the pairs; None if most pairs fit no homography, or none match.
    """
    kinds = colmap.TwoViewGeometryConfiguration
    numbers, geometries = database.read_two_view_geometries()
    pairs = []
    for number, geometry in zip(numbers, geometries, strict=True):
        if len(geometry.inlier_matches):
            i, j = (k - 1 for k in colmap.pair_id_to_image_pair(number))
            pairs.append((i, j, geometry))
    pairs = keep_distant(pairs, images, ordered)
    rotations = (int(kinds.PANORAMIC), int(kinds.PLANAR_OR_PANORAMIC))
    flat = [(i, j, x.H) for i, j, x in pairs if int(x.config) in rotations]
    if not pairs or len(flat) <= len(pairs) / 2:
        return None
    k = {x.camera_id: x.calibration_matrix() for x in database.read_all_cameras()}
    k_of = {x.image_id - 1: k[x.camera_id] for x in database.read_all_images()}
    first, second = (np.stack([k_of[pair[n]] for pair in flat]) for n in (0, 1))
    parallax = []
    for factor in FOCAL_FACTORS:
        scale = np.diag([factor, factor, 1.0])
        # K with a scaled focal length is K scale: the principal point stays
        turn = np.linalg.inv(second @ scale) @ np.stack([h for *_, h in flat]) @ first @ scale
        values = np.linalg.svd(turn, compute_uv=False)
        parallax.append(values[:, 0] / values[:, 2].clip(1e-12) - 1)
    best = min(parallax, key=np.median)
    return float(np.quantile(best, 0.75))


def is_still(still: int, pairs: int) -> bool:
    """Return whether so many still pairs of all mean a background that does not move."""
    return still > MAX_STILL * pairs


def count_matching(images: Sequence[FeatureImage]) -> int:
    """Return how many of a few images match another one of them."""
    colmap = import_pycolmap()
    extract = FeatureExtractor(colmap)
    options = colmap.FeatureMatchingOptions(use_gpu=False, num_threads=1)
    matcher = colmap.FeatureMatcher.create(options, colmap.Device.cpu)
    features = [extract(image) for image in images]
    matching: set[int] = set()
    for i in range(len(images)):
        for j in range(i):
            (a, first), (b, second) = features[i], features[j]
            if {i, j} <= matching or min(len(a), len(b)) < MIN_PAIR_MATCHES:
                continue
            to_points = colmap.keypoints_from_matrix
            matches = matcher.match(to_points(a), first, to_points(b), second)
            cameras = make_camera(colmap, images[i], 1), make_camera(colmap, images[j], 2)
            geometry = colmap.estimate_two_view_geometry(
                cameras[0], a[:, :2], cameras[1], b[:, :2], matches, geometry_options(colmap)
            )
            if len(geometry.inlier_matches) >= MIN_PAIR_MATCHES:
                matching |= {i, j}
    return len(matching)
