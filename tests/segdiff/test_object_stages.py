"""The stages before a run: resume, determinism, few and unusual images, and a network that reaches an exact teacher."""

from __future__ import annotations

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

import factorkit
from factorkit.data.procedural.flowers import draw_flowers
from factorkit.diffusion.schedule import Schedule
from factorkit.engine.step import Meter
from factorkit.engine.trainer import Trainer
from factorkit.segdiff import object_stages
from factorkit.segdiff import train as training
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.masks import distil
from factorkit.segdiff.masks.cued_mixture import CuedMixtureTask
from factorkit.segdiff.masks.distil import DistilTask, augment
from factorkit.segdiff.masks.objects import LOGITS_SIDE, MaskNetwork, measure_cue
from factorkit.segdiff.masks.spatial_mixture import SpatialMixture
from factorkit.segdiff.object_stages import ObjectStages
from factorkit.utils.errors import CheckpointError
from factorkit.utils.images import pixels_to_signed
from factorkit.utils.rng import BatchDraw
from tests.engine.host_reads import Watched
from tests.engine.trained import assert_identical, final_state

TINY = {
    "resolution": 16,
    "regions": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "norm_groups": 4,
    "batch_size": 4,
    "masks": "auto",
    "mixture_steps": 6,
    "distil_steps": 6,
    "steps": 2,
    "checkpoint_every": 2,
    "sample_every": 0,
    "precision": "fp32",
    "device": "cpu",
}


