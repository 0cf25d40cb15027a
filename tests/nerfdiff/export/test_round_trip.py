"""Exported cameras and images are read back as the same views."""

from __future__ import annotations

import pytest
import torch

from factorkit.data import make_procedural_views, open_views
from factorkit.data.procedural.scene import make_scene_field
from factorkit.nerfdiff.export import export


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("colmap", "colmap"), ("scene/transforms.json", "nerfstudio")])
def test_exported_views_are_read_back(tmp_path, name, kind):
    views = make_procedural_views(9, 16, seed=3)
    views.intrinsics[::2, 0, 0] += 1.5  # two cameras
    written = export(tmp_path / name, views, make_scene_field(), kind=kind, points=200)
    opened = open_views(written if written.is_dir() else written.parent)
    torch.testing.assert_close(opened.poses, views.poses, atol=1e-5, rtol=0)
    torch.testing.assert_close(opened.intrinsics, views.intrinsics, atol=1e-4, rtol=0)
    torch.testing.assert_close(opened.images, views.images, atol=0.012, rtol=0)
    torch.testing.assert_close(opened.masks, views.masks, atol=0.003, rtol=0)
    assert opened.layout == "object"
    assert [name.rsplit("/", 1)[-1].removesuffix(".png") for name in opened.names] == views.names
