from __future__ import annotations

import sys

import numpy as np
import pytest

from factorkit.data import open_dataset, prepare
from factorkit.utils.errors import ConfigError, DataError


@pytest.fixture
def shapes(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    labels = np.zeros((8, 6))
    labels[:, 4], labels[:, 5] = np.arange(8) % 4, -30.0
    with h5py.File(tmp_path / "3dshapes.h5", "w") as file:
        file["images"], file["labels"] = images, labels
    return tmp_path / "3dshapes.h5", images


def test_3d_shapes_file_gives_images_and_classes(shapes):
    path, images = shapes
    for data in (path, path.parent):
        dataset = open_dataset(data)
        assert dataset.layout == "3d-shapes" and dataset.labels.tolist() == [0, 1, 2, 3] * 2
    assert dataset.class_names == ["shape 0", "shape 1", "shape 2", "shape 3"] and dataset.test_images is None
    prepared = prepare(dataset.train, 64, workers=4, progress=False)
    np.testing.assert_array_equal(prepared.images, images)


def test_3d_shapes_damaged_file_raises(shapes, monkeypatch):
    h5py = pytest.importorskip("h5py")
    path, images = shapes
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="3dshapes.h5: not an HDF5 file"):
        open_dataset(path)
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = images.astype(np.float32), np.zeros((8, 6))
    with pytest.raises(DataError, match=r"images float32 \[8, 64, 64, 3\]"):
        open_dataset(path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"3dshapes.h5 needs h5py: pip install 'factorkit\[layouts\]'"):
        open_dataset(path)
