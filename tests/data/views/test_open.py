"""One scene written in every file format is read as the same views."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.data.views.cameras import Distortion
from factorkit.metrics.pose import pose_errors
from factorkit.utils.errors import ConfigError, DataError

SIZE = 20


@pytest.fixture(scope="module")
def scene():
    return make_procedural_views(9, SIZE, seed=3)


def save_rgba(path, scene, index):
    """The scene over white, taken apart into straight colours and opacity; returns nothing more than 8 bits can say."""
    mask = scene.masks[index]
    colors = torch.where(mask > 0, (scene.images[index] - (1 - mask)) / mask.clamp_min(1e-6), torch.zeros(3, 1, 1))
    pixels = torch.cat([colors.clamp(0, 1), mask]).mul(255).round().byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def save_rgb(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).numpy()).save(path)


def check(views, scene, indices, poses=True):
    """The same images and cameras, as far as 8 bits and float32 reach."""
    torch.testing.assert_close(views.images, scene.images[indices], atol=0.012, rtol=0)
    torch.testing.assert_close(views.intrinsics, scene.intrinsics[indices], atol=1e-3, rtol=0)
    if poses:
        torch.testing.assert_close(views.poses, scene.poses[indices], atol=1e-5, rtol=0)


def blender_folder(folder, scene):
    fov = 2 * math.atan(SIZE / 2 / scene.intrinsics[0, 0, 0].item())
    for name, indices in (("train", range(5)), ("val", (5,)), ("test", range(6, 9))):
        frames = [{"file_path": f"./{name}/r_{i}", "transform_matrix": scene.poses[i].tolist()} for i in indices]
        content = {"camera_angle_x": fov, "frames": frames}
        (folder / f"transforms_{name}.json").write_text(json.dumps(content))
        for i in indices:
            save_rgba(folder / name / f"r_{i}.png", scene, i)
    return folder


def test_blender_scene_matches_original(tmp_path, scene):
    folder = blender_folder(tmp_path, scene)
    train = open_views(folder, "train")
    check(train, scene, range(5))
    torch.testing.assert_close(train.masks, scene.masks[:5], atol=0.003, rtol=0)
    assert train.layout == "object" and train.background.tolist() == [1, 1, 1]
    assert train.near == pytest.approx(2, rel=1e-4) and train.far == pytest.approx(6, rel=1e-4)
    assert open_views(folder, "test").names == ["test/r_6.png", "test/r_7.png", "test/r_8.png"]
    assert len(open_views(folder)) == 9
    check(open_views(str(folder / "transforms_val.json"), "train"), scene, [5])


def test_backgrounds_match_with_background(tmp_path, scene):
    folder = blender_folder(tmp_path, scene)
    black = open_views(folder, "test", background="black")
    torch.testing.assert_close(
        black.images, scene.select(slice(6, 9)).with_background("black").images, atol=0.012, rtol=0
    )
    noise = open_views(folder, "test", background="noise", seed=4)
    assert noise.background is None
    assert torch.equal(noise.images, open_views(folder, "test", background="noise", seed=4).images)
    outside = (noise.masks == 0).expand_as(noise.images)
    assert noise.images[outside].std() > 0.25
    with pytest.raises(ConfigError, match="partly transparent"):
        open_views(folder, "test", background=None)


def test_resolution_matches_resize_afterwards(tmp_path, scene):
    folder = blender_folder(tmp_path, scene)
    small, full = open_views(folder, "train", resolution=7), open_views(folder, "train")
    torch.testing.assert_close(small.images, full.resize(7).images)
    torch.testing.assert_close(small.intrinsics, full.resize(7).intrinsics)
    with pytest.raises(ConfigError, match="at most 20"):
        open_views(folder, "train", resolution=21)


def nerfstudio_folder(folder, scene, **more):
    k = scene.intrinsics[0] * 2  # as of images twice the size: the files are reduced copies
    content = {
        "fl_x": k[0, 0].item(),
        "fl_y": k[1, 1].item(),
        "cx": k[0, 2].item(),
        "cy": k[1, 2].item(),
        "w": 2 * SIZE,
        "h": 2 * SIZE,
        "camera_model": "OPENCV",
        **more,
        "frames": [{"file_path": f"images/{i}.png", "transform_matrix": scene.poses[i, :3].tolist()} for i in range(9)],
    }
    for i in range(9):
        save_rgb(folder / "images" / f"{i}.png", scene.images[i])
    (folder / "transforms.json").write_text(json.dumps(content))
    return content


def test_nerfstudio_scene_matches_original(tmp_path, scene):
    nerfstudio_folder(tmp_path, scene)
    views = open_views(tmp_path)
    check(views, scene, range(9))
    assert views.masks is None and views.layout == "object"
    assert views.background.tolist() == [1, 1, 1]  # seen along the borders
    assert open_views(tmp_path, "test").names == ["images/0.png", "images/8.png"]
    check(open_views(tmp_path / "transforms.json", "train"), scene, range(1, 8))


def test_nerfstudio_layout_uses_all_frames(tmp_path, scene):
    near = scene.poses[:, :3, 2] @ scene.poses[0, :3, 2] > 0.8
    few = [f"images/{i}.png" for i in torch.nonzero(near).flatten().tolist()]
    assert 2 <= len(few) < 9
    nerfstudio_folder(tmp_path, scene, test_filenames=few)
    views = open_views(tmp_path, "test")
    assert views.layout == "object" and views.near == pytest.approx(2, rel=1e-4)
    content = json.loads((tmp_path / "transforms.json").read_text())
    content["frames"] = [frame for frame in content["frames"] if frame["file_path"] in few]
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    views = open_views(tmp_path)
    assert views.layout == "forward" and views.near is None
    assert open_views(tmp_path, layout="object").layout == "object"


def test_nerfstudio_splits_masks_and_intrinsics_are_read(tmp_path, scene):
    content = nerfstudio_folder(tmp_path, scene, test_filenames=["images/2.png"], train_filenames=["images/4.png"])
    assert open_views(tmp_path, "test").names == ["images/2.png"]
    assert open_views(tmp_path, "train").names == ["images/4.png"]
    frame = content["frames"][2]
    frame |= {"mask_path": "ignore/2.png", "fl_x": 99.0}
    (tmp_path / "ignore").mkdir()
    scored = (scene.masks[2, 0] > 0.5).byte()
    Image.fromarray(scored.numpy() * 200).save(tmp_path / "ignore/2.png")
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    views = open_views(tmp_path)
    assert views.masks is None
    assert torch.equal(views.loss_masks[2, 0], scored.float()) and views.loss_masks[0].min() == 1
    assert any("mask_path" in note for note in views.notes)
    assert views.intrinsics[2, 0, 0].item() == pytest.approx(99 / 2)
    assert views.intrinsics[1, 0, 0].item() == pytest.approx(scene.intrinsics[1, 0, 0].item())


def test_nerfstudio_masks_of_moving_parts_are_loss_masks(tmp_path, scene):
    nerfstudio_folder(tmp_path, scene)
    moving = (scene.masks[2, 0] > 0.5).byte().numpy()
    Image.fromarray(moving * 255).save(tmp_path / "images/dynamic_mask_2.png")
    views = open_views(tmp_path)
    assert torch.equal(views.loss_masks[2, 0], torch.from_numpy(1 - moving).float()) and views.loss_masks[0].min() == 1
    assert any("1 mask of moving parts" in note for note in views.notes)


def test_nerfstudio_16_bit_images_have_one_depth(tmp_path, scene):
    nerfstudio_folder(tmp_path, scene)
    for i, factor in enumerate((16, 1)):
        pixels = np.asarray(Image.open(tmp_path / f"images/{i}.png").convert("L")).astype(np.uint16) * factor
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    with pytest.warns(UserWarning, match="2 PNG of 16 bits .* read as 12 bits"):
        views = open_views(tmp_path)
    assert views.images[0].mean() > 10 * views.images[1].mean()


def test_nerfstudio_distortion_is_removed(tmp_path, scene):
    """A lens is simulated with its own formula, inverted by iteration, on an image that is smooth everywhere."""
    lens = Distortion(k1=-0.12, k2=0.03, p1=0.01, p2=-0.006)
    x, y = np.meshgrid(np.arange(60) + 0.5, np.arange(60) + 0.5)
    x, y = torch.tensor((x - 30) / 50), torch.tensor((y - 30) / 50)
    straight_x, straight_y = x.clone(), y.clone()
    for _ in range(50):
        bent_x, bent_y = lens(straight_x, straight_y)
        straight_x, straight_y = straight_x + x - bent_x, straight_y + y - bent_y

    def pattern(x, y):
        return torch.stack([0.5 + 0.4 * torch.sin(9 * x + 1), 0.5 + 0.4 * torch.cos(8 * y - 2 * x), 0.5 + 0.3 * x])

    save_rgb(tmp_path / "a.png", pattern(straight_x, straight_y))
    frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist()}
    settings = {"fl_x": 50, "fl_y": 50, "w": 60, "h": 60, "k1": -0.12, "k2": 0.03, "p1": 0.01, "p2": -0.006}
    (tmp_path / "transforms.json").write_text(json.dumps({**settings, "frames": [frame]}))
    result = open_views(tmp_path).images[0]
    inner = slice(6, -6)
    torch.testing.assert_close(result[:, inner, inner], pattern(x, y).float()[:, inner, inner], atol=0.01, rtol=0)
    unbent = pattern(straight_x, straight_y).float()
    assert (unbent - pattern(x, y).float())[:, inner, inner].abs().max() > 0.08


def test_distortion_matches_opencv():
    lens = Distortion(k1=-0.2, k2=0.07, k3=-0.02, p1=0.013, p2=-0.008)
    x, y = torch.rand(2, 30, dtype=torch.float64) - 0.5
    points = np.stack([x, y, np.ones(30)], axis=1)
    coefficients = np.array([lens.k1, lens.k2, lens.p1, lens.p2, lens.k3])
    expected, _ = cv2.projectPoints(points, np.zeros(3), np.zeros(3), np.eye(3), coefficients)
    np.testing.assert_allclose(torch.stack(lens(x, y), dim=1), expected[:, 0], atol=1e-12)


def test_srn_scene_matches_original(tmp_path, scene):
    focal = scene.intrinsics[0, 0, 0].item()
    (tmp_path / "pose").mkdir()
    (tmp_path / "intrinsics.txt").write_text(f"{focal} {SIZE / 2} {SIZE / 2} 0.\n0. 0. 0.\n1.\n{SIZE} {SIZE}\n")
    for i in range(9):
        save_rgb(tmp_path / "rgb" / f"{i:06d}.png", scene.images[i])
        opencv = scene.poses[i].numpy() @ np.diag([1.0, -1, -1, 1])
        (tmp_path / "pose" / f"{i:06d}.txt").write_text(" ".join(repr(float(x)) for x in opencv.ravel()))
    views = open_views(tmp_path)
    check(views, scene, range(9))
    assert views.layout == "object" and views.near == pytest.approx(2, rel=1e-4)
    assert open_views(tmp_path, "test").names == ["rgb/000000.png", "rgb/000008.png"]


def test_posed_array_matches_original(tmp_path, scene):
    images = scene.images.permute(0, 2, 3, 1).numpy()
    poses, focal = scene.poses.numpy(), scene.intrinsics[0, 0, 0].item()
    np.savez(tmp_path / "tiny.npz", images=images, poses=poses, focal=focal)
    views = open_views(tmp_path / "tiny.npz")
    check(views, scene, range(9))
    assert torch.equal(views.images, scene.images)  # floats stay what they are
    many = np.tile(np.arange(9), 12)[:103]
    np.savez(tmp_path / "many.npz", images=images[many], poses=poses[many], focal=focal)
    check(open_views(tmp_path / "many.npz", "train"), scene, many[:100])
    check(open_views(tmp_path / "many.npz", "test"), scene, many[100:])


def llff_file(folder, poses, bounds, k, height, width):
    """poses_bounds.npy from OpenGL poses: columns down, right, backwards, place, (height, width, focal)."""
    lens = np.tile([height, width, k], (len(poses), 1))
    columns = [-poses[:, :3, 1], poses[:, :3, 0], poses[:, :3, 2], poses[:, :3, 3], lens]
    values = np.concatenate([np.stack(columns, axis=2).reshape(len(poses), 15), bounds], axis=1)
    np.save(folder / "poses_bounds.npy", values)


def test_llff_scene_matches_original(tmp_path, scene):
    bounds = np.stack([np.linspace(2, 3, 9), np.linspace(8, 10, 9)], axis=1)
    llff_file(tmp_path, scene.poses.double().numpy(), bounds, 8 * scene.intrinsics[0, 0, 0].item(), 8 * SIZE, 8 * SIZE)
    for i in range(9):
        save_rgb(tmp_path / "images_8" / f"image{i:03d}.png", scene.images[i])
    views = open_views(tmp_path, layout="forward")
    check(views, scene, range(9), poses=False)
    assert views.layout == "forward"
    errors = pose_errors(views.poses, scene.poses)
    assert errors.rotation_degrees.max() < 1e-3 and errors.translation.max() < 1e-5
    # The nearest point is 1 / 0.75 away, far in proportion, near a little before it.
    assert 1 / errors.alignment.scale.item() == pytest.approx(1 / 0.75 / 2, rel=1e-4)
    assert views.near == pytest.approx(0.9 / 0.75) and views.far == pytest.approx(5 / 0.75)
    torch.testing.assert_close(views.poses[:, :3, 3].mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert open_views(tmp_path, "test").names == ["images_8/image000.png", "images_8/image008.png"]
    torch.testing.assert_close(open_views(tmp_path, "train", layout="forward").poses, views.poses[1:8])


def test_llff_intrinsics_use_height_width_focal(tmp_path, scene):
    poses = scene.poses[:2].double().numpy()
    llff_file(tmp_path, poses, np.array([[1.0, 9.0], [1.5, 4.0]]), 30.0, 24, 40)
    for i in range(2):
        save_rgb(tmp_path / "images_4" / f"{i}.png", torch.rand(3, 12, 20))
    views = open_views(tmp_path, layout="forward")
    expected = torch.tensor([[15.0, 0, 10], [0, 15, 6], [0, 0, 1]])
    torch.testing.assert_close(views.intrinsics, expected.expand(2, 3, 3))
    assert views.size == (12, 20) and views.far == pytest.approx(9 / 0.75)


def write_llff(folder, scene, count):
    bounds = np.tile([[2.5, 6.0]], (count, 1))
    poses = scene.poses[:count].double().numpy()
    llff_file(folder, poses, bounds, 8 * scene.intrinsics[0, 0, 0].item(), 8 * SIZE, 8 * SIZE)


@pytest.mark.parametrize("way", ["view_imgs.txt", "colmap", "folder", "size"])
def test_llff_more_images_than_poses_are_matched_and_named(tmp_path, scene, way):
    """Poses of the views 0, 2, 4, 6 and 8; the other images have none."""
    chosen = [f"{i:03}.png" for i in range(0, 9, 2)]
    write_llff(tmp_path, scene.select(torch.arange(0, 9, 2)), 5)
    for i in range(9):
        save_rgb(tmp_path / f"images/{i:03}.png", scene.images[i])
    if way == "view_imgs.txt":
        (tmp_path / way).write_text("\n".join(chosen) + "\n")
    elif way == "colmap":
        (tmp_path / "sparse/0").mkdir(parents=True)
        (tmp_path / "sparse/0/cameras.txt").write_text("1 SIMPLE_PINHOLE 20 20 30 10 10\n")
        lines = [f"{i} 1 0 0 0 0 0 0 1 {name}\n" for i, name in enumerate(chosen)]
        (tmp_path / "sparse/0/images.txt").write_text("\n".join(lines))
    elif way == "folder":
        for i in range(0, 9, 2):
            save_rgb(tmp_path / f"images_2/{i:03}.png", scene.resize(SIZE // 2).images[i])
        save_rgb(tmp_path / "images_4/000.png", scene.resize(SIZE // 4).images[0])
    else:
        for i in range(1, 9, 2):
            save_rgb(tmp_path / f"images/{i:03}.png", scene.resize(SIZE // 2).images[i])
    views = open_views(tmp_path)
    assert [name.rsplit("/", 1)[-1] for name in views.names] == chosen
    assert "5" in views.notes[0]
    assert ("images_2/ is read" in views.notes[0]) == (way == "folder")
    expected = scene.select(torch.arange(0, 9, 2)).resize(views.size)
    torch.testing.assert_close(views.images, expected.images, atol=0.005, rtol=0)


def test_llff_more_images_than_poses_without_a_sign_are_refused(tmp_path, scene):
    write_llff(tmp_path, scene, 5)
    for i in range(9):
        save_rgb(tmp_path / f"images/{i:03}.png", scene.images[i])
    (tmp_path / "view_imgs.txt").write_text("000.png\n")
    with pytest.raises(DataError, match="5 poses, but .*images has 9 images.*view_imgs.txt"):
        open_views(tmp_path)


def write_posed(folder, scene, name="transforms.json"):
    frames = []
    for i in range(9):
        save_rgb(folder / f"images/{i}.png", scene.images[i])
        frames.append({"file_path": f"images/{i}.png", "transform_matrix": scene.poses[i].tolist()})
    (folder / name).write_text(json.dumps({"camera_angle_x": 0.7, "frames": frames}))


@pytest.mark.parametrize("form", ["Masks/{}.png", "segmentation/{}.png", "images/{}_mask.png", "images/mask_{}.png"])
def test_foreground_masks_beside_posed_images_are_found(tmp_path, scene, form):
    write_posed(tmp_path, scene)
    for i in range(9):
        save_rgb(tmp_path / form.format(i), scene.masks[i].round().expand(3, -1, -1))
    views = open_views(tmp_path, "test")
    torch.testing.assert_close(views.masks, scene.masks[[0, 8]].round(), atol=0.003, rtol=0)
    assert "9 foreground masks" in views.notes[-1]


def test_scene_some_folders_below_is_named(tmp_path, scene):
    write_posed(tmp_path / "a/b", scene)
    with pytest.raises(DataError, match=r"contains 1 scene \(a/b\)"):
        open_views(tmp_path)


def test_transforms_file_of_another_name_is_named(tmp_path, scene):
    write_posed(tmp_path, scene, "my_cameras.json")
    with pytest.warns(UserWarning, match=r"my_cameras.json lists cameras.* give the file"):
        assert open_views(tmp_path).poses is None
    assert open_views(tmp_path / "my_cameras.json").poses is not None
