"""The autoencoder's parts: latents, the KL divergence, and sizes read from stored tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from factorkit.nn.autoencoder import (
    Autoencoder,
    AutoencoderSizes,
    enlarge_copy,
    kl_divergence,
    small_copy,
    squares_to_channels,
)
from factorkit.utils.errors import DataError

SIZES = AutoencoderSizes(
    channels=(4, 8, 8), encoder_channels=(4, 6, 8), num_res_blocks=2, latent_channels=3, norm_groups=2
)


def test_kl_divergence_equals_its_integral():
    mean, log_variance = torch.tensor([[0.0, 1.0, -0.5]]).double(), torch.tensor([[0.0, -1.0, 0.7]]).double()
    x = torch.linspace(-12, 12, 24001, dtype=torch.float64)[:, None]
    deviation = (log_variance / 2).exp()
    log_q = -(((x - mean) / deviation).square() / 2) - deviation.log()
    integrand = log_q.exp() * (log_q + x.square() / 2) / (2 * torch.pi) ** 0.5
    torch.testing.assert_close(kl_divergence(mean, log_variance)[0], torch.trapezoid(integrand, x, dim=0).mean())
    assert kl_divergence(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)).item() == 0


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("quant_conv", [False, True])
def test_sizes_from_shapes_of_a_state_equal_those_it_was_built_with(attention, quant_conv):
    sizes = AutoencoderSizes(
        **{**vars(SIZES), "attention": attention, "quant_conv": quant_conv, "post_quant_conv": not quant_conv}
    )
    model = Autoencoder(sizes)
    assert AutoencoderSizes.from_shapes({k: v.shape for k, v in model.state_dict().items()}, 2) == sizes
    output, mean, log_variance = model(torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 2, 3))
    assert output.shape == (1, 3, 8, 12) and mean.shape == log_variance.shape == (1, 3, 2, 3)
    assert sizes.downsample == 4


def test_squares_to_channels_equal_pixel_unshuffle_in_channels_last_memory():
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.rand(2, 3, 8, 12).to(memory_format=layout)
        squares = squares_to_channels(images, 4)
        assert squares.equal(F.pixel_unshuffle(images, 4)) and squares.is_contiguous(memory_format=torch.channels_last)


def test_names_of_tensors_are_those_of_diffusers():
    names = set(Autoencoder(AutoencoderSizes(**{**vars(SIZES), "attention": True})).state_dict())
    assert {
        "encoder.conv_in.weight",
        "encoder.down_blocks.0.resnets.1.norm2.bias",
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        "encoder.down_blocks.1.downsamplers.0.conv.weight",
        "encoder.mid_block.attentions.0.group_norm.weight",
        "encoder.mid_block.attentions.0.to_out.0.bias",
        "encoder.mid_block.resnets.1.conv1.weight",
        "encoder.conv_norm_out.weight",
        "quant_conv.weight",
        "post_quant_conv.bias",
        "decoder.up_blocks.0.resnets.2.conv1.weight",
        "decoder.up_blocks.1.upsamplers.0.conv.bias",
        "decoder.conv_out.weight",
    } <= names
    assert not {name for name in names if name.startswith(("encoder.down_blocks.2.down", "decoder.up_blocks.2.up"))}


def test_encode_sides_that_the_factor_does_not_divide_raise():
    with pytest.raises(DataError, match=r"images of 10 x 8 pixels: both sides must be divisible by 4"):
        Autoencoder(SIZES).encode(torch.zeros(1, 3, 8, 10))


@pytest.mark.parametrize(("quant_conv", "patch_size"), [(False, 1), (True, 1), (True, 2)])
def test_shortcuts_of_an_untrained_autoencoder_give_the_small_copy_and_that_copy_enlarged(quant_conv, patch_size):
    changes = {"latent_channels": 4, "shortcuts": True, "quant_conv": quant_conv, "patch_size": patch_size}
    sizes = AutoencoderSizes(**{**vars(SIZES), **changes})
    images = torch.rand(2, 3, 8 * patch_size, 12 * patch_size)
    model, small = Autoencoder(sizes), small_copy(images, 4 * patch_size)
    assert AutoencoderSizes.from_shapes({k: v.shape for k, v in model.state_dict().items()}, 2) == sizes
    mean, log_variance = model.encode(images)
    torch.testing.assert_close(mean, torch.cat([small, torch.zeros(2, 1, 2, 3)], 1))
    assert log_variance.unique().tolist() == [-10.0]
    torch.testing.assert_close(model.decode(mean), enlarge_copy(small, 4 * patch_size))
    model.decode(mean + torch.randn_like(mean)).square().sum().backward()
    assert model.decoder.conv_out.weight.grad.abs().max() > 0


def test_patches_of_pixels_keep_their_places():
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderSizes(**{**vars(SIZES), "patch_size": 2})).double()
    images, latents = torch.zeros(1, 3, 64, 64).double(), torch.zeros(1, 3, 8, 8).double()
    changed, other = images.clone(), latents.clone()
    changed[..., 8:16, 48:56] = 1  # latent (1, 6)
    other[..., 1, 6] = 1
    for moved in (model.encode(changed)[0] - model.encode(images)[0], model.decode(other) - model.decode(latents)):
        energy = F.adaptive_avg_pool2d(moved.square().sum(1), 2)[0]
        assert energy[0, 1] > 2 * energy.flatten()[[0, 2, 3]].max()
