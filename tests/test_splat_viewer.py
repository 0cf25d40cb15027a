"""The web viewer of examples/splat_viewer draws exported splat files; skipped where it is not installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.nerfdiff.export.splats import save_splats
from factorkit.nerfdiff.fields.gaussians import GaussianField

VIEWER = Path(__file__).resolve().parents[1] / "examples" / "splat_viewer"
INSTALLED = (VIEWER / "node_modules").is_dir() and shutil.which("node") and shutil.which("chromium")


@pytest.mark.slow
@pytest.mark.timeout(330)
@pytest.mark.skipif(not INSTALLED, reason="needs `npm install` in examples/splat_viewer, and Chromium")
@pytest.mark.parametrize("suffix", [".ply", ".spz"])
def test_viewer_draws_the_red_upper_half_above_the_blue_one(tmp_path, suffix):
    field = GaussianField(400).requires_grad_(False)
    field.opacities[:] = 4.0
    field.colors[:, 0] = torch.where(field.means[:, 2:] > 0, 1.7, -1.7) * torch.tensor([1.0, 0.0, -1.0])
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    save_splats(tmp_path / f"splats{suffix}", suffix, field, None, up)
    words = ["node", VIEWER / "view.js", "--screenshot", tmp_path / f"splats{suffix}", tmp_path / "image.png"]
    subprocess.run(words, check=True, timeout=320)
    pixels = np.asarray(Image.open(tmp_path / "image.png").convert("RGB")).astype(float)
    red, blue = (np.argwhere(pixels[..., i] - pixels[..., 2 - i] > 100) for i in (0, 2))
    assert min(len(red), len(blue)) > 1000 and red[:, 0].mean() < blue[:, 0].mean() - 20
