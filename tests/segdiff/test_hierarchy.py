"""Nested regions: the equations compared with a direct loop, labels by level, a run from training to files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import factorkit
from factorkit.cli.score_tables import format_scores
from factorkit.data.procedural.rooms import draw_rooms
from factorkit.diffusion.denoiser import Denoised
from factorkit.segdiff.backbones import make_backbone
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.hierarchy import HierarchicalDenoiser
from factorkit.segdiff.inference.segment import hard_labels, level_labels, level_masks, scored_level
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.verdict import write_report
from factorkit.utils.errors import ConfigError
from factorkit.utils.rng import BatchDraw
from tests.segdiff.conftest import TINY, randomize_weights


def build_nested(regions, **changes) -> HierarchicalDenoiser:
    torch.manual_seed(0)
    settings = {**TINY, "dropout": 0.0, **changes}
    backbone = make_backbone("unet", settings)
    others = {name: value for name, value in changes.items() if not hasattr(backbone, name)}
    model = HierarchicalDenoiser(backbone, regions, **others)
    for level in model.levels:
        randomize_weights(level)
    return model.double().eval()


def build_untrained_run(regions) -> SegdiffRun:
    config = preset_config("demo", **{**TINY, "regions": regions, "device": "cpu"}).resolved()
    return SegdiffRun(config, config.build(), torch.device("cpu"), 0)


def compute_by_hand(model, x, t, depth=0, within=None):
    """Return prediction, masks and branches of the leaves by the thesis's sum, one region at a time."""
    out = model.levels[depth](x, t, None, within)
    masks, branches = out.bottleneck.masks, out.bottleneck.branches
    if depth == len(model.levels) - 1:
        return (masks[:, :, None] * branches).sum(1), masks, branches
    total, all_masks, all_branches = 0, [], []
    for i in range(masks.shape[1]):
        m, h = masks[:, i : i + 1], branches[:, i]
        area = m if within is None else m * within
        inner, inner_masks, inner_branches = compute_by_hand(model, m * x, t, depth + 1, area)
        total = total + m * (h + inner) / 2
        all_masks.append(m * inner_masks)
        all_branches.append((h[:, None] + inner_branches) / 2)
    return total, torch.cat(all_masks, 1), torch.cat(all_branches, 1)


@pytest.mark.parametrize("regions", [(3, 2), (2, 2, 3)])
@pytest.mark.parametrize("form", ["thesis", "regional"])
def test_forward_equals_the_nested_sum_of_the_thesis(regions, form, make_batch):
    regional = {"branch_norm": "pixel", "normalised_logits": True, "half_resolution_masks": True}
    model = build_nested(regions, **(regional if form == "regional" else {}))
    x, t = make_batch()
    out = model(x, t)
    prediction, masks, branches = compute_by_hand(model, x, t)
    torch.testing.assert_close(out.prediction, prediction)
    torch.testing.assert_close(out.bottleneck.masks, masks)
    torch.testing.assert_close(out.bottleneck.branches, branches)
    torch.testing.assert_close(model.segment(x, t), masks)
    # The hierarchy equals a flat factorized model of its leaves.
    torch.testing.assert_close((masks[:, :, None] * branches).sum(1), out.prediction)
    assert masks.std() > 0.01, "uniform masks would hide an exchange of regions"
    # The prediction is a weighted mean over levels; level 0 depends on no other.
    levels = out.bottleneck.levels
    shares = [0.5**level for level in range(1, len(regions))]
    shares = torch.tensor([*shares, shares[-1]], dtype=x.dtype)
    torch.testing.assert_close((shares.view(-1, 1, 1, 1) * levels).sum(1), out.prediction)
    torch.testing.assert_close(levels[:, 0], model.levels[0](x, t).prediction)


