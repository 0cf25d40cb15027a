"""The pages in headless Chromium: `factorkit app`, report.html and the viewer of scenes."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.cli.app import build_page, import_gradio, serve_page
from factorkit.data import draw_flowers, make_procedural_views
from factorkit.data.procedural.scene import make_scene_field
from factorkit.nerfdiff import viewer
from factorkit.nerfdiff.viewer import Viewer, ViewerScene
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.train import train_segdiff
from factorkit.segdiff.verdict import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 60_000  # milliseconds that nothing takes unless it hangs
LOCAL = ("127.0.0.1", "localhost", "")
TINY = {
    "preset": "demo",
    "resolution": 16,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "mixture_steps": 20,
    "distil_steps": 1,
    "steps": 2,
    "batch_size": 4,
    "sample_every": 2,
    "device": "cpu",
    "progress": False,
}
pytestmark = pytest.mark.slow


@dataclass
class Visit:
    """A page, the errors on its console, and the hosts other than this machine that it asked for anything."""

    page: object
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._record)

    def _record(self, request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob"):
            self.requests.append(request.url)
            if (address.hostname or "") not in LOCAL:
                self.hosts.add(address.hostname)

    def capture(self, name: str) -> np.ndarray:
        """Return the pixels of the window, uint8 [H, W, 3]; FACTORKIT_SCREENSHOTS names a folder that keeps them."""
        png = self.page.screenshot()
        if folder := os.environ.get("FACTORKIT_SCREENSHOTS"):
            Path(folder, f"{name}.png").write_bytes(png)
        return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the pages are opened with playwright")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(WAIT)
    yield Visit(context.new_page())
    context.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SegdiffRun:
    folder = tmp_path_factory.mktemp("page")
    pixels, _ = draw_flowers(16, 24, seed=1)
    return train_segdiff(pixels, out=folder / "run", **TINY)


def test_app_page_segments_dropped_photos_and_downloads_cutouts_and_masks(run, visit, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs the extra app")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    photos = []
    for i, image in enumerate(draw_flowers(2, 48, seed=2)[0]):
        photos.append(tmp_path / f"große Blume {i}.png")
        Image.fromarray(image).resize((64, 48)).save(photos[-1])
    gradio = import_gradio()
    page = build_page(gradio, run, tmp_path, "auto", "The run: Good.")
    try:
        visit.page.goto(serve_page(gradio, page, None, False))
        visit.page.locator("input[type=file]").first.set_input_files([str(path) for path in photos])
        visit.page.wait_for_function("document.querySelector('textarea')?.value.startsWith('2 photos segmented')")
        visit.page.get_by_label("region 1").check()
        visit.page.wait_for_function("document.querySelector('textarea').value.includes('Cut-outs: region 1.')")
        visit.page.wait_for_function(
            "document.querySelectorAll('#cutouts img').length >= 2 && "
            "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        )
        visit.capture("app")
        with visit.page.expect_download() as download:
            visit.page.get_by_text("Download cut-outs and masks").click()
        with zipfile.ZipFile(download.value.path()) as archive:
            names = archive.namelist()
            assert len(names) == 2 * 3 and names[0] == f"{photos[0].stem}_cutout_1.png"
            cutout = Image.open(io.BytesIO(archive.read(names[0])))
            assert (cutout.mode, cutout.size) == ("RGBA", (64, 48))
    finally:
        page.close(verbose=False)
    assert not visit.errors and not visit.hosts


@pytest.mark.usefixtures("reports_with_curves")
def test_report_shows_every_image_without_errors_or_requests(run, visit):
    report = write_report(run.folder)
    visit.page.goto(report.as_uri())
    loaded = visit.page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert len(loaded) >= 3 and all(loaded)
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # no sideways scrolling
    visit.capture("report")
    assert not visit.errors and visit.requests == [report.as_uri()]


def test_viewer_page_draws_the_scene_and_hides_cameras_without_errors(visit, monkeypatch):
    monkeypatch.setattr(viewer, "RENDER_SIDES", (64,))
    visit.page.set_viewport_size({"width": 800, "height": 600})
    views = make_procedural_views(6, 24, seed=1)
    scene = ViewerScene(7, make_scene_field(), views, torch.tensor([0.0, 0.0, 1.0]), true=views.poses)
    with Viewer(scene, port=18100) as opened:
        visit.page.goto(opened.url)
        visit.page.get_by_text("Step 7").wait_for()
        captures = []

        def is_complete(pixels: np.ndarray) -> bool:
            captures.append(pixels)  # cameras may come after the scene: nothing changes any more
            still = len(captures) > 3 and all(np.array_equal(pixels, earlier) for earlier in captures[-4:-1])
            return still and np.ptp(pixels[270:330, 360:440, 0]) > 60

        complete = wait_for(visit, "viewer", is_complete)
        boxes = visit.page.locator("input[type=checkbox]")  # viser's labels do not name their boxes
        for i in (-1, -2):
            boxes.nth(i).uncheck(force=True)
        wait_for(visit, "viewer-without-cameras", lambda pixels: (pixels != complete).any(2).mean() > 0.005)
        assert opened.server.scene.get_handle_by_name("/true").visible is False
    assert not visit.errors and not visit.hosts


def wait_for(visit: Visit, name: str, condition) -> np.ndarray:
    """Return the window's pixels once the condition holds of them."""
    for _ in range(60):
        if condition(pixels := visit.capture(name)):
            return pixels
        visit.page.wait_for_timeout(500)
    pytest.fail(f"the page never looked as expected: {name}, console {visit.errors}")
