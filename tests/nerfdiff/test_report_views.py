"""The report of a run shows views beside renders at the size of their files, within a bound of time."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from factorkit.data.procedural.scene import make_procedural_views
from factorkit.nerfdiff import report_views
from factorkit.nerfdiff.report_views import save_own_size_views
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.utils.images import images_to_pixels

pytestmark = pytest.mark.usefixtures("short_flip_tests")


@pytest.fixture(scope="module")
def views():
    return make_procedural_views(10, 40, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("as_files", [True, False])
def test_train_report_shows_views_at_their_own_size_and_says_it_once(tmp_path, views, tiny, capsys, as_files):
    data = views
    if as_files:
        data = tmp_path / "photos"
        data.mkdir()
        for name, pixels in zip(views.names, images_to_pixels(views.images), strict=True):
            Image.fromarray(pixels).save(data / f"{name}.png")
    settings = {**tiny, "progress": True, "search": "dictionary"}
    run = train_nerfdiff(data, out=tmp_path / "run", **settings)
    assert "The report shows 3 views at 40 x 40 pixels" in capsys.readouterr().err
    assert "views_at_40x40" in (tmp_path / "run" / "report.html").read_text()
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / f"{run.step:06d}_views_at_40x40.png"))
    photo = images_to_pixels(views.images[[1 if as_files else 0]])[0]
    left = grid.shape[1] - 3 * 42  # cells of 40 pixels with gaps of 2, below a line of names
    assert np.abs(grid[20:60, left : left + 40].astype(int) - photo).max() <= 1  # rounded once more with opacity
    assert save_own_size_views(run, tmp_path / "run", data) == ""
    train_nerfdiff(data, out=tmp_path / "run", **settings)
    assert "The report shows" not in capsys.readouterr().err


@pytest.mark.slow
def test_save_own_size_views_slow_field_stays_at_the_size_of_the_training_and_says_so(
    tmp_path, views, tiny, monkeypatch
):
    monkeypatch.setattr(report_views, "MAX_SECONDS", 1e-9)
    run = train_nerfdiff(views, out=tmp_path / "run", **tiny)
    text = save_own_size_views(run, tmp_path / "run", views)
    assert text.startswith("The report shows views at 8 pixels only")
    assert not list((tmp_path / "run" / "samples").glob("*_views_at_*"))


def test_save_own_size_views_of_that_size_are_not_drawn_again(finished, scene_views):
    assert save_own_size_views(finished, finished.folder, scene_views) == ""
