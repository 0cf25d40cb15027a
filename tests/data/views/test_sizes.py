"""Views of several sizes and shapes in one scene."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.data.views.views import Views, resize_area
from factorkit.utils.errors import DataError

SIZE = 48


@pytest.fixture(scope="module")
def scene():
    return make_procedural_views(6, SIZE, seed=3)


def write(folder, scene, shapes):
    """Write views cropped about their centres to shapes (height, width), scaled by a factor, with own intrinsics."""
    frames = []
    for i, (height, width, factor) in enumerate(shapes):
        top, left = (SIZE - height) // 2, (SIZE - width) // 2
        image = scene.images[i, :, top : top + height, left : left + width]
        image = resize_area(image, height // factor, width // factor)
        path = folder / "images" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)
        k = scene.intrinsics[i] / factor
        lens = {"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2] - left / factor, "cy": k[1, 2] - top / factor}
        lens = {key: float(value) for key, value in lens.items()} | {"w": width // factor, "h": height // factor}
        frames.append({"file_path": f"images/{i}.png", "transform_matrix": scene.poses[i].tolist(), **lens})
    (folder / "transforms.json").write_text(json.dumps({"frames": frames}))


def test_open_views_sizes_of_one_shape_are_brought_to_the_smallest(tmp_path, scene):
    write(tmp_path, scene, [(SIZE, SIZE, 1 + i % 2) for i in range(6)])
    views = open_views(tmp_path)
    expected = scene.resize(SIZE // 2)
    torch.testing.assert_close(views.images, expected.images, atol=0.005, rtol=0)
    torch.testing.assert_close(views.intrinsics, expected.intrinsics)
    assert views.loss_masks is None and views.content_sizes is None
    assert "have 2 sizes and are brought to 24 x 24 pixels." in views.notes[-1]


@pytest.mark.parametrize("resolution", [None, 24, 17])
def test_open_views_shapes_that_differ_are_padded_and_the_padding_is_not_scored(tmp_path, scene, resolution):
    write(tmp_path, scene, [(SIZE, 36, 1) if i % 2 else (36, SIZE, 1) for i in range(6)])
    views = open_views(tmp_path, resolution=resolution)
    side = resolution or SIZE
    assert views.size == (side, side)
    assert "6 are padded" in views.notes[-1]
    short = views.content_sizes.min().item()
    assert views.loss_masks.mean().item() == pytest.approx(short / side)
    assert abs(short - 0.75 * side) <= 1
    for i in range(6):
        size = views.own_size(i)
        assert size == tuple(views.content_sizes[i].int().tolist())
        own = views.own_intrinsics(i, size)
        focal = scene.intrinsics[0, 0, 0].item() / SIZE
        assert own[0, 0].item() == pytest.approx(focal * side, rel=0.03)
        assert own[0, 2].item() == pytest.approx(size[1] / 2)
        assert own[1, 2].item() == pytest.approx(size[0] / 2)
    if resolution is None:  # padding aside, the views are the same
        inside = views.loss_masks > 0
        torch.testing.assert_close(views.images * inside, scene.images * inside, atol=0.005, rtol=0)
        torch.testing.assert_close(views.intrinsics, scene.intrinsics)


def test_open_views_portrait_and_landscape_photos_have_one_focal_length(tmp_path):
    for i, size in enumerate([(40, 30), (30, 40), (40, 30)]):
        Image.new("RGB", size, (20 * i, 90, 30)).save(tmp_path / f"{i}.png")
    views = open_views(tmp_path, resolution=20, fov=60)
    assert views.size == (20, 20)
    torch.testing.assert_close(views.intrinsics, views.intrinsics[:1].expand(3, 3, 3), atol=1e-4, rtol=0)
    assert views.images[0, :, 0, 0].tolist() == pytest.approx([0, 90 / 255, 30 / 255])


def test_resize_and_select_keep_content_sizes(scene):
    sizes = torch.tensor([[SIZE, SIZE // 2]] * 6)
    views = Views(scene.images, scene.names, scene.intrinsics, content_sizes=sizes)
    assert views.resize(12).content_sizes.tolist() == [[12.0, 6.0]] * 6
    assert views.select([1]).resize(12).own_size(0, 100) == (100, 50)


def test_open_views_one_focal_length_for_images_of_two_sizes_raises(tmp_path, scene):
    write(tmp_path, scene, [(SIZE, SIZE, 1 + i % 2) for i in range(6)])
    content = json.loads((tmp_path / "transforms.json").read_text())
    frames = [{key: frame[key] for key in ("file_path", "transform_matrix")} for frame in content["frames"]]
    (tmp_path / "transforms.json").write_text(json.dumps({"fl_x": 50.0, "frames": frames}))
    with pytest.raises(DataError, match=r"one `fl_x` .*\.png has .* pixels and .*\.png .*Add the `w` and `h`"):
        open_views(tmp_path)
    (tmp_path / "transforms.json").write_text(json.dumps({"fl_x": 50.0, "w": 48, "h": 48, "frames": frames}))
    assert open_views(tmp_path).intrinsics[:, 0, 0].tolist() == pytest.approx([25.0] * 6)
