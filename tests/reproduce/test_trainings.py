"""Which trainings experiments ask for, without training: equal ones lie in one folder, others never do."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from factorkit.reproduce import list_experiments, segdiff_runs
from factorkit.reproduce.experiment import CellUnavailableError, Setup
from factorkit.reproduce.experiments import class_segmentation, zero_shot
from factorkit.segdiff.config import preset_config

# all but what tells the presets apart at the full scale
TINY = {
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "num_fit_images": 4,
}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """asked(name, data, **changes): what the rows of an experiment would train, [(folder, settings), ...]."""
    found = []

    def train(data, *, out, preset, seed, progress, classes=None, **changes):
        config = preset_config(preset, **changes, seed=seed).resolved().to_dict()
        found.append((out.name, {**config, "preset": preset, "classes": classes}))
        raise CellUnavailableError("not trained")

    def taught(images, truth, classes, config, folder, progress):
        found.append((folder.name, {**config.to_dict(), "preset": "supervised"}))
        raise CellUnavailableError("not trained")

    monkeypatch.setattr(segdiff_runs, "train_segdiff", train)
    monkeypatch.setattr(class_segmentation, "train_supervised", taught)
    monkeypatch.setattr(zero_shot, "_scored_runs", {})

    def ask(name, data, scale="full", **changes):
        found.clear()
        setup = Setup(
            name, Path(data), scale, tmp_path, progress=False, changes={**TINY, **changes}, inputs={"voc": Path("x")}
        )
        for row in list_experiments()[name].rows(setup):
            with suppress(CellUnavailableError):
                row.compute(0)
        return list(found)

    return ask


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["small", "full"])
def test_experiments_share_exactly_equal_trainings(asked, photos, scale):
    names = [name for name in list_experiments() if not name.startswith(("fig3", "table3"))]
    every = [one for name in names for one in asked(name, photos, scale)]
    by_folder, by_settings = {}, {}
    for folder, settings in every:
        text = json.dumps(settings, sort_keys=True)
        by_folder.setdefault(folder, set()).add(text)
        by_settings.setdefault(text, set()).add(folder)
    assert len(every) > 3 * len(by_folder), "most rows need what another has trained"
    for folder, settings in by_folder.items():
        assert len(settings) == 1, f"{folder} would be claimed by {len(settings)} trainings"
    for folders in by_settings.values():
        assert len(folders) == 1, f"{sorted(folders)} would be one training"


def test_full_scale_run_folders_name_the_preset(asked, photos):
    assert {folder for folder, _ in asked("fig2.9", photos)} == {"full-photos-ffhq64-ours-seed0"}
    birds, flowers = asked("fig2.18", photos), asked("table2.1", photos)
    assert birds[0] in flowers, "the presets of birds and flowers are the same settings"
