"""Classes of images from folders, files, mappings and lists."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from factorkit.data import Classes, read_classes
from factorkit.utils.errors import ConfigError, DataError

FILES = ["image_1.jpg", "image_2.jpg", "image_10.jpg"]


def words(result: Classes) -> list[str]:
    return [result.names[i] if i >= 0 else "" for i in result.labels]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["rose/a.jpg", "iris/a.jpg", "rose/b.jpg"], ["rose", "iris", "rose"]),
        (["train/rose/a.jpg", "train/iris/b.jpg"], ["rose", "iris"]),
        (["rose/wild/a.jpg", "rose/b.jpg", "iris/x/y/c.jpg"], ["rose", "rose", "iris"]),
        (["rose 10/a.jpg", "rose 9/b.jpg"], ["rose 10", "rose 9"]),
    ],
)
def test_folders_classes_start_below_common_folder(names, expected):
    result = read_classes("folders", names)
    assert words(result) == expected and result.labels.dtype == np.int64
    assert read_classes(True, names).names == read_classes("auto", names).names == result.names


def test_class_names_are_sorted_naturally():
    assert read_classes("folders", ["10/a.jpg", "9/a.jpg", "1/a.jpg"]).names == ["1", "9", "10"]
    assert read_classes({"a": "b", "c": "a"}, ["a.png", "c.png"]).names == ["a", "b"]


def test_folders_single_class_or_loose_files_raise():
    with pytest.raises(DataError, match="only the class 'rose'"):
        read_classes("folders", ["x/rose/a.jpg", "x/rose/b.jpg"])
    with pytest.raises(ConfigError, match="1 .b.jpg. are in no class folder"):
        read_classes("folders", ["rose/a.jpg", "b.jpg"])
    with pytest.raises(ConfigError, match="x/b.jpg. are beside"):
        read_classes("folders", ["x/rose/a.jpg", "x/iris/c.jpg", "x/b.jpg"])
    with pytest.raises(ConfigError, match="have no folders"):
        read_classes("folders", ["000000"], positional=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.csv", "width,Name,class,x\n5,image_1,rose,\n5,image_2,,\n5,image_10,iris,\n5,image_99,tulip,\n"),
        ("c.csv", "image_1.jpg,rose\n\nimage_2.jpg,\nimage_10.jpg,iris\n"),
        ("c.csv", "\ufefffile,label\n sub/image_1.png , rose\nimage_2.jpg,\nimage_10,iris\n"),
        ("c.tsv", "path\tcategory\nimage_1.jpg\trose\nimage_2.jpg\t\nimage_10.jpg\tiris\n"),
        ("c.json", json.dumps({"image_1.jpg": "rose", "image_2": None, "image_10.jpg": "iris"})),
    ],
)
def test_file_matches_path_stem_or_last_part(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    names = ["sub/image_1.jpg", "image_2.jpg", "image_10.jpg"] if "sub" in text else FILES
    if name == "c.csv" and "sub" not in text:
        names = [f"deep/{n}" for n in FILES]
    result = read_classes(tmp_path / name, names)
    assert words(result) == ["rose", "", "iris"] and result.names == ["iris", "rose"]
    assert result.labels.tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    "name", ["caf\u00e9/Rosé 1.JPG", "CAFE\u0301/rose\u0301 1", "Café\\rosé 1.jpg", "ROSE\u0301 1.jpg"]
)
def test_file_names_match_in_any_case_and_unicode_form(name):
    result = read_classes({name: "rose", "b.jpg": "iris"}, ["café/rosé 1.jpg", "b.jpg"])
    assert words(result) == ["rose", "iris"]


def test_file_names_with_more_folders_than_the_images_match_by_their_last_part():
    table = {"C:\\photos\\a.JPG": "x", "photos/b.jpg": "y", "other/b.png": "y"}
    assert words(read_classes(table, ["a.jpg", "b.jpg"])) == ["x", "y"]
    with pytest.raises(DataError, match="1 .b.jpg. of 2 images missing"):
        read_classes(table | {"other/b.png": "x"}, ["a.jpg", "b.jpg"])
    with pytest.raises(DataError, match="1 .sub/b.jpg. of 2 images missing"):
        read_classes(table, ["a.jpg", "sub/b.jpg"])


def test_file_names_that_differ_in_case_alone_match_exactly():
    assert words(read_classes({"A.jpg": "x", "a.jpg": "y"}, ["a.jpg", "A.jpg"])) == ["y", "x"]
    with pytest.raises(DataError, match="1 .*a.png.* of 2 images missing"):
        read_classes({"A.jpg": "x", "a.jpg": "y"}, ["A.jpg", "a.png"])


def test_file_last_part_matches_only_if_unique():
    with pytest.raises(DataError, match=r"2 \(x/a.jpg, y/a.jpg\)"):
        read_classes({"a.jpg": "rose", "b": "iris"}, ["x/a.jpg", "y/a.jpg", "b.jpg"])
    assert words(read_classes({"x/a": "rose", "y/a": "iris"}, ["x/a.jpg", "y/a.jpg"])) == ["rose", "iris"]


def test_file_equal_stems_match_by_suffix():
    result = read_classes({"a.jpg": "rose", "a.png": "iris"}, ["a.png", "a.jpg"])
    assert words(result) == ["iris", "rose"]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_list_is_indexed_by_position_in_full_set(kind):
    result = read_classes(kind([7, 3, 7, -1, 12]), ["000000", "000003", "000004", "000001"], positional=True)
    assert words(result) == ["7", "", "12", "3"] and result.names == ["3", "7", "12"]


def test_auto_prefers_dataset_classes_and_drops_unused():
    known = Classes(np.array([2, -1, 0]), ["iris", "lily", "rose"])
    result = read_classes("auto", ["x/a.jpg", "y/b.jpg", "z/c.jpg"], dataset_classes=known)
    assert words(result) == ["rose", "", "iris"] and result.names == ["iris", "rose"]
    assert words(read_classes("folders", ["x/a.jpg", "y/b.jpg", "z/c.jpg"], dataset_classes=known)) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "name,class\nimage_1,rose\n", r"2 \(image_2.jpg, image_10.jpg\) of 3 images missing"),
        ("c.csv", "name,class\nimage_1,rose\nimage_1,iris\n", "two classes, 'rose' and 'iris'"),
        ("c.csv", "image_1,rose\nimage_2\n", r"\['image_2'\] has no class"),
        ("c.csv", "image_1,a\nimage_2,a\nimage_10,a\n", "only the class 'a'"),
        ("c.csv", b"\xff\xfe\x00", "cannot be read"),
        ("c.json", "[1, 2]", "contains list"),
        ("c.json", "{", "cannot be read"),
        ("c.txt", "image_1 rose", "give a .csv, .tsv or .json"),
    ],
)
def test_file_invalid_content_raises(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        read_classes(str(tmp_path / name), FILES)
    assert name in str(caught.value)


def test_spec_invalid_raises(tmp_path):
    with pytest.raises(DataError, match="nowhere.csv"):
        read_classes(tmp_path / "nowhere.csv", FILES)
    with pytest.raises(ConfigError, match="for files give a .csv"):
        read_classes([0, 1, 0], FILES)
    with pytest.raises(DataError, match="2 entries, but there is an image 4"):
        read_classes([0, 1], ["000001", "000004"], positional=True)
    with pytest.raises(ConfigError, match="classes=3"):
        read_classes(3, FILES)
