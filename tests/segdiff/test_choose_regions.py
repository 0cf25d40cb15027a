"""The choice of K without labels: the rule, its error, and images with a known number of regions."""

from __future__ import annotations

import json

import numpy as np
import pytest

import factorkit
from factorkit.segdiff import choose_regions as module
from factorkit.segdiff.choose_regions import choose_regions, recommend
from factorkit.utils.errors import CheckpointError, ConfigError, DataError

QUICK = {"resolution": 16, "steps": 60, "seed_trials": 1, "device": "cpu", "progress": False}


@pytest.fixture(autouse=True)
def isolate(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def trained_steps(monkeypatch):
    """The regions and seed of every training step."""
    steps, inner = [], module.MixtureTask.loss

    def record_loss(task, model, *args):
        steps.append((task.config.regions, task.config.seed))
        return inner(task, model, *args)

    monkeypatch.setattr(module.MixtureTask, "loss", record_loss)
    return steps


def make_bands(regions: int, count: int = 40, size: int = 16) -> np.ndarray:
    """Return images of ``regions`` bands of random colours: uint8 [count, size, size, 3]."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (count, regions, 3))
    band = np.arange(size) * regions // size
    data = np.repeat(colours[:, band][:, :, None], size, 2) + rng.normal(0, 6, (count, size, size, 3))
    return data.clip(0, 255).astype(np.uint8)


def test_recommend_stops_at_a_small_improvement():
    horses = {2: 0.2231, 3: 0.2086, 4: 0.2075, 5: 0.2074}
    improvements, chosen, reason = recommend(horses, 0.02)
    assert chosen == 3 and "the next, 4, lowers the error by 0.5%: under 2.0%" in reason
    assert improvements == pytest.approx({2: 0.065, 3: 0.0053, 4: 0.0005}, abs=1e-4)
    assert recommend(horses, 0.07)[1] == 2 and recommend(horses, 0.001)[1] == 4
    assert recommend({2: 0.20, 4: 0.21}, 0.02)[1:] == (
        2,
        "K = 2 is the smallest after which the next, 4, raises the error by 5.0%: under 2.0%",
    )
    _, chosen, reason = recommend({2: 0.4, 3: 0.3, 4: 0.2}, 0.02)
    assert chosen == 4 and "try larger" in reason


@pytest.mark.parametrize("regions", [2, 3])
def test_choose_regions_finds_the_number_of_parts(regions):
    choice = factorkit.choose_regions(make_bands(regions), out="out", candidates=(4, 2, 3), **QUICK)
    assert choice.regions == regions and list(choice.errors) == [2, 3, 4]
    written = json.loads((choice.folder / "choice.json").read_text())
    assert written["regions"] == regions and written["errors"]["2"] == choice.errors[2]
    assert (choice.folder / "regions.png").exists()
    line = choice.table().splitlines()[regions - 1]
    assert line.split()[0] == str(regions) and line.endswith("<") and choice.table().count("<") == 1


def test_choose_regions_finished_trials_are_reused(trained_steps, monkeypatch):
    changes = {**QUICK, "steps": 3}
    first = choose_regions(make_bands(2), out="out", candidates=(2, 3), **changes)
    assert set(trained_steps) == {(2, 0), (3, 0)} and len(trained_steps) == 6
    trained_steps.clear()
    assert choose_regions(make_bands(2), out="out", candidates=(2, 3), **changes).errors == first.errors
    assert trained_steps == []
    more = choose_regions(make_bands(2), out="out", candidates=(2, 3, 5), **{**changes, "seed_trials": 2})
    assert set(trained_steps) == {(2, 1), (3, 1), (5, 0), (5, 1)}
    assert more.errors[2][0] == first.errors[2][0] and len(more.errors[5]) == 2
    with pytest.raises(CheckpointError, match="random_flip: True there, False"):
        choose_regions(make_bands(2), out="out", candidates=(2, 3), random_flip=False, **changes)
    with pytest.raises(CheckpointError, match="sha256"):
        choose_regions(make_bands(3), out="out", candidates=(2, 3), **changes)


def test_choose_regions_measures_error_on_held_out_images(monkeypatch):
    recorded, inner = [], module.MixtureTask.__init__
    monkeypatch.setattr(
        module.MixtureTask, "__init__", lambda self, *args: (recorded.append(args[1:3]), inner(self, *args))[0] and None
    )
    data = make_bands(2)
    choose_regions(data, out="out", candidates=(2, 3), **{**QUICK, "steps": 1})
    images, held_out = recorded[0]
    assert len(images) == 30 and len(held_out) == 10
    assert {p.tobytes() for p in images} | {p.tobytes() for p in held_out} == {p.tobytes() for p in data}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": (3,)}, "two numbers"),
        ({"candidates": (1, 2)}, "at least 2"),
        ({"seed_trials": 0}, "seed_trials=0"),
        ({"min_improvement": 2.0}, "min_improvement=2.0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_choose_regions_invalid_settings_raise(changes, message):
    with pytest.raises(ConfigError, match=message):
        choose_regions(make_bands(2), out="out", **{**QUICK, **changes})


def test_choose_regions_too_few_images_raise():
    with pytest.raises(DataError, match="7 images: too few.*give 8"):
        choose_regions(make_bands(2, count=7), out="out", **QUICK)
