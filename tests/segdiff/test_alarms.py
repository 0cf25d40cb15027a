"""Alarms of synthetic masks that fail in one known way, on images of a bright disc on a dark background."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from factorkit.segdiff.alarms import measure_alarms, measure_place_gain
from factorkit.utils.errors import ConfigError, DataError

N, SIZE = 48, 32


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, Tensor]:
    """Images [N,3,H,W] and masks of the disc, bool [N,H,W]. Its position varies around the centre."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    centre = 15.5 + 10 * (torch.rand(N, 2, 1, 1, generator=generator) - 0.5)
    radius = 6 + 3 * torch.rand(N, 1, 1, generator=generator)
    inside = torch.hypot(y - centre[:, 0], x - centre[:, 1]) < radius
    colour = torch.tensor([0.8, 0.5, -0.2]).view(1, 3, 1, 1)
    images = torch.where(inside[:, None], colour, -0.5) + 0.25 * torch.randn(N, 3, SIZE, SIZE, generator=generator)
    return images.clamp(-1, 1), inside


def soften_labels(labels: Tensor, regions: int = 2, confidence: float = 0.9) -> Tensor:
    hard = F.one_hot(labels.long(), regions).movedim(-1, 1).float()
    return hard * confidence + (1 - hard) * (1 - confidence) / (regions - 1)


def read_failure_names(alarms) -> set[str]:
    """Return the first words of each failure, which name it."""
    return {failure.split(":")[0] for failure in alarms.failures()}


def test_failures_object_masks_are_empty(scene):
    images, inside = scene
    alarms = measure_alarms(images, soften_labels(inside), soften_labels(inside.flip(2)))
    assert alarms.failures() == [] and alarms.ok
    assert alarms.flip_agreement == pytest.approx(1, abs=1e-5)
    assert alarms.eta_gap > 0.4 and 0.1 < alarms.position_share < 0.7 and alarms.boundary_length < 0.08
    assert alarms.areas == pytest.approx([1 - inside.float().mean().item(), inside.float().mean().item()])
    assert alarms.score() == alarms.eta_gap


def test_alarms_of_object_masks_are_decided_by_the_place_gain(scene):
    images, inside = scene
    result = measure_alarms(images, soften_labels(inside), soften_labels(inside.flip(2)))
    masks = dataclasses.replace(
        result, error=0.2, place_gain=0.1, place_share=0.5, eta_gap=0.07, color_share=0.5, position_share=0.85
    )
    assert masks.ok and [check.name for check in masks.checks() if check.decisive] == ["place gain", "place share"]
    for change in ({"place_gain": 0.02}, {"place_share": 0.2}):
        assert read_failure_names(dataclasses.replace(masks, **change)) == {"masks without objects"}


