"""factorkit checkpoint ls, verify, prune, export."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import factorkit
from factorkit.engine.checkpoint import Checkpoints, read_checkpoint, write_checkpoint
from factorkit.engine.run_folder import locked

NAMES = [f"checkpoints/step_{step:08d}.safetensors" for step in (4, 3, 2, 1)]


@pytest.fixture
def run_of_four(run, tmp_path) -> Path:
    """A copy of the run with four checkpoints, the second of them the best, and one in a stage."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("stages"))
    tensors, meta = read_checkpoint(copy / NAMES[0])
    for step in (1, 2, 3):
        shifted = {k: v + step if k.startswith("ema.module.") else v for k, v in tensors.items()}
        write_checkpoint(copy / NAMES[4 - step], shifted, {**meta, "step": step})
    Checkpoints(copy / "checkpoints").keep_best(2, -1.0)
    write_checkpoint(copy / "stages/search" / NAMES[0], {"w": torch.ones(3)}, {"step": 4})
    return copy


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


@pytest.mark.slow
def test_ls_lists_all_and_marks_best(run_of_four, run_json, run_cli):
    result = run_json("checkpoint", "ls", run_of_four)["checkpoints"]
    assert [c["path"] for c in result] == [*NAMES, f"stages/search/{NAMES[0]}"]
    assert [c["step"] for c in result] == [4, 3, 2, 1, 4] and [c["best"] for c in result] == [0, 0, 1, 0, 0]
    assert result[0]["bytes"] == (run_of_four / NAMES[0]).stat().st_size
    text = run_cli("checkpoint", "ls", run_of_four)[1]
    assert [line.split("  ")[-1] for line in text.splitlines()][2] == "best" and text.count("MiB") == 5


@pytest.mark.slow
def test_verify_reads_all_and_names_damaged(run_of_four, run_json, run_refused):
    assert len(run_json("checkpoint", "verify", run_of_four)["whole"]) == 5
    damage(run_of_four / NAMES[1])
    message = run_refused("checkpoint", "verify", run_of_four)
    assert "step_00000003.safetensors is damaged" in message and f"{NAMES[0]}, {NAMES[2]}" in message


@pytest.mark.slow
def test_prune_keeps_newest_undamaged_and_best(run_of_four, run_json):
    damage(run_of_four / NAMES[0])
    (run_of_four / "checkpoints/.unfinished-1-0.safetensors").write_bytes(b"half")
    result = run_json("checkpoint", "prune", run_of_four)
    assert result["kept"] == [
        NAMES[1],
        NAMES[2],
        f"stages/search/{NAMES[0]}",
    ]  # Step 3 is the newest undamaged one, step 2 the best.
    assert sorted(result["dropped"]) == [NAMES[3], NAMES[0]]
    left = {p.name for p in (run_of_four / "checkpoints").iterdir()}
    assert left == {Path(NAMES[1]).name, Path(NAMES[2]).name, "best.json"}


@pytest.mark.slow
def test_prune_without_undamaged_keeps_damaged(run_of_four, run_json):
    damage(run_of_four / "stages/search" / NAMES[0])
    assert f"stages/search/{NAMES[0]}" in run_json("checkpoint", "prune", run_of_four, "--keep", 9)["kept"]


@pytest.mark.slow
def test_prune_during_training_is_refused(run_of_four, run_refused):
    with locked(run_of_four):
        assert "another process is training" in run_refused("checkpoint", "prune", run_of_four)
    assert "must be at least 1" in run_refused("checkpoint", "prune", run_of_four, "--keep", 0)


@pytest.mark.slow
def test_export_writes_averaged_weights(run_of_four, run_json, run_refused, tmp_path):
    for flags, step in (([], 4), (["--best"], 2), (["--step", 3], 3)):
        result = run_json("checkpoint", "export", run_of_four, "--out", tmp_path / f"step{step}.safetensors", *flags)
        run, source = factorkit.load(result["out"], device="cpu"), read_checkpoint(run_of_four / NAMES[4 - step])[0]
        assert result["step"] == run.step == step
        for name, value in run.model.state_dict().items():
            assert torch.equal(value, source[f"ema.module.{name}"]), name
    last = run_json("checkpoint", "export", run_of_four, "--out", tmp_path / "last.safetensors", "--weights", "last")
    run, source = factorkit.load(last["out"], device="cpu"), read_checkpoint(run_of_four / NAMES[0])[0]
    assert all(torch.equal(value, source[f"model.{name}"]) for name, value in run.model.state_dict().items())
    output = run_refused("checkpoint", "export", run_of_four, "--out", "x.safetensors", "--weights", 0.5)
    assert "no average of decay 0.5" in output
    assert "there are: 1, 2, 3, 4" in run_refused(
        "checkpoint", "export", run_of_four, "--out", "x.safetensors", "--step", 7
    )
    assert "--out FILE" in run_refused("checkpoint", "export", run_of_four)
    assert "two checkpoints" in run_refused("checkpoint", "export", run_of_four, "--out", "x", "--best", "--step", 2)
    (run_of_four / "checkpoints/best.json").unlink()
    assert "no best" in run_refused("checkpoint", "export", run_of_four, "--out", "x.safetensors", "--best")


def test_checkpoint_of_other_folder_is_refused(tmp_path, run_refused):
    for action in ("ls", "verify", "prune", "export"):
        flags = ["--out", "x"] if action == "export" else []
        assert "is not a run folder" in run_refused("checkpoint", action, tmp_path, *flags)
