"""Transformers in place of the U-Net: every task by the same calls, settings of one backbone alone, and sizes."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import factorkit
from factorkit.cli.main import main
from factorkit.reproduce.experiments.generated_images import count_multiply_adds
from factorkit.segdiff.autoencoder import AutoencoderConfig
from factorkit.segdiff.baselines.datasetddpm import pixel_features
from factorkit.segdiff.config import SegdiffConfig, preset_config
from factorkit.segdiff.network import count_parameters
from factorkit.segdiff.presets import PRESETS
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.settle import add_autoencoder
from factorkit.utils.errors import ConfigError
from tests.segdiff.conftest import randomize_weights

UVIT = {"backbone": "uvit", "resolution": 16, "model_channels": 16, "depth": 3, "patch_size": 2, "num_heads": 2}
RUN = {**UVIT, "regions": 2, "batch_size": 4, "steps": 2, "mixture_steps": 2, "distil_steps": 2, "norm_groups": 4}

# Parameters in millions, and multiply-adds in 10^9 with the preset's regions and with one, as in docs/backbones.md.
COUNTS = {
    "fast32": (0.70, 0.169, 0.075),
    "rooms32": (1.39, 0.896, None),
    "fast64": (1.45, 0.745, 0.317),
    "uvit32": (2.29, 0.162, 0.105),
    "uvit64": (2.31, 0.771, 0.507),
    "uvit128": (2.46, 0.968, 0.543),
    "flowers64": (193.7, 122.3, 39.7),
    "flowers128": (152.4, 208.0, 66.4),
}
# The same in latents of photos of 128 pixels, 4 x 32 x 32.
LATENT_COUNTS = {"fast32": (0.70, 0.170, 0.0752), "uvit32": (2.29, 0.163, 0.106), "fast64": (1.45, 0.187, 0.0795)}
# Parameters in millions, and multiply-adds in 10^9 of encoder and decoder, by the side of the photo.
AUTOENCODER_COUNTS = {128: (0.405, 0.0232, 0.667), 256: (0.422, 0.0352, 0.712)}


def make_images(count=12):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("masks", ["auto", "mixture", "network"])
def test_uvit_run_trains_segments_generates_edits_and_reloads(tmp_path, masks):
    run = factorkit.train_segdiff(
        make_images(), out=tmp_path / "run", preset="demo", progress=False, masks=masks, device="cpu", **RUN
    )
    assert (tmp_path / "run/report.html").exists() and list((tmp_path / "run/samples").glob("*_generated.png"))
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 45, 3), np.uint8))
    segmented = run.segment(photo)
    assert segmented.labels.shape == (1, 30, 45)
    assert run.generate(2, steps=3).images.shape == (2, 3, 16, 16)
    assert run.recompose(make_images(1), 0, from_=make_images(2)[1:], steps=2).images.shape[-2:] == (16, 16)
    assert run.interpolate(make_images(1), make_images(2)[1:], frames=3, steps=2).images.shape[-2:] == (16, 16)
    path = run.save(tmp_path / "model.safetensors")
    again = factorkit.load(path, device="cpu")
    assert isinstance(again.config.patch_size, int) and np.array_equal(again.segment(photo).labels, segmented.labels)


@pytest.mark.slow
def test_uvit_hierarchy_and_classes_train(tmp_path):
    nested = factorkit.train_segdiff(
        make_images(),
        out=tmp_path / "nested",
        preset="demo",
        progress=False,
        device="cpu",
        **{**RUN, "regions": (2, 2)},
    )
    assert nested.generate(1, steps=2).masks.shape == (1, 4, 16, 16)
    classes = ["a", "b"] * 6
    run = factorkit.train_segdiff(
        make_images(), out=tmp_path / "classes", preset="demo", progress=False, device="cpu", classes=classes, **RUN
    )
    assert run.generate(2, steps=2, classes="all", guidance=2.0).classes == ["a", "b"]


def test_features_of_a_plain_uvit_are_those_of_its_blocks():
    config = preset_config("demo", **{**RUN, "regions": 1, "depth": 9, "device": "cpu"}).resolved()
    run = SegdiffRun(config, randomize_weights(config.build()), torch.device("cpu"), 0)
    assert pixel_features(run, make_images(2)).shape == (2, 3 * 16 * 2, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"patch_size": 3},
            r"patch_size=3 must divide resolution=16 into at least 2 patches a side; use one of 1, 2, 4, 8",
        ),
        ({"patch_size": 16}, r"patch_size=16 must divide resolution=16"),
        ({"patch_size": 0}, r"patch_size=0"),
        ({"resolution": 1, "patch_size": 1}, r"resolution of at least 2"),
        ({"depth": 4}, r"depth=4 must be an odd number of blocks, 3 or more"),
        ({"depth": 1}, r"depth=1 "),
        ({"model_channels": 20}, r"model_channels=20 must be divisible by 8"),
        ({"num_heads": 3}, r"num_heads=3"),
        ({"patch_size": 1, "masks": "network", "half_resolution_masks": True}, r"half_resolution_masks=False"),
        ({"channel_mult": (1, 2)}, r"channel_mult=\(1, 2\) belongs to backbone='unet'.*leave it out"),
        ({"num_res_blocks": 1}, r"num_res_blocks=1 belongs to backbone='unet'"),
        ({"attention_resolutions": ()}, r"attention_resolutions=\(\) belongs to backbone='unet'"),
        ({"form": "thesis"}, r"form='thesis' is a U-Net; give form='regional'"),
        ({"backbone": "vit"}, r"backbone='vit' is unknown; choose one of unet, uvit"),
        ({"backbone": "unet"}, r"depth=3 belongs to backbone='uvit'"),
    ],
)
def test_backbone_settings_that_do_not_fit_raise_with_the_cure(changes, message):
    with pytest.raises(ConfigError, match=message):
        SegdiffConfig(**{**UVIT, **changes}).resolved()


@pytest.mark.parametrize(("resolution", "patch"), [(8, 1), (32, 2), (40, 2), (64, 4), (128, 8)])
def test_patch_size_left_out_gives_sixteen_tokens_a_side(resolution, patch):
    config = SegdiffConfig(backbone="uvit", resolution=resolution, masks="network").resolved()
    assert config.patch_size == patch and config.half_resolution_masks == (patch % 2 == 0)
    assert config.resolved() == config


def test_preset_of_another_backbone_keeps_its_training_and_takes_the_sizes():
    config = preset_config("fast64", backbone="uvit", learning_rate=1e-5).resolved()
    sizes = preset_config("uvit64").resolved()
    assert (config.steps, config.learning_rate, config.resolution) == (1500, 1e-5, 64)
    assert (config.make_backbone(), config.size_multiple) == (sizes.make_backbone(), 4)
    back = preset_config("uvit32", backbone="unet").resolved()
    assert back.make_backbone() == preset_config("fast32").resolved().make_backbone()


def count(config):
    with torch.device("meta"):
        parameters = count_parameters(config.build())
    return parameters / 1e6, count_multiply_adds(config) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "counts"), COUNTS.items())
def test_parameters_and_multiply_adds_of_presets_are_those_of_the_docs(preset, counts):
    assert count(preset_config(preset, masks="network").resolved()) == pytest.approx(counts[:2], rel=1e-2)
    if counts[2]:
        plain = preset_config(preset, masks="network", regions=1).resolved()
        assert count(plain)[1] == pytest.approx(counts[2], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "counts"), LATENT_COUNTS.items())
def test_parameters_and_multiply_adds_of_networks_in_latents_are_those_of_the_docs(preset, counts):
    for regions, expected in ((2, counts[:2]), (1, counts[2:])):
        config = preset_config(preset, masks="network", resolution=128, regions=regions)
        assert count(add_autoencoder(config)[1].resolved())[-len(expected) :] == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "counts"), AUTOENCODER_COUNTS.items())
def test_parameters_and_multiply_adds_of_autoencoders_are_those_of_the_docs(side, counts):
    config = AutoencoderConfig.from_dict(add_autoencoder(preset_config("fast32", resolution=side))[0])
    found, small = [], side // config.downsample
    with torch.device("meta"), torch.no_grad():
        model = config.build()
        latents = torch.empty(1, config.latent_channels, small, small)
        for run, x in ((model.encode, torch.empty(1, 3, side, side)), (model.decode, latents)):
            with FlopCounterMode(display=False) as counter:
                run(x)
            found.append(counter.get_total_flops() / 2e9)
    assert (count_parameters(model) / 1e6, *found) == pytest.approx(counts, rel=1e-2)


def test_presets_without_counts_have_the_network_of_one_with_counts():
    def network(preset):
        config = preset_config(preset, masks="network").resolved()
        return config.make_backbone(), config.form, config.resolution, config.nesting

    assert {network(preset) for preset in PRESETS} == {network(preset) for preset in COUNTS}


@pytest.mark.slow
def test_cli_backbone_takes_the_sizes_of_a_transformer(capsys):
    arguments = ["--preset", "fast32", "--backbone", "uvit", "--patch-size", "4", "--dry-run", "--masks", "network"]
    assert main(["train", "segdiff", *arguments, "--json", "--device", "cpu", "--batch-size", "2"]) == 0
    config = preset_config("fast32", backbone="uvit", patch_size=4, masks="network").resolved()
    assert json.loads(capsys.readouterr().out)["parameters"] == count_parameters(config.build())
    assert main(["train", "segdiff", *arguments[:4], "--patch-size", "5", "--dry-run"]) != 0
    assert re.search(r"patch_size=5 must divide resolution=32", capsys.readouterr().err)
