"""A file in diffusers' AutoencoderKL format against that architecture, written here from its published description."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from factorkit.segdiff.latents import open_autoencoder

CHANNELS, BLOCKS, LATENTS, GROUPS, EPS = (8, 16, 24), 2, 3, 4, 1e-6
SMALL = 0.02  # of what a norm reads, so that its eps counts


class Architecture:
    """The forward passes; a tensor is drawn where it is first read, so that they also define names and shapes."""

    def __init__(self, attention: bool, quant_conv: bool):
        self.attention, self.quant_conv, self.tensors = attention, quant_conv, {}
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, name, mean, deviation, *shape):
        if name not in self.tensors:
            self.tensors[name] = mean + deviation * torch.randn(shape, generator=self.generator)
        return self.tensors[name].double()

    def weights(self, name, gain, *shape):
        weight = self.draw(f"{name}.weight", 0, gain / math.sqrt(math.prod(shape[1:])), *shape)
        return weight, self.draw(f"{name}.bias", 0, SMALL, shape[0])

    def conv(self, name, x, channels, side=3, gain=SMALL, **options):
        options = {"padding": side // 2} | options
        return F.conv2d(x, *self.weights(name, gain, channels, x.shape[1], side, side), **options)

    def norm(self, name, x):
        weight, bias = (
            self.draw(f"{name}.{part}", mean, 0.3, x.shape[1]) for part, mean in (("weight", 1), ("bias", 0))
        )
        return F.group_norm(x, GROUPS, weight, bias, EPS)

    def resnet(self, name, x, channels):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), channels)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), channels)
        return h + (x if x.shape[1] == channels else self.conv(f"{name}.conv_shortcut", x, channels, 1, gain=1))

    def attend(self, name, x):
        """Self-attention of one head over all positions."""
        channels = x.shape[1]
        tokens = self.norm(f"{name}.group_norm", x).flatten(2).transpose(1, 2)
        q, k, v = (
            F.linear(tokens, *self.weights(f"{name}.{part}", gain, channels, channels))
            for part, gain in (("to_q", 2), ("to_k", 2), ("to_v", 1))
        )
        mixed = (q @ k.transpose(1, 2) / math.sqrt(channels)).softmax(2) @ v
        mixed = F.linear(mixed, *self.weights(f"{name}.to_out.0", SMALL, channels, channels))
        return x + mixed.transpose(1, 2).reshape(x.shape)

    def middle(self, name, x):
        x = self.resnet(f"{name}.resnets.0", x, CHANNELS[-1])
        x = self.attend(f"{name}.attentions.0", x) if self.attention else x
        return self.resnet(f"{name}.resnets.1", x, CHANNELS[-1])

    def last(self, name, x, channels):
        return self.conv(f"{name}.conv_out", F.silu(self.norm(f"{name}.conv_norm_out", x)), channels, gain=1)

    def encode(self, images):
        """Return the latents' mean."""
        x = self.conv("encoder.conv_in", images, CHANNELS[0])
        for level, channels in enumerate(CHANNELS):
            name = f"encoder.down_blocks.{level}"
            for i in range(BLOCKS):
                x = self.resnet(f"{name}.resnets.{i}", x, channels)
            if channels != CHANNELS[-1]:
                x = F.pad(x, (0, 1, 0, 1))  # one column on the right and one row below
                x = self.conv(f"{name}.downsamplers.0.conv", x, channels, gain=1, stride=2, padding=0)
        x = self.last("encoder", self.middle("encoder.mid_block", x), 2 * LATENTS)
        x = self.conv("quant_conv", x, 2 * LATENTS, 1, gain=1) if self.quant_conv else x
        return x[:, :LATENTS]

    def decode(self, x):
        """Return the images."""
        x = self.conv("post_quant_conv", x, LATENTS, 1, gain=1) if self.quant_conv else x
        x = self.middle("decoder.mid_block", self.conv("decoder.conv_in", x, CHANNELS[-1]))
        for level, channels in enumerate(CHANNELS[::-1]):
            name = f"decoder.up_blocks.{level}"
            for i in range(BLOCKS + 1):
                x = self.resnet(f"{name}.resnets.{i}", x, channels)
            if channels != CHANNELS[0]:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"{name}.upsamplers.0.conv", x, channels, gain=1)
        return self.last("decoder", x, 3)


@pytest.mark.parametrize(("attention", "quant_conv"), [(True, True), (False, False)])
@torch.no_grad()
def test_autoencoder_of_the_format_encodes_and_decodes_as_its_architecture(tmp_path, attention, quant_conv):
    architecture = Architecture(attention, quant_conv)
    torch.manual_seed(0)
    images, latents = torch.randn(2, 3, 16, 24).double(), torch.randn(2, LATENTS, 4, 6).double()
    mean, decoded = architecture.encode(images), architecture.decode(latents)
    save_file(architecture.tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", "norm_num_groups": GROUPS, "block_out_channels": CHANNELS}
    (tmp_path / "config.json").write_text(json.dumps({**config, "act_fn": "silu", "layers_per_block": BLOCKS}))
    autoencoder = open_autoencoder(tmp_path).double()
    for value, expected in ((autoencoder.encode(images)[0], mean), (autoencoder.decode(latents), decoded)):
        assert value.shape == expected.shape
        assert (value - expected).norm() < 1e-6 * expected.norm()
