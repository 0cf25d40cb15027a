"""Structure from motion on rendered photos with known cameras, and its answers to bad input."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.data.views.cameras import Distortion, undistort
from factorkit.data.views.colmap import read_model
from factorkit.data.views.open import list_views
from factorkit.data.views.views import Views
from factorkit.metrics.pose import pose_errors
from factorkit.nerfdiff.search import decide
from factorkit.nerfdiff.stages import sfm
from factorkit.nerfdiff.stages.feature_images import FeatureImage, read_feature_images
from factorkit.nerfdiff.stages.matches import choose_pairs, keep_distant, measure_parallax
from factorkit.utils.errors import ConfigError, DataError
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo, render_turned

SIZE = (240, 320)
SMALL = (120, 160)
POSES = orbit(np.arange(0, 88, 11.0))

pytest.importorskip("pycolmap")


def to_images(pixels, masks=None, focal="unknown"):
    k = make_intrinsics_of(pixels[0].shape[:2], 1.0 if focal == "unknown" else 1.1)
    grey = [image.mean(-1).round().astype(np.uint8) for image in pixels]
    masks = masks or [None] * len(grey)
    return [FeatureImage(f"a {i}.png", g, m, k, focal) for i, (g, m) in enumerate(zip(grey, masks, strict=True))]


@pytest.fixture(scope="module")
def photos():
    return to_images([render_photo(pose, make_intrinsics_of(SIZE), SIZE)[0] for pose in POSES])


@pytest.mark.slow
def test_find_cameras_known_scene_poses_reprojection_and_resume(tmp_path, photos, monkeypatch):
    result = sfm.find_cameras(photos, tmp_path / "a", False, False)
    assert len(result.registered) == len(POSES) and result.error <= 0.5
    # those that suit so few pairs would leave 4.5 degrees
    assert result.focal_from == "guesses" and "focal lengths were found from guesses." in result.describe()[-1]
    model = read_model(tmp_path / "a")
    poses = torch.from_numpy(np.stack([model.cameras[image.name].pose for image in photos]))
    errors = pose_errors(poses, torch.from_numpy(POSES))
    assert errors.rotation_degrees.max() <= 0.3
    k = model.cameras["a 0.png"].intrinsics(*SIZE)
    assert abs(k[0, 0] / make_intrinsics_of(SIZE)[0, 0] - 1) < 0.01 and list(k[:2, 2]) == [160, 120]

    # The product's projection (OpenGL axes, pixel centres at +0.5) meets COLMAP's observations.
    colmap = sfm.import_pycolmap()
    stored = colmap.Reconstruction(result.model)
    lens = model.cameras["a 0.png"].lens
    for image in stored.images.values():
        pose = model.cameras[image.name].pose
        seen = image.get_observation_points2D()
        points = np.stack([stored.points3D[point.point3D_id].xyz for point in seen])
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        x, y = (torch.from_numpy(local[:, axis] / -local[:, 2]) for axis in (0, 1))
        x, y = lens(x, -y)
        pixels = np.stack([x, y], 1) * k.diagonal()[:2] + k[:2, 2]
        assert np.median(np.linalg.norm(pixels - np.stack([point.xy for point in seen]), axis=1)) <= 0.5

    # Killed in the features, in the matches and before the mapping, it ends with the same bytes.
    class KilledError(Exception):
        pass

    def kill(*args):
        raise KilledError

    for name, after in (("extract_features", 3), ("match_images", 20), ("_map_images", 0)):
        whole = getattr(sfm, name)
        part = {
            "extract_features": lambda c, p, i, b, whole=whole: (whole(c, p, i[:3], b), kill()),
            "match_images": lambda c, p, i, b, whole=whole: (whole(c, p, i[:20], b), kill()),
        }.get(name, kill)
        monkeypatch.setattr(sfm, name, part)
        with pytest.raises(KilledError):
            sfm.find_cameras(photos, tmp_path / "b", False, False)
        monkeypatch.setattr(sfm, name, whole)
        assert sfm.load_result(tmp_path / "b") is None, after
    sfm.find_cameras(photos, tmp_path / "b", False, False)
    for name in ("cameras.bin", "images.bin", "points3D.bin"):
        assert (tmp_path / "a" / sfm.MODEL / name).read_bytes() == (tmp_path / "b" / sfm.MODEL / name).read_bytes()
    monkeypatch.setattr(sfm, "extract_features", kill)  # a finished result is loaded
    assert sfm.find_cameras(photos, tmp_path / "a", False, False) == result


@pytest.mark.slow
def test_find_cameras_still_background_uses_the_object_and_says_so(tmp_path):
    pixels = [render_photo(pose, make_intrinsics_of(SIZE), SIZE, still=True)[0] for pose in POSES]
    result = sfm.find_cameras(to_images(pixels), tmp_path, False, False)
    assert "the background does not move while the object turns" in result.describe()[0]
    assert len(result.registered) == len(POSES)
    model = read_model(tmp_path)
    poses = torch.from_numpy(np.stack([model.cameras[name].pose for name in result.registered]))
    assert pose_errors(poses, torch.from_numpy(POSES)).rotation_degrees.max() <= 3


@pytest.mark.slow
def test_find_cameras_pure_rotation_has_no_model_and_says_why(tmp_path):
    pixels = render_turned(POSES[0], (-12.0, -6, 0, 6, 12), SIZE)
    result = sfm.find_cameras(to_images(pixels, focal="exact"), tmp_path, False, False)
    assert result.model is None and "no parallax" in result.describe()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("count", [7, 14])
@pytest.mark.parametrize("focal", ["exact", "estimate", "unknown"])
def test_find_cameras_pure_rotation_of_more_images_and_any_focal_length_has_no_model(tmp_path, count, focal):
    pixels = render_turned(POSES[0], np.linspace(-12, 12, count), SMALL)
    result = sfm.find_cameras(to_images(pixels, focal=focal), tmp_path, False, False)
    assert result.model is None and not result.registered and "no parallax" in result.describe()[-1]


@pytest.mark.slow
def test_find_cameras_model_of_hardly_any_points_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(sfm, "MIN_PARALLAX", 0.0)
    pixels = render_turned(POSES[0], np.linspace(-12, 12, 7), SMALL)
    result = sfm.find_cameras(to_images(pixels, focal="exact"), tmp_path, False, False)
    assert result.model is None and "registered none of 7 images" in result.describe()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("focal", ["exact", "estimate", "unknown"])
def test_find_cameras_wall_from_different_places_is_registered(tmp_path, focal):
    poses, far = orbit(np.arange(0, 77, 11.0), 50.0), np.array([0, 0, -100.0])
    pixels = [render_photo(pose, make_intrinsics_of(SMALL), SMALL, block=far)[0] for pose in poses]
    result = sfm.find_cameras(to_images(pixels, focal=focal), tmp_path, False, False)
    assert len(result.registered) == len(poses)
    model = read_model(tmp_path)
    found = torch.from_numpy(np.stack([model.cameras[name].pose for name in result.registered]))
    assert pose_errors(found, torch.from_numpy(poses)).rotation_degrees.max() <= 1


def test_choose_pairs_few_unordered_are_all_and_ordered_are_neighbours_and_loops():
    images = [FeatureImage(f"{i}.png", np.zeros((16, 16), np.uint8), None, np.eye(3), "unknown") for i in range(30)]
    assert len(choose_pairs(images, ordered=False)) == 30 * 29 // 2
    pairs = choose_pairs(images, ordered=True)
    near = {(i, j) for j in range(30) for i in range(j) if j - i <= 10}
    assert set(pairs) == near | {(0, 20)} and len(pairs) == len(set(pairs))
    mixed = [images[i] for i in np.random.default_rng(0).permutation(30)]  # numbers of the names count, by value
    named = {tuple(sorted(int(mixed[k].name[:-4]) for k in pair)) for pair in choose_pairs(mixed, ordered=True)}
    assert named == set(pairs) and all(i < j for i, j in choose_pairs(mixed, ordered=True))


def test_choose_pairs_many_unordered_have_similar_ones_too_and_ordered_close_loops():
    pixels = [np.full((16, 16), i % 60, np.uint8) for i in range(120)]  # 0 and 60 are alike
    images = [FeatureImage(f"{i}.png", p, None, np.eye(3), "unknown") for i, p in enumerate(pixels)]
    ordered, unordered = set(choose_pairs(images, ordered=True)), set(choose_pairs(images, ordered=False))
    assert ordered < unordered and {(i, i + 60) for i in range(60)} <= unordered
    loops = {(i, j) for j in range(0, 120, 10) for i in range(0, j, 10)}
    assert loops <= ordered and (0, 110) in ordered and (3, 63) not in ordered
    assert len(ordered) == sum(min(j, 10) for j in range(120)) + len(loops) - 11


def list_frames(count):
    return [FeatureImage(f"{i}.png", np.zeros((120, 160), np.uint8), None, np.eye(3), "exact") for i in range(count)]


def measure_plane(poses, ordered):
    """Return the parallax of exact homographies between cameras before the plane z = 0."""
    images, k = list_frames(len(poses)), make_intrinsics_of(SMALL)
    to_plane = [np.linalg.inv(pose)[:3, [0, 1, 3]] for pose in poses]  # of (x, y, 1), in OpenGL axes
    flipped = k @ np.diag([1.0, -1, -1])
    colmap = SimpleNamespace(
        TwoViewGeometryConfiguration=SimpleNamespace(PANORAMIC=1, PLANAR_OR_PANORAMIC=2),
        pair_id_to_image_pair=lambda number: (number // 1000 + 1, number % 1000 + 1),
    )
    pairs = choose_pairs(images, ordered)
    moves = [flipped @ to_plane[j] @ np.linalg.inv(flipped @ to_plane[i]) for i, j in pairs]
    database = SimpleNamespace(
        read_two_view_geometries=lambda: (
            [1000 * i + j for i, j in pairs],
            [SimpleNamespace(config=2, H=h, inlier_matches=[0]) for h in moves],
        ),
        read_all_cameras=lambda: [SimpleNamespace(camera_id=1, calibration_matrix=lambda: k)],
        read_all_images=lambda: [SimpleNamespace(image_id=i + 1, camera_id=1) for i in range(len(images))],
    )
    return measure_parallax(colmap, database, images, ordered)


@pytest.mark.parametrize("count", [12, 24, 72, 300])
def test_measure_parallax_denser_frames_of_a_slow_walk_have_as_much(count):
    photos = measure_plane(orbit(np.linspace(0, 8, 8), 50.0), ordered=False)
    assert 0.04 < photos < 0.1
    assert measure_plane(orbit(np.linspace(0, 8, count), 50.0), ordered=True) == pytest.approx(photos, rel=0.4)
    if count == 300:  # of which not all pairs are compared either
        assert measure_plane(orbit(np.linspace(0, 8, count), 50.0), ordered=False) == pytest.approx(photos, rel=0.4)


def test_keep_distant_frames_that_do_not_match_leave_all_pairs():
    images, near = list_frames(40), [(i, i + 1, None) for i in range(39)]
    assert keep_distant(near, images, ordered=True) == near
    few, enough = ([*near, *((i, i + 10, None) for i in range(0, 10 * n, 10))] for n in (2, 3))
    assert keep_distant(few, images, ordered=True) == few
    assert keep_distant(enough, images, ordered=True) == enough[-3:]
    assert keep_distant(enough, images, ordered=False) == enough  # all were compared


@pytest.mark.slow
def test_find_cameras_frames_of_a_slow_walk_are_registered_and_move(tmp_path):
    poses = orbit(np.linspace(0, 3.3, 31))
    images = to_images([render_photo(pose, make_intrinsics_of(SMALL), SMALL)[0] for pose in poses], focal="exact")
    result = sfm.find_cameras(images, tmp_path, True, False)
    assert len(result.registered) == 31, result.describe()
    assert len(result.describe()) == 1  # nothing of a background that does not move


STOPPED = """
import os, signal, sys, numpy as np
if sys.argv[2] == "own":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
from pathlib import Path
from factorkit.nerfdiff.stages import sfm
from factorkit.nerfdiff.stages.feature_images import FeatureImage
sfm.match_images = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
image = FeatureImage("a", np.zeros((64, 64), np.uint8), None, np.diag([64.0, 64, 1]), "unknown")
sfm.find_cameras([image, image], Path(sys.argv[1]), False, False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("handler", "code"), [("default", -signal.SIGTERM), ("own", 143)])
def test_find_cameras_sigterm_ends_as_without_pycolmap(tmp_path, handler, code):
    command = [sys.executable, "-c", STOPPED, str(tmp_path / "sfm"), handler]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_find_cameras_one_image_is_refused(tmp_path, photos):
    with pytest.raises(DataError, match="1 image: structure from motion needs at least 2"):
        sfm.find_cameras(photos[:1], tmp_path, False, False)