def test_flip_agreement_of_object_masks_is_that_of_the_object(scene):
    images, inside = scene
    left = (torch.arange(SIZE) < SIZE // 2).expand(N, SIZE, SIZE)
    masks = soften_labels(torch.where(inside, 0, 1 + left.long()), 3)
    flipped = soften_labels(torch.where(inside.flip(2), 0, 1 + left.long()), 3)
    assert measure_alarms(images, masks, flipped, objects=True).flip_agreement == pytest.approx(1, abs=1e-5)
    assert measure_alarms(images, masks, flipped).flip_agreement < 0.5


def test_place_gain_is_high_for_objects_and_none_for_textures_or_halves(scene):
    images, inside = scene
    objects = measure_place_gain(images, soften_labels(inside))
    assert objects["place_gain"] > 0.2 and objects["place_share"] > 0.5
    generator = torch.Generator().manual_seed(2)
    textures = F.interpolate(torch.rand(N, 3, 6, 6, generator=generator), size=(SIZE, SIZE), mode="bicubic") * 2 - 1
    bright = textures.mean(1) > textures.mean((1, 2, 3))[:, None, None]
    left = (torch.arange(SIZE) < SIZE // 2).expand(N, SIZE, SIZE)
    halves = torch.where(left[:, None], *torch.rand(2, N, 3, 1, 1, generator=generator)) * 2 - 1
    for pixels, labels in ((textures, bright), (halves, left), (torch.zeros_like(images), inside)):
        places = measure_place_gain(pixels, soften_labels(labels))
        assert abs(places["place_gain"]) < 0.02 and places["place_share"] < 0.2


def test_alarms_with_an_error_are_ranked_by_it(scene):
    images, inside = scene
    result = measure_alarms(images, soften_labels(inside), soften_labels(inside.flip(2)))
    pale = dataclasses.replace(result, eta_gap=0.27)
    assert any("not about content" in failure for failure in pale.failures())
    competing, worse = dataclasses.replace(pale, error=0.21), dataclasses.replace(pale, error=0.23, eta_gap=0.5)
    assert competing.ok and competing.score() > worse.score()
    assert competing.to_dict()["error"] == 0.21 and "error" not in pale.to_dict()
    dithered = dataclasses.replace(competing, boundary_length=0.5, error=0.1)
    assert not dithered.ok and dithered.score() < worse.score()


def test_alarms_swapped_regions_are_equal(scene):
    images, inside = scene
    one = measure_alarms(images, soften_labels(inside), soften_labels(inside.flip(2)))
    other = measure_alarms(images, soften_labels(~inside), soften_labels(~inside.flip(2)))
    assert one.eta_gap == pytest.approx(other.eta_gap) and one.position_share == pytest.approx(other.position_share)


def test_failures_one_region_everywhere_name_only_the_collapse(scene):
    images, inside = scene
    for regions in (2, 3):
        masks = soften_labels(torch.ones_like(inside), regions)
        alarms = measure_alarms(images, masks, masks)
        assert read_failure_names(alarms) == {"collapsed to one region"} and not alarms.ok
        json.dumps(alarms.to_dict(), allow_nan=False)


def test_failures_fixed_split_name_the_position(scene):
    images, inside = scene
    left = torch.zeros_like(inside)
    left[:, :, : SIZE // 2] = True
    alarms = measure_alarms(images, soften_labels(left), soften_labels(left))
    assert alarms.position_share == pytest.approx(1) and alarms.eta_gap == pytest.approx(0, abs=0.01)
    assert alarms.flip_agreement == pytest.approx(-1)
    assert alarms.boundary_length == pytest.approx(0.5 / (SIZE - 1))
    assert read_failure_names(alarms) == {
        "split by position",
        "masks do not turn with the image",
        "masks are not about content",
    }


def test_failures_random_masks_name_dithering(scene):
    images, _ = scene
    noise = torch.rand(2, N, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.5
    alarms = measure_alarms(images, soften_labels(noise[0]), soften_labels(noise[1]))
    assert alarms.boundary_length == pytest.approx(0.5, abs=0.02)
    assert alarms.position_share == pytest.approx(1 / N, abs=0.005)
    assert alarms.flip_agreement == pytest.approx(0, abs=0.02)
    assert {"dithered masks", "masks are not about content", "masks without any place"} <= read_failure_names(alarms)


def test_failures_unused_region_name_its_number(scene):
    images, inside = scene
    masks, flipped = (soften_labels(2 * m.long(), regions=3) for m in (inside, inside.flip(2)))
    alarms = measure_alarms(images, masks, flipped)
    assert read_failure_names(alarms) == {"dead region 1"}
    assert "0.00" in alarms.failures()[0]


def test_failures_masks_of_other_images_name_missing_content(scene):
    images, inside = scene
    shuffled = inside.roll(N // 2, 0)
    alarms = measure_alarms(images, soften_labels(shuffled), soften_labels(shuffled.flip(2)))
    assert read_failure_names(alarms) == {"masks are not about content"}
    assert len(alarms.failures()) == 2, "by the eta gap and by the colour they explain"
    assert "0.3" in alarms.failures()[0]


def test_color_share_equals_the_explained_colour_over_that_of_two_clusters(scene):
    images, inside = scene
    alarms = measure_alarms(images, soften_labels(inside), soften_labels(inside.flip(2)))
    assert 0.95 < alarms.color_share <= 1
    half = torch.zeros_like(inside)
    half[:, : SIZE // 2] = True
    assert measure_alarms(images, soften_labels(half), soften_labels(half)).color_share < 0.2
    blank = torch.zeros_like(images)
    assert measure_alarms(blank, soften_labels(inside), soften_labels(inside.flip(2))).color_share == 0


def test_failures_short_boundaries_at_few_pixels_are_no_dithering():
    """Random squares of 2 x 2 pixels have 0.25 of the neighbours in another region; random pixels have 0.5."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(N, 8, 8, generator=generator) < 0.5).repeat_interleave(2, 1).repeat_interleave(2, 2)
    images = torch.where(labels[:, None], 0.8, -0.5).expand(-1, 3, -1, -1)
    alarms = measure_alarms(images, soften_labels(labels), soften_labels(labels.flip(2)))
    assert alarms.boundary_length > 0.2 and "dithered masks" not in read_failure_names(alarms)


def test_eta_gap_equals_own_minus_foreign_share_of_variance():
    """Two half black images, split in different directions: own masks explain everything, the other's nothing."""
    images = torch.full((2, 3, 4, 4), -1.0)
    images[0, :, :2] = images[1, :, :, :2] = 1.0
    own = images[:, 0] > 0
    assert measure_alarms(images, soften_labels(own), soften_labels(own.flip(2))).eta_gap == pytest.approx(1)
    assert measure_alarms(
        images, soften_labels(own.flip(0)), soften_labels(own.flip(0).flip(2))
    ).eta_gap == pytest.approx(-1)
    assert measure_alarms(torch.zeros_like(images), soften_labels(own), soften_labels(own.flip(2))).eta_gap == 0


def test_flip_agreement_equals_cohens_kappa(scene):
    images, inside = scene
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    other = inside.roll(3, 2)
    alarms = measure_alarms(images, soften_labels(inside), soften_labels(other.flip(2)))
    assert alarms.flip_agreement == pytest.approx(
        sklearn_metrics.cohen_kappa_score(inside.flatten().numpy(), other.flatten().numpy()), abs=1e-5
    )


def test_confidence_and_entropy_equal_those_of_soft_masks(scene):
    images, inside = scene
    alarms = measure_alarms(images, soften_labels(inside, 3, 0.6), soften_labels(inside.flip(2), 3, 0.6))
    assert alarms.confidence == pytest.approx(0.6)
    assert alarms.entropy == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2)) / math.log(3))
    certain = measure_alarms(images, soften_labels(inside, 2, 1.0), soften_labels(inside.flip(2), 2, 1.0))
    assert certain.entropy == 0 and certain.confidence == 1


def test_score_failed_seed_is_below_every_healthy_one(scene):
    images, inside = scene
    healthy = measure_alarms(images, soften_labels(inside), soften_labels(inside.flip(2)))
    # The eta gap is the highest possible, but a third region is unused.
    failed = measure_alarms(images, soften_labels(inside, 3), soften_labels(inside.flip(2), 3))
    assert failed.eta_gap == pytest.approx(healthy.eta_gap) and failed.score() < -1 < healthy.score()


def test_measure_alarms_invalid_input_raises(scene):
    images, inside = scene
    masks = soften_labels(inside)
    with pytest.raises(ConfigError, match="regions=1"):
        measure_alarms(images, masks[:, :1], masks[:, :1])
    with pytest.raises(DataError, match="at least 2 images"):
        measure_alarms(images[:1], masks[:1], masks[:1])
    with pytest.raises(DataError, match=r"\(48, 3, 16, 32\)"):
        measure_alarms(images[:, :, :16], masks, masks)
