"""The alarm on drawn images, and their scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from factorkit.data import draw_flowers
from factorkit.engine.run_log import RunLog
from factorkit.report.content import Check, judged_alarms
from factorkit.segdiff import drawn_images as module
from factorkit.segdiff.drawn_images import (
    DRAWN_IMAGES,
    GRAIN,
    MAX_GRAIN,
    NUM_CHECKED,
    STRUCTURE,
    choose_photos,
    log_drawn_checks,
    measure_grain,
    measure_noise_in_detail,
    read_photos,
    score_drawn,
    skip_checks,
)
from factorkit.segdiff.train import judge_drawn_images
from factorkit.segdiff.verdict import judge_regions
from factorkit.utils.errors import DataError
from factorkit.utils.files import read_log
from factorkit.utils.images import pixels_to_images

N = NUM_CHECKED


@pytest.fixture(scope="module")
def photos():
    return pixels_to_images(draw_flowers(160, 32, seed=0)[0])


def make_drawn(kind: str, photos: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "photos":
        return pixels_to_images(draw_flowers(N, 32, seed=9)[0])
    if kind in ("slightly noised", "grainy"):
        deviation = 0.02 if kind == "slightly noised" else 0.08
        return make_drawn("photos", photos) + deviation * torch.randn(N, 3, 32, 32, generator=generator)
    if kind == "noise":
        return torch.rand(N, 3, 32, 32, generator=generator)
    if kind == "noised":
        return (make_drawn("photos", photos) + 0.25 * torch.randn(N, 3, 32, 32, generator=generator)).clamp(0, 1)
    if kind == "texture":  # the spectrum of photos, without their edges
        phase = torch.fft.rfft2(torch.randn(N, 1, 32, 32, generator=generator)).sgn()
        phase[..., 0, 0] = 1
        return torch.fft.irfft2(torch.fft.rfft2(make_drawn("photos", photos)) * phase).clamp(0, 1)
    if kind == "blobs":
        return torch.nn.functional.interpolate(torch.rand(N, 3, 4, 4, generator=generator), 32, mode="bilinear")
    if kind == "mean image":
        return photos.mean(0, keepdim=True).expand(N, -1, -1, -1)
    return photos[:1].expand(N, -1, -1, -1)


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("photos", True),
        ("slightly noised", True),
        ("grainy", False),
        ("noise", False),
        ("noised", False),
        ("texture", False),
        ("blobs", False),
        ("mean image", False),
        ("one photo", False),
    ],
)
def test_check_drawn_images_separates_photos_from_noise(photos, kind, passes):
    reference, others = choose_photos(len(photos), N)
    scores = score_drawn(make_drawn(kind, photos), photos[reference], photos[others])
    distance, grain, structure = scores.checks()
    assert ({distance.status, grain.status, structure.status} == {"passed"}) == passes, scores
    assert scores.frechet_photos < scores.frechet_noise and 0 <= scores.precision <= 1
    assert not (distance.decisive or grain.decisive or structure.decisive)  # images do not say whether masks are right
    if kind == "grainy":
        assert distance.status == "passed" and grain.failures[0].startswith(GRAIN)
        assert f"{scores.grain:.3f}" in grain.failures[0]
    elif kind == "texture":
        assert distance.status == grain.status == "passed"
        assert structure.failures[0].startswith(
            f"{STRUCTURE}: their fine detail is {scores.noise_in_detail:.2f} of the"
        )
    elif not passes:
        assert f"{scores.frechet:.3f}" in distance.failures[0] and distance.failures[0].startswith(DRAWN_IMAGES)


@pytest.mark.parametrize("side", [16, 33])
@pytest.mark.parametrize("kind", ["flowers", "gray", "stripes"])
def test_measure_grain_noise_is_its_deviation_and_content_is_none(side, kind):
    if kind == "stripes":  # as much fine detail as pixels can have, but in all photos
        base = (torch.arange(side).view(1, 1, side, 1) // torch.tensor([1, 2, 3]).view(1, 3, 1, 1)) % 2 * 0.5 + 0.25
        photos = base.expand(2 * N, -1, -1, side)
    else:
        photos = pixels_to_images(draw_flowers(4 * N, side, seed=0)[0]) * 0.6 + 0.2
    photos = photos.mean(1, keepdim=True).expand(-1, 3, -1, -1) if kind == "gray" else photos
    noise = 0.1 * torch.randn(N, 1 if kind == "gray" else 3, side, side, generator=torch.Generator().manual_seed(1))
    assert measure_grain(photos[:N] + noise, photos)[0] == pytest.approx(0.1, rel=0.25)
    assert measure_grain(photos[:N], photos)[0] < 0.03
    flipped = [measure_grain(photos[:N].flip(dim) + noise.flip(dim), photos)[0] for dim in (1, 3)]
    assert side % 2 or flipped[1] == pytest.approx(flipped[0], rel=1e-3)


def test_measure_grain_photos_of_mixed_detail_are_within_chance():
    generator = torch.Generator().manual_seed(0)
    photos = torch.rand(160, 3, 16, 16, generator=generator) * torch.rand(160, 1, 1, 1, generator=generator).square()
    parts = [photos[torch.randperm(160, generator=generator)] for _ in range(20)]
    grains = [measure_grain(part[:N], part[N:]) for part in parts]
    assert all(grain < chance for grain, chance in grains) and max(grain for grain, _ in grains) > MAX_GRAIN


def test_measure_noise_in_detail_is_that_of_noise_whatever_its_amount(photos):
    noise = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    amounts = [measure_noise_in_detail(0.5 + deviation * noise, photos)[0] for deviation in (0.01, 0.2)]
    assert amounts == pytest.approx([1.0, 1.0], abs=0.05)
    own, chance = measure_noise_in_detail(photos[:N], photos[N:])
    assert abs(own) < chance < 1 and measure_noise_in_detail(photos[:N].flip(3), photos[N:])[0] == pytest.approx(own)
    assert measure_noise_in_detail(noise, 2 * noise.roll(1, 0))[1] > 0.82  # photos of noise: no limit within chance


@pytest.mark.slow
def test_score_drawn_noise_that_a_decoder_made_smooth_is_found_at_the_size_of_the_latents(photos):
    large, smooth = (
        torch.nn.functional.interpolate(images, 128, mode="bicubic").clamp(0, 1)
        for images in (photos, make_drawn("noised", photos))
    )
    at_full_size, at_latents = (score_drawn(smooth, large[N:], large[:N], factor) for factor in (1, 4))
    assert at_full_size.grain < MAX_GRAIN < 2 * MAX_GRAIN < at_latents.grain


@pytest.mark.parametrize("side", [32, 64])
def test_score_drawn_of_photos_read_in_batches_equals_that_of_whole_photos(monkeypatch, side):
    monkeypatch.setattr(module, "READING_BATCH_SIZE", 5)
    pixels = np.random.default_rng(0).integers(0, 256, (48, side, side, 3), np.uint8)
    photos = pixels_to_images(pixels)
    read = read_photos(pixels[16:32], 8), read_photos(pixels[32:], 8)
    assert read[0].shape[2:] == ((10, 10) if side == 32 else (9, 9))
    assert score_drawn(photos[:16], *read, 8) == score_drawn(photos[:16], photos[16:32], photos[32:], 8)


def test_score_drawn_latents_of_few_pixels_are_measured_at_9_pixels_or_more():
    photos = torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = score_drawn(photos[:16], photos[16:32], photos[32:], latent_factor=8)  # 4 x 4 latents
    assert scores.images == 16 and np.isfinite(list(scores.to_dict().values())).all()


def test_choose_photos_are_apart_and_as_many_as_there_are():
    for count in (32, 50, 3000):
        reference, others = choose_photos(count, N)
        assert not set(reference) & set(others) and max(*reference, *others) < count
        assert len(others) == min(N, count // 2) and len(reference) == min(1000, count - len(others))
    with pytest.raises(DataError, match="31 photos"):
        choose_photos(31, N)


@pytest.mark.parametrize(("step", "count", "reason"), [(99, 500, "99 steps"), (100, 31, "31 photos"), (100, 32, None)])
def test_skip_checks_few_steps_or_photos_give_the_reason(step, count, reason):
    checks = skip_checks(step, count)
    assert [check.status for check in checks] == ["not run"] * (reason is not None)
    assert not checks or reason in checks[0].not_run


def judge(folder, *checks: Check, **scores):
    with RunLog(folder) as log:
        passed = {"name": "eta gap", "status": "passed", "decisive": True, "value": 0.4}
        log.event("alarms", step=400, eta_gap=0.4, checks=[passed], failures=[])
    if checks:
        log_drawn_checks(folder, 400, checks)
    return judge_regions(read_log(folder), scores)


NOISE = Check(DRAWN_IMAGES, 3.0, high=0.5, failures=("drawn images are noise: 0.9",))
RIGHT = Check(DRAWN_IMAGES, 0.2, high=0.5)
GRAINY = Check(GRAIN, 0.09, high=0.045, failures=(f"{GRAIN}: too much",))
SCORES = {"iou": 0.9, "scored": 9, "baselines": {"mean_mask": {"iou": 0.5}}}


def test_verdict_noise_is_never_green(tmp_path):
    assert judge(tmp_path / "a", RIGHT, **SCORES).status == "good"
    unfinished = judge(tmp_path / "b", **SCORES)  # or a run stored before there was the check
    assert unfinished.status == "mixed" and "--generation" in unfinished.details[-1]
    noise = judge(tmp_path / "c", NOISE, **SCORES)
    assert noise.status == "mixed" and any("drawn images are noise" in line for line in noise.details)
    assert judge(tmp_path / "d", NOISE).status == "bad"
    assert judge(tmp_path / "f", RIGHT, GRAINY, **SCORES).status == "mixed"
    grainy = judge(tmp_path / "g", RIGHT, GRAINY)
    assert grainy.status == "bad" and grainy.headline == f"Failed: {GRAIN}"
    untrained = judge(tmp_path / "e", *skip_checks(1, 500), **SCORES)
    assert untrained.status == "mixed" and "drawn images were not checked" in untrained.headline


def test_log_drawn_checks_replaces_its_own_and_keeps_the_others(tmp_path):
    judge(tmp_path, NOISE, GRAINY)
    log_drawn_checks(tmp_path, 400, [RIGHT])
    alarms, failures = judged_alarms(read_log(tmp_path))
    assert [check["name"] for check in alarms["checks"]] == ["eta gap", DRAWN_IMAGES]
    assert failures == [] and alarms["eta_gap"] == 0.4
    log_drawn_checks(tmp_path / "plain", 500, [NOISE])  # a plain DDPM has no alarms before
    assert judged_alarms(read_log(tmp_path / "plain"))[1] == list(NOISE.failures)


@pytest.mark.slow
def test_judge_drawn_images_of_a_run_without_the_structure_measures_once(make_random_run, monkeypatch, tmp_path):
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)
    run = make_random_run()
    run.folder, run.step = tmp_path, 400
    judge(tmp_path, RIGHT)  # as runs were stored before there was the check
    for _ in range(2):
        judge_drawn_images(run, draw_flowers(40, 16, seed=0)[0])
        monkeypatch.setattr(run, "generate", None)
    alarms, failures = judged_alarms(read_log(tmp_path))
    assert [check["name"] for check in alarms["checks"]] == ["eta gap", DRAWN_IMAGES, GRAIN, STRUCTURE]
    assert len(failures) == 3 and failures[1].startswith(GRAIN)


@pytest.mark.slow
def test_evaluate_generation_scores_images_and_masks(make_random_run, monkeypatch, tmp_path):
    """With photos for drawn images it finds photos; masks that were drawn with are those that it segments."""
    run = make_random_run()
    run.folder, run.step = tmp_path, 400
    photos = draw_flowers(80, 16, seed=0)[0]
    untrained = run.evaluate_generation(photos, steps=2)
    assert untrained["images"] == 40 and untrained["noise_share"] > 0.5
    assert 0 <= untrained["mask_agreement"] <= 1 and "fid" not in untrained
    assert json.loads((tmp_path / "generation.json").read_text())["frechet"] == untrained["frechet"]
    assert judged_alarms(read_log(tmp_path))[1][0].startswith("drawn images are noise")

    generate = run.generate

    def draw_photos(n, **options):
        drawn = generate(n, **options)
        images = pixels_to_images(draw_flowers(n, 16, seed=9)[0])
        segmented = run.segment(images)
        return drawn._replace(images=images, labels=segmented.labels, masks=segmented.masks)

    monkeypatch.setattr(run, "generate", draw_photos)
    right = run.evaluate_generation(photos, steps=2)
    assert right["noise_share"] < 0.5 and right["precision"] > 0.5 and right["recall"] > 0.5
    assert right["mask_agreement"] > 0.99 > right["mask_agreement_by_chance"]
    assert judged_alarms(read_log(tmp_path))[1] == []
    with pytest.raises(DataError, match="31 photos"):
        run.evaluate_generation(np.array(photos[:31]))


@pytest.mark.slow
def test_evaluate_generation_latents_are_compared_and_judged_at_their_side(load_latent_run):
    run, photos = load_latent_run(step=400), draw_flowers(34, 48, seed=0)[0]
    scores = run.evaluate_generation(photos, steps=2)
    assert scores["side"] == run.config.side == 12 and scores["resolution"] == 48 and 0 <= scores["mask_agreement"] <= 1
    reference, others = choose_photos(34, 256)
    parts = (pixels_to_images(photos[rows]) for rows in (reference, others))
    expected = score_drawn(run.generate(17, steps=2).images, *parts, 4)
    assert {name: scores[name] for name in expected.to_dict()} == pytest.approx(expected.to_dict(), rel=1e-4)
    logged = judged_alarms(read_log(run.folder))[0]["checks"]
    assert [check["value"] for check in logged if check["name"] == GRAIN] == [pytest.approx(expected.grain, rel=1e-4)]


@pytest.mark.slow
def test_evaluate_generation_larger_factor_changes_the_scores_and_not_the_alarms(make_random_run, tmp_path):
    run, photos = make_random_run(resolution=32), draw_flowers(34, 32, seed=0)[0]
    run.folder, run.step, checks, scores = tmp_path, 400, [], []
    for factor in (1, 3):
        scores.append(run.evaluate_generation(photos, steps=2, latent_factor=factor))
        checks.append(judged_alarms(read_log(tmp_path))[0]["checks"])
    assert [each["side"] for each in scores] == [32, 10] and scores[0]["grain"] > scores[1]["grain"]
    assert checks[0] == checks[1]


@pytest.mark.slow
def test_judge_drawn_images_of_latents_measures_at_their_side(load_latent_run, monkeypatch):
    monkeypatch.setattr("factorkit.segdiff.train.write_report", lambda folder: None)
    run, photos = load_latent_run(step=400), draw_flowers(34, 48, seed=0)[0]
    judge_drawn_images(run, photos)
    parts = (pixels_to_images(photos[rows]) for rows in choose_photos(34, NUM_CHECKED))
    expected = score_drawn(run.generate(17, steps=10).images, *parts, 4).checks()
    logged = {check["name"]: check for check in judged_alarms(read_log(run.folder))[0]["checks"]}
    for check in expected:
        assert logged[check.name]["value"] == pytest.approx(check.value, rel=1e-4)