@pytest.mark.parametrize("masked", [True, False])
def test_find_cameras_nothing_to_match_says_so_after_a_line_for_each_stage(tmp_path, masked, capsys):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (64, 64, 3)) if masked else np.full((64, 64, 3), 90) for _ in range(3)]
    masks = [np.zeros((64, 64), bool)] * 3 if masked else None
    result = sfm.find_cameras(to_images(pixels, masks), tmp_path, False, True)
    text = capsys.readouterr().err
    assert all(line in text for line in ("sfm: features", "sfm: matches", "sfm: cameras of 3 images, all at once"))
    assert result.model is None and result.share == 0 and len(result.unregistered) == 3
    assert "no two images show enough of the same texture" in result.describe()[0]


@pytest.mark.slow
def test_find_cameras_ring_of_exact_cameras_is_closed_and_keeps_their_intrinsics(tmp_path):
    poses = orbit(np.arange(0, 360, 24.0))
    images = to_images([render_photo(pose, make_intrinsics_of(SIZE), SIZE)[0] for pose in poses], focal="exact")
    result = sfm.find_cameras(images, tmp_path, False, False)
    assert len(result.registered) == 15
    model = read_model(tmp_path)
    found = torch.from_numpy(np.stack([model.cameras[image.name].pose for image in images]))
    assert pose_errors(found, torch.from_numpy(poses)).rotation_degrees.max() <= 0.3
    np.testing.assert_allclose(model.cameras["a 3.png"].intrinsics(*SIZE), make_intrinsics_of(SIZE), atol=1e-9)


