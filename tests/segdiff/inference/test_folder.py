"""Segmentation of a folder of images: the files written, and resuming after every kind of interruption."""

from __future__ import annotations

import json
import shutil
import threading
import time
import tracemalloc
import warnings
from contextlib import closing
from pathlib import Path, PurePath

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.sources import FileSource
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference import folder as segment_folder
from factorkit.segdiff.inference.documents import MANIFEST, Manifest
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.errors import CheckpointError, ConfigError, WriteError
from factorkit.utils.output_record import OutputRecord

TINY = {
    "masks": "network",
    "resolution": 16,
    "regions": 3,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "device": "cpu",
    "threads": 1,
}
SIZES = [(30, 20), (18, 40), (16, 16), (9, 33), (64, 48), (64, 48)]


@pytest.fixture(scope="module")
def run():
    config = preset_config("demo", **TINY).resolved()
    torch.manual_seed(0)
    model = config.build()
    with torch.no_grad():  # The masks differ clearly between positions.
        model.masks.decoder.conv_out.weight.mul_(30)
    return SegdiffRun(config, model, torch.device("cpu"), 0)


@pytest.fixture
def photos(tmp_path):
    """photos(count): nested folders of noise images of several sizes."""

    def make(count=6):
        rng = np.random.default_rng(0)
        for i in range(count):
            path = tmp_path / "photos" / ("a" if i % 2 else "b/c") / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
            coarse.resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC).save(path)
        return tmp_path / "photos"

    return make


