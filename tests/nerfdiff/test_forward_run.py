"""Training on forward-facing views, in every way, and what can be asked of such a run."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.cli.main import main
from factorkit.cli.view import load_contents
from factorkit.nerfdiff.fields.kinds import FrequencyField
from factorkit.nerfdiff.train import train_nerfdiff
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels
from tests.nerfdiff.forward import forward_views

pycolmap = pytest.importorskip("pycolmap")
pytestmark = pytest.mark.usefixtures("short_flip_tests")

WAYS = {
    "dictionary": {},
    "single": {"search": "joint", "candidate_type": "single", "num_candidates": 1},
    "known": {"poses": "known", "field_steps": 30},
    "learned": {"poses": "learned"},
    "tuned": {"finetune_steps": 3, "noise": False},
    "hashgrid": {"field": "hashgrid"},
    "gaussians": {"field": "gaussians", "num_gaussians": 60, "gaussian_steps": 10, "finetune_steps": 3},
    "mlp": {"field": "mlp", "poses": "known", "field_steps": 2, "samples_per_ray": 3},
}


@pytest.fixture(scope="module")
def views():
    return forward_views(size=(9, 12), columns=3, rows=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, views, tiny):
    """Tiny runs by the way they were trained; each is trained when it is first requested."""
    result = {}

    def get(kind):
        if kind not in result:
            settings = {**tiny, "resolution": 12, "encoder_resolution": 12, **WAYS[kind]}
            result[kind] = train_nerfdiff(views, out=tmp_path_factory.mktemp(kind) / "run", **settings)
        return result[kind]

    return get


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Give NeRF's network 16 units a layer: with its 256 a run takes minutes."""
    monkeypatch.setitem(FrequencyField.__init__.__kwdefaults__, "width", 16)


@pytest.mark.parametrize("kind", WAYS)
def test_forward_run_has_every_result(kind, runs, views):
    run = runs(kind)
    assert run.poses.shape == (9, 4, 4) and run.poses.isfinite().all()
    if WAYS[kind].get("poses") == "known":
        assert torch.equal(run.poses, views.poses)
    result = run.predict_pose(views.select([0, 1]), refine=2)
    turns = result.poses[:, :3, :3]
    assert torch.allclose(turns @ turns.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5)
    assert result.candidates.shape == (2, 1, 4, 4)
    for path in ("orbit", "spiral"):
        rendered = run.render_path(path, frames=3, size=8)
        assert (
            rendered.images.shape == (3, 3, 6, 8)
            and rendered.depth.isfinite().all()
            and rendered.images.isfinite().all()
        )
    assert run.sample(1, steps=2).images.shape == (1, 3, 9, 12)
    scores = run.evaluate(views.select([2, 4, 6]))
    assert all(np.isfinite(scores[key]) for key in ("psnr", "psnr_encoder", "rotation_median_deg"))
    grids = {path.name.split("_", 1)[1] for path in (run.folder / "samples").iterdir()}
    assert {"views.png", "cameras_encoder.png"} <= grids
    assert type(run).load(run.save(run.folder / "one.safetensors"), device="cpu").views.layout == "forward"


def test_forward_run_known_poses_can_be_exported(runs, tmp_path):
    run = runs("known")
    run.export(tmp_path / "colmap", points=500)
    model = pycolmap.Reconstruction(tmp_path / "colmap" / "sparse" / "0")
    depths = -np.array([point.xyz[2] for point in model.points3D.values()])
    assert len(depths) > 50 and depths.min() >= 0.99 and depths.max() <= 30.1
    assert (tmp_path / "colmap" / "images" / "view_00.png").is_file()


def test_forward_run_stages_can_be_viewed(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs("dictionary").folder, folder)
    assert {"cameras_search.png", "cameras_refine.png"} <= {
        path.name.split("_", 1)[1] for path in (folder / "samples").iterdir()
    }
    done = load_contents(folder, "cpu")
    assert done.views.layout == "forward" and done.true is not None and done.camera.forward_facing
    shutil.rmtree(folder / "checkpoints")
    for stage in ("refine", "search"):
        contents = load_contents(folder, "cpu")
        assert contents.views.poses.shape == (9, 4, 4) and contents.step == (4 if stage == "refine" else 22)
        shutil.rmtree(folder / "stages" / stage)


def test_commands_on_a_forward_run_write_their_files(runs, views, tmp_path, capsys):
    folder = runs("dictionary").folder
    for name, image in zip(views.names, images_to_pixels(views.images), strict=True):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / f"{name}.png")

    def call_cli(*words):
        code = main([*map(str, words), "--device", "cpu", "--json"])
        return code, json.loads(capsys.readouterr().out)

    code, result = call_cli("pose", folder, tmp_path / "in", "--refine", 2)
    assert code == 0 and len(result["frames"]) == 9
    code, _ = call_cli("render", folder, "--path", "spiral", "--frames", 3, "--out", tmp_path / "spiral.gif")
    with Image.open(tmp_path / "spiral.gif") as gif:
        assert code == 0 and gif.n_frames == 3 and gif.size == (12, 9)
    code, _ = call_cli("reconstruct", folder, tmp_path / "in", "--out", tmp_path / "seen")
    assert code == 0 and (tmp_path / "seen" / "view_08.png").is_file()
    code, _ = call_cli("sample", folder, "-n", 1, "--steps", 2, "--trajectory", "--out", tmp_path / "drawn")
    assert code == 0 and (tmp_path / "drawn" / "trajectory.png").is_file()
    code, _ = call_cli("export", folder, tmp_path / "transforms.json")
    assert code == 0 and len(json.loads((tmp_path / "transforms.json").read_text())["frames"]) == 9


def test_forward_run_thesis_preset_trains(views, tmp_path, tiny):
    """A 6th of its size; that of 378 x 504 is built in test_config."""
    small = {
        "resolution": 24,
        "encoder_resolution": 24,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "batch_size": 2,
        "rays_per_view": 8,
        "samples_per_ray": 4,
        "steps": 2,
        "num_res_blocks": 1,
        "checkpoint_every": 2,
        "log_every": 1,
    }
    run = train_nerfdiff(
        views.resize((18, 24)), out=tmp_path / "run", preset="llff", device="cpu", progress=False, **small
    )
    assert run.step == 2 and run.config.search == "joint" and run.model.candidates.count == 1
    assert run.model.forward_facing and run.scene["size"] == [18, 24]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any(event["event"] == "finished" or event.get("step") == 2 for event in events)


def test_forward_run_orbit_parameters_are_refused(views, tmp_path, tiny):
    with pytest.raises(ConfigError, match="optimize_camera"):
        train_nerfdiff(views, out=tmp_path / "run", **{**tiny, "resolution": 12, "optimize_camera": ("roll",)})
