"""What the page of `factorkit app` does, without the page."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
from PIL import Image

from factorkit.data.open import open_source
from factorkit.engine.run_folder import CONFIG
from factorkit.segdiff import app
from factorkit.utils.errors import CheckpointError, ConfigError, DataError

TINY = {
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "mixture_steps": 1,
    "distil_steps": 1,
    "batch_size": 4,
    "sample_every": 0,
}


def test_segment_photos_of_any_mode_and_equal_names_writes_distinct_files(make_random_run, make_images, tmp_path):
    color = Image.fromarray(make_images(1)[0]).resize((40, 30))
    photos = [
        tmp_path / name for name in ("a/rose.png", "b/rose.png", "grey.jpg", "rose_cutout_9.png", "x_overlay.png")
    ]
    for mode, path in zip(("RGB", "RGB", "L", "RGBA", "P"), photos, strict=True):
        path.parent.mkdir(exist_ok=True)
        color.convert(mode).save(path)
    run, out = make_random_run(), tmp_path / "out"
    result = app.segment_photos(run, photos, out, "2")
    stems = ["rose", "rose.png", "grey", "rose_cutout_9", "x_overlay"]
    assert [path.name for path in result.overlays] == [f"{stem}_overlay.png" for stem in stems]
    assert [path.name for path in result.cutouts] == [f"{stem}_cutout_2.png" for stem in stems]
    assert len(result.files) == 5 * (1 + 3)
    assert all(Image.open(path).size == (40, 30) for path in [*result.overlays, *result.files])
    assert {Image.open(path).mode for path in result.cutouts} == {"RGBA"}
    with zipfile.ZipFile(result.archive) as archive:
        assert archive.namelist() == [path.name for path in result.files]
    assert result.summary == "5 photos segmented. Cut-outs: region 2."


def test_segment_photos_names_a_broken_photo_and_segments_the_others(make_random_run, make_images, tmp_path):
    Image.fromarray(make_images(1)[0]).save(tmp_path / "rose.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in ("broken.jpg", "rose.png")]
    with pytest.warns(UserWarning, match="broken.jpg"):
        result = app.segment_photos(make_random_run(), paths, tmp_path / "out")
    assert [path.name for path in result.overlays] == ["rose_overlay.png"]
    first, second = result.summary.splitlines()
    assert first.startswith("1 photo segmented. Cut-outs: region ") and "touches the border" in first
    assert second.startswith("Skipped: broken.jpg: not an image")


def test_segment_photos_without_a_readable_photo_or_region_is_refused(make_random_run, make_images, tmp_path):
    Image.fromarray(make_images(1)[0]).save(tmp_path / "rose.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    run = make_random_run()
    with pytest.raises(DataError, match="drop some"):
        app.segment_photos(run, [], tmp_path / "none")
    with pytest.raises(DataError, match="broken.jpg"):
        app.segment_photos(run, [tmp_path / "broken.jpg"], tmp_path / "one")
    with pytest.raises(ConfigError, match="regions 0 to 2"):
        app.segment_photos(run, [tmp_path / "rose.png"], tmp_path / "two", "7")


@pytest.mark.parametrize(("sides", "preset"), [((20, 30, 500), "fast32"), ((63,), "fast32"), ((20, 64, 500), "fast64")])
def test_choose_preset_follows_the_short_sides(sides, preset):
    assert app.choose_preset(open_source([Image.new("RGB", (side, 600)) for side in sides])) == preset


@pytest.mark.slow
def test_load_or_train_reuses_its_run_and_keeps_other_files(make_images, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(app.PRESETS, "fast32", app.PRESETS["fast32"] | TINY | {"resolution": 16})
    (tmp_path / "mine").mkdir()
    for i, image in enumerate(make_images(6)):
        Image.fromarray(image).save(tmp_path / "mine" / f"{i}.png")
    folder = tmp_path / "quick"
    run = app.load_or_train(tmp_path / "mine", folder, "cpu")
    assert run.folder == folder and run.config.masks == "auto" and run.step == 1
    assert "6 photos of" in (notes := capsys.readouterr().err) and "about 1 minute (fast32)" in notes
    written = (folder / CONFIG).stat().st_mtime_ns
    assert app.load_or_train(tmp_path / "mine", folder, "cpu").step == 1
    assert f"using the run in {folder}" in capsys.readouterr().err
    assert app.load_or_train(folder, tmp_path / "unused", "cpu").step == 1  # a run, not photos
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "mine" / "0.png")
    with pytest.raises(CheckpointError, match="other data"):
        app.load_or_train(tmp_path / "mine", folder, "cpu")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "own.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a factorkit run"):
        app.load_or_train(tmp_path / "mine", tmp_path / "notes", "cpu")
    assert (tmp_path / "notes" / "own.txt").read_text() == "mine" and (folder / CONFIG).stat().st_mtime_ns >= written
    with pytest.raises(DataError, match="no such file or folder"):
        app.load_or_train(tmp_path / "absent", folder, "cpu")
