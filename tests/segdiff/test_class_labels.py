"""Labels: through the model, the training, the sampler's guidance, and what a user asks for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import factorkit
from factorkit.data.datasets import Dataset
from factorkit.data.sources import ArraySource
from factorkit.diffusion.denoiser import GuidedDenoiser
from factorkit.segdiff import train
from factorkit.segdiff.class_labels import select_labels
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.previews import draw_class_grid
from factorkit.segdiff.task import SegdiffTask
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.rng import BatchDraw

CPU = torch.device("cpu")
TINY = {
    "resolution": 8,
    "regions": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 2,
    "steps": 4,
    "batch_size": 4,
    "checkpoint_every": 2,
    "sample_every": 0,
    "log_every": 1,
    "device": "cpu",
}
NAMES = ["iris", "lily", "rose"]
LABELS = ["rose", "iris", "", "lily", "iris", "rose"]


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("factorkit.segdiff.task.NUM_PREVIEW_STEPS", 2)
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)


def pictures(count=6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def fit(**changes):
    given = {"preset": "demo", "progress": False, "out": "out", "classes": LABELS, **TINY, **changes}
    return factorkit.train_segdiff(pictures(), **given)


# --- the model ---


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"regions": 1}, {"decoding": "concat"}, {"decoding": "unshared"}])
def test_labels_reach_image_and_masks_and_no_label_is_one_of_its_own(tiny, batch, changes):
    model = tiny(classes=3, **changes)
    x_t, t = batch(count=4)
    labels = torch.tensor([0, 1, 2, -1])
    told, free = model(x_t, t, labels), model(x_t, t)
    same = lambda a, b: torch.isclose(a, b).flatten(1).all(1).tolist()  # noqa: E731
    assert same(told.prediction, free.prediction) == [False, False, False, True]
    for i, label in enumerate([0, 1, 2]):  # each image has its own label's answer, whatever the others are
        alone = model(x_t, t, torch.full((4,), label)).prediction
        torch.testing.assert_close(alone[i], told.prediction[i])
    if model.regions > 1:
        assert same(told.bottleneck.masks, free.bottleneck.masks) == [False, False, False, True]
        torch.testing.assert_close(model.segment(x_t, t), free.bottleneck.masks)
        torch.testing.assert_close(model.segment(x_t, t, labels), told.bottleneck.masks)


def test_the_label_is_added_to_the_time_embedding(tiny, batch):
    model = tiny(classes=3)
    x_t, t = batch(count=2)
    with torch.no_grad():
        told = model(x_t, t, torch.tensor([2, 0])).prediction
        bias, table = model.time[2].bias, model.labels.table.weight
        bias += table[2]
        table[:] = 0
        torch.testing.assert_close(model(x_t, t).prediction[0], told[0])


def test_a_model_without_classes_is_as_it_was(tiny):
    assert tiny().labels is None and not any("labels" in name for name in tiny().state_dict())


# --- guidance ---


@torch.no_grad()
def test_guidance_mixes_predictions_and_keeps_the_told_models_masks(tiny, batch):
    model = tiny(classes=3)
    x_t, t = batch(count=2)
    labels = torch.tensor([1, 2])
    told, free = model(x_t, t, labels), model(x_t, t)
    found = GuidedDenoiser(model, labels, 3.0)(x_t, t)
    torch.testing.assert_close(found.prediction, 3 * told.prediction - 2 * free.prediction)
    torch.testing.assert_close(found.bottleneck.masks, told.bottleneck.masks)
    torch.testing.assert_close(GuidedDenoiser(model, labels, 0.0)(x_t, t).prediction, free.prediction)


def test_without_guidance_the_network_is_called_once():
    calls = []

    def model(x, t, cond):
        calls.append(cond)
        return factorkit.diffusion.denoiser.Denoised(x, None)

    GuidedDenoiser(model, "rose", 1.0)(torch.zeros(1), torch.zeros(1))
    assert calls == ["rose"]
    GuidedDenoiser(model, "rose", 2.0)(torch.zeros(1), torch.zeros(1))
    assert calls[1:] == ["rose", None]


def test_guidance_sharpens_a_gaussian_as_its_formula_says():
    """Told N(m, 1), free N(0, 1): at every level eps_free - eps_told = s a m / (a^2 + s^2), so on a VP path scale w
    is the exact denoiser of N(w m, 1)."""
    from factorkit.diffusion.samplers import sample
    from factorkit.diffusion.schedule import Schedule
    from tests.diffusion.closed_forms import Gaussian

    schedule = Schedule(100)
    told, free, pushed = (Gaussian(schedule, mu, 1.0) for mu in (0.2, 0.0, 0.5))
    either = lambda x, t, cond: (free if cond is None else told)(x, t)  # noqa: E731
    options = {"schedule": schedule, "prediction": "v", "sampler": "heun", "steps": 20, "seed": 1, "clip": False}
    found = sample(GuidedDenoiser(either, "told", 2.5), (1, 1, 16, 16), **options).images
    torch.testing.assert_close(found, sample(pushed, (1, 1, 16, 16), **options).images, rtol=0, atol=1e-4)


# --- training ---


def told(task, seed, count=4000, **options):
    seen = []
    predict = task.model.forward
    task.model.forward = lambda x, t, cond=None: (seen.append(cond), predict(x[:2], t[:2], cond[:2]))[1]
    indices = torch.arange(count) % 6
    draw = BatchDraw(seed, 0, count, slice(0, count), CPU)
    return indices, task._draw_labels(indices, draw)[0]


def test_labels_are_those_of_the_images_and_some_are_left_out():
    config = preset_config(None, **TINY, class_names=tuple(NAMES), label_dropout=0.2).resolved()
    labels = np.array([2, 0, -1, 1, 0, 2])
    task = SegdiffTask(config, pictures(), pictures(), CPU, labels)
    indices, given = told(task, 3)
    true = torch.from_numpy(labels)[indices]
    dropped = (given != true).float().mean().item()
    assert ((given == true) | (given == -1)).all()
    assert dropped == pytest.approx(0.2 * 5 / 6, abs=0.02)
    assert torch.equal(given, told(task, 3)[1]) and not torch.equal(given, told(task, 4)[1])


def test_a_run_keeps_its_classes_and_learns_their_labels():
    run = fit()
    assert run.config.class_names == tuple(NAMES)
    settings = json.loads(Path("out/config.json").read_text())
    assert settings["class_names"] == NAMES and "labels_sha256" in settings["data"]
    for again in (factorkit.load("out", device="cpu"), factorkit.load(run.save("one.safetensors"), device="cpu")):
        assert again.config.class_names == tuple(NAMES)
        ours = run.generate(3, classes="all", steps=2, guidance=2.0)
        assert torch.equal(again.generate(3, classes="all", steps=2, guidance=2.0).images, ours.images)
    weights = load_file(sorted(Path("out/checkpoints").iterdir())[-1])
    moments = weights["adam.exp_avg_sq.labels.table.weight"]
    assert moments.shape == (4, 32) and (moments.sum(1) > 0).sum() >= 3


def test_resuming_with_other_labels_is_refused_and_with_the_same_is_exact():
    fit(steps=2)
    with pytest.raises(CheckpointError, match="labels_sha256"):
        fit(classes=[*LABELS[:-1], "iris"])
    with pytest.raises(CheckpointError, match="class_names"):
        fit(classes=None)
    resumed = fit(steps=4)
    whole = fit(out="whole")
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_a_run_without_classes_has_none_and_says_so():
    run = fit(classes=None)
    assert run.config.class_names == () and run.generate(1, steps=1).classes is None
    with pytest.raises(ConfigError, match="has no classes.*train_segdiff"):
        run.generate(1, classes="rose")


def test_labels_of_the_data_set_itself_are_used_when_asked_for(monkeypatch):
    labels = np.array([2, 0, -1, 1, 0, 2])
    dataset = Dataset("official", ArraySource(pictures()), None, None, labels=labels, class_names=NAMES)
    found = train.find_classes(True, dataset, ["000005", "000001"])  # the others could not be decoded
    assert found.names == ["iris", "rose"] and found.labels.tolist() == [1, 0]
    assert train.find_classes(None, dataset, dataset.train.names) is None
    plain = Dataset("plain", ArraySource(pictures()), None, None)
    with pytest.raises(ConfigError, match="have no folders"):
        train.find_classes("auto", plain, plain.train.names)


def test_labels_that_do_not_fit_are_refused_before_anything_is_written():
    with pytest.raises(DataError, match="3 entries"):
        fit(classes=["a", "b", "c"])
    with pytest.raises(ConfigError, match="give classes= instead"):
        fit(class_names=("a", "b"))
    assert not Path("out").exists()


def test_the_estimate_counts_the_label_table():
    known = train.Classes(np.zeros(0, np.int64), NAMES)
    sizes = [train.estimate(preset="demo", classes=k, **TINY)["parameters"] for k in (None, known)]
    assert sizes[1] - sizes[0] == 4 * 32


# --- asking ---


def test_classes_are_taken_in_turn():
    ask = lambda classes, n: select_labels(classes, NAMES, n).tolist()  # noqa: E731
    assert ask("all", 5) == [0, 1, 2, 0, 1]
    assert ask("rose", 2) == [2, 2] and ask(1, 2) == [1, 1]
    assert ask(["rose", None, 0], 4) == [2, -1, 0, 2]
    assert ask(["rose", "iris"], 1) == [2]
    assert select_labels(None, NAMES, 3) is None


@pytest.mark.parametrize(
    ("classes", "guidance", "says"),
    [
        ("ross", 1.0, "'ross'.*did you mean rose"),
        ("xyz", 1.0, "'xyz'.*there are iris, lily, rose"),
        (3, 1.0, "0 to 2"),
        (-1, 1.0, "0 to 2"),
        ([], 1.0, "empty"),
        (None, 2.0, "needs classes="),
        ("rose", -1.0, "guidance=-1"),
        ("rose", float("nan"), "guidance=nan"),
    ],
)
def test_what_cannot_be_asked_is_named(classes, guidance, says):
    with pytest.raises(ConfigError, match=says):
        select_labels(classes, NAMES, 2, guidance)


def test_generated_images_tell_their_classes_and_depend_on_them():
    run = fit(learning_rate=0.1, label_dropout=0.0)
    drawn = run.generate(4, classes=["rose", None], steps=2)
    assert drawn.classes == ["rose", None, "rose", None]
    other = run.generate(4, classes=["iris", None], steps=2)
    differ = (drawn.images - other.images).abs().flatten(1).amax(1) > 1e-6
    assert differ.tolist() == [True, False, True, False]
    torch.testing.assert_close(run.generate(4, steps=2).images[1], drawn.images[1])
    many = run.generate(70, classes="all", steps=1)  # more than one piece
    assert many.classes[64:67] == ["lily", "rose", "iris"] and len(many.images) == 70


def test_the_sheet_has_a_row_for_each_class():
    masks = np.zeros((5, 2, 8, 8))
    masks[:, 0] = 1
    rows = lambda classes: draw_class_grid(pictures(5), masks, classes).size  # noqa: E731
    two, five = rows(["a", "a", "b", "b", "b"]), rows(["a", "b", "c", "d", None])
    assert five[1] > 2.3 * two[1] and five[0] < two[0]
    assert draw_class_grid(pictures(5), masks[:, :1], ["a"] * 5).size[0] < two[0]
