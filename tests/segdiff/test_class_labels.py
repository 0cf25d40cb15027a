"""Class labels in the model, the training, the sampler's guidance, and the public functions."""

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
    "masks": "network",
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
def isolate(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("factorkit.segdiff.task.NUM_PREVIEW_STEPS", 2)
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)


def make_images(count=6) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)


def train_tiny(**changes):
    settings = {"preset": "demo", "progress": False, "out": "out", "classes": LABELS, **TINY, **changes}
    return factorkit.train_segdiff(make_images(), **settings)


# --- the model ---


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"regions": 1}, {"decoding": "concat"}, {"decoding": "unshared"}])
def test_forward_labels_change_prediction_and_masks(build_tiny, make_batch, changes):
    model = build_tiny(classes=3, **changes)
    x_t, t = make_batch(count=4)
    labels = torch.tensor([0, 1, 2, -1])
    conditional, unconditional = model(x_t, t, labels), model(x_t, t)
    compare_rows = lambda a, b: torch.isclose(a, b).flatten(1).all(1).tolist()  # noqa: E731
    assert compare_rows(conditional.prediction, unconditional.prediction) == [False, False, False, True]
    for i, label in enumerate([0, 1, 2]):  # Each image's prediction depends on its own label only.
        alone = model(x_t, t, torch.full((4,), label)).prediction
        torch.testing.assert_close(alone[i], conditional.prediction[i])
    if model.regions > 1:
        assert compare_rows(conditional.bottleneck.masks, unconditional.bottleneck.masks) == [False, False, False, True]
        torch.testing.assert_close(model.segment(x_t, t), unconditional.bottleneck.masks)
        torch.testing.assert_close(model.segment(x_t, t, labels), conditional.bottleneck.masks)


def test_label_embedding_is_added_to_the_time_embedding(build_tiny, make_batch):
    model = build_tiny(classes=3)
    x_t, t = make_batch(count=2)
    with torch.no_grad():
        conditional = model(x_t, t, torch.tensor([2, 0])).prediction
        bias, table = model.time[2].bias, model.labels.table.weight
        bias += table[2]
        table[:] = 0
        torch.testing.assert_close(model(x_t, t).prediction[0], conditional[0])


def test_network_without_classes_has_no_label_table(build_tiny):
    assert build_tiny().labels is None and not any("labels" in name for name in build_tiny().state_dict())


# --- guidance ---


@torch.no_grad()
def test_guidance_mixes_predictions_and_keeps_conditional_masks(build_tiny, make_batch):
    model = build_tiny(classes=3)
    x_t, t = make_batch(count=2)
    labels = torch.tensor([1, 2])
    conditional, unconditional = model(x_t, t, labels), model(x_t, t)
    result = GuidedDenoiser(model, labels, 3.0)(x_t, t)
    torch.testing.assert_close(result.prediction, 3 * conditional.prediction - 2 * unconditional.prediction)
    torch.testing.assert_close(result.bottleneck.masks, conditional.bottleneck.masks)
    torch.testing.assert_close(GuidedDenoiser(model, labels, 0.0)(x_t, t).prediction, unconditional.prediction)


def test_guidance_of_scale_one_calls_the_network_once():
    calls = []

    def model(x, t, cond):
        calls.append(cond)
        return factorkit.diffusion.denoiser.Denoised(x, None)

    GuidedDenoiser(model, "rose", 1.0)(torch.zeros(1), torch.zeros(1))
    assert calls == ["rose"]
    GuidedDenoiser(model, "rose", 2.0)(torch.zeros(1), torch.zeros(1))
    assert calls[1:] == ["rose", None]


def test_guidance_of_a_gaussian_shifts_its_mean():
    """Guidance of scale w between N(m, 1) and N(0, 1) is the exact denoiser of N(w m, 1) on a VP path.

    At every level eps_unconditional - eps_conditional = s a m / (a^2 + s^2).
    """
    from factorkit.diffusion.samplers import sample
    from factorkit.diffusion.schedule import Schedule
    from tests.diffusion.closed_forms import Gaussian

    schedule = Schedule(100)
    conditional, unconditional, pushed = (Gaussian(schedule, mu, 1.0) for mu in (0.2, 0.0, 0.5))
    either = lambda x, t, cond: (unconditional if cond is None else conditional)(x, t)  # noqa: E731
    options = {"schedule": schedule, "prediction": "v", "sampler": "heun", "steps": 20, "seed": 1, "clip": False}
    result = sample(GuidedDenoiser(either, "conditional", 2.5), (1, 1, 16, 16), **options).images
    torch.testing.assert_close(result, sample(pushed, (1, 1, 16, 16), **options).images, rtol=0, atol=1e-4)


# --- training ---


def draw_labels(task, seed, count=4000, **options):
    recorded = []
    predict = task.model.forward
    task.model.forward = lambda x, t, cond=None: (recorded.append(cond), predict(x[:2], t[:2], cond[:2]))[1]
    indices = torch.arange(count) % 6
    draw = BatchDraw(seed, 0, count, slice(0, count), CPU)
    return indices, task._draw_labels(indices, draw)[0]