def test_forward_labels_reach_every_level(make_batch):
    model = build_nested((2, 2), classes=3)
    x, t = make_batch()
    labels = torch.tensor([2, 0])
    both = model(x, t, labels)
    for n in range(2):
        alone = model(x[n : n + 1], t[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(both.prediction[n : n + 1], alone.prediction)
    assert not torch.allclose(model.segment(x, t, labels), model.segment(x, t))


def test_region_tokens_of_a_level_are_pooled_inside_the_region(make_batch):
    torch.manual_seed(0)
    model = randomize_weights(
        preset_config("demo", **{**TINY, "masks": "network", "channel_mult": (1, 2), "regions": 2}).resolved().build()
    ).eval()
    recorded = []
    pool = model.tokens.forward
    model.tokens.forward = lambda x, masks: recorded.append(masks) or pool(x, masks)
    x, t = make_batch(torch.float32)
    within = torch.rand(2, 1, 16, 16)
    masks = model(x, t, None, within).bottleneck.masks
    torch.testing.assert_close(recorded[0], masks * within)


def test_third_level_receives_regions_of_both_levels_above(make_batch):
    model, recorded = build_nested((2, 2, 2)), []
    third = model.levels[2].forward
    model.levels[2].forward = lambda x, t, cond, within: recorded.append((x, within)) or third(x, t, cond, within)
    x, t = make_batch()
    masks = model(x, t).bottleneck.masks
    within = level_masks(masks, (2, 2, 2), 2)
    torch.testing.assert_close(recorded[0][1], within.flatten(0, 1)[:, None])
    torch.testing.assert_close(recorded[0][0], (within[:, :, None] * x[:, None]).flatten(0, 1))


def test_hard_labels_are_chosen_level_by_level():
    # Region 0 has three equal parts, region 1 one larger part but a smaller sum.
    masks = torch.tensor([0.2, 0.2, 0.2, 0.38, 0.01, 0.01]).view(6, 1, 1)
    assert hard_labels(masks, (6,)).item() == 3
    assert hard_labels(masks, (2, 3)).item() == 0, "region 0 is chosen first, then its part"
    assert hard_labels(masks, (3, 2)).item() == 3
    torch.testing.assert_close(level_masks(masks, (2, 3), 1).flatten(), torch.tensor([0.6, 0.4]))
    many = torch.rand(2, 12, 5, 5).softmax(1)
    labels = hard_labels(many, (2, 3, 2))
    for level, count in ((1, 2), (2, 6), (3, 12)):
        coarse = level_masks(many, (2, 3, 2), level)
        assert coarse.shape[1] == count
        result = level_labels(labels, (2, 3, 2), level)
        if level == 1:
            assert torch.equal(result, coarse.argmax(1))
        else:
            assert torch.equal(result, hard_labels(coarse, (2, 3, 2)[:level]))
    with pytest.raises(ConfigError, match="levels 1 to 3"):
        level_masks(many, (2, 3, 2), 4)


def test_config_list_of_one_number_equals_the_number():
    listed, plain = (preset_config("demo", regions=regions).resolved() for regions in ((3,), 3))
    assert listed.to_dict() == plain.to_dict()
    config = preset_config("demo", regions=[3, 2]).resolved()
    assert config.nesting == (3, 2) and config.num_leaf_regions == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": (3, 1)}, "at least 2"),
        ({"regions": ()}, "at least 2"),
        ({"regions": (2, 2), "decoding": "concat"}, "single branch"),
    ],
)
def test_config_invalid_nesting_raises(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset_config("demo", **changes).resolved()


def test_three_levels_train_segment_and_evaluate(tmp_path, monkeypatch):
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
    result = run.segment(images[:2])
    assert result.masks.shape == (2, 8, 16, 16) and result.level(2).masks.shape == (2, 4, 16, 16)
    assert torch.equal(result.level(2).labels, result.labels // 2)
    eighths = np.arange(16)[:, None] // 8 * 4 + np.arange(16) // 8 * 2 + labels % 2
    scores = run.evaluate(images, eighths.astype(np.uint8), nesting=(2, 2, 2), num_fit_images=4)
    first, second, third = scores["accuracy"]
    assert 0 < third <= second <= first <= 1 and len(scores["mapping"][2]) == 8
    assert third == pytest.approx(first * scores["within"][1] * scores["within"][2])


@pytest.mark.parametrize(
    ("regions", "level"), [((3,), (1, 3)), ((3, 4), (2, 12)), ((4, 4), (1, 4)), ((3, 3, 3), (2, 9)), ((13, 2), (1, 13))]
)
def test_scored_level_is_the_finest_with_few_regions(regions, level):
    assert scored_level(regions) == level


def test_evaluate_many_leaves_scores_a_coarser_level(monkeypatch):
    """Of 16 leaves of (4, 4) those of region 2 alternate inside the square."""
    truth = np.zeros((6, 16, 16), np.uint8)
    truth[:, 3:9, 4:12] = 1
    images = np.repeat(truth[..., None] * np.uint8(255), 3, -1)
    run = build_untrained_run((4, 4))

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
        build_untrained_run((13, 2)).evaluate(images, truth, num_fit_images=2)


def test_hierarchy_run_resumes_loads_and_writes_files(tmp_path, monkeypatch):
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
    result = run.segment(images[:2])
    assert result.masks.shape == (2, 6, 16, 16) and result.nesting == (2, 3)
    coarse = result.level(1)
    torch.testing.assert_close(coarse.masks, result.masks.unflatten(1, (2, 3)).sum(2))
    assert torch.equal(coarse.labels, result.labels // 3) and torch.equal(coarse.labels, coarse.masks.argmax(1))
    saved = factorkit.load(run.save(tmp_path / "model.safetensors"), device="cpu")
    assert torch.equal(saved.segment(images[:2]).masks, result.masks)
    assert run.generate(1, steps=1).masks.shape == (1, 6, 16, 16)
    assert run.branches(images[:1]).branches.shape == (1, 6, 3, 16, 16)

    scores = run.evaluate(images, labels, nesting=(3, 3), num_fit_images=6)
    assert scores["scored"] == 6 and scores["accuracy"][1] <= scores["accuracy"][0] <= 1
    assert json.loads((out / "scores.json").read_text())["within"] == scores["within"]
    written = run.segment_folder(images[:2], tmp_path / "files", progress=False)
    assert written.regions == 6 and len(written.areas) == 6
    stored = np.asarray(Image.open(tmp_path / "files" / "000000_labels.png"))
    assert np.array_equal(stored, result.labels[0].numpy())
    assert (out / "samples" / "000004_segmentation.png").exists()
    assert "at level 2" in write_report(out).read_text()


@torch.no_grad()
def test_loss_averages_the_error_of_every_level():
    settings = {**TINY, "channel_mult": (1, 2), "regions": (2, 2), "coarse_to_fine": (0, 0), "precision": "fp32"}
    images = draw_rooms(4, 16)[0]
    task = SegdiffTask(preset_config("demo", **settings).resolved(), images, images, torch.device("cpu"))
    for level in task.model.levels:
        randomize_weights(level)
    outputs, forward = [], task.model.forward
    task.model.forward = lambda x, t: outputs.append(forward(x, t)) or outputs[-1]
    compute_loss = lambda: task.loss(  # noqa: E731
        task.model, torch.arange(4), BatchDraw(0, 0, 4, slice(0, 4), torch.device("cpu")), torch.zeros(())
    )
    trained = compute_loss()
    alone = []
    for level in range(2):  # the plain error of a model with the level's prediction
        each = outputs[0].bottleneck.levels[:, level]
        task.model.forward = lambda x, t, each=each: Denoised(each, outputs[0].bottleneck._replace(levels=None))
        alone.append(compute_loss().loss)
    torch.testing.assert_close(trained.objective, (alone[0] + alone[1]) / 2)
    assert (trained.loss <= trained.objective).all(), "the error of a mean is at most the mean of the errors"
