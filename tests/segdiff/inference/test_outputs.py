"""The output formats of a segmented folder, each read by its own library or by the format's description."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from factorkit.data.sources import PillowSource
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference import folder as segment_folder
from factorkit.segdiff.inference.cutout_region import choose_cutout_region
from factorkit.segdiff.inference.outputs import FORMATS, Outputs, make_image_files
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.errors import ConfigError, WriteError

TINY = {"resolution": 16, "regions": 3, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1}
TINY |= {"attention_resolutions": (), "norm_groups": 2, "device": "cpu", "threads": 1, "masks": "network"}
NEW = ("grey-labels", "cutout", "coco-polygons", "labelme", "yolo")


@pytest.fixture(scope="module")
def run():
    config = preset_config("demo", **TINY).resolved()
    torch.manual_seed(0)
    return SegdiffRun(config, config.build(), torch.device("cpu"), 0)


@pytest.fixture(autouse=True)
def by_colour(run, monkeypatch):
    """Regions by colour: 0 is dark, 1 red, 2 all else; they have holes and components as the images have."""

    def predict(images: torch.Tensor) -> torch.Tensor:
        red, green = images[:, 0], images[:, 1]
        classes = torch.where(red < 0, 0, torch.where(green < 0, 1, 2))
        return torch.nn.functional.one_hot(classes, 3).movedim(3, 1).float() * 0.98 + 0.01 / 1.5

    monkeypatch.setattr(run, "predictor", lambda *args: predict)


def draw_photo(size=(120, 90)) -> Image.Image:
    """A red ring with a white middle on a dark ground, and a small red disc: no ring touches the border."""
    photo = Image.new("RGB", size, (20, 30, 40))
    pen = ImageDraw.Draw(photo)
    pen.ellipse((20, 15, 80, 75), fill=(200, 20, 20))
    pen.ellipse((40, 35, 60, 55), fill=(240, 240, 240))
    pen.ellipse((92, 20, 108, 40), fill=(200, 20, 20))
    return photo


@pytest.fixture
def photos(tmp_path) -> Path:
    """Photos in subfolders, two of one stem, one turned by EXIF, one name that is not ASCII, one of a single colour."""
    folder = tmp_path / "photos"
    for name in ("a/one.png", "a/one.bmp", "b/blüte 花.png", "plain.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        photo = Image.new("RGB", (20, 30), (200, 20, 20)) if name == "plain.png" else draw_photo()
        photo.save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    draw_photo().transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=95)
    return folder


@pytest.fixture
def done(run, photos, tmp_path):
    return run.segment_folder(photos, tmp_path / "out", formats=(*NEW, "labels"), size=120, progress=False)


STEMS = {"a/one.png": "a/one.png", "a/one.bmp": "a/one", "b/blüte 花.png": "b/blüte 花"}
STEMS |= {"plain.png": "plain", "turned.jpg": "turned"}


def labels_of(done, name: str) -> np.ndarray:
    return np.asarray(Image.open(done.out / f"{STEMS[name]}_labels.png"))


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max((a | b).sum(), 1)


def test_grey_labels_have_one_channel_with_the_numbers_of_regions(done, photos):
    for name, stem in STEMS.items():
        grey = Image.open(done.out / f"{stem}_labels_grey.png")
        with Image.open(photos / name) as photo:
            assert grey.mode == "L" and grey.size == ImageOps.exif_transpose(photo).size
        assert np.array_equal(np.asarray(grey), labels_of(done, name)) and np.asarray(grey).max() < 3


def test_cutout_shows_the_inner_region_on_a_transparent_ground(done, photos):
    assert done.cutout == (
        "region 2, since it touches the border of 5 images least for its area; --region (region=) chooses another"
    )
    cutout = Image.open(done.out / "b/blüte 花_cutout_2.png")
    pixels = np.asarray(cutout)
    assert cutout.mode == "RGBA" and cutout.size == (120, 90)
    assert pixels[45, 50, 3] > 240 and pixels[45, 50, :3].tolist() == [240] * 3
    assert pixels[2, 2].tolist() == [0, 0, 0, 0]
    assert len(np.unique(pixels[..., 3])) > 2  # soft


def test_cutout_region_of_scores_or_of_the_user_is_taken(run, photos, tmp_path, monkeypatch):
    def cut(**options):
        return run.segment_folder(photos / "b", tmp_path / "cut", formats="cutout", progress=False, **options)

    monkeypatch.setattr(SegdiffRun, "scores", {"mapping": [1, 2]})
    assert cut().cutout == "regions 1 and 2, the foreground of the run's scores.json"
    alpha = np.asarray(Image.open(tmp_path / "cut/blüte 花_cutout_1+2.png"))[..., 3]
    assert alpha[45, 25] > 240 and alpha[45, 50] > 240 and alpha[2, 2] < 8
    assert cut().already == 1
    assert cut(region=1).already == 0 and (tmp_path / "cut/blüte 花_cutout_1.png").is_file()
    assert cut(region="1").cutout == "region 1"
    for region in (3, -1, "object"):
        with pytest.raises(ConfigError, match="this run has regions 0 to 2"):
            cut(region=region)


def test_cutout_without_labels_of_object_masks_is_region_0():
    config = preset_config("demo", **TINY | {"masks": "auto", "regions": 2}).resolved()
    for scores in (None, {}, {"mapping": []}, {"mapping": [0, 1]}, {"mapping": [[0, 1], [2, 3]]}):
        choice = choose_cutout_region(config, "auto", scores, PillowSource([]), lambda images: images)
        assert choice == ((0,), 'region 0, the object of a run with masks="auto"')


def test_coco_polygons_are_read_by_pycocotools(done):
    coco = pytest.importorskip("pycocotools.coco").COCO(str(done.polygons))
    assert sorted(image["file_name"] for image in coco.loadImgs(coco.getImgIds())) == sorted(STEMS)
    kinds = set()
    for image in coco.loadImgs(coco.getImgIds()):
        labels = labels_of(done, image["file_name"])
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[image["id"]]))
        assert {a["category_id"] - 1 for a in annotations} == set(np.unique(labels).tolist())
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert iou(mask, labels == annotation["category_id"] - 1) >= 0.98
            kinds.add(type(annotation["segmentation"]))
    assert kinds == {list, dict}  # polygons, and run lengths where there are holes


def test_labelme_files_have_the_documented_keys_and_redraw_to_the_mask(done, photos):
    for name, stem in STEMS.items():
        path = done.out / f"labelme/{stem}.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        keys = {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"}
        assert content.keys() == keys and content["imageData"] is None
        assert (path.parent / content["imagePath"]).resolve() == (photos / name).resolve()
        labels = labels_of(done, name)
        assert (content["imageHeight"], content["imageWidth"]) == labels.shape
        for k in range(3):
            drawn = np.zeros(labels.shape, bool)
            for shape in content["shapes"]:
                assert shape["shape_type"] == "polygon" and len(shape["points"]) > 2
                if shape["label"] == f"region {k}":
                    drawn |= redraw(np.array(shape["points"]), labels.shape)
            assert not (labels == k).any() or iou(drawn, labels == k) >= 0.98


def redraw(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Draw a polygon as labelme does, at four times the size since it draws the outline too."""
    image = Image.new("L", (shape[1] * 4, shape[0] * 4))
    ImageDraw.Draw(image).polygon([(x * 4, y * 4) for x, y in points.tolist()], fill=1, outline=1)
    return np.asarray(image)[2::4, 2::4] > 0


