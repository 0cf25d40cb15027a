from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from factorkit.engine.run_log import RunLog
from factorkit.report.curves import DARK, LIGHT, draw_curves
from factorkit.segdiff.verdict import REPORT, write_report
from factorkit.utils.errors import CheckpointError

SECTIONS = ["Headline numbers", "Latest sample grids", "Curves", "Scores", "Events", "Settings", "Environment"]
SPLIT = "split by position: position alone explains 0.95 > 0.8 of the masks' variance"
HEALTHY = {"eta_gap": 0.45, "position_share": 0.3, "boundary_length": 0.05, "flip_agreement": 0.9}
pytestmark = pytest.mark.usefixtures("reports_with_curves")

SCORES = {
    "acc": 0.94,
    "iou": 0.874,
    "dice": 0.93,
    "oracle_acc": 0.95,
    "oracle_iou": 0.885,
    "oracle_dice": 0.94,
    "fitted_on": 16,
    "scored": 55,
    "areas": [0.36, 0.64],
    "confidence": 0.97,
    "baselines": {
        "centre_disc": {"acc": 0.7, "iou": 0.571, "dice": 0.7},
        "2-means": {"acc": 0.9, "iou": 0.866, "dice": 0.9},
        "GrabCut": {"unavailable": "opencv is not installed"},
    },
}


