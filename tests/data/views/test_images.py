"""Images and videos without poses, and real scenes if available."""

from __future__ import annotations

import math
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data import make_procedural_views, open_views
from factorkit.data.views.images import MAX_VIDEO_FRAMES
from factorkit.metrics.pose import pose_errors
from factorkit.utils.errors import ConfigError, DataError


def photo(seed, height=12, width=16):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def focal(views):
    return views.intrinsics[0, 0, 0].item()


def test_open_views_masks_of_moving_parts_are_loss_masks(tmp_path):
    for i in range(3):
        Image.fromarray(photo(i)).save(tmp_path / f"{i}.jpg")
    moving = np.zeros((12, 16), np.uint8)
    moving[:, 8:] = 1
    Image.fromarray(moving).save(tmp_path / "dynamic_mask_1.png")
    views = open_views(tmp_path)
    assert len(views) == 3 and views.masks is None
    assert torch.equal(views.loss_masks[1, 0], torch.from_numpy(1 - moving).float()) and views.loss_masks[0].min() == 1
    assert any("1 mask of moving parts" in note for note in views.notes)


def test_open_views_masks_none_leaves_the_folder_of_masks_out(tmp_path):
    for i in range(3):
        for folder, pixels in (("images", photo(i)), ("masks", photo(i)[..., 0] // 128 * 255)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    views = open_views(tmp_path, masks="none")
    assert len(views) == 3 and views.masks is None
    assert open_views(tmp_path).masks is not None


def test_open_views_of_more_than_8_bits_have_one_depth(tmp_path):
    for i, factor in enumerate((16, 1)):
        Image.fromarray(photo(3)[..., 0].astype(np.uint16) * factor).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="2 PNG of 16 bits .* read as 12 bits"):
        views = open_views(tmp_path)
    assert views.images[0].mean() > 12 * views.images[1].mean()


def test_open_views_folder_has_no_poses(tmp_path):
    for i in range(9):
        Image.fromarray(photo(i)).save(tmp_path / f"{i}.png")
    views = open_views(tmp_path)
    assert views.poses is None and views.masks is None and views.near is None and views.background is None
    expected = torch.from_numpy(np.stack([photo(i) for i in range(9)])).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(views.images, expected)
    assert focal(views) == pytest.approx(8 / math.tan(math.radians(25)))
    assert focal(open_views(tmp_path, fov=90.0, resolution=8)) == pytest.approx(4)
    assert open_views(tmp_path, "test").names == ["0.png", "8.png"]
    assert open_views(tmp_path, layout="forward").layout == "forward"
    array = np.stack([photo(i) for i in range(9)])
    assert torch.equal(open_views(array).images, views.images)


def test_open_views_exif_focal_length_is_used(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 26
    for name in ("a", "b"):
        Image.fromarray(photo(0, 30, 40)).save(tmp_path / f"{name}.jpg", exif=exif)
    # 26 mm on film 43.27 mm across its diagonal; these images are 50 pixels across.
    assert focal(open_views(tmp_path)) == pytest.approx(26 * 50 / 43.2666, rel=1e-4)
    assert focal(open_views(tmp_path, fov=90.0)) == pytest.approx(20)


def test_open_views_focal_length_is_known_from_exif_or_fov_only(tmp_path):
    (tmp_path / "plain").mkdir()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 26
    for i in range(2):
        Image.fromarray(photo(i)).save(tmp_path / "plain" / f"{i}.jpg")
    assert not open_views(tmp_path / "plain").has_focal
    assert open_views(tmp_path / "plain", fov=40.0).has_focal
    Image.fromarray(photo(2)).save(tmp_path / "plain" / "2.jpg", exif=exif)
    assert open_views(tmp_path / "plain").has_focal


def test_open_views_times_are_those_of_exif_if_all_images_have_one(tmp_path):
    for i, fields in enumerate([("2024:05:01 10:00:59", "5"), ("2024:05:01 10:01:01", None)]):
        exif = Image.Exif()
        exif.get_ifd(0x8769)[0x9003] = fields[0]
        if fields[1]:
            exif.get_ifd(0x8769)[0x9291] = fields[1]
        Image.fromarray(photo(i)).save(tmp_path / f"{i}.jpg", exif=exif)
    views = open_views(tmp_path)
    assert float(views.times[1] - views.times[0]) == pytest.approx(1.5)
    assert torch.equal(views.select([1]).times, views.times[1:])
    exif.get_ifd(0x8769)[0x9003] = "0000:00:00 00:00:00"
    Image.fromarray(photo(2)).save(tmp_path / "2.jpg", exif=exif)
    assert open_views(tmp_path).times is None


@pytest.mark.parametrize("apart", [False, True])
def test_open_views_masks_separate_foreground(tmp_path, apart):
    mask = np.zeros((12, 16), np.uint8)
    mask[3:9, 4:10] = 255
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for i in range(3):
        Image.fromarray(photo(i)).save(tmp_path / "images" / f"{i}.png")
        if i != 1:
            Image.fromarray(mask // 255 if i == 2 else mask).save(tmp_path / "masks" / f"{i}_mask.png")
    given = {"source": tmp_path / "images", "masks": tmp_path / "masks"} if apart else {"source": tmp_path}
    views = open_views(**given, background="black")
    assert views.names == ["0.png", "2.png"]
    torch.testing.assert_close(views.masks[:, 0], torch.from_numpy(mask / np.float32(255)).expand(2, -1, -1))
    cut = torch.from_numpy(photo(2) * (mask > 0)[..., None]).permute(2, 0, 1) / 255
    torch.testing.assert_close(views.images[1], cut)
    kept = open_views(**given, background=None)
    torch.testing.assert_close(kept.images[1], torch.from_numpy(photo(2)).permute(2, 0, 1) / 255)
    assert kept.background is None and kept.masks is not None


def test_open_views_alpha_becomes_mask(tmp_path):
    pixels = np.concatenate([photo(0), np.full((12, 16, 1), 255, np.uint8)], axis=2)
    pixels[:5, :, 3] = 51
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "b.png")
    views = open_views(tmp_path)
    assert views.masks[0, 0, 0, 0].item() == pytest.approx(0.2) and views.masks[1].min() == 1
    torch.testing.assert_close(views.images[0, :, :5], 0.2 * views.images[1, :, :5] + 0.8)


def test_open_views_of_views_splits_and_resizes():
    views = make_procedural_views(9, 16)
    assert open_views(views) is views
    assert open_views(views, "test", 8).names == ["view_000", "view_008"]
    assert open_views(views, "train", 8).size == (8, 8)


@pytest.fixture
def video(tmp_path):
    """write(count): a video whose frames grow brighter one by one."""

    def write(count):
        frames = np.stack([np.full((32, 48, 3), 20 + i * 200 // count, np.uint8) for i in range(count)])
        path = tmp_path / "walk.mp4"
        imageio.imwrite(path, frames, plugin="pyav", codec="libx264", fps=24)
        return path

    return write


@pytest.mark.slow
def test_open_views_video_gives_frames(video):
    views = open_views(video(10))
    assert len(views) == 10 and views.poses is None and views.size == (32, 48)
    brightness = views.images.mean((1, 2, 3)) * 255
    torch.testing.assert_close(brightness, 20 + torch.arange(10) * 20.0, atol=6, rtol=0)
    assert open_views(video(10), "test").names == ["walk_0.png", "walk_8.png"]


@pytest.mark.slow
def test_open_views_video_with_masks_of_its_frames_reads_them_at_the_reduced_size(video, tmp_path):
    path, masks = video(9), tmp_path / "masks"
    masks.mkdir()
    height, width = open_views(path).size
    for i in range(9):
        left = np.zeros((height, width), np.uint8)
        left[:, : width // 2] = 255
        Image.fromarray(left).save(masks / f"walk_{i}.png")
    views = open_views(path, "train", width // 2, masks=masks)
    assert len(views) == 7 and views.size[1] == width // 2
    assert (views.masks[..., : width // 4] == 1).all() and (views.masks[..., width // 4 :] == 0).all()


@pytest.mark.slow
def test_open_views_long_video_is_subsampled(video):
    views = open_views(video(300), resolution=24)
    assert len(views) == MAX_VIDEO_FRAMES and views.size == (16, 24)
    assert views.names[0] == "walk_000.png" and views.names[-1] == "walk_299.png"
    assert focal(views) == pytest.approx(12 / math.tan(math.radians(25)))


def test_open_views_invalid_video_raises(tmp_path):
    for content in (b"", b"nothing of a video" * 100):
        path = tmp_path / "broken.mp4"
        path.write_bytes(content)
        with pytest.raises(DataError, match="broken.mp4: this video cannot be decoded"):
            open_views(path)


@pytest.mark.slow
def test_open_views_truncated_video_raises(video):
    path = video(40)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="cannot be decoded|without a single frame"):
        open_views(path)


@pytest.mark.slow
def test_open_views_without_decoder_names_extra(video, monkeypatch):
    path = video(2)
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    with pytest.raises(ConfigError, match=r"factorkit\[video\]"):
        open_views(path)


def test_open_views_unread_cameras_warn(tmp_path):
    for i in range(2):
        Image.fromarray(photo(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "cams").mkdir()
    (tmp_path / "cams/0_cam.txt").touch()
    with pytest.warns(UserWarning, match=r"cams/0_cam.txt looks like MVSNet's cameras.*transforms.json") as message:
        views = open_views(tmp_path)
    assert views.poses is None and len(message) == 1


def test_open_views_masks_for_posed_array_are_read(tmp_path):
    views = make_procedural_views(2, 8)
    np.savez(tmp_path / "a.npz", images=views.images.permute(0, 2, 3, 1), poses=views.poses, focal=9.0)
    opened = open_views(tmp_path / "a.npz", masks=np.ones((2, 8, 8), bool))
    assert opened.masks.min() == 1 and opened.poses is not None


@pytest.mark.slow
def test_open_views_real_lego(real_data):
    folder = real_data("nerf_lego_200")
    train = open_views(folder, "train", 50)
    assert len(train) == 100 and train.layout == "object" and train.near == pytest.approx(2.0, abs=0.03)
    # The silhouettes lie around the projection of the point all cameras look at.
    down = torch.arange(50) + 0.5
    middle = (train.masks[:, 0] * down[:, None]).sum((1, 2)) / train.masks[:, 0].sum((1, 2))
    assert (middle - 25).abs().max() < 10
    tiny = open_views(folder / "lego_tiny_100.npz", "train", 50)
    torch.testing.assert_close(tiny.poses, train.poses, atol=1e-5, rtol=0)
    torch.testing.assert_close(tiny.intrinsics, train.intrinsics, atol=1e-2, rtol=0)
    assert tiny.background.tolist() == [0, 0, 0]
    torch.testing.assert_close(train.with_background("black").images, tiny.images, atol=0.01, rtol=0)


def test_open_views_real_fern(real_data):
    folder = real_data("llff_fern_504")
    views = open_views(folder, resolution=126)
    cameras = np.load(folder / "cameras.npz")
    poses = torch.eye(4).double().repeat(20, 1, 1)
    poses[:, :3] = torch.from_numpy(cameras["c2w"])
    errors = pose_errors(views.poses, poses)
    assert errors.rotation_degrees.max() < 1e-3 and errors.translation.max() < 1e-4
    assert focal(views) == pytest.approx(float(cameras["focal"]) / 4, rel=1e-4)
    assert len(open_views(folder, "test", 63)) == 3 and len(open_views(folder, "train", 63)) == 17