def test_yolo_lines_are_read_and_redraw_to_the_mask(done):
    assert (done.out / "yolo/classes.txt").read_text().splitlines() == ["region 0", "region 1", "region 2"]
    for name, stem in STEMS.items():
        labels = labels_of(done, name)
        drawn = np.zeros((3, *labels.shape), bool)
        for line in (done.out / f"yolo/labels/{stem}.txt").read_text(encoding="utf-8").splitlines():
            k, *values = line.split()
            corners = np.array(values, float).reshape(-1, 2)
            assert len(corners) > 2 and corners.min() >= 0 and corners.max() <= 1
            drawn[int(k)] |= redraw(corners * labels.shape[::-1], labels.shape)
        for k in np.unique(labels):
            assert iou(drawn[k], labels == k) >= 0.98
    assert not list(done.out.rglob(".unfinished*"))


def test_formats_with_another_tolerance_are_written_again(run, photos, tmp_path):
    def write(tolerance):
        options = {"formats": ("yolo", "coco-polygons"), "tolerance": tolerance, "progress": False}
        return run.segment_folder(photos / "b", tmp_path / "out", size=120, **options)

    path = tmp_path / "out/yolo/labels/blüte 花.txt"
    assert write(0).already == 0
    exact = len(path.read_text().split())
    assert write(0).already == 1
    assert write(2).already == 0 and len(path.read_text().split()) < 0.6 * exact
    for tolerance in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="tolerance="):
            write(tolerance)


