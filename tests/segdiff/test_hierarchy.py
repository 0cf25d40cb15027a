"""Regions within regions: the equations against a direct loop, labels by level, a run from training to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import factorkit
from factorkit.cli.evaluate import format_scores
from factorkit.data.procedural.rooms import draw_rooms
from factorkit.diffusion.denoiser import Denoised
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.hierarchy import HierarchicalUNet, hard_labels, level_labels, level_masks, scored_level
from factorkit.segdiff.masks.network import RegionLogitNorm
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.verdict import write_report
from factorkit.utils.errors import ConfigError
from factorkit.utils.rng import BatchDraw
from tests.segdiff.conftest import TINY, stirred


def nested(regions, **changes) -> HierarchicalUNet:
    torch.manual_seed(0)
    settings = {name: value for name, value in TINY.items() if name != "regions"}
    model = HierarchicalUNet(regions, **{**settings, **changes})
    for level in model.levels:
        stirred(level)
    return model.double().eval()


def untrained(regions) -> SegdiffRun:
    config = preset_config("demo", **{**TINY, "regions": regions, "device": "cpu"}).resolved()
    return SegdiffRun(config, config.build(), torch.device("cpu"), 0)


def by_hand(model, x, t, depth=0, within=None):
    """The text's sum for one region of a level at a time: prediction, masks and branches of the leaves."""
    out = model.levels[depth](x, t, None, within)
    masks, branches = out.bottleneck.masks, out.bottleneck.branches
    if depth == len(model.levels) - 1:
        return (masks[:, :, None] * branches).sum(1), masks, branches
    total, all_masks, all_branches = 0, [], []
    for i in range(masks.shape[1]):
        m, h = masks[:, i : i + 1], branches[:, i]
        area = m if within is None else m * within
        inner, inner_masks, inner_branches = by_hand(model, m * x, t, depth + 1, area)
        total = total + m * (h + inner) / 2
        all_masks.append(m * inner_masks)
        all_branches.append((h[:, None] + inner_branches) / 2)
    return total, torch.cat(all_masks, 1), torch.cat(all_branches, 1)


@pytest.mark.parametrize("regions", [(3, 2), (2, 2, 3)])
@pytest.mark.parametrize("form", ["thesis", "regional"])
def test_the_nested_sum_of_the_text(regions, form, batch):
    regional = {"branch_norm": "pixel", "normalised_logits": True, "half_resolution_masks": True}
    model = nested(regions, **(regional if form == "regional" else {}))
    x, t = batch()
    out = model(x, t)
    prediction, masks, branches = by_hand(model, x, t)
    torch.testing.assert_close(out.prediction, prediction)
    torch.testing.assert_close(out.bottleneck.masks, masks)
    torch.testing.assert_close(out.bottleneck.branches, branches)
    torch.testing.assert_close(model.segment(x, t), masks)
    # from outside it is a flat factorized model of its leaves
    torch.testing.assert_close((masks[:, :, None] * branches).sum(1), out.prediction)
    assert masks.std() > 0.01, "masks of one value would hide an exchange of regions"
    # a mean over what each level predicts by itself, the first of them without any of the others
    levels = out.bottleneck.levels
    shares = [0.5**level for level in range(1, len(regions))]
    shares = torch.tensor([*shares, shares[-1]], dtype=x.dtype)
    torch.testing.assert_close((shares.view(-1, 1, 1, 1) * levels).sum(1), out.prediction)
    torch.testing.assert_close(levels[:, 0], model.levels[0](x, t).prediction)


def test_classes_are_told_to_every_level(batch):
    model = nested((2, 2), classes=3)
    x, t = batch()
    told = torch.tensor([2, 0])
    both = model(x, t, told)
    for n in range(2):
        alone = model(x[n : n + 1], t[n : n + 1], told[n : n + 1])
        torch.testing.assert_close(both.prediction[n : n + 1], alone.prediction)
    assert not torch.allclose(model.segment(x, t, told), model.segment(x, t))


