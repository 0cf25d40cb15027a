"""Oxford Flowers-102 with its segmentations, in ReDO's split."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from factorkit.data.layouts import base
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

NUM_CLASSES = 102
BACKGROUND_COLOR = np.array((0, 0, 254))  # painted over the background by the authors
COLOR_TOLERANCE = 48  # JPEG blurs this blue along outlines; no flower colour is as close to it
SPLIT_KEYS = {"train": "tstid", "val": "valid", "test": "trnid"}  # ReDO (Chen et al. 2019) trains on the largest part


def read(root: Path) -> base.DatasetFiles:
    ids = _read_matlab(root / "setid.mat", *SPLIT_KEYS.values())
    numbers_of = {split: np.sort(ids[key].ravel().astype(np.int64)) for split, key in SPLIT_KEYS.items()}
    numbers = np.sort(np.concatenate(list(numbers_of.values())))
    if len(np.unique(numbers)) < len(numbers):
        raise DataError(f"{root / 'setid.mat'}: an image is in two splits. {base.FETCH_AGAIN}")
    names = [f"image_{number:05d}.jpg" for number in numbers]
    base.require_files(root / "jpg", names, "images of setid.mat")
    labels = class_names = None
    path = root / "imagelabels.mat"
    if path.is_file():
        classes = _read_matlab(path, "labels")["labels"].ravel().astype(np.int64)
        if len(classes) < numbers[-1] or classes.min() < 1 or classes.max() > NUM_CLASSES:
            raise DataError(f"{path}: expected one class from 1 to {NUM_CLASSES} for each image. {base.FETCH_AGAIN}")
        labels = classes[numbers - 1] - 1
        class_names = [f"class {i}" for i in range(1, NUM_CLASSES + 1)]
    masks = {}
    if (root / "segmim").is_dir():
        files = base.filter_existing(root / "segmim", [name.replace("image_", "segmim_") for name in names])
        mask_files = FileSource(root / "segmim", files, [file.replace("segmim_", "image_") for file in files])
        masks = {
            "segmim": base.LabelSource(mask_files, _is_flower),
            "redo": base.LabelSource(mask_files, _is_flower_redo),
        }
    splits = {split: np.searchsorted(numbers, part) for split, part in numbers_of.items()}
    return base.DatasetFiles(FileSource(root / "jpg", names), masks, splits, labels, class_names)


def _is_flower(values: np.ndarray) -> np.ndarray:
    return np.abs(values.astype(np.int16) - BACKGROUND_COLOR).max(-1) > COLOR_TOLERANCE


def _is_flower_redo(values: np.ndarray) -> np.ndarray:
    """Apply ReDO's rule: pixels without red, without green, or with a blue of 254 are background."""
    return (values[..., 0] != 0) & (values[..., 1] != 0) & (values[..., 2] != 254)


def _read_matlab(path: Path, *keys: str) -> dict[str, np.ndarray]:
    scipy_io = base.import_extra("scipy.io", "layouts", "reading .mat files")
    try:
        content = scipy_io.loadmat(path)
        return {key: content[key] for key in keys}
    except KeyError as error:
        raise DataError(f"{path}: no variable {error}. {base.FETCH_AGAIN}") from error
    except Exception as error:  # scipy: OSError, ValueError, MatReadError, zlib.error, ...
        raise DataError(f"{path}: not a readable MATLAB file: {error}. {base.FETCH_AGAIN}") from error


READER = base.Reader(
    name="flowers-102",
    title="Oxford Flowers-102 with segmentations",
    url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    expects="jpg/image_00001.jpg ... image_08189.jpg\nsegmim/segmim_00001.jpg ...\nsetid.mat\nimagelabels.mat",
    splits="ReDO's: train is tstid (6149), val is valid (1020), test is trnid (1020)",
    masks="segmim (everything except the painted blue; default); redo (ReDO's rule on the same files)",
    labels="102 classes, from imagelabels.mat",
    read=read,
    extra="layouts",
)
