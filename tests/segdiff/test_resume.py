from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import factorkit
from factorkit.engine.checkpoint import read_checkpoint
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.errors import CheckpointError
from factorkit.utils.files import read_log
from tests.engine.test_step import LATENT, LATENT_UVIT, make_trainer
from tests.engine.trained import assert_identical, final_state

UNET = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": ()}
UVIT = {"backbone": "uvit", "model_channels": 16, "depth": 3, "masks": "network"}
KILLED_RUN = Path(__file__).with_name("killed_run.py")


def train_tiny(out: Path, **changes):
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8)
    settings = {
        "steps": 4,
        "mixture_steps": 2,
        "distil_steps": 2,
        "resolution": 16,
        **(UNET if "backbone" not in changes else {}),
        "norm_groups": 4,
        "batch_size": 4,
        "device": "cpu",
        "sample_every": 0,
    }
    return factorkit.train_segdiff(images, out=out, progress=False, **{**settings, **changes})


@pytest.mark.parametrize("changes", [{}, UVIT], ids=["unet", "uvit"])
def test_train_resumed_is_bit_identical_and_other_settings_raise(tmp_path, changes):
    train_tiny(tmp_path / "whole", **changes)
    train_tiny(tmp_path / "parts", steps=1, dropout=0.0, **changes)
    run = train_tiny(tmp_path / "parts", **changes)
    assert_identical(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))
    loaded = factorkit.load(tmp_path / "whole", device="cpu")
    assert_identical(run.model.state_dict(), loaded.model.state_dict())
    with pytest.raises(CheckpointError, match=r"regions: 2 there, 3 requested|regions: 3 there, 2 requested"):
        train_tiny(tmp_path / "parts", regions=5 - run.config.regions, **changes)


@pytest.mark.parametrize(
    "changes",
    [{**UVIT, "masks": "auto"}, LATENT, {**LATENT_UVIT, "masks": "auto"}],
    ids=["uvit", "latent", "latent uvit"],
)
def test_training_with_object_masks_resumed_is_bit_identical(tmp_path, monkeypatch, changes):
    """The stages before it are the same for all networks; they and previews would take most of the time."""
    monkeypatch.setattr(SegdiffTask, "inspect", lambda *arguments: {})
    for out, all_steps in (("whole", [4]), ("parts", [1, 4])):
        for steps in all_steps:
            make_trainer(tmp_path / out, **{**changes, "steps": steps, "dropout": 0.1}).run()
    assert_identical(final_state(tmp_path / "parts"), final_state(tmp_path / "whole"))


def train_and_kill(folder: Path, kind: str) -> dict[str, int]:
    """Train the runs of killed_run.py; return the number of kills by moment."""
    process = subprocess.run(
        [sys.executable, str(KILLED_RUN), str(folder), kind],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(factorkit.__file__).parents[1])},
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_train_killed_at_random_moments_is_bit_identical(tmp_path):
    """SIGKILL in steps and in saves, repeatedly, until the run completes."""
    kills = train_and_kill(tmp_path, "pixels")
    assert kills["step"] >= 2 and sum(kills.values()) - kills["step"] >= 2
    assert_identical(final_state(tmp_path / "killed"), final_state(tmp_path / "whole"))
    assert not [p.name for p in (tmp_path / "killed/checkpoints").iterdir() if not p.name.startswith("step_")]


@pytest.mark.slow
def test_train_killed_in_every_training_of_a_latent_run_is_bit_identical(tmp_path):
    assert list(train_and_kill(tmp_path, "latents")) == ["autoencoder", "mixture", "mask network", "branches"]
    for stage in ("_autoencoder", "", "/stages/mixture", "/stages/distil"):
        assert_identical(final_state(tmp_path / f"killed{stage}"), final_state(tmp_path / f"whole{stage}"))
        resumed = [event["step"] for event in read_log(tmp_path / f"killed{stage}") if event["event"] == "resume"]
        assert resumed == [2]
    copies = [read_checkpoint(tmp_path / f"{name}/autoencoder.safetensors")[0] for name in ("killed", "whole")]
    assert_identical(*copies)


def test_micro_batches_of_the_thesis_form_take_the_same_step(tmp_path):
    """Compare Adam's first moment, the gradient; Adam's steps amplify rounding errors of tiny gradients."""
    result = {}
    for micro in (None, 1, 3):
        out = tmp_path / str(micro)
        train_tiny(out, steps=1, form="thesis", precision="fp32", micro_batch_size=micro)
        result[micro] = {k: v for k, v in final_state(out).items() if k.startswith("adam.exp_avg.")}
    assert sum(v.norm() for v in result[None].values()) > 0
    for micro in (1, 3):
        for name, value in result[None].items():
            torch.testing.assert_close(result[micro][name], value, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.slow
def test_train_resumes_for_the_same_images_under_another_name_link_or_zip(tmp_path):
    def train(data: Path, steps: int):
        model = {
            "masks": "network",
            "resolution": 16,
            "model_channels": 8,
            "channel_mult": (1, 2),
            "batch_size": 4,
            "sample_every": 0,
        }
        return factorkit.train_segdiff(
            data, out=tmp_path / "run", preset="demo", progress=False, steps=steps, device="cpu", **model
        )

    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(photos / f"{i}.png")
    train(photos, 1)
    moved = photos.rename(tmp_path / "elsewhere")
    assert train(moved, 2).step == 2
    (tmp_path / "link").symlink_to(moved)
    assert train(tmp_path / "link", 3).step == 3
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for path in moved.iterdir():
            archive.write(path, f"top/{path.name}")
    assert train(tmp_path / "packed.zip", 4).step == 4
    Image.new("RGB", (16, 16)).save(moved / "0.png")
    with pytest.raises(CheckpointError, match="other data"):
        train(moved, 5)