def test_a_level_looks_only_where_it_splits():
    norm = RegionLogitNorm(2).train()
    torch.manual_seed(0)
    logits = torch.randn(4, 2, 8, 8)
    within = torch.zeros(4, 1, 8, 8)
    within[..., :4] = 1
    inside = norm(logits, within)[..., :4]
    within[..., 4] = 0.4  # its rim
    logits[..., 4:] *= 100  # what lies outside of the region
    torch.testing.assert_close(norm(logits, within)[..., :4], inside)
    torch.testing.assert_close(inside.mean((2, 3)), torch.zeros(4, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.std((2, 3), unbiased=False), torch.full((4, 2), 1.5), atol=1e-3, rtol=0)


def test_every_region_that_is_split_has_statistics_of_its_own():
    # "which region is it" and "how noisy is it" would else pass for splits of unit variance
    norm = RegionLogitNorm(2).train()
    torch.manual_seed(0)
    logits, within = torch.randn(6, 2, 8, 8), torch.rand(6, 1, 8, 8)
    logits[1::3, 0] += 40
    logits[2::3] *= 0.1
    together = norm(logits, within)
    for row in range(6):
        torch.testing.assert_close(together[row], norm(logits[row : row + 1], within[row : row + 1])[0])
    torch.testing.assert_close(together[2], norm(10 * logits, within)[2], atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(norm.eval()(logits, within), together)
    assert norm(logits, torch.zeros_like(within)).isfinite().all(), "a region may be nowhere in a picture"


def test_a_region_that_is_all_rim_is_measured_there():
    """Of nine uncertain regions each has a ninth of every pixel; with nothing to measure, logits would be no split."""
    logits = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = RegionLogitNorm(2).train()(logits, torch.full((6, 1, 8, 8), 1 / 9))
    torch.testing.assert_close(found, RegionLogitNorm(2)(logits, torch.ones(6, 1, 8, 8)), atol=1e-4, rtol=0)


def test_region_tokens_of_a_level_are_taken_inside_the_region(batch):
    torch.manual_seed(0)
    model = stirred(preset_config("demo", **{**TINY, "channel_mult": (1, 2), "regions": 2}).resolved().build()).eval()
    seen = []
    pooled = model.tokens.forward
    model.tokens.forward = lambda x, masks: seen.append(masks) or pooled(x, masks)
    x, t = batch(torch.float32)
    within = torch.rand(2, 1, 16, 16)
    masks = model(x, t, None, within).bottleneck.masks
    torch.testing.assert_close(seen[0], masks * within)


def test_the_third_level_splits_within_both_above(batch):
    model, seen = nested((2, 2, 2)), []
    third = model.levels[2].forward
    model.levels[2].forward = lambda x, t, cond, within: seen.append((x, within)) or third(x, t, cond, within)
    x, t = batch()
    masks = model(x, t).bottleneck.masks
    within = level_masks(masks, (2, 2, 2), 2)
    torch.testing.assert_close(seen[0][1], within.flatten(0, 1)[:, None])
    torch.testing.assert_close(seen[0][0], (within[:, :, None] * x[:, None]).flatten(0, 1))


def test_labels_go_level_by_level():
    # three of five parts of region 0 share it; region 1 has one certain part of less
    masks = torch.tensor([0.2, 0.2, 0.2, 0.38, 0.01, 0.01]).view(6, 1, 1)
    assert hard_labels(masks, 6).item() == 3
    assert hard_labels(masks, (2, 3)).item() == 0, "region 0 first, then its part"
    assert hard_labels(masks, (3, 2)).item() == 3
    torch.testing.assert_close(level_masks(masks, (2, 3), 1).flatten(), torch.tensor([0.6, 0.4]))
    many = torch.rand(2, 12, 5, 5).softmax(1)
    labels = hard_labels(many, (2, 3, 2))
    for level, count in ((1, 2), (2, 6), (3, 12)):
        coarse = level_masks(many, (2, 3, 2), level)
        assert coarse.shape[1] == count
        found = level_labels(labels, (2, 3, 2), level)
        if level == 1:
            assert torch.equal(found, coarse.argmax(1))
        else:
            assert torch.equal(found, hard_labels(coarse, (2, 3, 2)[:level]))
    with pytest.raises(ConfigError, match="levels 1 to 3"):
        level_masks(many, (2, 3, 2), 4)


def test_one_number_in_a_list_is_that_number():
    listed, plain = (preset_config("demo", regions=regions).resolved() for regions in ((3,), 3))
    assert listed.to_dict() == plain.to_dict()
    config = preset_config("demo", regions=[3, 2]).resolved()
    assert config.nesting == (3, 2) and config.num_leaf_regions == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regions": (3, 1)}, "at least 2"),
        ({"regions": ()}, "at least 2"),
        ({"regions": (2, 2), "decoding": "concat"}, "single branch"),
    ],
)
def test_what_cannot_nest_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        preset_config("demo", **changes).resolved()


