"""`factorkit app`: the page, and what the command refuses. The page needs the extra `app`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from factorkit.cli.app import HOST, build_page, import_gradio, serve_page


def test_app_without_gradio_says_what_to_install_before_it_trains(photos, run_refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # Python's marker for a missing module
    assert "pip install 'factorkit[app]'" in run_refused("app", photos)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_app_refuses_a_region_that_the_run_lacks(run, run_refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    assert "regions 0 to 1" in run_refused("app", run, "--region", 2)


@pytest.mark.slow
def test_page_segments_photos_for_this_machine_alone(run, photos, run_refused, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs the extra app")
    from gradio_client import Client, handle_file

    import factorkit

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    gradio = import_gradio()
    page = build_page(gradio, factorkit.load(run, device="cpu"), tmp_path, "auto", "The run: Good.")
    try:
        url = serve_page(gradio, page, None, False)
        assert url.startswith(f"http://{HOST}:") and not page.analytics_enabled
        assert "The run: Good." in str(page.get_config_file())
        client = Client(url, verbose=False, download_files=str(tmp_path / "downloads"))
        image = handle_file(str(photos / "images" / "00.png"))
        summary, overlays, cutouts, files, archive = client.predict([image], "1", api_name="/segment")
        assert summary == "1 photo segmented. Cut-outs: region 1."
        assert len(overlays) == len(cutouts) == 1 and archive.endswith("regions.zip")
        names = ["00_cutout_1.png", "00_mask_0.png", "00_mask_1.png"]
        assert [Path(file).name for file in files] == names
        port = url.rstrip("/").rpartition(":")[2]
        assert "is not free; give another --port" in run_refused("app", run, "--no-browser", "--port", port)
        with pytest.raises(Exception, match="no photos yet"):
            client.predict([], "auto", api_name="/segment")
    finally:
        page.close(verbose=False)
