"""Oxford Flowers-102 with its segmentations, in ReDO's split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.layouts.base import (
    FETCH_AGAIN,
    DatasetFiles,
    LabelSource,
    Reader,
    filter_existing,
    find_root,
    import_extra,
    require_files,
)
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

CLASSES = 102
BLUE = np.array((0, 0, 254))  # what the authors painted over the background
NEAR = 48  # JPEG blurs that blue along outlines; flowers are nowhere as near to it
ROLES = {"train": "tstid", "val": "valid", "test": "trnid"}  # ReDO (Chen et al. 2019) trains on the largest part


def read(data: Any) -> DatasetFiles | None:
    root = find_root(data, ("", "102flowers", "flowers-102"), required=("jpg", "setid.mat"))
    if root is None:
        return None
    ids = _matlab(root / "setid.mat", *ROLES.values())
    parts = {split: np.sort(ids[key].ravel().astype(np.int64)) for split, key in ROLES.items()}
    numbers = np.sort(np.concatenate(list(parts.values())))
    if len(np.unique(numbers)) < len(numbers):
        raise DataError(f"{root / 'setid.mat'}: an image is in two of the splits. {FETCH_AGAIN}")
    names = [f"image_{number:05d}.jpg" for number in numbers]
    require_files(root / "jpg", names, "images of setid.mat")
    labels = class_names = None
    if (root / "imagelabels.mat").is_file():
        stored = _matlab(root / "imagelabels.mat", "labels")["labels"].ravel().astype(np.int64)
        if len(stored) < numbers[-1] or stored.min() < 1 or stored.max() > CLASSES:
            raise DataError(
                f"{root / 'imagelabels.mat'}: not one class from 1 to {CLASSES} for each image. {FETCH_AGAIN}"
            )
        labels = stored[numbers - 1] - 1
        class_names = [f"class {i}" for i in range(1, CLASSES + 1)]
    masks = {}
    if (root / "segmim").is_dir():
        stored_names = filter_existing(root / "segmim", [name.replace("image_", "segmim_") for name in names])
        stored_masks = FileSource(root / "segmim", stored_names, [n.replace("segmim_", "image_") for n in stored_names])
        masks = {"segmim": LabelSource(stored_masks, _not_blue), "redo": LabelSource(stored_masks, _redo)}
    splits = {split: np.searchsorted(numbers, part) for split, part in parts.items()}
    return DatasetFiles(FileSource(root / "jpg", names), masks, splits, labels, class_names)


def _not_blue(values: np.ndarray) -> np.ndarray:
    return np.abs(values.astype(np.int16) - BLUE).max(-1) > NEAR


def _redo(values: np.ndarray) -> np.ndarray:
    """As ReDO reads them: whatever has no red, no green, or a blue of 254 is background."""
    return (values[..., 0] != 0) & (values[..., 1] != 0) & (values[..., 2] != 254)


def _matlab(path: Path, *keys: str) -> dict[str, np.ndarray]:
    scipy_io = import_extra("scipy.io", "layouts", "reading .mat files")
    try:
        found = scipy_io.loadmat(path)
        return {key: found[key] for key in keys}
    except KeyError as error:
        raise DataError(f"{path}: holds no {error}. {FETCH_AGAIN}") from error
    except Exception as error:  # scipy: OSError, ValueError, MatReadError, zlib.error, ...
        raise DataError(f"{path}: no readable MATLAB file: {error}. {FETCH_AGAIN}") from error


READER = Reader(
    name="flowers-102",
    title="Oxford Flowers-102 with segmentations",
    url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    expects="jpg/image_00001.jpg ... image_08189.jpg\nsegmim/segmim_00001.jpg ...\nsetid.mat\nimagelabels.mat",
    splits="ReDO's: train is tstid (6149), val is valid (1020), test is trnid (1020)",
    masks="segmim (whatever is not the painted blue, the default); redo (ReDO's rule on the same files)",
    labels="102 classes, from imagelabels.mat",
    read=read,
    extra="layouts",
)