def test_three_levels_train_and_are_scored(tmp_path, monkeypatch):
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)
    images, labels = draw_rooms(8, 16)
    run = factorkit.train_segdiff(
        images,
        out=tmp_path / "run",
        preset="demo",
        steps=3,
        resolution=16,
        regions=(2, 2, 2),
        model_channels=8,
        norm_groups=2,
        channel_mult=(1, 2),
        batch_size=2,
        sample_every=0,
        device="cpu",
        progress=False,
    )
    found = run.segment(images[:2])
    assert found.masks.shape == (2, 8, 16, 16) and found.level(2).masks.shape == (2, 4, 16, 16)
    assert torch.equal(found.level(2).labels, found.labels // 2)
    eighths = np.arange(16)[:, None] // 8 * 4 + np.arange(16) // 8 * 2 + labels % 2
    scores = run.evaluate(images, eighths.astype(np.uint8), nesting=(2, 2, 2), num_fit_images=4)
    first, second, third = scores["accuracy"]
    assert 0 < third <= second <= first <= 1 and len(scores["mapping"][2]) == 8
    assert third == pytest.approx(first * scores["within"][1] * scores["within"][2])


@pytest.mark.parametrize(
    ("regions", "level"), [(3, (1, 3)), ((3, 4), (2, 12)), ((4, 4), (1, 4)), ((3, 3, 3), (2, 9)), ((13, 2), (1, 13))]
)
def test_the_level_that_is_scored(regions, level):
    assert scored_level(regions) == level


def test_many_leaves_are_scored_at_a_coarser_level(monkeypatch):
    """16 leaves of (4, 4): those of region 2 are the square, by turns."""
    truth = np.zeros((6, 16, 16), np.uint8)
    truth[:, 3:9, 4:12] = 1
    images = np.repeat(truth[..., None] * np.uint8(255), 3, -1)
    run = untrained((4, 4))

    def segment(x_t, t):
        bright = x_t.mean(1) > 0
        leaves = torch.where(bright, 8, 0) + torch.arange(16) % 4
        return torch.nn.functional.one_hot(leaves, 16).movedim(-1, 1).float()

    monkeypatch.setattr(run.model, "segment", segment)
    scores = run.evaluate(images, truth, num_fit_images=2)
    assert (scores["level"], scores["mapping"], scores["iou"]) == (1, [2], 1)
    assert scores["areas"] == pytest.approx([1 - truth.mean(), 0, truth.mean(), 0])
    assert "foreground is region 2 of level 1" in format_scores(scores)
    with pytest.raises(ConfigError, match="13 regions cannot be mapped"):
        untrained((13, 2)).evaluate(images, truth, num_fit_images=2)


def test_a_run_from_training_to_files(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("factorkit.segdiff.task.NUM_PREVIEW_STEPS", 1)
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)
    images, labels = draw_rooms(12, 16)
    settings = {
        "resolution": 16,
        "regions": (2, 3),
        "model_channels": 8,
        "channel_mult": (1, 2),
        "norm_groups": 2,
        "batch_size": 4,
        "checkpoint_every": 2,
        "sample_every": 4,
        "log_every": 1,
        "device": "cpu",
        "progress": False,
    }
    out = tmp_path / "run"
    train = lambda steps: factorkit.train_segdiff(images, out=out, preset="demo", steps=steps, **settings)  # noqa: E731
    train(2)
    resumed = train(4)
    straight = factorkit.train_segdiff(images, out=tmp_path / "straight", preset="demo", steps=4, **settings)
    weights = straight.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())

    run = factorkit.load(out, device="cpu")
    found = run.segment(images[:2])
    assert found.masks.shape == (2, 6, 16, 16) and found.nesting == (2, 3)
    coarse = found.level(1)
    torch.testing.assert_close(coarse.masks, found.masks.unflatten(1, (2, 3)).sum(2))
    assert torch.equal(coarse.labels, found.labels // 3) and torch.equal(coarse.labels, coarse.masks.argmax(1))
    saved = factorkit.load(run.save(tmp_path / "model.safetensors"), device="cpu")
    assert torch.equal(saved.segment(images[:2]).masks, found.masks)
    assert run.generate(1, steps=1).masks.shape == (1, 6, 16, 16)
    assert run.branches(images[:1]).branches.shape == (1, 6, 3, 16, 16)

    scores = run.evaluate(images, labels, nesting=(3, 3), num_fit_images=6)
    assert scores["scored"] == 6 and scores["accuracy"][1] <= scores["accuracy"][0] <= 1
    assert json.loads((out / "scores.json").read_text())["within"] == scores["within"]
    written = run.segment_folder(images[:2], tmp_path / "files", progress=False)
    assert written.regions == 6 and len(written.areas) == 6
    stored = np.asarray(Image.open(tmp_path / "files" / "000000_labels.png"))
    assert np.array_equal(stored, found.labels[0].numpy())
    assert (out / "samples" / "000004_segmentation.png").exists()
    assert "at level 2" in write_report(out).read_text()


@torch.no_grad()
def test_every_level_is_asked_for_the_whole_target():
    settings = {**TINY, "channel_mult": (1, 2), "regions": (2, 2), "coarse_to_fine": (0, 0), "precision": "fp32"}
    images = draw_rooms(4, 16)[0]
    task = SegdiffTask(preset_config("demo", **settings).resolved(), images, images, torch.device("cpu"))
    for level in task.model.levels:
        stirred(level)
    answers, forward = [], task.model.forward
    task.model.forward = lambda x, t: answers.append(forward(x, t)) or answers[-1]
    found = lambda: task.loss(  # noqa: E731
        task.model, torch.arange(4), BatchDraw(0, 0, 4, slice(0, 4), torch.device("cpu")), torch.zeros(())
    )
    trained = found()
    alone = []
    for level in range(2):  # the plain error of a model that answers what the level answered
        each = answers[0].bottleneck.levels[:, level]
        task.model.forward = lambda x, t, each=each: Denoised(each, answers[0].bottleneck._replace(levels=None))
        alone.append(found().loss)
    torch.testing.assert_close(trained.objective, (alone[0] + alone[1]) / 2)
    assert (trained.loss <= trained.objective).all(), "the error of a mean is at most the mean of the errors"
