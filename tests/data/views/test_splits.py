"""No view of a test split is ever among the training views, whatever says which views are for testing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.data.views.splits import select_listed, select_split
from factorkit.utils.errors import DataError

SIZE, COUNT = 8, 10


@pytest.fixture(scope="module")
def scene():
    return make_procedural_views(COUNT, SIZE, seed=3)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)


def write_transforms(file, scene, names, rows=None, **settings):
    rows = range(len(names)) if rows is None else rows
    frames = [
        {"file_path": name, "transform_matrix": scene.poses[i].tolist()} for name, i in zip(names, rows, strict=True)
    ]
    for name, i in zip(names, rows, strict=True):
        save(file.parent / name, scene.images[i])
    file.write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames, **settings}))


def read_names(folder, split):
    return [name.rsplit("/", 1)[-1].removesuffix(".png") for name in open_views(folder, split).names]


def check(folder, train, test):
    assert read_names(folder, "train") == train
    assert read_names(folder, "test") == test


@pytest.mark.parametrize("form", ["{}", "./images/{}", "{}.png", "/home/them/images/{}.png", "IMAGES\\{}.PNG"])
def test_transforms_lists_of_other_name_forms_never_leak(tmp_path, scene, form):
    names = [f"images/v{i}.png" for i in range(4)]
    write_transforms(tmp_path / "transforms.json", scene, names, test_filenames=[form.format("v1"), form.format("v2")])
    check(tmp_path, ["v0", "v3"], ["v1", "v2"])


def test_transforms_list_of_other_images_is_refused(tmp_path, scene):
    names = [f"images/v{i}.png" for i in range(4)]
    write_transforms(tmp_path / "transforms.json", scene, names, test_filenames=["a.png", "b.png"])
    with pytest.raises(DataError, match="none of the 2 names listed for test is a view, such as a.png"):
        open_views(tmp_path, "train")


def test_transforms_split_of_each_frame_is_honoured(tmp_path, scene):
    names = [f"images/v{i}.png" for i in range(4)]
    write_transforms(tmp_path / "transforms.json", scene, names)
    content = json.loads((tmp_path / "transforms.json").read_text())
    for frame, split in zip(content["frames"], ("test", "train", "validation", "train"), strict=True):
        frame["split"] = split
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    check(tmp_path, ["v1", "v3"], ["v0"])
    content["frames"][0]["split"] = "holdout"
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="`split` is 'holdout'"):
        open_views(tmp_path)


def test_transforms_test_frames_of_scannetpp_are_for_testing(tmp_path, scene):
    write_transforms(tmp_path / "other.json", scene, ["dslr/t0.png"], rows=[5])
    extra = json.loads((tmp_path / "other.json").read_text())["frames"]
    (tmp_path / "other.json").unlink()
    write_transforms(tmp_path / "transforms.json", scene, [f"dslr/v{i}.png" for i in range(3)], test_frames=extra)
    check(tmp_path, ["v0", "v1", "v2"], ["t0"])
    assert len(open_views(tmp_path)) == 4


def test_transforms_beside_a_file_of_test_frames_trains_on_the_others(tmp_path, scene):
    names = [f"images/v{i}.png" for i in range(5)]
    write_transforms(tmp_path / "transforms.json", scene, names)
    write_transforms(tmp_path / "transforms_test.json", scene, ["./images/v1.png", "images/v3.png"], rows=[1, 3])
    check(tmp_path, ["v0", "v2", "v4"], ["v1", "v3"])


def test_transforms_of_test_frames_alone_are_not_trained_on(tmp_path, scene):
    write_transforms(tmp_path / "transforms_test.json", scene, [f"images/v{i}.png" for i in range(3)])
    assert read_names(tmp_path, "test") == ["v0", "v1", "v2"]
    assert len(open_views(tmp_path)) == 3
    with pytest.raises(DataError, match=r"transforms_train.json: no such file. The frames of test are not trained on"):
        open_views(tmp_path, "train")


FOLDERS = ["train/v0.png", "test/v1.png", "train/v2.png", "val/v3.png", "train/v4.png", "test/v5.png"]


def test_transforms_names_in_split_folders_are_split_by_them(tmp_path, scene):
    write_transforms(tmp_path / "transforms.json", scene, FOLDERS)
    check(tmp_path, ["v0", "v2", "v4"], ["v1", "v5"])


def test_images_in_split_folders_are_split_by_them(tmp_path, scene):
    for i, name in enumerate(FOLDERS):
        save(tmp_path / name, scene.images[i])
    check(tmp_path, ["v0", "v2", "v4"], ["v1", "v5"])
    assert "folders in the names" in open_views(tmp_path, "train").notes[-1]


def test_select_split_one_folder_or_none_is_every_eighth():
    for names in ([f"test/{i}.png" for i in range(9)], [f"{i}.png" for i in range(9)]):
        assert select_split(names, "test")[0] == [0, 8]
    assert select_split([f"contest/{i}.png" for i in range(8)] + ["contest/train.png"], "test")[0] == [0, 8]


def write_colmap(folder, names):
    folder.mkdir(parents=True)
    (folder / "cameras.txt").write_text(f"1 SIMPLE_PINHOLE {SIZE} {SIZE} 9 4 4\n")
    lines = [f"{i + 1} 1 0 0 0 {i} 0 0 1 {name}\n" for i, name in enumerate(names)]
    (folder / "images.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("place", ["sparse/0", "."])
@pytest.mark.parametrize(
    ("listings", "train", "test"),
    [
        ({"test.txt": "v1.png\nv4.png\n"}, "0235", "14"),
        ({"test.txt": "v1\nimages/v4.jpg\n"}, "0235", "14"),
        ({"train_list.txt": "v0.png\nv2.png"}, "02", "1345"),
        ({"val.txt": "v0.png", "test.txt": "v5.png"}, "1234", "5"),
    ],
)
def test_colmap_listings_never_leak(tmp_path, scene, place, listings, train, test):
    names = [f"v{i}.png" for i in range(6)]
    write_colmap(tmp_path / "sparse/0", names)
    for i, name in enumerate(names):
        save(tmp_path / "images" / name, scene.images[i])
    for name, text in listings.items():
        (tmp_path / place / name).write_text(text)

    def read(split):
        return "".join(name[-5] for name in open_views(tmp_path, split, layout="forward").names)

    assert (read("train"), read("test")) == (train, test)


def test_nsvf_names_of_every_split_are_split_by_them(tmp_path, scene):
    (tmp_path / "intrinsics.txt").write_text("9 4 4 0\n0 0 0\n1\n8 8\n")
    for i in range(6):
        save(tmp_path / f"rgb/{'012'[i % 3]}_v{i}.png", scene.images[i])
        (tmp_path / "pose").mkdir(exist_ok=True)
        matrix = scene.poses[i].numpy() @ np.diag([1, -1, -1, 1])
        np.savetxt(tmp_path / f"pose/{'012'[i % 3]}_v{i}.txt", matrix)
    check(tmp_path, ["0_v0", "0_v3"], ["2_v2", "2_v5"])


def test_select_listed_names_unknown_frames_in_a_note():
    rows, notes = select_listed({"test": ["1.png", "gone.png"]}, ["0.png", "1.png", "2.png"], "train", "here")
    assert rows == [0, 2]
    assert "gone.png" in notes[-1]


@pytest.mark.parametrize("suffix", ["", ".png"])
def test_open_views_too_few_of_a_split_names_only_the_views_that_it_lacks(tmp_path, scene, suffix):
    for split, count in (("train", 1), ("test", 2)):
        names = [f"./{split}/r_{i}" for i in range(count)]
        write_transforms(tmp_path / f"transforms_{split}.json", scene, [f"{name}.png" for name in names])
        text = (tmp_path / f"transforms_{split}.json").read_text()
        (tmp_path / f"transforms_{split}.json").write_text(text.replace(".png", suffix))
    expected = f": 3 views, 1 of them for training; test/r_0{suffix}, test/r_1{suffix} are held out for testing"
    with pytest.raises(DataError, match=expected):
        open_views(tmp_path, "train", min_views=2)


def test_open_views_one_frame_of_transforms_is_counted_before_the_split(tmp_path, scene):
    write_transforms(tmp_path / "transforms.json", scene, ["a.png"])
    expected = "1 view, 0 of them for training; a.png is held out .* At least 2 are needed: give more images$"
    with pytest.raises(DataError, match=expected):
        open_views(tmp_path, "train", min_views=2)
    assert len(open_views(tmp_path, "test")) == 1
    names = ["a.png", "b.png"]
    write_transforms(tmp_path / "transforms.json", scene, names, train_filenames=names)
    with pytest.raises(
        DataError, match="0 of them for testing; a.png, b.png are held out .* At least 1 is needed: give"
    ):
        open_views(tmp_path, "test")