@pytest.mark.slow
def test_find_cameras_two_images_are_too_few_and_it_says_so(tmp_path, photos):
    result = sfm.find_cameras(photos[:2], tmp_path, False, False)
    assert result.model is None and "1 pair of images match, but too weakly" in result.describe()[0]


@pytest.mark.slow
def test_find_cameras_equal_images_have_no_model_and_say_so(tmp_path, photos):
    copies = [replace(photos[0], name=f"{i}.png") for i in range(4)]
    result = sfm.find_cameras(copies, tmp_path, False, False)
    assert result.model is None and "or images are equal" in result.describe()[0]
    assert "registered none of 4 images" in result.describe()[1]


@pytest.mark.slow
def test_find_cameras_duplicates_and_a_masked_image_are_handled(tmp_path, photos):
    hidden = replace(photos[5], name="hidden.png", mask=np.zeros(SIZE, bool))
    images = [*photos[:5], replace(photos[2], name="copy.png"), hidden]
    result = sfm.find_cameras(images, tmp_path, False, False)
    assert set(result.registered) >= {*(x.name for x in photos[:5]), "copy.png"}
    assert result.unregistered == ("hidden.png",) == result.plain
    text = result.describe()[-1]
    assert "left out of the training: hidden.png. 1 image has fewer than 30 features, by masks" in text
    model = read_model(tmp_path)
    twins = [model.cameras[name].pose for name in (photos[2].name, "copy.png")]
    np.testing.assert_allclose(*twins, atol=0.02)
    assert (
        sfm.find_cameras([*photos[:5], replace(photos[2], name="copy.png"), hidden], tmp_path, False, False) == result
    )


