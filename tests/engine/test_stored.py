"""Files of every version of the checkpoint format go on loading: ``stored/<what>_<version>.safetensors``."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import factorkit
from factorkit.engine import checkpoint
from factorkit.engine.checkpoint import read_checkpoint
from factorkit.engine.config import migrate_settings, register_renamed_settings
from factorkit.nerfdiff.config import NerfdiffConfig
from factorkit.segdiff.config import SegdiffConfig
from factorkit.utils.errors import CheckpointError

STORED = Path(__file__).with_name("stored")
VERSIONS = range(1, checkpoint.VERSION + 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_load_stored_segdiff_file_gives_the_same_masks(version):
    run = factorkit.load(STORED / f"segdiff_{version}.safetensors", device="cpu")
    image = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert run.step == 2 and run.segment(image).masks.std().item() == pytest.approx(0.1206, rel=1e-2)


@pytest.mark.parametrize("version", VERSIONS)
def test_load_stored_nerfdiff_file_gives_the_same_poses(version):
    run = factorkit.load(STORED / f"nerfdiff_{version}.safetensors", device="cpu")
    place = run.predict_pose(torch.linspace(0, 1, 192).view(1, 3, 8, 8)).poses[0, :3, 3]
    torch.testing.assert_close(place, torch.tensor([1.0821, 3.0194, 0.9074]), rtol=1e-3, atol=1e-3)
    assert run.step == 2 and run.render(run.poses[:1]).images.mean().item() == pytest.approx(0.4457, rel=1e-2)


@pytest.mark.parametrize("version", VERSIONS)
def test_restore_stored_checkpoint_resumes(toy, tmp_path, version):
    stored = STORED / f"toy_{version}.safetensors"
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copyfile(stored, tmp_path / "run/checkpoints/step_00000003.safetensors")
    trainer, tensors = toy(), read_checkpoint(stored)[0]
    assert trainer.restore() and trainer.step == 3
    state = trainer.state.tensors()
    assert state.keys() == tensors.keys()
    assert [name for name in state if not torch.equal(state[name], tensors[name])] == []
    trainer.run()
    assert trainer.step == 6


def test_read_checkpoint_later_version_raises(tmp_path):
    with safe_open(STORED / "toy_1.safetensors", framework="pt") as file:
        tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    for written in ("factorkit-2", "factorkit-0", "somebody-1", "factorkit-x"):
        save_file(tensors, tmp_path / "later.safetensors", metadata=header | {"format": written})
        reason = "later factorkit .*upgrade" if written == f"factorkit-{checkpoint.VERSION + 1}" else written
        with pytest.raises(CheckpointError, match=reason):
            read_checkpoint(tmp_path / "later.safetensors")


def test_migrate_settings_old_names_become_new_ones():
    old = {"model": "toy", "decay": 0.3, "ema": 0.9, "ema_also": [0.5], "steps": 2}
    new = {"model": "toy", "lr_decay_fraction": 0.3, "ema_decay": 0.9, "extra_ema_decays": [0.5], "steps": 2}
    assert migrate_settings(old, "config.json") == migrate_settings(new, "config.json") == new


def test_migrate_settings_removed_setting_is_refused_unless_it_computes_the_same():
    register_renamed_settings(["test"], {"width": "channels"}, {("channels", "wide"): 64}, removed={"looks": 1})
    assert migrate_settings({"model": "test", "width": "wide", "looks": 1}, "") == {"model": "test", "channels": 64}
    with pytest.raises(CheckpointError, match=r"^a/config.json was written with looks=2 .* only supports looks=1"):
        migrate_settings({"model": "test", "looks": 2}, "a/config.json")


def test_load_stored_nerfdiff_file_with_occupancy_gives_the_same_render():
    """The grid's buffer ``num_updates`` was ``looks``."""
    run = factorkit.load(STORED / "nerfdiff_occupancy_1.safetensors", device="cpu")
    grid = run.model.field.occupancy
    assert grid.num_updates == 3 and grid.bits.count_nonzero() == 4096
    assert run.render(run.poses[:1]).images.mean().item() == pytest.approx(0.7995, rel=1e-3)


@pytest.mark.parametrize(("name", "config"), [("segdiff", SegdiffConfig), ("nerfdiff", NerfdiffConfig)])
@pytest.mark.parametrize("version", VERSIONS)
def test_migrate_settings_stored_files_have_only_settings_of_today(name, config, version):
    meta = read_checkpoint(STORED / f"{name}_{version}.safetensors")[1]
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(meta) - fields - {"model", "step", "scene"} == set()
    settings = {k: v for k, v in meta.items() if k in fields}
    assert config.from_dict(settings).to_dict().items() >= settings.items()


@pytest.mark.parametrize(("model", "name", "value"), [("nerfdiff", "encoder", "unet"), ("segdiff", "backbone", "unet")])
def test_migrate_settings_stored_before_transformers_have_the_unet(model, name, value):
    assert migrate_settings({"model": model}, "config.json")[name] == value
    assert migrate_settings({"model": model, name: "other"}, "config.json")[name] == "other"


@pytest.mark.parametrize("masks", ["network", "mixture", "auto"])
@pytest.mark.parametrize("model", ["segdiff", "supervised"])
def test_migrate_settings_stored_cue_without_object_masks_is_dropped(model, masks):
    migrated = migrate_settings({"model": model, "masks": masks, "cue_weight": 1.0}, "config.json")
    assert migrated.get("cue_weight") == (1.0 if masks == "auto" else None)
    requested = SegdiffConfig(masks=masks, cue_weight=1.0).resolved()
    assert requested.cue_weight == (1.0 if masks == "auto" else None)
