"""Scenes as in LLFF (Mildenhall et al. 2019): poses_bounds.npy beside folders of images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from factorkit.data.files import fold_stem, list_images
from factorkit.data.sources import list_supported_formats
from factorkit.data.views.cameras import make_intrinsics, scale_intrinsics
from factorkit.data.views.colmap import is_colmap, read_image_names
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader
from factorkit.data.views.splits import split_every_eighth
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_arrays

FOLDERS = ("images_8", "images_4", "images_2", "images")


def is_llff(path: Path) -> bool:
    """Return whether this is a folder with poses_bounds.npy."""
    return (path / "poses_bounds.npy").is_file()


def read_llff(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split; every 8th of the sorted images is for testing.

    Raises:
        DataError: an invalid array, missing images, other images than poses, bounds without 0 < near <
            far, or an invalid pose.
    """
    file = path / "poses_bounds.npy"
    if not any((path / name).is_dir() for name in FOLDERS):
        raise DataError(f"{path}: none of the folders {', '.join(FOLDERS)} exists")
    values = _read_poses_bounds(file)
    images, notes = _match_images(path, file, len(values))
    names = [image.relative_to(path).as_posix() for image in images]
    is_bad = ~np.isfinite(values).all(1)
    if is_bad.any():
        raise DataError(f"{file}: values that are not finite for {names[int(is_bad.argmax())]}")
    matrices, bounds = values[:, :15].reshape(-1, 3, 5), values[:, 15:]
    is_bad = ~((bounds[:, 0] > 0) & (bounds[:, 0] < bounds[:, 1]))
    if is_bad.any():
        bad = int(is_bad.argmax())
        raise DataError(
            f"{file}: near {bounds[bad, 0]:g} and far {bounds[bad, 1]:g} of {names[bad]}: need 0 < near < far"
        )
    down, right, back, position, hwf = np.moveaxis(matrices, 2, 0)
    poses = np.tile(np.eye(4), (len(values), 1, 1))
    poses[:, :3] = np.stack([right, -down, back, position], axis=2)
    check_rigid(torch.from_numpy(poses), names)
    views = []
    for i in split_every_eighth(len(values), split):
        height, width, focal = hwf[i]
        k = make_intrinsics(focal, focal, width / 2, height / 2)
        views.append(
            LazyView(names[i], image_reader(images[i]), scale_intrinsics(k, height, width, names[i]), poses[i])
        )
    return views, SceneSettings(names, poses, (float(bounds[:, 0].min()), float(bounds[:, 1].max())), notes)


def _match_images(path: Path, file: Path, count: int) -> tuple[list[Path], tuple[str, ...]]:
    """Return the images of the poses, in the order of their names, and sentences if there are others.

    If the first folder has another number of images: the names in view_imgs.txt or of a COLMAP model, else another
    folder, else the images of one size, whichever gives the right number.
    """
    listings = {folder: list_images(folder) for name in FOLDERS if (folder := path / name).is_dir()}
    first, images = next(iter(listings.items()))
    if len(images) == count:
        return images, ()
    for source, listed in _listed_names(path):
        stems = {fold_stem(Path(name.strip()).name) for name in listed if name.strip()}
        if len(stems) == count:
            for folder, others in listings.items():
                named = [image for image in others if fold_stem(image.name) in stems]
                if len(named) == count:
                    text = f"{folder.name}/ has {format_count(len(others), 'image')}; the {count} named in {source}"
                    return named, (f"{text} have the poses of poses_bounds.npy.",)
    for folder, others in list(listings.items())[1:]:
        if len(others) == count:
            text = f"{first.name}/ has {format_count(len(images), 'image')} for {format_count(count, 'pose')}"
            return others, (f"{text}: {folder.name}/ is read, which has {count}.",)
    for folder, others in listings.items():
        sizes: dict[tuple[int, int], list[Path]] = {}
        for image in others:
            sizes.setdefault(_read_size(image), []).append(image)
        fitting = [(size, group) for size, group in sizes.items() if len(group) == count]
        if len(fitting) == 1:
            (width, height), group = fitting[0]
            text = f"{folder.name}/ has {format_count(len(others), 'image')}; those of {width} x {height} pixels"
            return group, (f"{text}, {count}, have the poses of poses_bounds.npy.",)
    raise DataError(
        f"{file}: {format_count(count, 'pose')}, but {first} has {format_count(len(images), 'image')}. "
        "There must be one pose for each image, in the order of their names. Remove the other images, or list the "
        "names of those with poses in view_imgs.txt."
    )


def _listed_names(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield lists of the images that LLFF's scripts made poses of, with the name of the file."""
    listing = path / "view_imgs.txt"
    if listing.is_file():
        try:
            yield listing.name, listing.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{listing}: cannot be read: {error}") from error
    if is_colmap(path):
        yield "the COLMAP model", read_image_names(path)


def _read_size(image: Path) -> tuple[int, int]:
    """Return width and height from an image's header; zeros if it has none."""
    try:
        with Image.open(image, formats=list_supported_formats()) as opened:
            return opened.size
    except OSError:
        return 0, 0


def _read_poses_bounds(file: Path) -> np.ndarray:
    """Read the array float64 [V, 17]."""
    try:
        values = read_arrays(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a readable array: {error}") from error
    if isinstance(values, dict) or values.dtype.kind not in "fiu":
        raise DataError(f"{file}: not an array of numbers; expected 17 numbers for each image")
    if values.ndim != 2 or values.shape[1] != 17 or not len(values):
        raise DataError(f"{file}: an array of shape {list(values.shape)}, expected 17 numbers for each image")
    return values.astype(np.float64)
