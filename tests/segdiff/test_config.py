"""Forms, presets and invalid settings."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from factorkit.segdiff.config import ResolvedSegdiffConfig, SegdiffConfig, preset_config
from factorkit.segdiff.presets import FORMS, PRESETS
from factorkit.utils.errors import ConfigError


def test_thesis_form_equals_chapter_2():
    config = SegdiffConfig(form="thesis").resolved()
    result = {name: getattr(config, name) for name in FORMS["thesis"]}
    assert result == {
        "prediction": "eps",
        "branch_norm": "group",
        "region_tokens": False,
        "normalised_logits": False,
        "half_resolution_masks": False,
        "mask_learning_rate": 1.0,
        "t_max": 1000,
        "high_noise_fraction": 0.0,
        "coarse_to_fine": (0, 0),
    }
    assert (config.learning_rate, config.ema_decay, config.batch_size, config.regions) == (1e-4, 0.9999, 128, 3)
    assert (config.model_channels, config.timesteps, config.segment_t) == (128, 1000, 30)


def test_regional_form_is_the_default_with_every_part_on():
    config = SegdiffConfig(masks="network").resolved()
    assert SegdiffConfig().form == "regional"
    assert config.prediction == "v" and config.branch_norm == "pixel"
    assert config.region_tokens and config.normalised_logits and config.half_resolution_masks
    assert config.mask_learning_rate < 1 and config.t_max < 1000 and config.high_noise_fraction > 0
    assert 0 <= config.coarse_to_fine[0] < config.coarse_to_fine[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prediction", "eps"),
        ("prediction", "v"),
        ("branch_norm", "pixel"),
        ("branch_norm", "masked_group"),
        ("region_tokens", True),
        ("region_tokens", False),
        ("normalised_logits", True),
        ("normalised_logits", False),
        ("half_resolution_masks", True),
        ("half_resolution_masks", False),
        ("mask_learning_rate", 0.05),
        ("t_max", 444),
        ("coarse_to_fine", (3, 9)),
        ("segment_t", 77),
    ],
)
def test_setting_one_part_changes_no_other(form, name, value):
    plain, changed = (
        SegdiffConfig(form=form, masks="network", **changes).resolved() for changes in ({}, {name: value})
    )
    assert getattr(changed, name) == value
    others = {f.name for f in dataclasses.fields(plain)} - {name}
    assert {n: getattr(plain, n) for n in others} == {n: getattr(changed, n) for n in others}


def test_high_noise_fraction_without_high_levels_is_zero():
    assert SegdiffConfig(high_noise_fraction=0.25).resolved().high_noise_fraction == 0.25
    assert SegdiffConfig(form="thesis", t_max=500, high_noise_fraction=0.25).resolved().high_noise_fraction == 0.25
    assert SegdiffConfig(t_max=1000).resolved().high_noise_fraction == 0


@pytest.mark.parametrize(("form", "t_max"), [("thesis", 200), ("regional", SegdiffConfig().resolved().t_max // 5)])
def test_t_max_scales_with_timesteps(form, t_max):
    config = SegdiffConfig(form=form, timesteps=200).resolved()
    assert config.t_max == t_max
    assert (config.high_noise_fraction > 0) == (t_max < 200)


@pytest.mark.parametrize("decoding", ["concat", "masked_mid", "unshared"])
def test_decodings_resolve_in_both_forms(decoding):
    for form in FORMS:
        config = SegdiffConfig(form=form, decoding=decoding).resolved()
        assert config.region_tokens == (form == "regional" and decoding != "concat")
        assert config.branch_norm == ("pixel" if form == "regional" else "group")


def test_resolved_config_round_trips_and_is_stable():
    config = preset_config("fast32", form="thesis", region_tokens=True, coarse_to_fine=(1, 2)).resolved()
    again = ResolvedSegdiffConfig.from_dict(config.to_dict())
    assert again == config == again.resolved()
    assert isinstance(again.channel_mult, tuple) and isinstance(config.to_dict()["channel_mult"], list)


@pytest.mark.parametrize(
    ("name", "resolution", "steps", "batch"),
    [
        ("flowers64", 64, 50_000, 128),
        ("flowers128", 128, 50_000, 128),
        ("cub64", 64, 50_000, 128),
        ("cub128", 128, 50_000, 128),
        ("ffhq64", 64, 500_000, 128),
        ("ffhq128", 128, 500_000, 128),
        ("imagenet64", 64, 500_000, 512),
    ],
)
def test_thesis_presets_equal_section_2_4(name, resolution, steps, batch):
    config = preset_config(name).resolved()
    assert (config.form, config.resolution, config.steps, config.batch_size) == ("thesis", resolution, steps, batch)
    shape = ((1, 2, 3, 4), 3) if resolution == 64 else ((1, 1, 2, 3, 4), 2)
    assert (config.channel_mult, config.num_res_blocks) == shape
    assert (config.model_channels, config.regions, config.learning_rate, config.ema_decay) == (128, 3, 1e-4, 0.9999)
    assert (config.warmup_steps, config.lr_decay_fraction, config.gradient_clip, config.dropout) == (0, 0.0, None, 0.0)


def test_presets_are_valid_and_complete():
    assert {"demo", "fast32", "fast64"} <= set(PRESETS)
    for name in PRESETS:
        regional = name in ("demo", "fast32", "rooms32", "fast64", "uvit32", "uvit64", "uvit128")
        assert preset_config(name).resolved().form == ("regional" if regional else "thesis")


def test_preset_changes_override_the_preset():
    config = preset_config("flowers64", steps=7, form="regional")
    assert (config.steps, config.form, config.resolution) == (7, "regional", 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regions": (7, 7, 7)}, r"regions=\(7, 7, 7\): 343 regions.*at most 256"),
        ({"regions": 257}, r"257 regions in all"),
        ({"regions": 0}, r"regions=0.*regions=1 is the plain DDPM"),
        ({"resolution": 30}, r"resolution=30.*use resolution=32"),
        ({"resolution": 0}, r"resolution=0 must be at least 1"),
        ({"form": "best"}, r"form='best'.*regional, thesis"),
        ({"decoding": "two"}, r"decoding='two'.*masked_skips, concat, masked_mid, unshared"),
        ({"decoding": "concat", "branch_norm": "masked_group"}, r"branch_norm='group'"),
        ({"decoding": "concat", "region_tokens": True}, r"region_tokens=False"),
        ({"prediction": "score"}, r"prediction='score'.*eps, v, x0, flow"),
        ({"branch_norm": "layer"}, r"branch_norm='layer'.*group, masked_group, pixel"),
        ({"channel_mult": ()}, r"channel_mult=\(\)"),
        ({"channel_mult": (1, 0)}, r"channel_mult=\(1, 0\)"),
        ({"model_channels": 7}, r"model_channels=7 must be even"),
        ({"num_res_blocks": 0}, r"num_res_blocks=0"),
        ({"dropout": 1.5}, r"dropout=1.5"),
        ({"mask_learning_rate": -1.0}, r"mask_learning_rate=-1"),
        ({"t_max": 2000}, r"t_max=2000.*timesteps=1000"),
        ({"t_max": 0}, r"t_max=0"),
        ({"high_noise_fraction": 1.5}, r"high_noise_fraction=1.5"),
        ({"t_max": 1000, "high_noise_fraction": 0.5}, r"high_noise_fraction=0.5.*t_max=1000"),
        ({"coarse_to_fine": (150, 50)}, r"coarse_to_fine=\(150, 50\)"),
        ({"coarse_to_fine": (1, 2, 3)}, r"coarse_to_fine=\(1, 2, 3\)"),
        ({"timesteps": 20}, r"timesteps=20.*more than 20"),
        ({"segment_t": 1000}, r"segment_t=1000.*999"),
        ({"num_fit_images": 0}, r"num_fit_images=0"),
        ({"steps": 0}, r"steps=0"),
        ({"learning_rate": 0.0}, r"learning_rate=0"),
        ({"precision": "fp8"}, r"precision='fp8'.*auto, bf16 or fp32"),
    ],
)
def test_config_invalid_settings_raise_with_the_cure(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset_config(None, **changes).resolved()


def test_preset_unknown_name_or_setting_lists_known_ones():
    with pytest.raises(ConfigError, match=r"preset='flowers32'.*demo, fast32, rooms32, fast64, uvit32.*flowers64"):
        preset_config("flowers32")
    with pytest.raises(ConfigError, match=r"'region'.*regions.*resolution"):
        preset_config("demo", region=3)


def test_memory_advice_names_settings_with_values():
    get_advice = lambda at_once=8, **changes: preset_config("demo", **changes).resolved().memory_advice(at_once)  # noqa: E731
    assert "micro_batch_size=4" in get_advice() and "checkpoint_branches=True" in get_advice()
    assert "checkpoint_branches" not in get_advice(checkpoint_branches=True) + get_advice(regions=1) + get_advice(
        decoding="concat"
    )
    assert "micro" not in get_advice(1) and "model_channels=" in get_advice(1, regions=1)


def test_config_accepts_numpy_and_torch_integers():
    settings = {
        "regions": np.int64(2),
        "seed": torch.tensor(7),
        "channel_mult": [np.int32(1), 2],
        "ema_decay": np.float64(0.5),
    }
    config = preset_config("demo", **settings).resolved()
    assert (config.regions, config.seed, config.channel_mult) == (2, 7, (1, 2))
    assert {type(n) for n in (config.regions, config.seed, *config.channel_mult)} == {int}
    assert preset_config("demo", regions=(np.int64(2), 3)).resolved().num_leaf_regions == 6
    for wrong in (np.float32(2), np.array([2, 2]), True + 0.5):
        with pytest.raises(ConfigError, match="regions="):
            preset_config("demo", regions=wrong).resolved()


def test_masks_by_default_are_auto_in_the_regional_form_and_of_the_network_in_the_thesis():
    assert SegdiffConfig().resolved().masks == "auto"
    assert SegdiffConfig(form="thesis").resolved().masks == "network"
    assert SegdiffConfig(form="thesis", masks="mixture").resolved().masks == "mixture"
    assert SegdiffConfig(regions=1).choose_masks() == ("network", "")
    with pytest.raises(ConfigError, match="masks='auto' is not in the thesis"):
        SegdiffConfig(form="thesis", masks="auto").resolved()


@pytest.mark.parametrize(
    ("preset", "changes", "regions"),
    [
        ("demo", {}, None),
        ("fast64", {"masks": "auto", "regions": None}, None),
        (None, {}, None),
        ("fast64", {"regions": 3}, 3),
        ("fast32", {"masks": "network", "regions": None}, 2),
        ("demo", {"form": "thesis"}, 2),
        ("demo", {"latent": "autoencoder"}, None),
        ("demo", {"normalised_logits": True}, 2),
        ("rooms32", {"regions": None}, (3, 3)),
        ("flowers64", {}, 3),
    ],
)
def test_preset_regions_are_open_only_where_masks_auto_chooses_them(preset, changes, regions):
    config = preset_config(preset, **changes)
    assert config.regions == regions
    if preset != "rooms32" and "latent" not in changes:
        assert config.resolved().regions == (regions or 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"regions": (3, 2)}, r"regions=\(3, 2\)"),
        ({"normalised_logits": False}, "normalised_logits="),
        ({"half_resolution_masks": True}, "half_resolution_masks="),
        ({"mask_learning_rate": 0.1}, "mask_learning_rate="),
    ],
)
def test_masks_where_auto_is_impossible_are_of_the_network_with_a_reason(changes, reason):
    config = SegdiffConfig(**changes)
    masks, note = config.choose_masks()
    assert masks == config.resolved().masks == "network" and re.match(f'masks="network": {reason}', note)
