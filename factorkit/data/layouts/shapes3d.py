"""3D Shapes: 480,000 rendered rooms of 64 px, in one HDF5 file."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.files import stat_file
from factorkit.data.layouts.base import FETCH_AGAIN, DatasetFiles, Reader, import_extra
from factorkit.data.sources import Source, hash_values
from factorkit.utils.errors import DataError

FILE = "3dshapes.h5"
FACTORS = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")  # the columns of `labels`


class Hdf5Source(Source):
    """The rows of a uint8 array [N, H, W, 3] in an HDF5 file, opened on first use."""

    def __init__(self, path: Path, key: str, count: int) -> None:
        self.path, self.key = path, key
        self.names = [f"{i:06d}" for i in range(count)]
        self.rows: Any = None
        self.lock = threading.Lock()

    def decode(self, index: int) -> Image.Image:
        """Return one row of the array as an image."""
        with self.lock:
            if self.rows is None:
                self.rows = import_extra("h5py", "layouts", "reading HDF5").File(self.path, "r")[self.key]
            try:
                return Image.fromarray(self.rows[index])
            except OSError as error:
                raise DataError(f"{self.path}: row {index} cannot be read: {error}. {FETCH_AGAIN}") from error

    def fingerprint(self) -> str:
        """Return a hash of the file's path, size and time, and the key."""
        return hash_values("hdf5", str(self.path), self.key, stat_file(self.path))


def read(path: Path) -> DatasetFiles | None:
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        return None
    h5py = import_extra("h5py", "layouts", f"reading {path.name}")
    try:
        with h5py.File(path.resolve(), "r") as file:
            images, factors = file["images"], file["labels"][:]
            shape, dtype = images.shape, images.dtype
    except (OSError, KeyError, RuntimeError) as error:
        raise DataError(f"{path}: not an HDF5 file with 'images' and 'labels': {error}. {FETCH_AGAIN}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or factors.shape != (shape[0], len(FACTORS)):
        raise DataError(
            f"{path}: images {dtype} {list(shape)} and labels {list(factors.shape)}, expected uint8 [N, H, W, 3] and "
            f"[N, {len(FACTORS)}]. {FETCH_AGAIN}"
        )
    shapes, labels = np.unique(factors[:, FACTORS.index("shape")], return_inverse=True)
    source = Hdf5Source(path.resolve(), "images", shape[0])
    return DatasetFiles(source, labels=labels.astype(np.int64), class_names=[f"shape {value:g}" for value in shapes])


READER = Reader(
    name="3d-shapes",
    title="3D Shapes",
    url="https://github.com/google-deepmind/3d-shapes",
    expects=f"{FILE} (or a folder that contains it), with images uint8 [480000, 64, 64, 3] and labels [480000, 6]",
    splits="no official splits",
    labels="the 4 shapes of the object",
    read=read,
    extra="layouts",
)
