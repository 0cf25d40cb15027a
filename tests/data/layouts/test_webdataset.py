from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from factorkit.data import load_labelled, open_dataset, prepare
from factorkit.utils.errors import DataError


def encoded(value, kind="PNG", shape=(12, 16, 3)):
    buffer = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def pack():
    """pack(path, {member: bytes}, mode="w"): a .tar."""

    def write(path, members, mode="w"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, mode) as archive:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def shards(tmp_path, pack):
    """Two shards to train on and one to validate, 3 samples each; the first of each has no class, the last no mask."""
    for s, shard in enumerate(("set-train-000000", "set-train-000001", "set-val-000000")):
        members = {}
        for i in range(3):
            key = f"part/{i:04d}"
            members[f"{key}.png"] = encoded(60 * s + 10 * i)
            members[f"{key}.json"] = b"{}"
            if i > 0:
                members[f"{key}.cls"] = str(2 * i).encode()
            if i < 2:
                members[f"{key}.seg.png"] = encoded(i, shape=(12, 16))
        pack(tmp_path / "shards" / f"{shard}.tar", members)
    return tmp_path / "shards"


def test_read_shards_give_samples_splits_classes_masks(shards, grey):
    dataset = open_dataset(shards)
    assert dataset.layout == "webdataset" and len(dataset.train) == 6
    assert dataset.train.names[0] == "set-train-000000/part/0000.png"
    assert grey(dataset.train) == [0, 10, 20, 60, 70, 80]
    assert dataset.labels.tolist() == [-1, 2, 4] * 2 and dataset.class_names == ["0", "1", "2", "3", "4"]
    assert grey(dataset.splits["val"].images) == [120, 130, 140]
    assert dataset.test_images.names == ["set-val-000000/part/0000.png", "set-val-000000/part/0001.png"]
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 8)
    assert labelled.foreground.reshape(2, -1).all(1).tolist() == [False, True]
    assert prepare(dataset.train, 8, progress=False).images[:, 0, 0, 0].tolist() == [0, 10, 20, 60, 70, 80]


def test_read_single_shard_or_pattern(shards):
    assert len(open_dataset(shards / "set-val-000000.tar", holdout="none").train) == 3
    dataset = open_dataset(shards / "set-train-{000000..000001}.tar", holdout="none")
    assert len(dataset.train) == 6
    with pytest.raises(DataError, match=r"000002.tar: 2 of the 4 shards of .* missing"):
        open_dataset(shards / "set-train-{000000..000003}.tar")


def test_read_folder_with_images_and_archive_keeps_images(shards, photo):
    photo(shards / "photo.jpg")
    dataset = open_dataset(shards)
    assert dataset.layout is None and dataset.train.names == ["photo.jpg"]


def test_prepare_replaced_shard_is_prepared_again(shards, pack):
    first = prepare(open_dataset(shards).train, 8, progress=False)
    pack(shards / "set-train-000000.tar", {"a.png": encoded(99)})
    again = prepare(open_dataset(shards).train, 8, progress=False)
    assert again.images[0, 0, 0, 0] == 99 and len(again) == 4 and len(first) == 6


def test_member_names_outside_archive_are_sanitized(tmp_path, pack):
    members = {"../../evil.png": encoded(1), "/etc/passwd.png": encoded(2), "C:/a.png": encoded(3)}
    dataset = open_dataset(pack(tmp_path / "in/x.tar", members))
    assert dataset.train.names == ["x/evil.png", "x/etc/passwd.png", "x/a.png"]
    assert len(prepare(dataset.train, 8, progress=False)) == 3
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("passwd*"))


def test_read_links_in_archive_are_skipped(tmp_path, pack):
    path = pack(tmp_path / "x.tar", {"a.png": encoded(1)})
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("secret.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert open_dataset(path).train.names == ["x/a.png"]


def test_read_damaged_archive_raises(tmp_path, pack):
    big = {"a.png": encoded(1), "b.png": encoded(2) + bytes(5000)}
    path = pack(tmp_path / "x.tar", big)
    whole = path.read_bytes()
    path.write_bytes(whole[:2500])
    with pytest.raises(DataError, match="x.tar.* (again|anew)"):
        open_dataset(path)
    path.write_bytes(b"this is no archive" * 100)
    with pytest.raises(DataError, match="x.tar: not a readable .tar"):
        open_dataset(path)
    pack(path, big, "w:gz")
    with pytest.raises(DataError, match="Decompress it if it is compressed"):
        open_dataset(path)
    pack(path, {"a.txt": b"words"})
    with pytest.raises(DataError, match="no images in 1 archive"):
        open_dataset(path)


@pytest.mark.parametrize("text", [b"cat", b"-1", b"9999999999", b""])
def test_read_invalid_class_number_raises(tmp_path, pack, text):
    with pytest.raises(DataError, match="a.cls is not a class number"):
        open_dataset(pack(tmp_path / "x.tar", {"a.png": encoded(1), "a.cls": text}))