@pytest.mark.slow
def test_find_cameras_moving_object_is_left_to_the_floor(tmp_path):
    places = np.random.default_rng(0).uniform(-0.4, 0.4, (6, 3)) * [1, 1, 0]
    pixels = [
        render_photo(pose, make_intrinsics_of(SIZE), SIZE, block=place)[0]
        for pose, place in zip(POSES, places, strict=False)
    ]
    result = sfm.find_cameras(to_images(pixels), tmp_path, False, False)
    assert len(result.registered) >= 5
    model = read_model(tmp_path)
    rows = [int(name[2]) for name in result.registered]
    poses = torch.from_numpy(np.stack([model.cameras[name].pose for name in result.registered]))
    assert pose_errors(poses, torch.from_numpy(POSES[rows])).rotation_degrees.max() <= 2


@pytest.mark.slow
def test_find_cameras_two_cameras_have_their_own_lenses_which_are_removed_as_by_opencv(tmp_path):
    lens, other = Distortion(k1=-0.12), (320, 240)
    sizes = [SIZE if i % 2 else other for i in range(6)]
    ks = [make_intrinsics_of(size, 1.1 if size == SIZE else 1.4) for size in sizes]
    photos = [
        render_photo(pose, k, size, lens if size == SIZE else None)[0]
        for pose, k, size in zip(POSES, ks, sizes, strict=False)
    ]
    for i, pixels in enumerate(photos):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    listed = list_views(tmp_path).views
    result = sfm.find_cameras(read_feature_images(listed, False), tmp_path / "sfm", False, False)
    assert len(result.registered) == 6
    model = read_model(tmp_path / "sfm")
    poses = torch.from_numpy(np.stack([model.cameras[f"{i}.png"].pose for i in range(6)]))
    assert pose_errors(poses, torch.from_numpy(POSES[:6])).rotation_degrees.max() <= 0.5
    for i, (k, size) in enumerate(zip(ks, sizes, strict=True)):
        camera = model.cameras[f"{i}.png"]
        fitted = camera.intrinsics(*size)
        assert abs(fitted[0, 0] / k[0, 0] - 1) < 0.03
        assert abs(camera.lens.k1 - (lens.k1 if size == SIZE else 0)) < 0.03
        # OpenCV counts from pixel centres
        shifted = fitted - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        expected = cv2.undistort(photos[i], shifted, np.array([camera.lens.k1, 0, 0, 0]))
        image = torch.from_numpy(photos[i]).movedim(-1, 0) / 255
        result_pixels = undistort(image, fitted, camera.lens)[0].movedim(0, -1).numpy()
        inner = (slice(12, -12), slice(12, -12))
        assert np.abs(result_pixels[inner] - expected[inner] / 255).mean() < 0.01