def read_pngs(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.png")}


def segment_quietly(run, *args, **options):
    return run.segment_folder(*args, progress=False, **options)


@pytest.mark.slow
def test_segment_folder_files_equal_segment(run, photos, tmp_path):
    folder, out = photos(), tmp_path / "out"
    result = segment_quietly(run, folder, out, formats=("labels", "masks", "overlays", "coco"))
    assert (result.segmented, result.already, result.skipped, result.regions) == (6, 0, {}, 3)
    annotated = json.loads((out / "annotations.json").read_text())
    names = {image["file_name"]: image for image in annotated["images"]}
    areas = []
    for path in sorted(folder.rglob("*.png")):
        name = path.relative_to(folder).as_posix()
        expected = run.segment(path)
        stem = (out / name).with_suffix("")
        labels = np.asarray(Image.open(f"{stem}_labels.png"))
        masks = expected.masks[0].sort(0).values
        sure = (masks[-1] - masks[-2] > 0.01).numpy()  # Images are batched, so the last bits differ.
        assert (labels == expected.labels[0].numpy())[sure].all() and sure.mean() > 0.9
        for k in range(3):
            grey = np.asarray(Image.open(f"{stem}_mask_{k}.png")).astype(float) / 255
            assert np.abs(grey - expected.masks[0, k].numpy()).max() < 0.01
        assert Image.open(f"{stem}_overlay.png").size == Image.open(path).size
        image = names[name]
        of_it = {a["category_id"]: a for a in annotated["annotations"] if a["image_id"] == image["id"]}
        counted = np.bincount(labels.ravel(), minlength=3)
        assert {k - 1: a["area"] for k, a in of_it.items()} == {k: n for k, n in enumerate(counted) if n}
        assert all(a["segmentation"]["size"] == [image["height"], image["width"]] for a in of_it.values())
        areas.append(counted / labels.size)
    assert result.areas == pytest.approx(np.mean(areas, 0))
    assert len({a["id"] for a in annotated["annotations"]}) == len(annotated["annotations"])
    assert [c["name"] for c in annotated["categories"]] == ["region 0", "region 1", "region 2"]
    assert result.overview.is_file() and not list(out.rglob(".unfinished*"))


def test_segment_folder_writes_requested_formats_and_adds_more(run, photos, tmp_path):
    folder, out = photos(2), tmp_path / "out"
    segment_quietly(run, folder, out, formats="labels")
    assert {name.rpartition("_")[2] for name in read_pngs(out)} == {"labels.png", "overview.png"}
    assert segment_quietly(run, folder, out, formats=("labels",)).already == 2
    result = segment_quietly(run, folder, out, formats=("labels", "coco"))
    assert result.already == 0 and result.annotations.is_file()
    for formats in ((), ("labels", "gif")):
        with pytest.raises(ConfigError, match="formats"):
            segment_quietly(run, folder, out, formats=formats)
    with pytest.raises(ConfigError, match="workers=0"):
        segment_quietly(run, folder, out, workers=0)


def test_segment_folder_brighter_image_changes_the_depth_of_all(run, tmp_path):
    values = np.linspace(0, 255, 20 * 20).reshape(20, 20).astype(np.uint16)
    (tmp_path / "deep").mkdir()
    for name, factor in (("a", 16), ("b", 1)):
        Image.fromarray(values * factor).save(tmp_path / f"deep/{name}.png")

    def segment():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = run.segment_folder(tmp_path / "deep", tmp_path / "out", progress=False)
        return result.segmented - result.already, " ".join(str(warning.message) for warning in caught)

    done, note = segment()
    assert done == 2 and "read as 12 bits" in note
    assert segment() == (0, "")
    Image.fromarray(values * 257).save(tmp_path / "deep/c.png")
    assert segment()[0] == 3


def test_segment_folder_second_call_redoes_only_changes(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_folder, "OVERVIEW_IMAGES", 1)
    folder, out = photos(), tmp_path / "out"
    segment_quietly(run, folder, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    recorded = []
    monkeypatch.setattr(
        FileSource, "read", lambda self, i, f=FileSource.read: (recorded.append(self.names[i]), f(self, i))[1]
    )
    assert segment_quietly(run, folder, out).already == 6 and not recorded
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    shutil.copy(folder / "a/01.png", folder / "b/c/02.png")
    (out / "a/03_mask_1.png").unlink()
    assert segment_quietly(run, folder, out).already == 4
    assert sorted(recorded) == ["a/03.png", "b/c/02.png"]
    for changes in ({"t": 500}, {"size": 24}, {"upsample": "bilinear"}):
        assert segment_quietly(run, folder, out, **changes).already == 0, changes


def test_segment_folder_killed_process_results_count(run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_folder, "OVERVIEW_IMAGES", 1)
    out = tmp_path / "out"
    segment_quietly(run, photos(), out)
    lines = (out / "segments.jsonl").read_bytes().splitlines(keepends=True)
    (out / "segments.jsonl").write_bytes(b"".join(lines[:3]))
    (out / "segments.1.jsonl").write_bytes(lines[3])
    (out / "segments.2.jsonl").write_bytes(lines[4] + lines[5][:40])  # killed while it wrote
    result = segment_quietly(run, tmp_path / "photos", out)
    assert (result.already, result.segmented) == (5, 6)
    assert sorted(p.name for p in out.glob("seg*.jsonl")) == ["segments.jsonl"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_segment_folder_stopped_call_resumes(run, photos, tmp_path, monkeypatch, end):
    """After every kind of interruption the files are complete, and the next call completes them."""
    monkeypatch.setattr(segment_folder, "OVERVIEW_IMAGES", 2)
    monkeypatch.setattr(segment_folder, "MAX_IMAGES_HELD", 1)
    folder, out, whole = photos(12), tmp_path / "out", tmp_path / "whole"
    segment_quietly(run, folder, whole)
    save, count = Image.Image.save, iter(range(1000))

    def fail(image, path, **options):
        if next(count) == 33:  # between the files of one image
            path.write_bytes(b"half of a")
            raise end
        save(image, path, **options)

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(WriteError if isinstance(end, OSError) else KeyboardInterrupt) as caught:
        segment_quietly(run, folder, out, workers=1)
    if isinstance(end, OSError):
        assert "No space left" in str(caught.value) and "same command again" in str(caught.value)
        assert caught.value.exit_code == 1
    monkeypatch.setattr(Image.Image, "save", save)
    written = read_pngs(out)
    assert 0 < len(written) < len(read_pngs(whole)) and not list(out.rglob(".unfinished*"))
    for name in written:
        Image.open(out / name).load()
    result = segment_quietly(run, folder, out)
    assert 0 < result.already < 12 and result.segmented == 12
    again, expected = read_pngs(out), read_pngs(whole)
    assert again.keys() == expected.keys()
    for name in expected:
        first, second = (np.asarray(Image.open(place / name)).astype(int) for place in (out, whole))
        assert (np.abs(first - second) > 2).mean() < 0.02, name


def test_segment_folder_full_disk_in_manifest_resumes(run, photos, tmp_path, monkeypatch):
    folder, out = photos(3), tmp_path / "out"
    add = segment_folder.Manifest.add

    def full(self, index, stamp, record):
        if index == 1:
            raise OSError(28, "No space left on device", str(self.out / MANIFEST))
        add(self, index, stamp, record)

    monkeypatch.setattr(segment_folder.Manifest, "add", full)
    with pytest.raises(WriteError, match=r"segments\.jsonl.*No space left"):
        segment_quietly(run, folder, out)
    monkeypatch.setattr(segment_folder.Manifest, "add", add)
    assert segment_quietly(run, folder, out).segmented == 3


def test_segment_folder_full_disk_keeps_old_summary_files(run, photos, tmp_path, monkeypatch):
    folder, out = photos(2), tmp_path / "out"
    segment_quietly(run, folder, out, formats=("labels", "coco"))
    before = (out / "annotations.json").read_bytes(), (out / "overview.png").read_bytes()
    Image.new("RGB", (20, 20), "blue").save(folder / "a/new.png")
    monkeypatch.setattr("os.replace", lambda a, b: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WriteError):
        segment_quietly(run, folder, out, formats=("labels", "coco"))
    assert before == ((out / "annotations.json").read_bytes(), (out / "overview.png").read_bytes())
    monkeypatch.undo()
    assert (
        len(json.loads(segment_quietly(run, folder, out, formats=("labels", "coco")).annotations.read_text())["images"])
        == 3
    )


def test_segment_folder_locked_folder_raises(run, photos, tmp_path):
    from factorkit.engine.run_folder import locked

    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(CheckpointError, match="segmenting into"):
        segment_quietly(run, photos(1), tmp_path / "out")


@pytest.mark.slow
def test_segment_folder_large_folder_bounds_memory(run, photos, tmp_path, monkeypatch):
    """Reading runs ahead of slow writing by a bounded number of pixels."""
    folder = photos(40)
    held, most, lock = [0], [0], threading.Lock()
    read, write = segment_folder._FolderJob._read, segment_folder._FolderJob._write

    def counted_read(job, index):
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        return read(job, index)

    def slow_write(job, index, prepared, masks):
        time.sleep(0.01)
        try:
            return write(job, index, prepared, masks)
        finally:
            with lock:
                held[0] -= 1

    monkeypatch.setattr(segment_folder._FolderJob, "_read", counted_read)
    monkeypatch.setattr(segment_folder._FolderJob, "_write", slow_write)
    monkeypatch.setattr(segment_folder, "MAX_IMAGES_HELD", 4)
    segment_quietly(run, folder, tmp_path / "a")
    assert 4 < most[0] <= 3 * 4 + 1
    held[0] = most[0] = 0
    monkeypatch.setattr(segment_folder, "MAX_PIXELS_HELD", 1000)  # fewer than one image has
    segment_quietly(run, folder, tmp_path / "b")
    assert most[0] <= 4


def test_segment_folder_progress_includes_earlier_results(run, photos, tmp_path, capsys):
    folder = photos(3)
    run.segment_folder(folder, tmp_path / "out")
    assert "3/3" in capsys.readouterr().err
    run.segment_folder(folder, tmp_path / "out")
    assert "3/3" in capsys.readouterr().err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segment_quietly(run, folder, tmp_path / "out")
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_segment_folder_work_per_image_is_constant(run, photos, tmp_path, monkeypatch):
    calls = {}
    for count in (10, 30):
        folder, out = photos(count), tmp_path / f"out{count}"
        created, plain = [0], Path._make_child if hasattr(Path, "_make_child") else Path.with_segments

        def counted(self, *args, created=created, plain=plain):
            created[0] += 1
            return plain(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(PurePath, plain.__name__, counted)
            segment_quietly(run, folder, out, formats="labels")
            assert segment_quietly(run, folder, out, formats="labels").already == count
        calls[count] = created[0] / count
    assert calls[10] > 1 and calls[30] < 1.5 * calls[10]


@pytest.fixture
def save(tmp_path):
    """save(name, colour): a photo."""

    def write(name, colour, size=(20, 16)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(colour)
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)
        return path

    return write


def files_of(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name[0] != "."}


def test_segment_folder_images_of_one_name_get_distinct_files_and_merged_annotations(run, save, tmp_path):
    out, paths = tmp_path / "out", [save(name, i) for i, name in enumerate(("A/img.png", "B/img.png", "C/other.png"))]
    expected = [run.segment(path).labels[0].numpy() for path in paths]
    for _ in range(2):  # stable when repeated
        for count, path in enumerate(paths, 1):
            result = segment_quietly(run, path.parent, out, formats=("labels", "coco"))
            images = json.loads(result.annotations.read_text())["images"]
            assert len(images) == 3 or len(images) == count
    stems = ["img", "img-2", "other"]
    for stem, labels in zip(stems, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(out / f"{stem}_labels.png")), labels), stem
    assert sorted(p.name for p in out.glob("*.png")) == sorted(
        [f"{stem}_labels.png" for stem in stems] + ["overview.png", "overview-2.png", "overview-3.png"]
    )
    coco = json.loads((out / "annotations.json").read_text())
    assert [(i["id"], i["file_name"]) for i in coco["images"]] == [(1, "img.png"), (2, str(paths[1])), (3, "other.png")]
    for number, labels in enumerate(expected, 1):
        areas = {a["category_id"] - 1: a["area"] for a in coco["annotations"] if a["image_id"] == number}
        assert areas == {k: int(n) for k, n in enumerate(np.bincount(labels.ravel(), minlength=3)) if n}
    before = files_of(out)
    assert segment_quietly(run, tmp_path / "A", out, formats=("labels", "coco")).already == 1
    assert files_of(out) == before


def test_segment_folder_annotations_load_in_pycocotools(run, save, tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    paths = [save(f"{folder}/img.png", i) for i, folder in enumerate("AB")]
    for path in paths:
        result = segment_quietly(run, path.parent, tmp_path / "out", formats=("labels", "coco"))
    loaded = coco.COCO(str(result.annotations))
    assert loaded.getImgIds() == [1, 2] and len(loaded.loadCats(loaded.getCatIds())) == 3
    loaded.info()
    for number, stem in ((1, "img"), (2, "img-2")):
        labels = np.asarray(Image.open(tmp_path / "out" / f"{stem}_labels.png"))
        for annotation in loaded.loadAnns(loaded.getAnnIds(imgIds=number, iscrowd=0)):
            assert np.array_equal(loaded.annToMask(annotation), labels == annotation["category_id"] - 1)
    results = [{**a, "score": 1.0} for a in loaded.dataset["annotations"]]
    assert len(loaded.loadRes(results).anns) == len(results)


def test_segment_folder_numbers_of_images_stay_when_photos_are_added(run, save, tmp_path):
    for i, name in enumerate(("b", "d")):
        save(f"photos/{name}.png", i)
    segment_quietly(run, tmp_path / "photos", tmp_path / "out", formats="coco")
    save("photos/a.png", 7)
    result = segment_quietly(run, tmp_path / "photos", tmp_path / "out", formats="coco")
    images = json.loads(result.annotations.read_text())["images"]
    assert {i["file_name"]: i["id"] for i in images} == {"b.png": 1, "d.png": 2, "a.png": 4}
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["overview.png"]


def test_segment_folder_keeps_files_of_the_user(run, save, tmp_path):
    """In the folder of the photos itself, and in an output folder where a result was corrected by hand."""
    save("photos/cat.png", 1)
    mine = save("photos/cat_labels.png", 2)
    before = mine.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(WriteError, match=r"cat_labels\.png is one of the inputs"):
            segment_quietly(run, tmp_path / "photos", tmp_path / "photos", overwrite=overwrite)
    with pytest.raises(WriteError, match=r"cat_labels\.png exists and was not written by factorkit.*--overwrite"):
        segment_quietly(run, tmp_path / "photos" / "cat.png", tmp_path / "photos")
    assert mine.read_bytes() == before and not (tmp_path / "photos" / "cat_overlay.png").exists()
    segment_quietly(run, tmp_path / "photos" / "cat.png", tmp_path / "photos", overwrite=True)
    assert Image.open(mine).mode == "P"
    mine.write_bytes(before)
    with pytest.warns(UserWarning, match=r"kept 1 result changed by hand: cat_labels\.png"):
        assert segment_quietly(run, tmp_path / "photos" / "cat.png", tmp_path / "photos").already == 1
    with pytest.raises(WriteError, match="changed after factorkit wrote it"):
        segment_quietly(run, tmp_path / "photos" / "cat.png", tmp_path / "photos", t=500)
    assert mine.read_bytes() == before


@pytest.mark.parametrize("name", ["annotations.json", "segments.jsonl", "overview.png"])
def test_segment_folder_keeps_summary_files_of_the_user(run, save, tmp_path, name):
    save("photos/cat.png", 1)
    (tmp_path / "photos" / name).write_text('{"images": []}\n')
    with pytest.raises(WriteError, match=f"{name} exists and was not written by factorkit"):
        segment_quietly(run, tmp_path / "photos" / "cat.png", tmp_path / "photos", formats=("labels", "coco"))
    assert (tmp_path / "photos" / name).read_text() == '{"images": []}\n'


def test_segment_folder_results_among_the_photos_are_not_segmented(run, save, tmp_path):
    for i in range(2):
        save(f"photos/{i}.png", i)
    folder = tmp_path / "photos"
    for out in (folder, folder / "segmented", folder / "second"):
        assert segment_quietly(run, folder, out).segmented == 2
        assert segment_quietly(run, folder, out).already == 2


def test_segment_folder_moved_photos_count_as_done(run, save, tmp_path):
    for i in range(2):
        save(f"photos/{i}.png", i)
    segment_quietly(run, tmp_path / "photos", tmp_path / "out")
    before = files_of(tmp_path / "out").keys()
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert segment_quietly(run, tmp_path / "moved", tmp_path / "out").already >= 0
    assert segment_quietly(run, tmp_path / "moved", tmp_path / "out", formats=("labels", "coco")).already >= 0
    assert files_of(tmp_path / "out").keys() == before | {"annotations.json"}
    images = json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]
    assert [image["id"] for image in images] == [1, 2]


def test_segment_folder_photos_at_a_former_path_get_new_numbers(run, save, tmp_path):
    """A moved photo takes its number along, also in later calls."""
    options = {"out": tmp_path / "out", "formats": ("labels", "coco")}
    save("photos/0.png", 0)
    segment_quietly(run, tmp_path / "photos", **options)
    (tmp_path / "photos").rename(tmp_path / "moved")
    segment_quietly(run, tmp_path / "moved", **options)
    save("photos/0.png", 1)
    segment_quietly(run, tmp_path / "photos", **options)
    images = json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]
    assert [image["id"] for image in images] == [1, 2]


RECORDS_CODE = ("utils/line_index.py", "utils/output_record.py", "utils/files.py", "inference/documents.py")


@pytest.mark.slow
def test_segment_folder_finished_images_take_little_memory(tmp_path):
    """The lists of finished images and files hold none of their text (it took 2,350 bytes a photo)."""
    names = [f"holiday/{i:06d}.jpg" for i in range(360)]
    source, regions = FileSource(tmp_path, names), ("labels.png", "overlay.png", "mask_0.png")
    with closing(Manifest(tmp_path, "key", source)) as manifest, OutputRecord(tmp_path) as record:

        def finish(first, end):
            for i in range(first, end):
                files = {f"holiday/{i:06d}_{region}": Path.touch for region in regions}
                sizes = record.write(files, manifest.inputs[i], stem=f"holiday/{i:06d}")
                manifest.add(i, [i, i], {"image_id": i + 1, "files": sizes, "areas": [0.5, 0.5], "depths": {"a": 12}})

        finish(0, 60)
        tracemalloc.start()
        finish(60, 360)
        snapshot = tracemalloc.take_snapshot()
        tracemalloc.stop()
    # threads of earlier tests may allocate meanwhile
    own = [tracemalloc.Filter(True, f"*{Path(name)}") for name in RECORDS_CODE]
    bytes_per_photo = sum(trace.size for trace in snapshot.filter_traces(own).traces) / 300
    assert 24 < bytes_per_photo < 250, bytes_per_photo


def test_segment_folder_names_images_unlike_the_training_set(photos, tmp_path):
    config = preset_config("demo", **TINY | {"masks": "auto"}).resolved()
    run = SegdiffRun(config, config.build(), torch.device("cpu"), 0)
    folder, options = photos(3), {"formats": ("labels",)}
    assert segment_quietly(run, folder, tmp_path / "familiar", **options).unlike == []
    assert run.segment(folder).unlike == (False,) * 3
    run.model.masks.typical.limits.zero_()
    for already in (0, 3):
        segments = segment_quietly(run, folder, tmp_path / "unlike", **options)
        assert segments.already == already and len(segments.unlike) == 3
    assert run.segment(folder).unlike == (True,) * 3
    assert run.segment(folder, t=5).unlike == (False,) * 3  # masks of noisy images are not judged