def train(out, images=None, **changes):
    images = draw_flowers(12, 16, seed=0)[0] if images is None else images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "write_report", lambda folder: None)  # takes longer than all the rest
        return factorkit.train_segdiff(images, out=out, preset="demo", progress=False, **{**TINY, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("task", [CuedMixtureTask, DistilTask])
def test_run_that_dies_in_a_stage_resumes_bit_identically(tmp_path, monkeypatch, whole, task):
    class DeathError(Exception):
        pass

    loss, calls = task.loss, itertools.count(1)

    def die_in_the_fourth_step(*arguments):
        if next(calls) == 4:
            raise DeathError
        return loss(*arguments)

    monkeypatch.setattr(task, "loss", die_in_the_fourth_step)
    with pytest.raises(DeathError):
        train(tmp_path / "run")
    stage = "mixture" if task is CuedMixtureTask else "distil"
    assert [p.name for p in (tmp_path / "run/stages" / stage / "checkpoints").iterdir()] == [
        "step_00000002.safetensors"
    ]
    train(tmp_path / "run")
    assert_identical(final_state(tmp_path / "run"), final_state(whole))


@pytest.mark.slow
def test_alarms_of_object_masks_count_the_steps_of_their_stage(tmp_path, whole):
    counted = json.loads([line for line in (whole / "log.jsonl").read_text().splitlines() if '"alarms"' in line][-1])
    reasons = [check["reason"] for check in counted["checks"] if "training steps" in check.get("reason", "")]
    assert reasons and all("there were 6" in reason for reason in reasons)
    assert counted["error"] > 0


@pytest.mark.slow
def test_finished_run_is_loaded_without_its_stages(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(ObjectStages, "run", lambda self: pytest.fail("the stages ran again"))
    assert train(whole).step == 2


@pytest.mark.slow
def test_open_regions_are_chosen_once_and_stored(tmp_path, monkeypatch, whole):
    """The choice of 2 takes the mixture that it was made with, and neither resuming nor lost stages change it."""
    monkeypatch.setattr(object_stages, "MIN_CUE_IMAGES", 12)
    monkeypatch.setattr(ObjectStages, "measure_error", lambda self, mixture, weight: 1.0)
    out = tmp_path / "run"
    train(out, regions=None, steps=1)
    messages = (out / "log.jsonl").read_text()
    assert "a third region explains 0.0% of the unexplained noise" in messages and "2 regions suit" in messages
    assert json.loads((out / "config.json").read_text())["regions"] == 2
    stage = final_state(out / "stages/mixture_of_other_regions")["ema.module.prior_logits"]
    assert torch.equal(final_state(out)["model.masks.mixture.prior_logits"], stage) and len(stage) == 2
    monkeypatch.setattr(ObjectStages, "measure_error", lambda self, mixture, weight: pytest.fail("chosen again"))
    shutil.rmtree(out / "stages")
    assert train(out, regions=None).config.regions == train(out).config.regions == 2
    with pytest.raises(CheckpointError, match="regions: 2 there, 3 requested"):
        train(out, regions=3)
    # A run that was started with a number keeps it.
    folder = shutil.copytree(whole, tmp_path / "whole")
    assert train(folder, regions=None).config.regions == 2


@pytest.mark.slow
def test_open_regions_that_choose_three_give_the_masks_of_three(tmp_path, monkeypatch):
    monkeypatch.setattr(object_stages, "MIN_CUE_IMAGES", 12)
    monkeypatch.setattr(object_stages, "MIN_REGION_GAIN", -1.0)
    config, images = preset_config("demo", **TINY | {"regions": 3}).resolved(), draw_flowers(12, 16, seed=0)[0]
    states = []
    for name in ("open", "three"):
        stages = ObjectStages(config, images, tmp_path / name, {}, torch.device("cpu"), False)
        (tmp_path / name).mkdir()
        assert name == "three" or stages.choose_regions() == 3
        states.append(stages.run().state_dict())
    assert_identical(*states)


@pytest.mark.slow
def test_seed_trials_of_object_masks_compare_the_masks_after_one_step(tmp_path, whole):
    run = train(tmp_path / "run", seed_trials=2)
    trials = tmp_path / "run/seed_trials"
    steps = [path.name for path in sorted(trials.glob("seed_*/checkpoints/step_*"))]
    assert run.step == 2 and steps == ["step_00000001.safetensors"] * 2
    winner = final_state(trials / f"seed_{run.config.seed}")
    name = "model.masks.network.conv_out.weight"
    assert torch.equal(final_state(tmp_path / "run")[name], winner[name])


@pytest.mark.slow
def test_run_of_another_seed_has_other_masks(tmp_path, whole):
    train(tmp_path / "run", seed=1)
    name = "model.masks.network.conv_out.weight"
    assert not torch.equal(final_state(tmp_path / "run")[name], final_state(whole)[name])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 10])
def test_train_on_few_images_segments_and_generates(tmp_path, count):
    images = draw_flowers(count, 16, seed=0)[0]
    run = train(tmp_path / "run", images)
    segmentation = run.segment(images)
    assert segmentation.masks.isfinite().all() and segmentation.labels.shape == (count, 16, 16)
    generated = run.generate(2, steps=3)
    assert generated.images.isfinite().all() and generated.masks.shape == (2, 2, 16, 16)
    log = (tmp_path / "run/log.jsonl").read_text()
    assert "photos unlike the training set will not be named: that takes at least 20 images" in log
    assert segmentation.unlike == (False,) * count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grey", "one colour", "noise", "transparent", "one of border colour"])
def test_train_on_unusual_images_is_finite(tmp_path, kind):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 16, 16, 3), np.uint8)
    if kind == "grey":
        images[...] = images[..., :1]
    elif kind == "one colour":
        images[...] = images[:1, :1, :1]
    elif kind == "transparent":
        images = np.concatenate([images, np.zeros((6, 16, 16, 1), np.uint8)], 3)
    elif kind == "one of border colour":
        images = draw_flowers(6, 16, seed=0)[0]
        images[2] = images[2, 0, 0]
    masks = train(tmp_path / "run", images).segment(images).masks
    assert masks.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transparent", "grey", "tiny", "strip", "border colour"])
def test_segment_of_unusual_photos_is_finite(whole, kind):
    rng = np.random.default_rng(0)
    photo = {
        "transparent": rng.integers(0, 256, (20, 30, 4), np.uint8),
        "grey": rng.integers(0, 256, (300, 200, 1), np.uint8),
        "tiny": np.full((2, 3, 3), 7, np.uint8),
        "strip": rng.integers(0, 256, (2, 900, 3), np.uint8),
        "border colour": np.full((40, 40, 3), 200, np.uint8),
    }[kind]
    segmentation = factorkit.load(whole, device="cpu").segment([photo])
    assert segmentation.labels[0].shape == photo.shape[:2] and segmentation.masks[0].isfinite().all()


@pytest.mark.slow
def test_segment_of_a_huge_photo_has_its_size(whole):
    photo = np.zeros((2500, 3500, 3), np.uint8)
    photo[800:1700, 1200:2400] = (220, 60, 40)
    segmentation = factorkit.load(whole, device="cpu").segment([photo])
    assert segmentation.labels[0].shape == (2500, 3500)
    assert (segmentation.masks[0].sum(0) - 1).abs().max() < 1e-4