def test_training_labels_equal_the_images_or_are_dropped():
    config = preset_config(None, **TINY, class_names=tuple(NAMES), label_dropout=0.2).resolved()
    labels = np.array([2, 0, -1, 1, 0, 2])
    task = SegdiffTask(config, make_images(), make_images(), CPU, labels)
    indices, labels_drawn = draw_labels(task, 3)
    true = torch.from_numpy(labels)[indices]
    dropped = (labels_drawn != true).float().mean().item()
    assert ((labels_drawn == true) | (labels_drawn == -1)).all()
    assert dropped == pytest.approx(0.2 * 5 / 6, abs=0.02)
    assert torch.equal(labels_drawn, draw_labels(task, 3)[1]) and not torch.equal(labels_drawn, draw_labels(task, 4)[1])


@pytest.mark.slow
def test_train_with_classes_stores_names_and_trains_embeddings():
    run = train_tiny()
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


@pytest.mark.slow
def test_train_resumed_with_same_labels_is_exact_and_with_others_raises():
    train_tiny(steps=2)
    with pytest.raises(CheckpointError, match="labels_sha256"):
        train_tiny(classes=[*LABELS[:-1], "iris"])
    with pytest.raises(CheckpointError, match="class_names"):
        train_tiny(classes=None)
    resumed = train_tiny(steps=4)
    whole = train_tiny(out="whole")
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@pytest.mark.slow
def test_generate_class_without_classes_raises():
    run = train_tiny(classes=None)
    assert run.config.class_names == () and run.generate(1, steps=1).classes is None
    with pytest.raises(ConfigError, match="has no classes.*train_segdiff"):
        run.generate(1, classes="rose")


def test_find_classes_on_request_uses_the_labels_of_the_data_set(monkeypatch):
    labels = np.array([2, 0, -1, 1, 0, 2])
    dataset = Dataset("official", ArraySource(make_images()), None, None, labels=labels, class_names=NAMES)
    result = train.find_classes(True, dataset, ["000005", "000001"])  # The other images could not be decoded.
    assert result.names == ["iris", "rose"] and result.labels.tolist() == [1, 0]
    assert train.find_classes(None, dataset, dataset.train.names) is None
    plain = Dataset("plain", ArraySource(make_images()), None, None)
    with pytest.raises(ConfigError, match="have no folders"):
        train.find_classes("auto", plain, plain.train.names)


def test_train_mismatched_labels_raise_before_anything_is_written():
    with pytest.raises(DataError, match="3 entries"):
        train_tiny(classes=["a", "b", "c"])
    with pytest.raises(ConfigError, match="give classes= instead"):
        train_tiny(class_names=("a", "b"))
    assert not Path("out").exists()


@pytest.mark.slow
def test_estimate_with_classes_counts_the_label_table():
    known = train.Classes(np.zeros(0, np.int64), NAMES)
    sizes = [train.estimate(preset="demo", classes=k, **TINY)["parameters"] for k in (None, known)]
    assert sizes[1] - sizes[0] == 4 * 32


# --- selecting classes ---


def test_select_labels_cycles_through_classes():
    select = lambda classes, n: select_labels(classes, NAMES, n).tolist()  # noqa: E731
    assert select("all", 5) == [0, 1, 2, 0, 1]
    assert select("rose", 2) == [2, 2] and select(1, 2) == [1, 1]
    assert select(["rose", None, 0], 4) == [2, -1, 0, 2]
    assert select(["rose", "iris"], 1) == [2]
    assert select_labels(None, NAMES, 3) is None


@pytest.mark.parametrize(
    ("classes", "guidance", "message"),
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
def test_select_labels_invalid_request_raises(classes, guidance, message):
    with pytest.raises(ConfigError, match=message):
        select_labels(classes, NAMES, 2, guidance)


@pytest.mark.slow
def test_generate_with_classes_returns_and_depends_on_them():
    run = train_tiny(learning_rate=0.1, label_dropout=0.0)
    drawn = run.generate(4, classes=["rose", None], steps=2)
    assert drawn.classes == ["rose", None, "rose", None]
    other = run.generate(4, classes=["iris", None], steps=2)
    differ = (drawn.images - other.images).abs().flatten(1).amax(1) > 1e-6
    assert differ.tolist() == [True, False, True, False]
    torch.testing.assert_close(run.generate(4, steps=2).images[1], drawn.images[1])
    many = run.generate(70, classes="all", steps=1)  # more than one batch
    assert many.classes[64:67] == ["lily", "rose", "iris"] and len(many.images) == 70


def test_class_grid_has_a_row_per_class():
    masks = np.zeros((5, 2, 8, 8))
    masks[:, 0] = 1
    grid_size = lambda classes: draw_class_grid(make_images(5), masks, classes).size  # noqa: E731
    two, five = grid_size(["a", "a", "b", "b", "b"]), grid_size(["a", "b", "c", "d", None])
    assert five[1] > 2.3 * two[1] and five[0] < two[0]
    assert draw_class_grid(make_images(5), masks[:, :1], ["a"] * 5).size[0] < two[0]
