"""The example runs as a user runs it, and its images show the scene."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "render_a_scene.py"


@pytest.mark.slow
def test_example_render_a_scene_writes_its_image(tmp_path):
    command = [sys.executable, str(EXAMPLE), str(tmp_path), "--size", "48", "--frames", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    scene, depth = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("scene.png", "scene_depth.png"))
    assert scene.shape == (48, 64, 3) and depth.shape == (48, 64)
    assert (depth[:6] == 0).all() and 0.3 < (depth > 0).mean() < 0.7  # sky above, the table across the middle
    assert depth[44, 32] > depth[24, 32] > 0  # the table's front is nearer than its middle
    assert scene[:6, :, 2].mean() > scene[:6, :, 0].mean() + 10  # the sky is blue
    normals = np.asarray(Image.open(tmp_path / "scene_normals.png")).astype(int)
    assert 0.1 < (abs(normals - [128, 128, 255]).max(-1) < 12).mean() < 0.5  # up, on the table
    assert (normals[depth == 0] == 128).mean() > 0.8  # none in the sky
    page = np.asarray(Image.open(tmp_path / "scene_overview.png")).astype(int)
    assert page.shape[0] > 48 and page.shape[1] > 64 and (page[:48, :64] == scene).all()
    assert scene[depth > 0].std() > 40  # bright and dark: light, shadow and chequers
    orbit = Image.open(tmp_path / "scene_orbit.gif")
    assert orbit.n_frames == 3 and orbit.size == (21, 16)
    first, second = (np.asarray((orbit.seek(i), orbit.convert("RGB"))[1]).astype(int) for i in (0, 1))
    assert np.abs(first - second).mean() > 2  # the camera moves
