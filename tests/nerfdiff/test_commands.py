"""The command line on nerfdiff runs."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from factorkit.cli.main import main
from factorkit.utils.images import images_to_pixels


@pytest.fixture
def call_cli(capsys):
    """ask(*words) runs a command with --json: exit code and the object it prints."""

    def run(*words):
        code = main([str(word) for word in words] + ["--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture(scope="module")
def drawings(tmp_path_factory, scene_views):
    """The tiny run's views as files."""
    folder = tmp_path_factory.mktemp("image_folder")
    for name, image in zip(scene_views.names, images_to_pixels(scene_views.images), strict=True):
        Image.fromarray(image).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def posed(tmp_path_factory, drawings, scene_views):
    """The same as a nerfstudio folder with poses."""
    folder = tmp_path_factory.mktemp("posed")
    k = scene_views.intrinsics[0]
    frames = [
        {"file_path": str(drawings / f"{name}.png"), "transform_matrix": pose.tolist()}
        for name, pose in zip(scene_views.names, scene_views.poses, strict=True)
    ]
    content = {"fl_x": float(k[0, 0]), "fl_y": float(k[1, 1]), "cx": 4.0, "cy": 4.0, "w": 8, "h": 8, "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def test_pose_command_prints_predicted_poses(call_cli, finished, drawings, scene_views, tmp_path):
    code, result = call_cli("pose", finished.folder, drawings, "--out", tmp_path / "poses.json", "--device", "cpu")
    assert code == 0 and result["frames"] == json.loads((tmp_path / "poses.json").read_text())["frames"]
    order = sorted(range(10), key=lambda i: scene_views.names[i])
    expected = finished.predict_pose(scene_views.select(order)).poses
    assert torch.allclose(torch.tensor([f["camera_to_world"] for f in result["frames"]]), expected, atol=0.02)


def test_reconstruct_render_sample_and_export_write_their_files(call_cli, finished, drawings, tmp_path):
    run = finished.folder
    code, result = call_cli("reconstruct", run, drawings, "--out", tmp_path / "seen", "--size", 12, "--device", "cpu")
    assert code == 0 and result["reconstructed"] == 10 and len(list((tmp_path / "seen").glob("*_depth.png"))) == 10
    with Image.open(tmp_path / "seen" / "view_003.png") as image:
        assert image.size == (12, 12)
    code, result = call_cli("render", run, "--out", tmp_path / "orbit.gif", "--frames", 4, "--device", "cpu")
    with Image.open(tmp_path / "orbit.gif") as gif:
        assert code == 0 and gif.n_frames == result["frames"] == 4
    code, result = call_cli(
        "sample", run, "-n", 2, "--steps", 4, "--trajectory", "--out", tmp_path / "s", "--device", "cpu"
    )
    assert code == 0 and len(json.loads((tmp_path / "s" / "poses.json").read_text())["poses"]) == 2
    assert (tmp_path / "s" / "view_0001.png").exists() and (tmp_path / "s" / "trajectory.png").exists()
    code, result = call_cli("export", run, tmp_path / "transforms.json", "--device", "cpu")
    assert code == 0 and len(json.loads((tmp_path / "transforms.json").read_text())["frames"]) == 10


def test_evaluate_command_scores_views_with_poses(call_cli, finished, posed):
    code, scores = call_cli("evaluate", finished.folder, "--views", posed, "--device", "cpu")
    assert code == 0 and {"rotation_median_deg", "under_10_deg", "psnr", "psnr_encoder", "seconds"} <= scores.keys()
    code, answer = call_cli("evaluate", finished.folder, "--device", "cpu")
    assert code == 2 and "--views" in answer["error"]


def test_commands_invalid_arguments_are_named(call_cli, finished, drawings, tmp_path):
    code, answer = call_cli("pose", finished.folder, tmp_path / "nowhere", "--device", "cpu")
    assert code == 2 and "nowhere" in answer["error"]
    code, answer = call_cli("render", finished.folder, "--out", tmp_path / "x.avi", "--device", "cpu")
    assert code == 2 and ".gif" in answer["error"]
    code, answer = call_cli("segment", finished.folder, drawings, "--out", tmp_path / "x", "--device", "cpu")
    assert code == 2 and "nerfdiff" in answer["error"]
    code, answer = call_cli("train", "nerfdiff", "--preset", "legos")
    assert code == 2 and "lego" in answer["error"]


def training_words(posed, folder, tiny):
    """Return the command line of the tiny training."""
    words = ["train", "nerfdiff", "--data", posed, "--out", folder]
    for key, value in tiny.items():
        if key != "progress":
            words += [f"--{key.replace('_', '-')}", *(value if isinstance(value, tuple) else [value])]
    return words


@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, ["search", "refine", "flip 0a", "flip 0b", "refine again", "distil"]),
        ({"search": "joint"}, ["joint", "half a", "half b"]),
        ({"poses": "known", "field": "hashgrid"}, ["fit", "distil"]),
    ],
)
def test_dry_run_times_every_stage_and_writes_nothing(changes, stages, call_cli, posed, tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = training_words(posed, "run", tiny | {"flip_rounds": 3} | changes)
    code, estimate = call_cli(*words, "--dry-run")
    assert code == 0 and [stage["name"] for stage in estimate["stages"]] == stages
    for stage in estimate["stages"]:
        assert stage["views_per_second"] > 0 and stage["seconds"] > 0
    steps = {stage["name"]: stage["steps"] for stage in estimate["stages"]}
    assert steps[stages[0]] == {"search": 22, "joint": 5, "fit": 4}[stages[0]] and steps.get("distil", 5) == 5
    assert estimate["seconds"] == pytest.approx(sum(stage["seconds"] for stage in estimate["stages"]))
    assert estimate["views"] == 8 and estimate["device"] == "cpu"  # every 8th is held out
    assert estimate["parameters"] > 10_000 and estimate["memory_gib"] >= 20 * estimate["parameters"] / 2**30
    assert not list(tmp_path.iterdir())


def test_train_command_takes_flags_and_resumes(call_cli, posed, tmp_path, tiny):
    words = training_words(posed, tmp_path / "run", tiny)
    code, result = call_cli(*words)
    assert code == 0 and result["run"] == str(tmp_path / "run") and (tmp_path / "run" / "report.html").exists()
    assert call_cli(*words)[0] == 0


def test_train_help_defaults_follow_the_resolution(capsys):
    assert main(["train", "nerfdiff", "--preset", "fast", "--resolution", "64", "--help-advanced"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "--grid-resolution INT" in output and output.split("--grid-resolution INT")[1].split("(default:")[
        1
    ].startswith(" 64)")


def test_reconstruct_images_of_several_shapes_keep_them(call_cli, finished, drawings, tmp_path):
    for name, box in (("view_000", (0, 1, 8, 7)), ("view_001", (1, 0, 7, 8))):
        with Image.open(drawings / f"{name}.png") as image:
            image.crop(box).save(tmp_path / f"{name}.png")
    words = [finished.folder, tmp_path / "view_000.png", tmp_path / "view_001.png", "--device", "cpu"]
    assert call_cli("reconstruct", *words, "--out", tmp_path / "out", "--size", 16)[0] == 0
    with Image.open(tmp_path / "out/view_000.png") as wide, Image.open(tmp_path / "out/view_001.png") as tall:
        assert (wide.size, tall.size) == ((16, 12), (12, 16))
    code, result = call_cli("pose", *words)
    assert code == 0
    assert [(frame["w"], frame["h"]) for frame in result["frames"]] == [(8, 6), (6, 8)]


def test_render_poses_of_pose_has_their_intrinsics(call_cli, finished, drawings, tmp_path):
    poses, out = tmp_path / "poses.json", tmp_path / "frames"
    assert call_cli("pose", finished.folder, drawings, "--out", poses, "--device", "cpu")[0] == 0
    content = json.loads(poses.read_text())
    content["frames"] = content["frames"][:2]
    content["frames"][1] |= {"fl_x": 9.0, "fl_y": 9.0, "cx": 6.0, "cy": 3.0, "w": 12, "h": 6}
    poses.write_text(json.dumps(content))
    code, result = call_cli("render", finished.folder, "--poses", poses, "--out", out, "--device", "cpu")
    assert (code, result["frames"]) == (0, 2)
    k = torch.tensor([[9.0, 0, 6], [0, 9, 3], [0, 0, 1]])
    pose = torch.tensor(content["frames"][1]["camera_to_world"])[None]
    expected = finished.render(pose, (6, 12), intrinsics=k).images
    with Image.open(out / "0001.png") as image:
        assert torch.equal(
            torch.tensor(list(image.getdata())).reshape(6, 12, 3), torch.tensor(images_to_pixels(expected)[0])
        )
    code, result = call_cli("render", finished.folder, "--poses", poses, "--out", tmp_path / "a.gif", "--device", "cpu")
    assert code != 0 and "several sizes" in str(result)


def test_render_poses_of_transforms_need_their_coordinates(call_cli, finished, scene_views, tmp_path):
    """The training data's cameras render the same as the run's, once they are said to be the data's."""
    k = scene_views.intrinsics[0].tolist()
    frames = [{"file_path": "x.png", "transform_matrix": pose.tolist()} for pose in scene_views.poses[:2]]
    lens = {"fl_x": k[0][0], "fl_y": k[1][1], "cx": k[0][2], "cy": k[1][2], "w": 8, "h": 8}
    file = tmp_path / "transforms.json"
    file.write_text(json.dumps({**lens, "frames": frames}))
    words = ["render", finished.folder, "--poses", file, "--device", "cpu", "--out"]
    code, result = call_cli(*words, tmp_path / "a")
    assert code != 0 and "--coordinates run" in str(result)
    assert call_cli(*words, tmp_path / "given", "--coordinates", "given")[0] == 0
    assert call_cli(*words, tmp_path / "run", "--coordinates", "run")[0] == 0
    images = [(tmp_path / name / "0000.png").read_bytes() for name in ("given", "run")]
    assert images[0] != images[1]
    file.write_text(json.dumps({"poses": scene_views.poses[:1].tolist()}))
    assert call_cli(*words, tmp_path / "sampled")[0] == 0
    file.write_text(json.dumps({"frames": [{**frames[0], **lens}, frames[1]]}))
    code, result = call_cli(*words, tmp_path / "b", "--coordinates", "run")
    assert code != 0 and "for all cameras, or for none" in str(result)