def test_teacher_masks_sum_to_one(tmp_path):
    images = draw_flowers(6, 16, seed=0)[0]
    config = preset_config("demo", **TINY).resolved()
    torch.manual_seed(0)
    stages = ObjectStages(config, images, tmp_path, {}, torch.device("cpu"), False)
    masks = stages.teach(SpatialMixture(2, object_first=True), 1.0)
    assert masks.shape == (6, 2, LOGITS_SIDE, LOGITS_SIDE) and masks.dtype == torch.uint8
    assert (masks.int().sum(1) - 255).abs().max() <= 1


@pytest.mark.parametrize(
    ("count", "configured", "errors", "weight", "reason"),
    [
        (16, None, (0.2, 0.1971), 0.0, "the cue explains 1.45% of the unexplained noise, the limit is 1.5%"),
        (16, None, (0.2, 0.1969), 1.0, "the cue explains 1.55% of the unexplained noise"),
        (15, None, None, 1.0, "fewer than 16 images decide nothing"),
        (16, 0.5, None, 0.5, "as configured"),
    ],
)
def test_train_mixtures_uses_the_cue_where_it_explains_enough(
    tmp_path, monkeypatch, count, configured, errors, weight, reason
):
    images = draw_flowers(count, 16, seed=0)[0]
    config = preset_config("demo", **TINY | {"mixture_steps": 1, "cue_weight": configured}).resolved()
    remaining = iter(errors or ())
    monkeypatch.setattr(object_stages, "unexplained_noise", lambda *arguments: next(remaining))
    trained = []

    def train_mixture(self, name, mixture, weight):
        trained.append(name)
        return mixture

    monkeypatch.setattr(ObjectStages, "train_mixture", train_mixture)
    stages = ObjectStages(config, images, tmp_path, {}, torch.device("cpu"), False)
    assert stages.train_mixtures(SpatialMixture(2, object_first=True))[1] == weight
    assert trained == (["mixture_without_cue", "mixture"] if errors else ["mixture"])
    event = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert event["message"].startswith(f"object masks with cue_weight={weight:g}: {reason}")


@pytest.mark.parametrize(
    ("count", "regions", "errors", "message"),
    [
        (
            16,
            3,
            {3: 0.1942, 2: 0.2},
            "explains 2.9% of the unexplained noise, the limit is 3.0%: 2 regions suit the images, try",
        ),
        (16, 2, {3: 0.1942, 2: 0.2}, "2 regions suit the images, as configured"),
        (16, 2, {3: 0.1938, 2: 0.2}, "3 regions suit the images, try regions=3"),
        (15, 3, None, "another number than regions=3 suits the images was not checked with fewer than 16 images"),
        (16, 4, None, "another number than regions=4 suits the images was not checked beyond 2 and 3"),
    ],
)
def test_compare_regions_says_which_number_suits_the_images(tmp_path, monkeypatch, count, regions, errors, message):
    config = preset_config("demo", **TINY | {"regions": regions}).resolved()
    monkeypatch.setattr(ObjectStages, "train_mixture", lambda self, name, mixture, weight: mixture)
    monkeypatch.setattr(
        ObjectStages, "measure_error", lambda self, mixture, weight: errors[mixture.prior_logits.shape[0]]
    )
    stages = ObjectStages(config, draw_flowers(count, 16, seed=0)[0], tmp_path, {}, torch.device("cpu"), False)
    suited = stages.compare_regions(SpatialMixture(regions, object_first=True), 1.0)
    assert suited == (regions if errors is None else 3 if errors[3] < 0.194 else 2)
    assert message in json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["message"]


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        (
            (0.2, 0.22, 0.21, 0.25),
            "the place explains 9.1% of the noise that is unexplained without it, the cue 4.8%: place-led",
        ),
        ((0.2, 0.204, 0.22, 0.25), "the cue 9.1%: colour-led masks"),
        ((0.2, 0.201, 0.202, 0.203), "both together 1.5% < 5%: neither is trustworthy, check the masks"),
    ],
)
def test_explain_masks_says_what_leads_them(tmp_path, monkeypatch, errors, message):
    config, images = preset_config("demo", **TINY).resolved(), draw_flowers(16, 16, seed=0)[0]
    mixture = SpatialMixture(2, object_first=True)
    names = {(True, 1.0): 0, (False, 1.0): 1, (True, 0.0): 2, (False, 0.0): 3}  # has places, weight of the cue

    def measure_error(self, mixture, weight):
        return errors[names[mixture.prior_logits.std((1, 2)).max().item() > 1e-6, weight]]

    monkeypatch.setattr(ObjectStages, "measure_error", measure_error)
    ObjectStages(config, images, tmp_path, {}, torch.device("cpu"), False).explain_masks(mixture, 1.0)
    assert message in json.loads((tmp_path / "log.jsonl").read_text())["message"]


