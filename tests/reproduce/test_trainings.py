"""Which trainings the experiments request: equal ones share a folder, different ones never do. Nothing is trained."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from factorkit.reproduce import list_experiments, segdiff_runs
from factorkit.reproduce.experiment import CellUnavailableError, Setup
from factorkit.reproduce.experiments import class_segmentation, zero_shot
from factorkit.segdiff.config import preset_config
from factorkit.utils.errors import ConfigError

# All settings except those that distinguish the presets at the full scale.
TINY = {
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "num_fit_images": 4,
}


@pytest.fixture
def list_trainings(monkeypatch, tmp_path):
    """list_trainings(name, data, **changes): the trainings of an experiment's rows, [(folder, settings), ...]."""
    result = []

    def train(data, *, out, preset, seed, progress, classes=None, **changes):
        config = preset_config(preset, **changes, seed=seed).resolved().to_dict()
        result.append((out.name, {**config, "preset": preset, "classes": classes}))
        raise CellUnavailableError("not trained")

    def record_supervised(images, truth, classes, config, folder, progress):
        result.append((folder.name, {**config.to_dict(), "preset": "supervised"}))
        raise CellUnavailableError("not trained")

    monkeypatch.setattr(segdiff_runs, "train_segdiff", train)
    monkeypatch.setattr(class_segmentation, "train_supervised", record_supervised)
    monkeypatch.setattr(zero_shot, "_scored_runs", {})

    def record_trainings(name, data, scale="full", **changes):
        result.clear()
        setup = Setup(
            name, Path(data), scale, tmp_path, progress=False, changes={**TINY, **changes}, inputs={"voc": Path("x")}
        )
        for row in list_experiments()[name].rows(setup):
            with suppress(CellUnavailableError):
                row.compute(0)
        return list(result)

    return record_trainings


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["small", "full"])
def test_experiments_share_exactly_equal_trainings(list_trainings, photos, scale):
    names = [name for name in list_experiments() if not name.startswith(("fig3", "table3"))]
    every = [one for name in names for one in list_trainings(name, photos, scale)]
    by_folder, by_settings = {}, {}
    for folder, settings in every:
        text = json.dumps(settings, sort_keys=True)
        by_folder.setdefault(folder, set()).add(text)
        by_settings.setdefault(text, set()).add(folder)
    assert len(every) > 3 * len(by_folder), "most rows reuse the training of another"
    for folder, settings in by_folder.items():
        assert len(settings) == 1, f"{folder} would be claimed by {len(settings)} trainings"
    for folders in by_settings.values():
        assert len(folders) == 1, f"{sorted(folders)} would be one training"


def test_full_scale_run_folders_name_the_preset(list_trainings, photos):
    assert {folder for folder, _ in list_trainings("fig2.9", photos)} == {"full-photos-ffhq64-ours-seed0"}
    birds, flowers = list_trainings("fig2.18", photos), list_trainings("table2.1", photos)
    assert birds[0] in flowers, "the presets of birds and flowers are the same settings"


@pytest.mark.parametrize("scale", ["small", "gpu"])
def test_trainings_of_a_transformer_leave_out_what_only_the_unet_has(scale, tmp_path):
    setup = Setup("table2.6", None, scale, tmp_path, changes={"backbone": "uvit"})
    trainings = segdiff_runs.Trainings(setup, "cub64")
    models = segdiff_runs.list_our_models(trainings)
    assert [model.label for model in models] == ["ours", "network"]
    for changes in [model.changes for model in models] + [{"masks": "network", "decoding": "unshared"}]:
        assert trainings.config(**changes).backbone == "uvit"
    with pytest.raises(ConfigError, match="is a U-Net"):
        segdiff_runs.Trainings(Setup("table2.6", None, "full", tmp_path, changes=setup.changes), "cub64").config()


def test_trainings_of_many_pixels_stay_on_pixels(tmp_path, monkeypatch):
    requested = []
    monkeypatch.setattr(segdiff_runs, "train_segdiff", lambda data, **settings: requested.append(settings))
    setup = Setup("table2.6", None, "small", tmp_path, changes={"resolution": 128})
    segdiff_runs.Trainings(setup, "cub64").train("ours", 0)
    assert requested[0]["latent"] == "no"
