"""``train_segdiff`` from data to scores: folders, resuming, seed trials and errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import factorkit
from factorkit.data.procedural.flowers import draw_flowers
from factorkit.segdiff import train, training_images
from factorkit.segdiff.alarms import Alarms
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.train import estimate
from factorkit.utils.errors import CheckpointError, ConfigError, DataError
from factorkit.utils.files import read_log
from tests.data.flower_folder import write_flowers

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
HEALTHY = Alarms(
    eta_gap=0.45,
    position_share=0.3,
    boundary_length=0.05,
    flip_agreement=0.95,
    areas=[0.4, 0.6],
    confidence=0.9,
    entropy=0.1,
)


@pytest.fixture(autouse=True)
def isolate(tmp_path, monkeypatch):
    """Use a separate cache and working folder; skip the report and the baselines, which have their own tests."""
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: (Path(folder) / "report.html").touch())
    monkeypatch.setattr("factorkit.segdiff.task.NUM_PREVIEW_STEPS", 1)
    monkeypatch.setattr("factorkit.segdiff.evaluate.score_baselines", lambda images, *args: {"for": len(images)})


def train_tiny(data=None, **changes):
    return factorkit.train_segdiff(data, **{"preset": "demo", "progress": False, **TINY, **changes})


def read_weights(folder) -> dict[str, torch.Tensor]:
    return load_file(sorted((Path(folder) / "checkpoints").glob("step_*.safetensors"))[-1])


def have_equal_weights(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def read_event_names(folder) -> list[str]:
    return [event["event"] for event in read_log(folder)]


@pytest.fixture
def photos(tmp_path) -> Path:
    """images/ and masks/: 12 flowers, every one with a mask."""
    return write_flowers(tmp_path / "photos", 12, 12)


@pytest.mark.slow
def test_train_without_data_uses_procedural_flowers_and_scores(monkeypatch):
    make_small_dataset = lambda resolution, nested: real(resolution, train=20, test=6, nested=nested)  # noqa: E731
    real = training_images.make_procedural_dataset
    monkeypatch.setattr(training_images, "make_procedural_dataset", make_small_dataset)
    run = train_tiny(out="out")
    assert (run.config.resolution, run.step, run.folder) == (8, 4, Path("out"))
    settings = json.loads(Path("out/config.json").read_text())
    assert settings["data"]["name"] == "procedural flowers" and settings["data"]["images"] == 20
    assert settings["model"] == "segdiff" and settings["preset"] == "demo"
    scores = json.loads(Path("out/scores.json").read_text())
    assert scores == run.scores and scores["fitted_on"] + scores["scored"] == 6
    assert {"acc", "iou", "dice", "oracle_acc", "oracle_iou", "oracle_dice"} <= set(scores)
    assert run.generate(2, steps=2).images.shape == (2, 3, 8, 8)
    assert Path("out/report.html").exists()
    assert sorted(p.name for p in Path("out/samples").iterdir()) == ["000004_generated.png", "000004_segmentation.png"]


@pytest.mark.slow
def test_train_array_writes_to_the_default_folder():
    run = train_tiny(draw_flowers(6, 8)[0])
    assert run.folder == Path("runs/demo") and run.scores is None
    names = read_event_names("runs/demo")
    assert names[0] == "start" and names[-2:] == ["end", "alarms"]  # the last: what drawn images show
    losses = [event["loss"] for event in read_log("runs/demo") if event["event"] == "step"]
    assert len(losses) == 4 and all(np.isfinite(losses))


@pytest.mark.slow
def test_train_folder_with_masks_scores_held_out_images(photos):
    run = train_tiny(photos, out="out", holdout=5, num_fit_images=2, baselines=True)
    settings = json.loads(Path("out/config.json").read_text())
    assert settings["data"]["images"] == 7
    scores = json.loads(Path("out/scores.json").read_text())
    assert (scores["fitted_on"], scores["scored"], scores["step"]) == (2, 3, 4)
    assert scores["baselines"] == {"for": 5} and run.scores == scores


@pytest.mark.slow
def test_train_unlabelled_folder_skips_broken_images(photos):
    (photos / "images" / "deep").mkdir()
    (photos / "images" / "deep" / "broken.jpg").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="1 of 13 .*broken.jpg"):
        run = train_tiny(photos / "images", out="out")
    assert json.loads(Path("out/config.json").read_text())["data"]["images"] == 12
    assert run.scores is None


@pytest.mark.parametrize("images", ["missing", "empty", "broken"])
def test_train_without_readable_images_raises_and_leaves_no_folder(tmp_path, images):
    if images != "missing":
        (tmp_path / images).mkdir()
    if images == "broken":
        (tmp_path / images / "a.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="a.png" if images == "broken" else images):
        train_tiny(tmp_path / images, out="out")
    assert not Path("out").exists()


# --- repeated calls ---


@pytest.mark.slow
def test_train_repeated_call_trains_and_scores_nothing(photos, monkeypatch):
    first = train_tiny(photos, out="out", holdout=5)
    before, log = read_weights("out"), read_event_names("out")

    def fail_if_called(*args, **named):
        raise AssertionError("trained or scored again")

    monkeypatch.setattr("factorkit.segdiff.task.SegdiffTask.loss", fail_if_called)
    monkeypatch.setattr("factorkit.segdiff.run.SegdiffRun.evaluate", fail_if_called)
    again = train_tiny(photos, out="out", holdout=5)
    assert have_equal_weights(read_weights("out"), before) and again.scores == first.scores
    assert read_event_names("out") == log


@pytest.mark.slow
def test_train_interrupted_run_resumes_to_the_same_weights(monkeypatch):
    images = draw_flowers(6, 8)[0]
    train_tiny(images, out="whole")
    inner, calls = train.SegdiffTask.loss, []

    def fail(self, *args):
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("power cut")
        return inner(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr("factorkit.segdiff.task.SegdiffTask.loss", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny(images, out="broken")
    with pytest.raises(CheckpointError, match="a run with other data "):
        train_tiny(draw_flowers(6, 8, seed=1)[0], out="broken")
    train_tiny(images, out="broken")
    assert "resume" in read_event_names("broken")
    assert have_equal_weights(read_weights("whole"), read_weights("broken"))


@pytest.mark.slow
def test_train_more_steps_resumes_and_scores_again(photos):
    assert train_tiny(photos, out="out", holdout=5).scores["step"] == 4
    longer = train_tiny(photos, out="out", holdout=5, steps=6)
    assert longer.step == 6 and longer.scores["step"] == 6
    assert "baselines" in longer.scores, "the verdict always compares with position and colour"
    assert "baselines" in train_tiny(photos, out="out", holdout=5, steps=6, baselines=True).scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": 3}, "regions: 2 there, 3 requested"),
        ({"form": "thesis"}, "form: 'regional' there, 'thesis'"),
        ({"seed": 5}, "seed: 0 there, 5"),
        ({"preset": "fast32"}, "preset: 'demo' there"),
    ],
)
def test_train_folder_of_another_run_raises_with_the_differences(changes, message):
    images = draw_flowers(6, 8)[0]
    train_tiny(images, out="out", steps=1)
    with pytest.raises(CheckpointError, match=message):
        train_tiny(images, out="out", steps=1, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [True, False])
def test_train_run_of_the_former_default_resumes_with_the_masks_of_the_network(recorded, capsys):
    images = draw_flowers(6, 8)[0]
    train_tiny(images, out="old", steps=2)
    settings = json.loads(Path("old/config.json").read_text())
    for name in ("mixture_steps", "distil_steps", "cue_weight", *([] if recorded else ["masks"])):
        del settings[name]
    Path("old/config.json").write_text(json.dumps(settings))
    run = train_tiny(images, out="old", masks=None, progress=True)
    assert run.config.masks == "network" and 'masks="network": old was started with it' in capsys.readouterr().err
    assert "resume" in read_event_names("old") and run.step == 4


def test_train_foreign_folder_raises(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a factorkit run"):
        train_tiny(draw_flowers(6, 8)[0], out="out")
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": 0}, "regions=0"),
        ({"resolution": 9}, "resolution=9"),
        ({"seed_trials": 0}, "seed_trials=0"),
        ({"seed_trials": 2, "regions": 1}, "regions=1 has none"),
        ({"preset": "demos"}, "preset='demos'"),
        ({"regons": 2}, "'regons'"),
        ({"holdout": 3}, "no masks"),
        ({"coarse_to_fine": (9, 1)}, "coarse_to_fine"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_train_invalid_settings_raise_before_a_folder_is_made(changes, message):
    with pytest.raises(ConfigError, match=message):
        train_tiny(draw_flowers(6, 8)[0], out="out", **changes)
    assert not Path("out").exists()


# --- forms and ablations ---


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"form": "thesis"},
        {"regions": 1},
        {"decoding": "concat"},
        {"decoding": "masked_mid", "prediction": "eps"},
        {"decoding": "unshared"},
        {"timesteps": 50},
        {"micro_batch_size": 3, "precision": "fp32", "dropout": 0.1},
    ],
)
def test_train_every_form_and_ablation_can_be_loaded(changes, photos):
    run = train_tiny(photos, out="out", holdout=5, steps=2, **{"segment_t": 3, **changes})
    assert (run.scores is None) == (changes.get("regions") == 1)
    assert factorkit.load("out", device="cpu").config == run.config
    start = preset_config("demo", **{**TINY, "segment_t": 3, **changes}).resolved()
    blank = np.zeros((2, 8, 8, 3), np.uint8)
    fresh = train.SegdiffTask(start, blank, blank, torch.device("cpu"))
    moved = read_weights("out")
    assert any(not torch.equal(moved[f"model.{k}"], v) for k, v in fresh.model.named_parameters())


@pytest.mark.slow
def test_train_too_few_labels_warns_and_keeps_the_run(photos):
    with pytest.warns(UserWarning, match="could not be scored.*at least 2"):
        run = train_tiny(photos, out="out", holdout=1)
    assert run.step == 4 and run.scores is None


@pytest.mark.slow
def test_load_every_ema_decay_gives_its_weights(photos):
    run = train_tiny(photos, out="out", holdout=5, extra_ema_decays=(0.25, 0.5))
    stored = read_weights("out")
    for decay in (0.25, 0.5):
        other = factorkit.load("out", device="cpu", weights=decay)
        again = factorkit.load(other.save(f"{decay}.safetensors"), device="cpu")
        for one in (other, again):
            assert all(torch.equal(v, stored[f"ema_{decay}.module.{k}"]) for k, v in one.model.state_dict().items())
            assert (one.config.ema_decay, one.config.extra_ema_decays, one.folder) == (decay, (), None)
    assert run.config.extra_ema_decays == (0.25, 0.5)
    before = Path("out/scores.json").read_text()
    other.evaluate(photos / "images", photos / "masks")
    assert Path("out/scores.json").read_text() == before


# --- seed trials ---


def set_alarms_by_seed(monkeypatch, gaps):
    """Replace the alarms by healthy ones with the given eta gap of each seed; return the list of measured seeds."""
    measured = []

    def alarms(task, model):
        measured.append(task.config.seed)
        return dataclasses.replace(HEALTHY, eta_gap=gaps[task.config.seed])

    monkeypatch.setattr("factorkit.segdiff.task.SegdiffTask.alarms", alarms)
    return measured


@pytest.mark.slow
def test_seed_trials_best_trial_is_continued_exactly(monkeypatch):
    images = draw_flowers(6, 8)[0]
    measured = set_alarms_by_seed(monkeypatch, {10: 0.35, 11: 0.44, 12: 0.1})
    run = train_tiny(images, out="trials", seed_trials=3, seed=10)
    assert set(measured) == {10, 11, 12}
    assert run.config.seed == 11 and run.step == 4
    train_tiny(images, out="plain", seed=11)
    assert have_equal_weights(read_weights("trials"), read_weights("plain")), (
        "the trial is the beginning of the run of its seed"
    )

    log = read_log("trials")
    restarts = [event for event in log if event["event"] == "restart"]
    assert [event["seed"] for event in restarts] == [10, 11, 12, 11]
    assert "healthy" in restarts[0]["message"] and "not about content" in restarts[2]["message"]
    assert restarts[-1]["restarts"] == 3 and "seed 11" in restarts[-1]["message"]
    assert [event["step"] for event in log if event["event"] == "step"] == [1, 2, 3, 4]


@pytest.mark.slow
def test_seed_trials_of_a_mixture_are_ranked_by_unexplained_noise(monkeypatch):
    alarms = {0: 0.25, 1: 0.21, 2: 0.22}
    monkeypatch.setattr("factorkit.segdiff.task.measure_alarms", lambda *args, **settings: HEALTHY)
    errors = iter(alarms.values())
    monkeypatch.setattr("factorkit.segdiff.task.unexplained_noise", lambda *args: next(errors))
    with monkeypatch.context() as patch:
        patch.setattr("factorkit.segdiff.task.SegdiffTask.inspect", lambda *args: {})
        run = train_tiny(draw_flowers(6, 8)[0], out="out", seed_trials=3, masks="mixture")
    assert run.config.seed == 1
    restarts = [event for event in read_log("out") if event["event"] == "restart"]
    assert [event.get("error") for event in restarts] == [0.25, 0.21, 0.22, None]


@pytest.mark.slow
def test_seed_trials_all_failed_is_logged(monkeypatch):
    set_alarms_by_seed(monkeypatch, {0: 0.1, 1: 0.2})
    assert train_tiny(draw_flowers(6, 8)[0], out="out", seed_trials=2).config.seed == 1
    assert "fail every seed" in [event for event in read_log("out") if event["event"] == "restart"][-1]["message"]


@pytest.mark.slow
def test_seed_trials_interrupted_resume_without_repeats(monkeypatch):
    images = draw_flowers(6, 8)[0]
    set_alarms_by_seed(monkeypatch, {0: 0.1, 1: 0.4})
    inner, recorded = train.SegdiffTask.loss, []

    def fail(self, model, indices, draw, step):
        if len(recorded) == 3:
            raise RuntimeError("power cut")
        recorded.append((self.config.seed, int(step)))
        return inner(self, model, indices, draw, step)

    with monkeypatch.context() as patch:
        patch.setattr("factorkit.segdiff.task.SegdiffTask.loss", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny(images, out="out", seed_trials=2)
    assert recorded == [(0, 0), (0, 1), (1, 0)]
    recorded.clear()

    def record(self, model, indices, draw, step):
        recorded.append((self.config.seed, int(step)))
        return inner(self, model, indices, draw, step)

    monkeypatch.setattr("factorkit.segdiff.task.SegdiffTask.loss", record)
    assert train_tiny(images, out="out", seed_trials=2).config.seed == 1
    assert recorded == [(1, 0), (1, 1), (1, 2), (1, 3)], "the finished trial of seed 0 must not run again"
    recorded.clear()
    assert train_tiny(images, out="out", seed_trials=2).config.seed == 1
    assert recorded == []
    train_tiny(images, out="whole", seed=1)
    assert have_equal_weights(read_weights("out"), read_weights("whole"))


# --- before training ---


@pytest.mark.slow
def test_estimate_leaves_no_files_and_returns_plausible_numbers(tmp_path):
    result = estimate(preset="demo", **TINY)
    config = preset_config("demo", **TINY).resolved()
    assert result["parameters"] == sum(p.numel() for p in config.build().parameters())
    assert result["images_per_second"] > 0
    assert result["seconds"] == pytest.approx(config.steps * config.batch_size / result["images_per_second"])
    assert 20 * result["parameters"] / 2**30 <= result["memory_gib"] < 4
    assert (result["steps"], result["batch_size"], result["trial_images"], result["device"]) == (4, 4, 4, "cpu")
    assert list(tmp_path.iterdir()) == []
    json.dumps(result)


@pytest.mark.slow
def test_estimate_of_object_masks_counts_their_stages_and_leaves_no_files(tmp_path):
    result = estimate(preset="demo", **TINY | {"masks": "auto", "mixture_steps": 10, "distil_steps": 10_000})
    steps = 4 * 4 / result["images_per_second"]
    assert result["stage_seconds"] > 10 * steps and result["seconds"] == pytest.approx(steps + result["stage_seconds"])
    assert list(tmp_path.iterdir()) == []


def test_estimate_invalid_settings_raise():
    with pytest.raises(ConfigError, match="regions=0"):
        estimate(preset="demo", regions=0)


def test_package_public_names_load_lazily():
    assert factorkit.train_segdiff is train.train_segdiff
    assert set(factorkit.__all__) >= {"train_segdiff", "load", "SegdiffRun"}
    with pytest.raises(AttributeError, match="train_everything"):
        factorkit.train_everything  # noqa: B018