@pytest.mark.slow
def test_train_mixtures_drops_a_cue_that_names_other_things(tmp_path, monkeypatch):
    images = draw_flowers(24, 16, seed=0)[0]
    config = preset_config("demo", **TINY | {"mixture_steps": 40}).resolved()
    weights = []
    for name, shift in (("own", 0), ("other", 5)):  # the cue of the image itself, of another one
        monkeypatch.setattr(
            object_stages, "measure_cue", lambda values, shift=shift: measure_cue(values).roll(shift, 0)
        )
        stages = ObjectStages(config, images, tmp_path / name, {}, torch.device("cpu"), False)
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        weights.append(stages.train_mixtures(SpatialMixture(2, object_first=True))[1])
    assert weights == [1.0, 0.0]


@pytest.mark.parametrize("stage", ["mixture", "distil"])
def test_step_of_an_object_stage_reads_nothing_on_the_host(tmp_path, monkeypatch, stage):
    monkeypatch.setattr(distil, "is_readable", lambda x: False)  # as on a GPU
    config, images = preset_config("demo", **TINY | {"cue_weight": 1.0}).resolved(), draw_flowers(8, 16, seed=0)[0]
    found = []

    def watch(trainer):
        take = trainer._training_step(Meter(torch.device("cpu")))
        take(0)
        with Watched() as watched:
            take._work()
        assert trainer.task.capturable
        found.append(watched.found)
        return trainer.task.model

    stages = ObjectStages(config, images, tmp_path, {}, torch.device("cpu"), False)
    monkeypatch.setattr(Trainer, "run", watch)
    mixture = stages.train_mixtures(SpatialMixture(2, object_first=True))[0]
    if stage == "distil":
        stages.train_network(MaskNetwork(2, 16), mixture, 1.0)
    assert found[-1] == []


def test_gram_and_schmidt_equal_qr(monkeypatch):
    matrices = torch.eye(3) + 0.15 * torch.randn(50, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = distil.orthogonalise(matrices)
    monkeypatch.setattr(distil, "is_readable", lambda x: False)
    torch.testing.assert_close(distil.orthogonalise(matrices), expected, rtol=0, atol=1e-5)


def test_augment_moves_masks_with_their_images():
    images = torch.zeros(8, 3, 32, 32)
    images[:, :, 8:20, 8:20] = 1.0
    inside = (images[:, :1] > 0).float()
    draw = BatchDraw(0, 0, 8, slice(0, 8), torch.device("cpu"))
    moved, masks = augment(images, torch.cat([inside, 1 - inside], 1), draw, random_flip=True)
    torch.testing.assert_close(masks.sum(1), torch.ones(8, 32, 32))
    for image, mask in zip(moved, masks, strict=True):
        hard = mask[0] > 0.5
        assert not torch.equal(mask[0], inside[0, 0])
        # Colours change, but by one function: inside and outside stay two separate colours.
        assert (image[:, hard].mean(1) - image[:, ~hard].mean(1)).norm() > 5 * image[:, mask[0] == 1].std(1).norm()


@pytest.mark.slow
def test_network_reaches_an_exact_teacher():
    """Where the true masks teach, the network finds them in other images, and at higher noise somewhat worse."""
    images, inside = draw_flowers(96, 16, seed=0)
    masks = torch.from_numpy(inside).float()[:, None]
    masks = torch.nn.functional.interpolate(torch.cat([masks, 1 - masks], 1), size=(LOGITS_SIDE, LOGITS_SIDE))
    config = preset_config("demo", **TINY).resolved()
    torch.manual_seed(0)
    network, schedule = MaskNetwork(2, 16), Schedule()
    task = DistilTask(config, network, images[:64], lambda: (255 * masks[:64]).byte(), True, schedule)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(120):
        draw = BatchDraw(0, 16 * step, 16, slice(0, 16), torch.device("cpu"))
        task.loss(network, torch.arange(16 * step, 16 * step + 16) % 64, draw, step).objective.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x, truth, right = pixels_to_signed(torch.from_numpy(images[64:])), torch.from_numpy(inside[64:]), []
    with torch.no_grad():
        for t in (0, 200, 600):
            times = torch.full((32,), t)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
            x_t = schedule.noise(x, noise, times) if t else x
            right.append(float(((network(x_t, times).argmax(1) == 0) == truth).float().mean()))
    assert right[0] > 0.93 and right[1] > 0.88 and right[0] >= right[2] - 0.01
