from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from factorkit.nerfdiff.build import build_encoder, build_model
from factorkit.nerfdiff.cameras.candidates import LookAtCandidates, OctantCandidates, SingleCandidate, build_candidates
from factorkit.nerfdiff.config import NerfdiffConfig, preset_config
from factorkit.nerfdiff.fields.kinds import FrequencyField, build_field
from factorkit.nerfdiff.presets import PRESETS
from factorkit.nerfdiff.rays import CameraModel
from factorkit.utils.errors import ConfigError


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.slow
def test_preset_config_every_preset_builds_a_model(preset):
    config = preset_config(preset)
    forward = preset == "llff"
    size = [378, 504] if forward else [config.resolution] * 2
    camera_model = CameraModel(torch.eye(3), torch.zeros(3), forward)
    scene = {"size": size, "layout": "forward" if forward else "object", "distance": 1.0 if forward else 2.0}
    field = build_field(config.field, min(config.grid_resolution, 8), 0)
    model = build_model(config, scene, camera_model, field, torch.eye(4)[None])
    raw, scores = model.encoder(torch.randn(1, 3, *model.encoder.size), torch.tensor([5]))
    poses = model.candidates(raw)
    kinds = {"demo": LookAtCandidates, "fast": LookAtCandidates, "llff": SingleCandidate}
    assert isinstance(model.candidates, kinds.get(preset, OctantCandidates))
    assert poses.shape == (1, 1 if forward else config.num_candidates, 4, 4) and scores.shape == poses.shape[:2]
    assert poses.isfinite().all()


def test_thesis_presets_equal_the_settings_of_the_thesis():
    lego, car = preset_config("lego"), preset_config("car")
    assert (lego.num_candidates, car.num_candidates, lego.resolution, lego.timesteps, lego.steps) == (
        12,
        8,
        128,
        100,
        200_000,
    )
    assert (lego.field_learning_rate, lego.learning_rate, lego.classification_weight) == (1e-4, 2e-5, 0.1)
    assert lego.search == "joint" and not lego.balance_candidates and lego.noise and lego.timestep_power == 1
    assert (lego.model_channels, lego.channel_mult, lego.num_res_blocks, lego.encoder_pooling) == (
        64,
        (1, 1, 2, 2, 4),
        2,
        "average",
    )
    assert isinstance(build_field(lego.field, 1, 0), FrequencyField)


def test_preset_config_scales_with_the_resolution_unless_given():
    small, large = preset_config("fast"), preset_config("fast", resolution=96, field="grid")
    assert (small.grid_resolution, small.samples_per_ray, small.field_steps) == (32, 32, 600)
    assert (large.grid_resolution, large.samples_per_ray, large.field_steps) == (96, 96, 1800)
    assert preset_config("fast", resolution=96, grid_resolution=40).grid_resolution == 40
    joint = preset_config("fast", search="joint")
    assert joint.steps == 1500 and joint.classification_weight == 0.01
    large_joint = preset_config("fast", search="joint", resolution=96)
    assert (joint.grid_resolution, joint.samples_per_ray, large_joint.grid_resolution, large_joint.samples_per_ray) == (
        24,
        28,
        72,
        84,
    )
    assert preset_config("fast", search="joint", steps=7).steps == 7
    assert preset_config("lego", search="joint").steps == 200_000


def test_build_encoder_reads_squares_of_the_stem_at_the_next_size_that_they_divide():
    candidates = build_candidates("look_at", 8, 3.0, (5.0, 70.0), ())
    sizes = {resolution: preset_config("fast", resolution=resolution).encoder_stem_size for resolution in (8, 32, 128)}
    assert sizes == {8: 1, 32: 2, 128: 4}
    encoder = build_encoder(preset_config("fast", resolution=64, model_channels=8), (64, 50), candidates)
    assert encoder.size == (64, 52)
    poses, scores = encoder(torch.zeros(2, 3, 64, 50), torch.zeros(2, dtype=torch.int64))
    assert poses.shape == (2, 8, 3) and scores.shape == (2, 8)
    moved = torch.zeros(1, 3, 64, 52)
    moved[..., 1] = 1  # within a square: no pixel is averaged away
    t = torch.zeros(1, dtype=torch.int64)
    assert not torch.equal(encoder(moved, t)[1], encoder(moved.roll(1, -1), t)[1])


