"""Splat files: what independent readers find in them, the way back, and files of another kind."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

import factorkit
from factorkit import rendering
from factorkit.cli.main import main
from factorkit.cli.view import load_contents, newest_checkpoint
from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.export import kind_of
from factorkit.nerfdiff.export.splats import read_splats, save_ply, save_splats
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.nerfdiff.fields.kinds import GridField
from factorkit.nerfdiff.rays import CameraModel, render_views
from factorkit.nerfdiff.splat_scene import UP, SplatScene
from factorkit.nerfdiff.viewer import Viewer, fov_and_aspect, render_viewpoint
from factorkit.utils.errors import ConfigError, DataError

PlyData = pytest.importorskip("plyfile").PlyData
Z_UP = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)


def make_field(count=60, seed=0):
    torch.manual_seed(seed)
    field = GaussianField(count, seed)
    for name, scale in (("colors", 0.5), ("directional", 0.2), ("opacities", 1.0), ("log_scales", 0.3)):
        getattr(field, name).data += scale * torch.randn_like(getattr(field, name))
    return field.requires_grad_(False)


def render(field, pose, size=(20, 24)):
    intrinsics = torch.tensor([[1.2, 0, 0.5], [0, 1.44, 0.5], [0, 0, 1]])
    return render_views(field, pose, CameraModel(intrinsics, torch.tensor([0.2, 0.4, 0.6])), size, 1).color


@pytest.fixture
def splats(tmp_path):
    path = tmp_path / "splats.ply"
    save_ply(path, make_field(), None)
    return path


def read(path):
    table = PlyData.read(path)["vertex"]
    groups = {"xyz": list("xyz"), "scale": 3, "rot": 4, "f_dc": 3, "f_rest": 45}
    names = {k: v if isinstance(v, list) else [f"{k}_{i}" for i in range(v)] for k, v in groups.items()}
    columns = {k: torch.tensor(np.stack([table[n] for n in v], 1)) for k, v in names.items()}
    return columns | {"opacity": torch.tensor(np.array(table["opacity"]))}


def test_ply_holds_the_gaussians_for_an_independent_reader(splats):
    field, table = make_field(), read(splats)
    torch.testing.assert_close(table["xyz"], field.means.data)
    torch.testing.assert_close(table["scale"], field.log_scales.data)
    torch.testing.assert_close(table["rot"], torch.nn.functional.normalize(field.quaternions.data, dim=1))
    torch.testing.assert_close(table["opacity"], field.opacities.data)
    torch.testing.assert_close(table["f_dc"], field.colors.data[:, 0])
    torch.testing.assert_close(table["f_rest"].unflatten(1, (3, 15)).transpose(1, 2), field.directional.data)


def test_ply_read_and_written_again_is_the_same_file(splats, tmp_path):
    scene = factorkit.load(splats)
    field, own = scene.model.field, make_field()
    for name in ("means", "log_scales", "opacities", "colors", "directional"):
        assert torch.equal(getattr(field, name), getattr(own, name))
    torch.testing.assert_close(field.quaternions, torch.nn.functional.normalize(own.quaternions, dim=1))
    again = scene.export(tmp_path / "again.ply")
    one, other = (torch.cat([x.flatten() for x in read(path).values()]) for path in (splats, again))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_moved_ply_shows_the_same_image_from_the_moved_camera(tmp_path):
    field, pose = make_field(), rendering.orbit(1, 4.0, 20.0)
    rotation = torch.linalg.matrix_exp(torch.tensor([[0, -0.7, 0.2], [0.7, 0, -0.4], [-0.2, 0.4, 0]]).double())
    moved = Similarity(rotation, torch.tensor([0.3, -2.0, 1.0]).double(), torch.tensor(1.7).double())
    save_ply(tmp_path / "splats.ply", field, moved)
    want, got = render(field, pose), render(read_splats(tmp_path / "splats.ply"), moved.apply(pose))
    assert (got - want).abs().mean() < 1e-4


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_ply_of_a_lower_degree_has_no_higher_harmonics(degree, tmp_path):
    field, count = make_field(), (degree + 1) ** 2 - 1
    field.directional[:, count:] = 0
    save_ply(tmp_path / "full.ply", field, None)
    table = PlyData.read(tmp_path / "full.ply")["vertex"].data
    kept = [f"f_rest_{15 * channel + i}" for channel in range(3) for i in range(count)]
    names = [name for name in table.dtype.names if not name.startswith("f_rest_")]
    kind = np.dtype([(name, "<f4") for name in names] + [(f"f_rest_{i}", "<f4") for i in range(3 * count)])
    short = np.empty(len(table), kind)
    for name, source in zip(kind.names, names + kept, strict=True):
        short[name] = table[source]
    properties = "".join(f"property float {name}\n" for name in kind.names)
    header = f"ply\nformat binary_little_endian 1.0\ncomment by hand\nelement vertex 60\n{properties}end_header\n"
    (tmp_path / "short.ply").write_bytes(header.encode() + short.tobytes())
    assert torch.equal(read_splats(tmp_path / "short.ply").directional, field.directional)


def edit_header(*pairs):
    def edit(content):
        for old, new in pairs:
            content = content.replace(old, new, 1)
        return content

    return edit


HEADER = b"ply\nformat binary_little_endian 1.0\nelement vertex 1\n"
POINTS = HEADER + b"property float x\nproperty float y\nproperty float z\nproperty uchar red\nend_header\n" + 13 * b"a"
MESH = POINTS.replace(b"end_header", b"element face 2\nproperty list uchar int vertex_indices\nend_header")
CHUNKS = HEADER.replace(b"vertex", b"chunk") + b"property float min_x\nend_header\n" + 4 * b"a"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: b"", "not a .ply file"),
        (lambda content: b"PK" + content, "not a .ply file"),
        (lambda content: content[:100], "header is damaged"),
        (lambda content: content[:-1], "truncated or damaged: 60 vertices in its header, 59.99"),
        (lambda content: content + b"ab", "truncated or damaged"),
        (lambda content: POINTS, "holds no Gaussians: its vertices lack f_dc_0"),
        (lambda content: MESH, "is a mesh of 2 faces"),
        (lambda content: CHUNKS, "first element is not a list of vertices"),
        (edit_header((b"binary_little_endian", b"ascii")), "text form"),
        (edit_header((b"vertex 60", b"vertex 0")), "is empty"),
        (edit_header((b"vertex 60", b"vertex 999999999999999999999")), "truncated"),
        (edit_header((b"float opacity", b"float opacitx")), "lack opacity"),
        (edit_header((b"float f_rest_44", b"float f_resx_44")), "44 properties f_rest_"),
        (edit_header((b"float f_rest_3\n", b"float f_rest_2\n")), "one name"),
        (edit_header((b"property float nx", b"property list uchar int nx")), "are no Gaussians"),
    ],
)
def test_file_that_is_not_a_splat_file_raises_a_sentence(splats, edit, message):
    splats.write_bytes(edit(splats.read_bytes()))
    with pytest.raises(DataError, match=message):
        factorkit.load(splats)


def test_missing_file_and_wrong_options_raise(splats, tmp_path):
    with pytest.raises(DataError, match=r"none.ply cannot be read"):
        factorkit.load(tmp_path / "none.ply")
    with pytest.raises(ConfigError, match="no other weights"):
        factorkit.load(splats, weights="last")
    with pytest.raises(ConfigError, match="up='x'"):
        SplatScene(splats, up="x")
    for path, options in (("a.glb", {}), ("a.ply", {"coordinates": "given"}), ("a.ply", {"kind": "mesh"})):
        with pytest.raises(ConfigError, match="another splat file"):
            factorkit.load(splats).export(tmp_path / path, **options)


def test_gaussians_that_are_not_finite_are_left_out_with_a_warning(splats):
    field = make_field()
    field.means[3, 1], field.opacities[5] = float("nan"), float("inf")
    save_ply(splats, field, None)
    with pytest.warns(UserWarning, match="2 Gaussians with numbers that are not finite"):
        assert len(read_splats(splats).means) == 58
    field.means[:] = float("nan")
    save_ply(splats, field, None)
    with pytest.raises(DataError, match="none of its 60 Gaussians"):
        read_splats(splats)


@pytest.mark.parametrize("up", UP)
def test_paths_go_around_the_gaussians_whatever_points_up(splats, up, tmp_path):
    shift = torch.tensor([30.0, -50.0, 20.0])
    field = make_field()
    field.means += shift
    save_ply(splats, field, None)
    scene = SplatScene(splats, up=up)
    axis, sign = UP[up]
    poses = scene._make_path("orbit", 4)
    offsets = poses[:, :3, 3] - shift
    assert (torch.linalg.det(poses[:, :3, :3]) - 1).abs().max() < 1e-5
    assert (sign * offsets[:, axis] > 0).all() and (sign * poses[:, axis, 1] > 0.5).all()
    images = scene.render_path("orbit", 16, 2).images
    assert images.shape == (2, 3, 16, 16) and images.amax((1, 2, 3)).min() > 0.1
    assert scene.views.images.shape[0] == 8


@pytest.mark.parametrize(
    ("name", "of_gaussians", "of_others"),
    [
        ("lego.ply", "splats", "points"),
        ("points.ply", "points", "points"),
        ("mesh.ply", "mesh", "mesh"),
        ("my_splats.ply", "splats", "splats"),
        ("lego.spz", "splats", "splats"),
    ],
)
def test_name_of_a_ply_says_what_is_written_and_means_splats_for_gaussians(name, of_gaussians, of_others, tmp_path):
    assert kind_of(tmp_path / name, make_field(2)) == of_gaussians
    assert kind_of(tmp_path / name, GridField(4)) == of_others


def test_commands_take_a_splat_file(splats, tmp_path, capsys):
    assert main(["render", str(splats), "--out", str(tmp_path / "frames"), "--frames", "2", "--size", "8"]) == 0
    assert len(list((tmp_path / "frames").glob("*.png"))) == 2
    cameras = {"frames": [{"transform_matrix": rendering.orbit(1, 4.0, 20.0)[0].tolist()}]}
    (tmp_path / "poses.json").write_text(json.dumps(cameras))
    words = [
        "render",
        str(splats),
        "--poses",
        str(tmp_path / "poses.json"),
        "--out",
        str(tmp_path / "one"),
        "--size",
        "8",
    ]
    assert main(words) == 0
    assert main(["export", str(splats), str(tmp_path / "other.spz")]) == 0
    assert main(["export", str(splats), str(splats)]) != 0  # an input is never replaced
    capsys.readouterr()
    assert main(["sample", str(splats), "--out", str(tmp_path / "s")]) == 2
    assert "only render, export and view take" in capsys.readouterr().err


@pytest.mark.slow
def test_viewer_shows_the_splats_themselves_and_renders_them(splats):
    pytest.importorskip("viser")
    contents = load_contents(splats, "cpu")
    assert newest_checkpoint(splats) is None and len(contents.views) == 8
    with Viewer(contents, port=0) as viewer:
        sent = []
        viewer.server.scene.add_gaussian_splats = lambda name, *parts: sent.append([x.shape for x in parts])
        viewer.show(contents)
        assert sent == [[(60, 3), (60, 3, 3), (60, 3), (60, 1)]]
    fov, _ = fov_and_aspect(contents.views.intrinsics[0], 512, 512)
    pixels = render_viewpoint(contents, None, contents.views.poses[0], fov, 16, 16)
    want = SplatScene(splats).render(contents.views.poses[:1], 16).images[0]
    assert np.abs(pixels / 255 - want.permute(1, 2, 0).numpy()).max() < 1 / 255


def test_spz_shows_the_same_image_to_an_independent_reader(tmp_path):
    forge = pytest.importorskip("gaussforge").GaussForge()
    field, pose = make_field(), rendering.orbit(1, 4.0, 20.0)
    save_splats(tmp_path / "splats.spz", ".spz", field, None, Z_UP)
    content = (tmp_path / "splats.spz").read_bytes()
    (tmp_path / "back.ply").write_bytes(bytes(forge.convert(content, "spz", "ply")["data"]))
    assert len(content) < 0.35 * len((tmp_path / "back.ply").read_bytes())
    back = read_splats(tmp_path / "back.ply")
    y_up = Similarity(torch.tensor([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).double(), torch.zeros(3), torch.ones(()))
    want = render(field, pose)
    assert (render(back, y_up.apply(pose)) - want).abs().mean() < 4e-3 and want.std() > 0.1
    torch.testing.assert_close(back.means, y_up.apply_points(field.means), rtol=0, atol=2e-6)
    torch.testing.assert_close(back.log_scales, field.log_scales, rtol=0, atol=1 / 32 + 1e-6)
    torch.testing.assert_close(back.opacities.sigmoid(), field.opacities.sigmoid(), rtol=0, atol=1 / 510 + 1e-6)


def test_spz_positions_too_far_for_its_digits_raise(tmp_path):
    field = make_field()
    field.means[0, 0] = 1e7
    with pytest.raises(DataError, match="1e\\+07 do not fit"):
        save_splats(tmp_path / "splats.spz", ".spz", field, None, Z_UP)
    field.means[0, 0] = 4e6
    save_splats(tmp_path / "splats.spz", ".spz", field, None, Z_UP)


def test_spz_read_again_shows_the_same_image_and_is_written_as_the_same_file(tmp_path):
    field, pose = make_field(), rendering.orbit(1, 4.0, 20.0)
    save_splats(tmp_path / "splats.spz", ".spz", field, None, Z_UP)
    scene = factorkit.load(tmp_path / "splats.spz")
    y_up = Similarity(torch.tensor([[1, 0, 0], [0, 0, 1], [0, -1, 0]]).double(), torch.zeros(3), torch.ones(()))
    back, want = scene.model.field, render(field, pose)
    assert (render(back, y_up.apply(pose)) - want).abs().mean() < 4e-3
    torch.testing.assert_close(back.means, y_up.apply_points(field.means), rtol=0, atol=2e-6)
    assert (scene.poses[:, :3, 1][:, 1] > 0.5).all()  # y is up
    again = scene.export(tmp_path / "again.spz")
    assert gzip.decompress(again.read_bytes()) == gzip.decompress((tmp_path / "splats.spz").read_bytes())
    assert main(["render", str(again), "--out", str(tmp_path / "frames"), "--frames", "1", "--size", "8"]) == 0


def test_spz_with_the_antialiased_flag_is_drawn_with_compensated_opacities(tmp_path):
    field = make_field()
    field.log_scales -= 3  # smaller than a pixel
    field.antialiased = True
    save_splats(tmp_path / "splats.spz", ".spz", field, None, Z_UP)
    assert gzip.decompress((tmp_path / "splats.spz").read_bytes())[14] == 1
    scene = factorkit.load(tmp_path / "splats.spz")
    thin = scene.render(scene.poses[:1], 32).images.sum()
    scene.model.field.antialiased = False
    assert thin < 0.7 * scene.render(scene.poses[:1], 32).images.sum()


def test_spz_of_version_2_has_three_bytes_of_each_rotation(tmp_path):
    header = np.array([0x5053474E, 2, 1], "<u4").tobytes() + bytes([0, 4, 0, 0])
    position = bytes([16, 0, 0, 240, 255, 255, 8, 0, 0])  # 1, -1 and 1/2 with 4 bits of fraction
    body = position + bytes([128, 255, 0, 128, 160, 144, 128, 255, 127, 127])
    (tmp_path / "old.spz").write_bytes(gzip.compress(header + body))
    field = read_splats(tmp_path / "old.spz")
    assert field.means.tolist() == [[1.0, -1.0, 0.5]] and field.log_scales.tolist() == [[0.0, -1.0, -2.0]]
    torch.testing.assert_close(field.quaternions, torch.tensor([[0.0, 1.0, 0.0, 0.0]]), rtol=0, atol=5e-3)
    assert field.opacities.sigmoid().item() == pytest.approx(128 / 255) and not field.directional.any()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: b"not gzip", "not a .spz file, or is damaged"),
        (lambda content: gzip.compress(b""), "no .spz header"),
        (lambda content: gzip.compress(b"ply\n" + content[4:]), "no .spz header"),
        (lambda content: gzip.compress(content[:4] + b"\4" + content[5:]), "version 4, degree 3"),
        (lambda content: gzip.compress(content[:12] + b"\5" + content[13:]), "version 3, degree 5"),
        (lambda content: gzip.compress(content[:-1]), "truncated or damaged: 60 Gaussians in its header"),
        (lambda content: gzip.compress(content + b"a"), "truncated or damaged"),
        (lambda content: gzip.compress(content)[:-40], "truncated or damaged"),
        (lambda content: gzip.compress(content[:8] + bytes(4) + content[12:16]), "is empty"),
        (lambda content: gzip.compress(content[:8] + b"\xff" * 4 + content[12:]), "truncated or damaged"),
    ],
)
def test_file_that_is_not_a_spz_file_raises_a_sentence(tmp_path, edit, message):
    save_splats(tmp_path / "splats.spz", ".spz", make_field(), None, Z_UP)
    content = gzip.decompress((tmp_path / "splats.spz").read_bytes())
    (tmp_path / "splats.spz").write_bytes(edit(content))
    with pytest.raises(DataError, match=message):
        factorkit.load(tmp_path / "splats.spz")
