from __future__ import annotations

import zipfile

import numpy as np
import pytest

from factorkit.data import load_labelled, make_procedural_dataset, open_dataset, prepare
from factorkit.data.files import strip_suffix
from factorkit.utils.errors import ConfigError, DataError


@pytest.fixture
def make_set(tmp_path, save):
    """make_set(images, labelled, pairs): a folder with i00.jpg ..., masks of the first `labelled`, and pair lines."""

    def make(images: int, labelled: int, pairs: str = "", name: str = "set"):
        for i in range(images):
            save(tmp_path / name / f"images/i{i:02}.jpg", size=(8, 8))
        for i in range(labelled):
            save(tmp_path / name / f"masks/i{i:02}.png", 255, (8, 8), "L")
        if pairs:
            (tmp_path / name / "near_duplicates.txt").write_text(f"# pairs\n{pairs}\n")
        return tmp_path / name

    return make


def stems(source) -> set[str]:
    return {strip_suffix(name) for name in source.names}


def test_holdout_auto_few_masks_holds_out_all_labelled(make_set):
    dataset = open_dataset(make_set(6, 3))
    assert dataset.name == "set"
    assert stems(dataset.train) == {"i03", "i04", "i05"}
    assert dataset.test_images.names == ["i00.jpg", "i01.jpg", "i02.jpg"]
    assert dataset.test_masks.names == ["i00.png", "i01.png", "i02.png"]
    assert load_labelled(dataset.test_images, dataset.test_masks, 4).foreground.all()


def test_holdout_auto_many_masks_holds_out_a_fifth(make_set):
    dataset = open_dataset(make_set(20, 15))
    assert len(dataset.test_images) == 3 and len(dataset.train) == 17
    assert len(open_dataset(make_set(2, 2, name="two")).test_images) == 1


def test_holdout_auto_is_limited(make_set, monkeypatch):
    monkeypatch.setattr("factorkit.data.datasets.AUTO_HOLDOUT_MAX", 2)
    assert len(open_dataset(make_set(20, 20)).test_images) == 2


@pytest.mark.parametrize("count", [1, 4, 9])
def test_holdout_number_holds_out_that_many(make_set, count):
    dataset = open_dataset(make_set(12, 10), holdout=count)
    assert len(dataset.test_images) == count and len(dataset.train) == 12 - count
    assert not stems(dataset.train) & stems(dataset.test_images)
    assert stems(dataset.test_images) == stems(dataset.test_masks) <= {f"i{i:02}" for i in range(10)}


def test_holdout_choice_is_stable_with_added_files(make_set):
    before = stems(open_dataset(make_set(10, 10), holdout=5).test_images)
    after = stems(open_dataset(make_set(14, 14), holdout=5).test_images)
    rest = {f"i{i:02}" for i in range(10)} - before
    assert before != {f"i{i:02}" for i in range(5)}, "not simply the first"
    assert not after & rest, "an old training image may not become a test image"


def test_near_duplicates_stay_on_one_side(make_set):
    pairs = [(0, 5), (5, 9), (1, 11), (2, 3)]  # 10 and 11 have no mask
    root = make_set(12, 10, "\n".join(f"i{a:02} i{b:02}" for a, b in pairs))
    for count in range(1, 11):
        dataset = open_dataset(root, holdout=count)
        train, test = stems(dataset.train), stems(dataset.test_images)
        assert not train & test and len(test) <= count
        for a, b in pairs:
            a, b = f"i{a:02}", f"i{b:02}"
            assert not (a in test and b in train) and not (b in test and a in train)
        assert ("i00" in test) == ("i05" in test) == ("i09" in test)


def test_near_duplicates_unlabelled_leave_training(make_set):
    with pytest.warns(UserWarning, match="1 of 4 names matches no image, the first is i99; .* i00.jpg"):
        dataset = open_dataset(make_set(6, 2, "i01 i04  # the same flower\ni99 i00"), holdout="masked")
    assert stems(dataset.train) == {"i02", "i03", "i05"} and stems(dataset.test_images) == {"i00", "i01"}


@pytest.mark.parametrize("pair", ["i01.jpg i04.JPG", "i01\ti04", "i01.jpg \t i04 # twins"])
def test_near_duplicates_file_accepts_names_with_or_without_suffix(make_set, pair):
    assert stems(open_dataset(make_set(6, 2, pair), holdout="masked").train) == {"i02", "i03", "i05"}


def test_near_duplicates_file_names_match_in_any_case_and_unicode_form(make_set, save):
    root = make_set(5, 2, "I00.JPG\tcafe\u0301 1.jpg\nsub\\x\ti01")
    save(root / "images/Caf\u00e9 1.jpg")
    save(root / "images/sub/X.jpg")
    assert stems(open_dataset(root, holdout="masked").train) == {"i02", "i03", "i04"}