def test_import_pycolmap_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    with pytest.raises(ConfigError, match=r"factorkit\[sfm\]"):
        sfm.import_pycolmap()


def test_decide_small_images_or_no_package_is_the_dictionary(tmp_path, monkeypatch):
    small = Views(
        torch.rand(8, 3, 32, 32),
        [str(i) for i in range(8)],
        torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(8, 3, 3),
    )
    assert decide(small, {})[0] == "dictionary"
    for i in range(8):
        Image.new("RGB", (300, 200)).save(tmp_path / f"{i}.png")
    assert "only 0 of" in decide(tmp_path, {})[1]
    monkeypatch.setitem(sys.modules, "pycolmap", None)
    name, reason = decide(tmp_path, {})
    assert name == "dictionary" and "structure from motion would be tried" in reason and "factorkit[sfm]" in reason


def test_read_feature_images_two_sizes_have_two_cameras(tmp_path):
    for i, size in enumerate([(80, 60), (60, 80), (80, 60)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    images = read_feature_images(list_views(tmp_path).views, False)
    assert len({image.camera_key for image in images}) == 2
    assert [image.focal for image in images] == ["unknown"] * 3


@pytest.mark.parametrize(
    ("priors", "is_calibrated", "count"), [((True, True), True, 1), ((True, False), False, 1), ((True, False), True, 2)]
)
def test_list_starts_unknown_focal_length_adds_a_calibrated_copy(tmp_path, priors, is_calibrated, count):
    def calibrate(path, options):
        path.write_text("calibrated")
        return is_calibrated

    colmap = SimpleNamespace(ViewGraphCalibrationOptions=dict, calibrate_view_graph=calibrate)
    (tmp_path / "work").mkdir()
    (tmp_path / sfm.DATABASE).write_text("guesses")
    cameras = [SimpleNamespace(has_prior_focal_length=prior) for prior in priors]
    starts = sfm._list_starts(colmap, tmp_path / sfm.DATABASE, tmp_path / "work", cameras)
    assert [path.read_text() for path in starts.values()] == ["guesses", "calibrated"][:count]
    assert list(starts) == ([""] if all(priors) else ["guesses", "the pairs of images"][:count])


@pytest.mark.parametrize(
    ("other", "is_kept"), [((9, 0.1), False), ((10, 0.3), False), ((10, 0.1), True), ((11, 0.9), True)]
)
def test_rank_run_more_images_then_lower_error_is_kept(other, is_kept):
    first, second = (
        [SimpleNamespace(num_reg_images=lambda n=n: n, compute_mean_reprojection_error=lambda e=e: e)]
        for n, e in ((10, 0.2), other)
    )
    assert (min(first, second, key=sfm._rank_run) is second) == is_kept
