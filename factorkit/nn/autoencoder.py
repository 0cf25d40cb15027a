"""A KL-regularised autoencoder of images (Rombach et al. 2022), with the tensor names of diffusers' AutoencoderKL.

Those trained here add shortcuts without weights, as those of Chen et al. (2024, DC-AE): the latents start as the image
made small and the output as that copy enlarged, and the network learns what they lack. Their convolutions work on
squares of pixels as channels: convolutions at all pixels took most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nn.unet import zero_init
from factorkit.utils.errors import DataError

IMAGE_CHANNELS = 3
EPS = 1e-6  # of the format's norms
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0  # of a latent
_LEVELS = "encoder.down_blocks", "decoder.up_blocks"
FIRST_LOG_VARIANCE = -10.0  # of latents with shortcuts; more noise hides what the others learn, and KL empties them


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes:
    """The sizes of an autoencoder.

    Attributes:
        channels: of each level of the decoder, that of the image first; each further level halves the sides.
        encoder_channels: of those of the encoder.
        num_res_blocks: residual blocks of a level of the encoder; the decoder has one more.
        latent_channels: of the latents.
        norm_groups: of all GroupNorms.
        attention: whether the middle of encoder and decoder has self-attention.
        quant_conv: whether a 1x1 convolution follows the encoder.
        post_quant_conv: whether a 1x1 convolution precedes the decoder.
        shortcuts: whether the first three latents and the output are residuals; that takes three latent channels.
        patch_size: side in pixels of the squares that are the channels of the first and the last convolution.
    """

    channels: tuple[int, ...]
    encoder_channels: tuple[int, ...]
    num_res_blocks: int
    latent_channels: int
    norm_groups: int
    attention: bool = False
    quant_conv: bool = True
    post_quant_conv: bool = True
    shortcuts: bool = False
    patch_size: int = 1

    @property
    def downsample(self) -> int:
        """The factor by which the sides of latents are smaller."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], norm_groups: int) -> AutoencoderSizes:
        """Return the sizes of stored tensors by their shapes, which do not tell the groups of norms.

        Raises:
            KeyError: a tensor is missing.
            ValueError: a tensor is no weight of a convolution.
        """

        def channels(name: str, axis: int = 0) -> int:
            shape = tuple(shapes[name])
            if len(shape) != 4 or min(shape) < 1:
                raise ValueError(f"{name} is {shape}, and has to be the weight of a convolution")
            return shape[axis]

        levels = range(_count(shapes, "encoder.down_blocks"))
        down, up = ([f"{blocks}.{i}.resnets.0.conv1.weight" for i in levels] for blocks in _LEVELS)
        return cls(
            channels=tuple(channels(name) for name in reversed(up)),
            encoder_channels=tuple(channels(name) for name in down),
            num_res_blocks=_count(shapes, "encoder.down_blocks.0.resnets"),
            latent_channels=channels("decoder.conv_in.weight", 1),
            norm_groups=norm_groups,
            attention=_count(shapes, "encoder.mid_block.attentions") > 0,
            quant_conv="quant_conv.weight" in shapes,
            post_quant_conv="post_quant_conv.weight" in shapes,
            shortcuts="shortcuts" in shapes,
            patch_size=max(1, math.isqrt(channels("encoder.conv_in.weight", 1) // IMAGE_CHANNELS)),
        )


def _count(names: Mapping[str, object], prefix: str) -> int:
    """Return the number of parts ``prefix.0``, ``prefix.1`` ... that have tensors."""
    return len({name[len(prefix) + 1 :].split(".")[0] for name in names if name.startswith(f"{prefix}.")})


class Autoencoder(nn.Module):
    """Encoder to a Gaussian over latents, and decoder to images.

    Images are [B, 3, H, W] in [-1, 1], latents [B, C, H / f, W / f]; f divides both sides.
    """

    def __init__(self, sizes: AutoencoderSizes):
        super().__init__()
        self.sizes = sizes
        latents = sizes.latent_channels
        self.encoder, self.decoder = _Encoder(sizes), _Decoder(sizes)
        self.quant_conv = nn.Conv2d(2 * latents, 2 * latents, 1) if sizes.quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if sizes.post_quant_conv else None
        if sizes.shortcuts:
            self.register_buffer("shortcuts", torch.ones(()))  # marks stored weights that need them
            zero_init(self.decoder.conv_out)
            last = zero_init(self.encoder.conv_out if self.quant_conv is None else self.quant_conv)
            last.get_parameter("bias").data[latents:] = FIRST_LOG_VARIANCE

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images decoded from latents drawn with ``noise`` [B, C, h, w], and the latents' mean, log variance."""
        mean, log_variance = self.encode(images)
        return self.decode(mean + (log_variance / 2).exp() * noise), mean, log_variance

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the latents.

        Raises:
            DataError: a side that the factor does not divide.
        """
        height, width, factor = *images.shape[2:], self.sizes.downsample
        if height % factor or width % factor:
            raise DataError(f"images of {width} x {height} pixels: both sides must be divisible by {factor}")
        moments = self.encoder(squares_to_channels(images, self.sizes.patch_size))
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, 1)
        if self.sizes.shortcuts:
            mean = mean + F.pad(small_copy(images, factor), (0, 0, 0, 0, 0, mean.shape[1] - IMAGE_CHANNELS))
        return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def decode(self, latents: Tensor) -> Tensor:
        """Return the images, not clipped."""
        hidden = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        images = F.pixel_shuffle(self.decoder(hidden).float(), self.sizes.patch_size)
        if self.sizes.shortcuts:
            images = images + enlarge_copy(latents[:, :IMAGE_CHANNELS].float(), self.sizes.downsample)
        return images


def squares_to_channels(images: Tensor, side: int) -> Tensor:
    """Return F.pixel_unshuffle(images, side) of images [B, C, H, W], but in channels_last memory, by one copy."""
    squares = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, C, h, side, w, side]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).permute(0, 3, 1, 2)


def small_copy(images: Tensor, factor: int) -> Tensor:
    """Return images [B, 3, H, W] averaged over squares of ``factor`` pixels."""
    return F.avg_pool2d(images, factor)


def enlarge_copy(images: Tensor, factor: int) -> Tensor:
    """Return images [B, 3, h, w] interpolated to sides ``factor`` times as long."""
    return F.interpolate(images, scale_factor=float(factor), mode="bicubic", align_corners=False)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, variance) || N(0, 1)) of each latent in nats, averaged over an image's latents: [B]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)


class _Encoder(nn.Module):
    """From images to mean and log variance, [B, 2 C, h, w]."""

    def __init__(self, sizes: AutoencoderSizes):
        super().__init__()
        channels, groups = sizes.encoder_channels, sizes.norm_groups
        self.conv_in = nn.Conv2d(IMAGE_CHANNELS * sizes.patch_size**2, channels[0], 3, padding=1)
        pairs = list(pairwise((channels[0], *channels)))
        self.down_blocks = nn.ModuleList(
            _DownBlock(a, b, sizes.num_res_blocks, groups, downsample=i + 1 < len(pairs))
            for i, (a, b) in enumerate(pairs)
        )
        self.mid_block = _Middle(channels[-1], groups, sizes.attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * sizes.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    """From latents to images."""

    def __init__(self, sizes: AutoencoderSizes):
        super().__init__()
        channels, groups = sizes.channels[::-1], sizes.norm_groups
        self.conv_in = nn.Conv2d(sizes.latent_channels, channels[0], 3, padding=1)
        self.mid_block = _Middle(channels[0], groups, sizes.attention)
        pairs = list(pairwise((channels[0], *channels)))
        self.up_blocks = nn.ModuleList(
            _UpBlock(a, b, sizes.num_res_blocks + 1, groups, upsample=i + 1 < len(pairs))
            for i, (a, b) in enumerate(pairs)
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], IMAGE_CHANNELS * sizes.patch_size**2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _ResnetBlock(nn.Module):
    """norm → SiLU → conv3 → norm → SiLU → conv3, plus a shortcut."""

    gathered_alone = True  # sharding: its weights are read in its own forward pass only

    def __init__(self, channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPS)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _Attention(nn.Module):
    """Self-attention of one head over all positions, plus its input."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).mT
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](h).mT.reshape(x.shape)


class _Middle(nn.Module):
    """Two residual blocks, with attention between them if the format has it."""

    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_ResnetBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList(_Attention(channels, groups) for _ in range(attention))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _DownBlock(nn.Module):
    """Residual blocks, then a convolution of stride 2 with one more row and column of zeros below and to the right."""

    def __init__(self, channels: int, out_channels: int, count: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            _ResnetBlock(channels if i == 0 else out_channels, out_channels, groups) for i in range(count)
        )
        self.downsamplers = nn.ModuleList(_Convolution(out_channels, stride=2) for _ in range(downsample))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for downsampler in self.downsamplers:
            x = downsampler(F.pad(x, (0, 1, 0, 1)))
        return x


class _UpBlock(nn.Module):
    """Residual blocks, then nearest neighbours of twice the sides and a convolution."""

    def __init__(self, channels: int, out_channels: int, count: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            _ResnetBlock(channels if i == 0 else out_channels, out_channels, groups) for i in range(count)
        )
        self.upsamplers = nn.ModuleList(_Convolution(out_channels, padding=1) for _ in range(upsample))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for upsampler in self.upsamplers:
            x = upsampler(F.interpolate(x, scale_factor=2.0))
        return x


class _Convolution(nn.Module):
    """A 3x3 convolution under the name ``conv``."""

    def __init__(self, channels: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)