def test_near_duplicates_file_accepts_spaces_and_dots(make_set, save):
    root = make_set(4, 2, "i00.jpg\tmy twin\ni01 v1.png")
    save(root / "images/my twin.jpg")
    save(root / "images/v1.png.jpg")
    assert stems(open_dataset(root, holdout="masked").train) == {"i02", "i03"}


def test_near_duplicates_file_of_unknown_images_raises(make_set):
    with pytest.raises(DataError, match="near_duplicates.txt: 2 of 2 names match no image, the first is img1;"):
        open_dataset(make_set(4, 2, "img1 img3"))


def test_holdout_none_trains_on_all_images(make_set):
    dataset = open_dataset(make_set(6, 2, "i00 i05"), holdout="none")
    assert len(dataset.train) == 6 and stems(dataset.test_images) == {"i00", "i01"}


@pytest.mark.parametrize("top", ["", "some set/"])
def test_open_dataset_zip_with_masks(make_set, tmp_path, top):
    root = make_set(6, 2, "i01 i05")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in root.rglob("*.*"):
            archive.write(path, f"{top}{path.relative_to(root)}")
    dataset = open_dataset(tmp_path / "set.zip")
    assert stems(dataset.train) == {"i02", "i03", "i04"}
    assert dataset.test_masks.names == ["i00.png", "i01.png"]
    assert dataset.test_masks.decode(0).mode == "L" and len(prepare(dataset.train, 4, progress=False)) == 3


def test_open_dataset_images_without_masks(tmp_path, save):
    save(tmp_path / "photos/a.png")
    for data in (tmp_path / "photos", np.zeros((2, 8, 8, 3), np.uint8)):
        dataset = open_dataset(data)
        assert len(dataset.train) in (1, 2) and dataset.test_images is None and dataset.test_masks is None
    with pytest.raises(ConfigError, match='photos has no masks.*"auto"'):
        open_dataset(tmp_path / "photos", holdout=1)


def test_holdout_invalid_raises(make_set, tmp_path):
    root = make_set(4, 4, "i00 i01\ni01 i02\ni02 i03")
    with pytest.raises(ConfigError, match="only 4 images with a mask"):
        open_dataset(root, holdout=5)
    with pytest.raises(DataError, match="no training images are left"):
        open_dataset(root, holdout="masked")
    with pytest.raises(DataError, match="more near-duplicates than that"):
        open_dataset(root, holdout=2)
    for wrong in (0, -1, True, "some", 2.5):
        with pytest.raises(ConfigError, match="holdout="):
            open_dataset(root, holdout=wrong)
    with pytest.raises(DataError, match="no such file or folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="make_procedural_dataset"):
        open_dataset(None)
    (root / "near_duplicates.txt").write_text("i00 i01\ni02\n")
    with pytest.raises(DataError, match="near_duplicates.txt, line 2: expected two names"):
        open_dataset(root)


def test_open_dataset_unmatched_masks_raise(make_set, save):
    root = make_set(2, 0)
    save(root / "masks/other.png", 1, mode="L")
    with pytest.raises(DataError, match="1 of 1 mask has no image: other.png"):
        open_dataset(root)


def test_make_procedural_dataset_separates_train_and_test():
    dataset = make_procedural_dataset(8, train=6, test=3, seed=1)
    images = prepare(dataset.train, 8).images
    labelled = load_labelled(dataset.test_images, dataset.test_masks, 8)
    assert images.shape == (6, 8, 8, 3) and labelled.images.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(labelled.foreground, np.asarray(dataset.test_masks.array)[..., 0])
    assert 0.05 < labelled.foreground.mean() < 0.5
    everything = np.concatenate([images, labelled.images]).reshape(9, -1)
    assert len(np.unique(everything, axis=0)) == 9, "a test image was trained on"
    with pytest.raises(ConfigError, match="test=0"):
        make_procedural_dataset(8, test=0)


@pytest.mark.parametrize(("name", "train", "test"), [("flowers17_128", 1288, 71), ("weizmann_horse_128", 262, 65)])
def test_open_dataset_real_data_has_expected_sizes(real_data, name, train, test):
    root = real_data(name)
    dataset = open_dataset(root)
    assert (len(dataset.train), len(dataset.test_images), len(dataset.test_masks)) == (train, test, test)
    pairs = [line.split() for line in (root / "near_duplicates.txt").read_text().splitlines() if line[0] != "#"]
    in_train, in_test = stems(dataset.train), stems(dataset.test_images)
    assert not any((a in in_train and b in in_test) or (b in in_train and a in in_test) for a, b in pairs)
    assert load_labelled(dataset.test_images.subset(range(2)), dataset.test_masks.subset(range(2)), 16).foreground.any()