def test_labelme_file_of_a_moved_photo_has_its_new_path(run, photos, tmp_path):
    def write():
        return run.segment_folder(photos / "b", tmp_path / "out", formats="labelme", progress=False)

    write()
    (photos / "b").rename(photos / "c")
    result = run.segment_folder(photos / "c", tmp_path / "out", formats="labelme", progress=False)
    assert result.segmented == 1
    path = tmp_path / "out/labelme/blüte 花.json"
    assert (path.parent / json.loads(path.read_text())["imagePath"]).exists()


@pytest.mark.parametrize(
    "name", ["labelme/blüte 花.json", "yolo/labels/blüte 花.txt", "yolo/classes.txt", "polygons.json"]
)
def test_new_formats_keep_a_file_of_the_user(run, photos, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(WriteError, match="was not written by factorkit"):
        run.segment_folder(photos / "b", tmp_path / "out", formats=NEW, progress=False)
    assert path.read_text() == "mine"


def test_full_disk_in_a_polygon_file_leaves_no_half_file_and_resumes(run, photos, tmp_path, monkeypatch):
    import factorkit.segdiff.inference.outputs as outputs

    write = outputs._write_text

    def fill(text, path):
        write(text[:5], path)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(outputs, "_write_text", fill)
    with pytest.raises(WriteError, match="same command again"):
        run.segment_folder(photos, tmp_path / "out", formats="yolo", progress=False)
    assert not list((tmp_path / "out").rglob("*.txt"))
    monkeypatch.undo()


def test_image_of_one_pixel_has_a_file_of_every_format():
    names = Outputs(FORMATS, 2, (0,)).file_names("x")
    files, record = make_image_files(
        names,
        Image.new("RGB", (1, 1)),
        np.zeros((1, 1), np.uint8),
        np.array([[[255]], [[0]]], np.uint8),
        Outputs(FORMATS, 2, (0,)),
        "x.png",
    )
    assert files.keys() == set(names.values())
    assert record["polygons"][0]["segmentation"] == [[0, 0, 1, 0, 1, 1, 0, 1]] and record["areas"] == [1, 0]


@pytest.mark.slow
def test_memory_of_many_photos_stays_flat(run, tmp_path, monkeypatch):
    """The images held at once do not grow with their number, and neither does what remains of a finished image."""
    import tracemalloc

    monkeypatch.setattr(segment_folder, "MAX_IMAGES_HELD", 4)
    monkeypatch.setattr(segment_folder, "OVERVIEW_IMAGES", 1)
    for i in range(80):
        (tmp_path / "many").mkdir(exist_ok=True)
        draw_photo((40, 30)).save(tmp_path / f"many/{i:03d}.png")
    peaks = []
    for count in (20, 80):
        files = sorted((tmp_path / "many").iterdir())[:count]
        tracemalloc.start()
        run.segment_folder(files, tmp_path / f"out{count}", formats=NEW, workers=1, progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 60 * 4096  # bytes: names, sizes and record of a finished image
