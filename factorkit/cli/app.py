"""``factorkit app``."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from factorkit.cli.base import Command, Device, Flag, OptionalInt, OptionalPath, Result, report_interruption
from factorkit.utils.errors import ConfigError, FactorkitError

if TYPE_CHECKING:
    from factorkit.segdiff.run import SegdiffRun

HOST = "127.0.0.1"  # the page has no password
STYLE = """
#cutouts img {background: repeating-conic-gradient(#ddd 0 25%, #fff 0 50%) 0 0 / 16px 16px}
.grid-wrap {max-height: 70vh}
.grid-container {padding-top: 2em !important; align-items: center}
.thumbnail-item, .thumbnail-item img {aspect-ratio: auto !important; height: auto !important}
"""  # tiles as high as their photos, below the title of the gallery


@dataclass(kw_only=True)
class App(Command):
    """Open a page in the browser that segments photos: drop them, pick a region, download cut-outs and masks.

    The page is served to this machine alone, and nothing is sent anywhere. With PHOTOS in place of RUN a quick run is
    trained on them first (a few minutes of one CPU core); the same photos use it again. Results are temporary files:
    download what you want to keep. Ctrl-C stops the page. It needs the extra `app`.

    Examples:
        factorkit app runs/photos
        factorkit app photos/
        factorkit app photos/ --out runs/holiday --port 9000 --no-browser
    """

    path: Positional[Annotated[Path, arg(metavar="RUN|PHOTOS")]]
    """A run folder or one .safetensors file; or photos, as `factorkit train segdiff --data` reads them."""
    out: OptionalPath = None
    """With PHOTOS: folder of the quick run. The default is runs/app-NAME."""
    region: str = "auto"
    """The region to begin with: a number, or auto as for `factorkit segment --region`."""
    port: OptionalInt = None
    """Port to serve at. The default is the first free one from 7860."""
    no_browser: Flag = False
    """Print the address, but open no browser."""
    device: Device = "auto"
    """Where to compute. auto uses a GPU if there is one."""

    def execute(self) -> Result:
        """Open the page and serve it until it is closed."""
        gradio = import_gradio()
        from factorkit.cli.evaluate import judge_run
        from factorkit.segdiff.app import load_or_train
        from factorkit.segdiff.inference.cutout_region import check_region
        from factorkit.segdiff.inference.segment import check_segment_settings
        from factorkit.segdiff.verdict import REPORT

        out = self.out or Path("runs") / f"app-{self.path.resolve().stem}"
        with report_interruption(out):
            run = load_or_train(self.path, out, self.device)
        check_segment_settings(run.config, None, "guided")
        check_region(self.region, run.config.num_leaf_regions)
        verdict = f"The run: {judge_run(run.folder, REPORT)[1][0]}" if run.folder else ""
        with tempfile.TemporaryDirectory(prefix="factorkit-app-") as folder:
            os.environ["GRADIO_TEMP_DIR"] = folder  # uploads, too, are deleted at the end
            page = build_page(gradio, run, Path(folder), self.region, verdict)
            try:
                url = serve_page(gradio, page, self.port, not self.no_browser)
            except (OSError, OverflowError) as error:
                problem = "no port from 7860 on is free" if self.port is None else f"--port {self.port} is not free"
                raise ConfigError(f"{problem}; give another --port, 1024 to 65535") from error
            print(f"{self.path} at {url}; Ctrl-C stops it", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
            page.close(verbose=False)
        return {"path": str(self.path), "url": url}, "stopped"


def import_gradio() -> Any:
    """Import gradio, which then sends no statistics; ConfigError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"the page needs gradio: pip install 'factorkit[app]' ({error})") from error
    return gradio


def build_page(gradio: Any, run: SegdiffRun, folder: Path, region: str, verdict: str) -> Any:
    """Build the page for a run and the verdict on it; results are written to new folders below ``folder``."""
    from factorkit.report.image_grid import palette
    from factorkit.segdiff.app import segment_photos

    def show(photos: list[str] | None, region: str) -> tuple[Any, ...]:
        try:
            result = segment_photos(run, photos or [], Path(tempfile.mkdtemp(dir=folder)), region)
        except FactorkitError as error:
            raise gradio.Error(str(error)) from error
        return result.summary, *([str(path) for path in paths] for paths in result[:3]), str(result.archive)

    colors = palette(run.config.num_leaf_regions)
    swatch = '<span style="background:rgb({},{},{});padding:0 .7em;margin-right:.5em"></span>region {}&emsp;'
    look: dict[str, Any] = {"format": "png", "object_fit": "contain", "height": "fit-content", "buttons": ["download"]}
    with gradio.Blocks(title="factorkit", analytics_enabled=False) as page:
        with gradio.Row():
            photos = gradio.Files(label="Photos: drop them here", type="filepath", height=170)
            with gradio.Column():
                numbers = [(f"region {k}", str(k)) for k in range(len(colors))]
                choice = gradio.Radio([("auto", "auto"), *numbers], value=region, label="Region to cut out")
                gradio.HTML("".join(swatch.format(*color, k) for k, color in enumerate(colors)))
        summary = gradio.Textbox(label="Result", info=verdict, lines=1, interactive=False)
        with gradio.Row():
            overlays = gradio.Gallery(label="Regions", **look)
            cutouts = gradio.Gallery(label="Cut-outs", elem_id="cutouts", **look)
        archive = gradio.DownloadButton("Download cut-outs and masks (.zip)")
        files = gradio.Files(label="One by one", interactive=False, height=170)
        outputs = [summary, overlays, cutouts, files, archive]
        gradio.on([photos.upload, photos.delete, choice.input], show, [photos, choice], outputs, api_name="segment")
    return page


def serve_page(gradio: Any, page: Any, port: int | None, open_browser: bool) -> str:
    """Serve the page to this machine alone and return its address."""
    _, url, _ = page.launch(
        server_name=HOST,
        server_port=port,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        run_history=False,
        ssr_mode=False,
        footer_links=[],
        css=STYLE,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return str(url)
