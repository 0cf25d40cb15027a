from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from factorkit.data import load_labelled, open_dataset, prepare
from factorkit.utils.errors import ConfigError, DataError


def test_read_without_library_names_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for data in (tmp_path, "hf:owner/name"):
        with pytest.raises(ConfigError, match=r"needs datasets: pip install 'factorkit\[huggingface\]'"):
            open_dataset(data)


@pytest.fixture
def flowers(monkeypatch, tmp_path):
    """Four rows to train on and two to validate: image, mask and class."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hf = pytest.importorskip("datasets")
    features = hf.Features(
        {
            "id": hf.Value("int64"),
            "image": hf.Image(),
            "mask": hf.Image(),
            "kind": hf.ClassLabel(names=["rose", "iris"]),
        }
    )

    def part(values):
        rows = {
            "id": list(values),
            "image": [Image.new("RGB", (16, 12), (v, v, v)) for v in values],
            "mask": [Image.new("L", (16, 12), v % 2) for v in values],
            "kind": [v % 2 for v in values],
        }
        return hf.Dataset.from_dict(rows, features=features)

    return hf.DatasetDict({"train": part([10, 21, 30, 41]), "validation": part([50, 61])})


def check(dataset, grey):
    assert dataset.layout == "huggingface" and grey(dataset.train) == [10, 21, 30, 41]
    assert dataset.labels.tolist() == [0, 1, 0, 1] and dataset.class_names == ["rose", "iris"]
    assert set(dataset.splits) == {"train", "val"} and grey(dataset.test_images) == [50, 61]
    foreground = load_labelled(dataset.test_images, dataset.test_masks, 8).foreground
    assert foreground.reshape(2, -1).all(1).tolist() == [False, True]


def test_read_memory_disk_and_hub_give_same_data(flowers, tmp_path, grey, monkeypatch):
    check(open_dataset(flowers), grey)
    flowers.save_to_disk(tmp_path / "saved")
    check(open_dataset(tmp_path / "saved"), grey)
    requested = []
    monkeypatch.setattr("datasets.load_dataset", lambda *names: requested.append(names) or flowers)
    check(open_dataset("hf:owner/name:plain"), grey)
    assert requested == [("owner/name", "plain")]


def test_read_single_split_without_masks(flowers, tmp_path, grey):
    alone = flowers["train"].remove_columns("mask")
    alone.save_to_disk(tmp_path / "alone")
    for data in (alone, tmp_path / "alone"):
        dataset = open_dataset(data)
        assert grey(dataset.train) == [10, 21, 30, 41] and dataset.test_images is None and not dataset.splits
    first = prepare(dataset.train, 8, progress=False)
    changed = open_dataset(alone.select([2, 0]))
    again = prepare(changed.train, 8, progress=False)
    assert again.path != first.path and again.images[:, 0, 0, 0].tolist() == [30, 10]


def test_read_unsupported_data_raises(flowers, monkeypatch):
    with pytest.raises(DataError, match=r"none of its columns \(id, kind\) holds images"):
        open_dataset(flowers.remove_columns(["image", "mask"]))

    def refuse(*names):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match="hf:owner/name: cannot be loaded: offline mode"):
        open_dataset("hf:owner/name")


def test_prepare_missing_images_are_skipped(flowers):
    hf = pytest.importorskip("datasets")
    rows = {"image": [Image.fromarray(np.zeros((8, 8, 3), np.uint8)), None]}
    dataset = open_dataset(hf.Dataset.from_dict(rows, features=hf.Features({"image": hf.Image()})))
    with pytest.warns(UserWarning, match="1 of 2 images"):
        prepared = prepare(dataset.train, 8, progress=False)
    assert prepared.source_rows.tolist() == [0]