class Page(HTMLParser):
    """The headings, tags, addresses and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.attributes, self.addresses, self.headings, self.words = [], set(), [], [], []
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        self.addresses += [v for k, v in attributes if k in ("src", "srcset", "href", "action", "data")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("h2", "h3"):
            self.headings.append(data)
        if "style" not in self.tags[-1:]:
            self.words.append(data)

    def images(self) -> list[Image.Image]:
        prefix = "data:image/png;base64,"
        return [Image.open(io.BytesIO(base64.b64decode(a[len(prefix) :]))) for a in self.addresses]


def write_run(folder: Path, failures: list[str] = [], scores: dict | None = SCORES, end: bool = True) -> Path:  # noqa: B006
    (folder / "samples").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 40, "preset": "fast32", "data": {"name": "daffodils"}}))
    with RunLog(folder) as log:
        log.event("start", step=0, message="on cpu")
        for step in (10, 20, 30, 40):
            log.event(
                "step",
                step=step,
                images=16 * step,
                loss=1 / step,
                loss_by_quarter=[0.4, None, 0.2, 0.1],
                areas=[0.4, 0.6],
                entropy=0.3,
                images_per_second=120.5,
                lr=1e-3,
                seconds=30.0,
                novelty={"a": 1},
            )
        log.event("alarms", step=40, **HEALTHY, areas=[0.4, 0.6], failures=failures)
        log.event("surprise", step=40, something="else")
        if end:
            log.event("end", step=40, message="finished")
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores))
    for step in range(0, 44, 4):
        Image.new("RGB", (300, 200), (step, 0, 0)).save(folder / "samples" / f"{step:06d}_segmentation.png")
    Image.new("RGB", (50, 70)).save(folder / "samples" / "000040_generated.png")
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Page:
    return Page(write_report(write_run(tmp_path_factory.mktemp("runs") / "daffodils")))


@pytest.mark.slow
def test_write_report_complete_run_has_every_section(complete):
    assert [h for h in complete.headings if h in SECTIONS] == SECTIONS
    assert "Not available yet" not in complete.text
    assert {"Alarms", "Loss", "Loss by quarter of t", "Area of each region", "Entropy of the masks"} <= set(
        complete.headings
    )
    assert "Finished at step 40 of 40." in complete.text
    for text in ("daffodils", "2 min 00 s", "120.5", "data.name", "0.874", "0.885", "opencv is not", "confidence"):
        assert text in complete.text


@pytest.mark.slow
def test_write_report_refers_to_nothing_outside_the_page(complete):
    assert complete.addresses and all(a.startswith("data:image/png;base64,") for a in complete.addresses)
    assert not re.search(r"https?://|url\(|@import", complete.source)
    assert not {"script", "link", "iframe", "a"} & set(complete.tags)


@pytest.mark.slow
def test_write_report_shows_newest_grid_large_and_thins_earlier_ones(complete):
    images = complete.images()
    steps = [image.convert("RGB").getpixel((0, 0))[0] for image in images if image.size == (300, 200)]
    assert steps[0] == 40 and steps[1:] == sorted(steps[1:])
    assert len(steps) == 1 + 8 and steps[1] == 0 and steps[-1] == 40
    assert [image.size for image in images].count((50, 70)) == 1
    assert "segmentation, step 40" in complete.headings


@pytest.mark.slow
def test_write_report_lists_baselines_below_the_run_best_first(complete):
    rows = [complete.text.index(name) for name in ("this run ", "2-means 0.9", "centre disc 0.7", "GrabCut opencv")]
    assert rows == sorted(rows)


@pytest.mark.slow
def test_write_report_has_curves_for_both_colour_schemes(complete):
    assert complete.tags.count("source") == 6
    assert "prefers-color-scheme: dark" in complete.source


@pytest.mark.slow
def test_write_report_empty_folder_names_what_is_missing(tmp_path):
    page = Page(write_report(tmp_path))
    assert [h for h in page.headings if h in SECTIONS] == SECTIONS
    assert page.text.count("Not available yet") == len(SECTIONS) - 1  # the environment is always there
    assert "No verdict yet" in page.headings and "Not started" in page.text


@pytest.mark.slow
def test_write_report_unfinished_run_is_called_unfinished(tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", scores=None, end=False)))
    assert "Not finished: step 40 of 40." in page.text
    assert "Not available yet: nothing was scored" in page.text


@pytest.mark.slow
def test_write_report_damaged_files_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text('{"steps": 4')
    (folder / "scores.json").write_text("[1, 2]")
    with open(folder / "log.jsonl", "ab") as file:
        file.write(b'{"event": "step", "step": 50, "lo')
    whole = (folder / "samples" / "000040_segmentation.png").read_bytes()
    (folder / "samples" / "000044_segmentation.png").write_bytes(whole[: len(whole) // 2])
    (folder / "samples" / "garbage.png").write_bytes(b"not an image")
    page = Page(write_report(folder))
    assert "segmentation, step 40" in page.headings and "garbage" not in page.text
    assert page.text.count("Not available yet") == 2


@pytest.mark.slow
def test_write_report_odd_values_do_not_raise(tmp_path):
    (tmp_path / "scores.json").write_text(json.dumps({"iou": None, "acc": "high", "baselines": {"a": 3, "b": {}}}))
    with RunLog(tmp_path) as log:
        log.event("step", step=1, loss=None, areas=[None, 0.5], loss_by_quarter="none", entropy=float("nan"))
        log.event("step", step="two", loss=[1])
        log.event("step", loss=1.0)
        log.event("alarms", step=1, eta_gap=None, failures=None)
        log.event("end", step=None, message=None)
    with open(tmp_path / "log.jsonl", "a") as lines:
        lines.write('{"event": "resume", "step": 1, "time": 1e300, "message": "in the year 3e292"}\n')
    page = Page(write_report(tmp_path))
    assert "in the year 3e292" in page.text
    assert "Area of each region" in page.headings and "Loss" not in page.headings


@pytest.mark.slow
def test_write_report_hostile_names_are_escaped(tmp_path):
    evil = "<script>alert('\"&')</script>"
    folder = write_run(tmp_path / "<script>run", [f"{evil}: {evil}"], {**SCORES, "iou": 0.1, evil: evil})
    (folder / "config.json").write_text(json.dumps({evil: evil}))
    (folder / "scores.json").write_text(
        json.dumps({**SCORES, "iou": 0.1, evil: [evil], "baselines": {evil: {"iou": 0.5}, "x": {"unavailable": evil}}})
    )
    with RunLog(folder) as log:
        log.event(evil, step=41, message=evil)
    Image.new("RGB", (9, 9)).save(folder / "samples" / "000040_<script>' onerror='x.png")
    page = Page(write_report(folder))
    assert "script" not in page.tags and "<script" not in page.source
    assert not any(name.startswith("on") for name in page.attributes)
    assert page.text.count(evil) > 6
    assert page.addresses and all(a.startswith("data:") for a in page.addresses)


@pytest.mark.slow
def test_write_report_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = write_report(tmp_path)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("factorkit.utils.files.os.replace", full)
    with pytest.raises(CheckpointError, match="no space left.*writable"):
        write_report(tmp_path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_report_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        write_report(tmp_path / "nowhere")


@pytest.mark.slow
def test_draw_curves_follow_the_theme_on_a_transparent_background():
    log = [{"event": "step", "step": s, "loss": 1 / s, "areas": [0.2, 0.8]} for s in (1, 2, 3)]
    light, dark = draw_curves(log, LIGHT, REPORT), draw_curves(log, DARK, REPORT)
    assert [f[0] for f in light] == [f[0] for f in dark] == ["Loss", "Area of each region"]
    for (_, _, a), (_, _, b) in zip(light, dark, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(a)).convert("RGBA"))
        assert pixels[0, 0, 3] == 0 and (pixels[..., 3] == 255).any()
        assert a != b


@pytest.mark.slow
def test_draw_curves_areas_have_the_colours_of_the_regions():
    log = [{"event": "step", "step": s, "areas": [0.25, 0.75]} for s in (1, 2)]
    pixels = np.asarray(Image.open(io.BytesIO(draw_curves(log, LIGHT, REPORT)[0][2])).convert("RGBA")).astype(int)
    blue = (np.abs(pixels[..., :3] - (0, 114, 178)).sum(-1) < 40) & (pixels[..., 3] > 200)
    orange = (np.abs(pixels[..., :3] - (230, 159, 0)).sum(-1) < 40) & (pixels[..., 3] > 200)
    assert 2.7 < orange.sum() / blue.sum() < 3.3
