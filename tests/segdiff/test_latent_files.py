"""Autoencoders in diffusers' format as files: what is read, and what is refused by file and key."""

from __future__ import annotations

import pytest
import torch

import factorkit
from factorkit.data import draw_flowers
from factorkit.segdiff.latents import open_autoencoder
from factorkit.utils.errors import CheckpointError
from tests.engine.trained import assert_identical
from tests.segdiff.test_latents import RUN, make_autoencoder, write_format


def test_open_autoencoder_reads_both_generations_of_names(tmp_path):
    expected = make_autoencoder()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    changes = {}
    for name, tensor in expected.state_dict().items():
        for new, former in old.items():
            if f".attentions.0.{new}." in name:
                changes |= {name: None, name.replace(new, former): tensor.clone()}
    assert len(changes) == 32
    for folder in (write_format(tmp_path / "new"), write_format(tmp_path / "old", **changes)):
        for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
            assert_identical(open_autoencoder(path).state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"_class_name": "VQModel"}, {}, r"is VQModel; latent= reads AutoencoderKL alone"),
        ({}, {"quantize__embedding__weight": torch.ones(3, 3)}, r"with a codebook \(VQ\)"),
        ({"act_fn": "relu"}, {}, r"act_fn='relu' in its config.json"),
        ({"block_out_channels": [8, 8]}, {}, r"config.json: block_out_channels=\[8, 8\], but .* have \[8, 8, 8\] chan"),
        ({"block_out_channels": 5}, {}, r"other/config.json: block_out_channels=5, but the levels of diffusion_pyt"),
        *(
            (
                {"norm_num_groups": groups},
                {},
                f"config.json: norm_num_groups={groups!r} must be an integer of at least 1",
            )
            for groups in (None, 0, "x", -4, True, 4.0)
        ),
        ({"norm_num_groups": 3}, {}, r"3 groups of a norm do not divide 8 channels"),
        ({}, {"decoder__conv_out__bias": None}, r"has no tensor decoder.conv_out.bias, of 1 that are missing"),
        ({}, {"decoder__more": torch.ones(1)}, r"has a tensor decoder.more, of 1 that the format does not have"),
        (
            {},
            {"encoder__conv_in__weight": torch.ones(8, 1, 3, 3)},
            r"conv_in.weight is \(8, 1, 3, 3\), and has to be \(8, 3",
        ),
        *(
            ({}, {name.replace(".", "__"): torch.tensor(1.0)}, rf"{name} is \(\), and has to be the weight of a conv")
            for name in (
                "encoder.conv_in.weight",
                "decoder.conv_in.weight",
                "decoder.up_blocks.1.resnets.0.conv1.weight",
            )
        ),
        *(
            (
                {},
                {"decoder__conv_out__bias": torch.tensor([0, 0, value])},
                r"damaged: decoder.conv_out.bias holds NaN or",
            )
            for value in (torch.nan, -torch.inf)
        ),
    ],
)
def test_open_autoencoder_of_another_architecture_raises(tmp_path, settings, changes, message):
    with pytest.raises(CheckpointError, match=message):
        open_autoencoder(write_format(tmp_path / "other", settings, **changes))


def test_open_autoencoder_config_that_is_no_object_raises(tmp_path):
    (write_format(tmp_path) / "config.json").write_text("[5]")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: it contains list"):
        open_autoencoder(tmp_path)


@pytest.mark.parametrize(("weight", "message"), [(1e30, "are not all finite numbers"), (0.0, "the same everywhere")])
def test_train_autoencoder_of_useless_latents_raises(tmp_path, weight, message):
    autoencoder = write_format(tmp_path / "ae", quant_conv__weight=torch.full((8, 8, 1, 1), weight))
    with pytest.raises(
        CheckpointError, match=f"latent='{autoencoder}': the latents of the training images .*{message}"
    ):
        factorkit.train_segdiff(draw_flowers(12, 32, seed=0)[0], out=tmp_path / "run", latent=autoencoder, **RUN)
    assert not (tmp_path / "run").exists()
