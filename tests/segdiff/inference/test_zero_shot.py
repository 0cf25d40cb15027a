"""Zero-shot transfer: a run conditioned on one of its classes for each class of another data set."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.cli.main import main
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference.zero_shot import THESIS_LABELS, score_zero_shot
from factorkit.utils.errors import ConfigError

DOG, CAT, VOID = 12, 8, 255
SIZE = 16


@pytest.fixture
def voc(tmp_path):
    """Two cats and a dog to train on, three cats and two dogs to score; animals left, void between, rest right."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    of_split = {"train": [CAT, CAT, DOG], "val": [CAT, CAT, CAT, DOG, DOG]}
    for split, classes in of_split.items():
        stems = []
        for number, label in enumerate(classes):
            stems.append(f"{split}_{number}")
            values = np.zeros((SIZE, SIZE), np.uint8)
            values[:, :8], values[:, 8:10] = label, VOID
            mask = Image.fromarray(values)
            mask.putpalette(list(range(256)) * 3)
            mask.save(root / f"SegmentationClass/{stems[-1]}.png")
            image = np.full((SIZE, SIZE, 3), 10 * label, np.uint8)
            Image.fromarray(image).save(root / f"JPEGImages/{stems[-1]}.jpg")
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(stems))
    return root


def make_config(names=("beagle", "tabby"), **changes):
    changes = {"resolution": SIZE, "regions": 3, "class_names": names, **changes}
    return preset_config("demo", channel_mult=(1, 2), **changes).resolved()


def make_predictor(num_columns):
    """Return a predictor whose region 1 is the first ``num_columns[label]`` columns; the rest is region 0."""

    def predictor(label):
        def predict(images):
            masks = torch.zeros(len(images), 3, SIZE, SIZE)
            masks[:, 0] = 1
            masks[:, :2, :, : num_columns[label]] = torch.tensor([0.0, 1.0])[:, None, None]
            return masks

        return predict

    return predictor


def test_zero_shot_many_leaf_regions_map_a_coarser_level(voc):
    """Of (4, 4) regions the leaves of region 1 are the animal, in stripes."""

    def predictor(label):
        def predict(images):
            leaves = torch.arange(SIZE) % 4 + torch.where(torch.arange(SIZE) < 8, 4, 12)
            return torch.nn.functional.one_hot(leaves, 16).T[None, :, None].expand(len(images), 16, SIZE, SIZE).float()

        return predict

    scores = score_zero_shot(make_config((), regions=(4, 4)), predictor, voc, label_map=None, num_fit_images=16)
    assert scores["level"] == 1 and scores["iou"] == 1 and scores["classes"]["cat"]["mapping"] == [1]


def test_zero_shot_scores_each_class_with_its_label(voc):
    label_map = {"cat": "tabby", "dog": 0}
    scores = score_zero_shot(make_config(), make_predictor({1: 8, 0: 5}), voc, label_map=label_map, num_fit_images=16)
    assert set(scores["classes"]) == {"cat", "dog"} and len(scores["missing"]) == 18
    cat, dog = scores["classes"]["cat"], scores["classes"]["dog"]
    assert cat == {"label": "tabby", "images": 3, "fitted_on": 2, "mapping": [1], "acc": 1, "iou": 1, "miou": 1}
    # Of the dog's 8 columns 5 are predicted; of the background's 6 all, and 3 too many; 14 columns are valid.
    assert dog["label"] == "beagle" and dog["images"] == 2 and dog["fitted_on"] == 1
    assert dog["acc"] == pytest.approx(11 / 14) and dog["iou"] == pytest.approx(5 / 8)
    assert dog["miou"] == pytest.approx((5 / 8 + 6 / 9) / 2)
    assert scores["iou"] == pytest.approx((1 + 5 / 8) / 2) and scores["miou"] == pytest.approx((1 + dog["miou"]) / 2)


def test_zero_shot_single_split_fits_on_the_first_half(voc):
    everywhere = make_predictor({None: 8})
    scores = score_zero_shot(make_config(), everywhere, voc, split="all", label_map=None, num_fit_images=16)
    assert scores["classes"]["cat"]["fitted_on"] == 2 and scores["classes"]["cat"]["images"] == 3
    train = score_zero_shot(make_config(), everywhere, voc, split="train", label_map=None, num_fit_images=16)
    assert "dog" in train["missing"], "one image cannot be both fitted on and scored"
    assert train["classes"]["cat"]["label"] is None


def test_zero_shot_default_label_map_needs_imagenet_classes(voc):
    assert len(THESIS_LABELS) == 20 and THESIS_LABELS["cat"] == 281 and THESIS_LABELS["tvmonitor"] == 664
    conditions = []

    def predictor(label):
        conditions.append(label)
        return make_predictor({label: 8})(label)

    names = tuple(f"synset {n}" for n in range(1000))
    scores = score_zero_shot(make_config(names), predictor, voc, label_map=None, num_fit_images=16)
    assert conditions == [281, 153] and scores["classes"]["dog"]["label"] == "synset 153"


def test_zero_shot_invalid_arguments_raise(voc):
    with pytest.raises(ConfigError, match="names 'wolf', but the data set's classes are aeroplane"):
        score_zero_shot(make_config(), make_predictor({}), voc, label_map={"wolf": "beagle"}, num_fit_images=16)
    with pytest.raises(ConfigError, match="did you mean beagle"):
        score_zero_shot(make_config(), make_predictor({}), voc, label_map={"dog": "beagles"}, num_fit_images=16)
    with pytest.raises(ConfigError, match="has no classes"):
        score_zero_shot(make_config(()), make_predictor({}), voc, label_map={"dog": 0}, num_fit_images=16)
    with pytest.raises(ConfigError, match="split='test': VOC2012 has train, val, all"):
        score_zero_shot(make_config(), make_predictor({}), voc, split="test", label_map=None, num_fit_images=16)


def test_zero_shot_conditions_the_model_on_the_class(make_random_run, voc, tmp_path, capsys):
    run = make_random_run(class_names=("beagle", "tabby"))
    label_map = tmp_path / "map.json"
    label_map.write_text(json.dumps({"cat": "tabby"}))
    saved = run.save(tmp_path / "run.safetensors")
    code = main(["evaluate", str(saved), "--data", str(voc), "--label-map", str(label_map), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert code == 0 and printed["classes"]["cat"]["label"] == "tabby" and printed["classes"]["dog"]["label"] is None
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    masks = [run.predictor(None, "fast", label)(images) for label in (None, 0, 1)]
    assert not torch.allclose(masks[0], masks[1]) and not torch.allclose(masks[1], masks[2])