def test_preset_config_from_64_pixels_on_leaves_the_field_to_the_views():
    large = preset_config("fast", resolution=96)
    assert large.field == "auto" and (large.grid_resolution, large.field_steps) == (64, 1200)
    assert preset_config("fast", resolution=64).field == "auto"
    joint = preset_config("fast", search="joint", resolution=96)
    assert preset_config("fast", resolution=63).field == joint.field == "grid"
    assert preset_config("fast", resolution=96, field="hashgrid").field == "hashgrid"
    given = preset_config("fast", resolution=96, field_steps=7)
    assert given.with_field("grid", "yes").field_steps == given.with_field("gaussians", "no").field_steps == 7
    earlier = preset_config("fast", resolution=96, field="grid")
    assert large.with_choices({"scene": {}, **earlier.to_dict(), "unbounded": "no"}) == replace(earlier, unbounded="no")


def test_preset_config_occupancy_is_on_for_costly_fields():
    assert not preset_config("fast").occupancy and not preset_config("demo", resolution=64, field="grid").occupancy
    assert all(preset_config("fast", field=field).occupancy for field in ("hashgrid", "mlp", "siren", "tcnn"))
    assert not preset_config("fast", field="mlp", occupancy=False).occupancy
    assert not preset_config("lego").occupancy, "the thesis' settings, to the letter"


def test_stage_config_seeds_differ_between_stages():
    config = preset_config("fast", seed=3)
    seeds = {config.stage(name).seed for name in ("search", "refine", "distil")}
    assert len(seeds) == 3 and config.stage("search").seed == config.stage("search").seed
    assert config.stage("search").seed != preset_config("fast", seed=4).stage("search").seed


def test_config_round_trip_and_unknown_setting_raises():
    config = preset_config("fast", optimize_camera=("roll",), elevation_range=(0.0, 50.0))
    assert NerfdiffConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="candidtes"):
        preset_config("fast", candidtes=3)


@pytest.mark.parametrize("size", [(16, 16), (13, 24)])
def test_vit_encoder_predicts_candidates_from_views_of_any_size(size):
    config = preset_config("fast", encoder="vit", encoder_depth=2)
    candidates = build_candidates("look_at", 3, 4.0, (0.0, 60.0), ())
    encoder = build_encoder(config, size, candidates)
    assert encoder.size == tuple(-(-side // 4) * 4 for side in size)
    raw, scores = encoder(torch.randn(2, 3, *size), torch.tensor([0, 5]))
    assert raw.shape == (2, 3, candidates.raw_size) and scores.shape == (2, 3)
    raw.sum().backward()
    assert encoder.encoder.patch.weight.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "vit", "channel_mult": (1, 2)}, r"channel_mult=\(1, 2\) belongs to encoder='unet'"),
        ({"encoder_patch_size": 2}, r"encoder_patch_size=2 belongs to encoder='vit'.*give encoder='vit'"),
        ({"encoder": "vit", "model_channels": 12}, r"model_channels=12 must be a multiple of 8"),
        ({"encoder": "vit", "encoder_depth": 0}, r"encoder_depth=0 must be at least 1"),
        ({"encoder": "cnn"}, r"encoder='cnn' is unknown; choose one of unet, vit"),
    ],
)
def test_encoder_settings_that_do_not_fit_raise_with_the_cure(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset_config("fast", **changes)


def test_preset_of_the_other_encoder_keeps_the_rest():
    config, usual = preset_config("lego", encoder="vit"), preset_config("lego")
    assert config.channel_mult == NerfdiffConfig().channel_mult and config.model_channels == 64
    assert (config.encoder_pooling, config.steps) == (usual.encoder_pooling, usual.steps)
