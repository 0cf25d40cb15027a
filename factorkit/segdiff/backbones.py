"""The networks inside a segdiff model, one class each; nothing else knows them by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.nn.unet import Decoder, Encoder, Middle, TimeEmbedding
from factorkit.nn.uvit import TokenDecoder, TokenEncoder, TokenMaskHead, TransformerBlock
from factorkit.segdiff.masks.network import NetworkMasks
from factorkit.utils.errors import ConfigError

IMAGE_CHANNELS = 3
TOKENS_PER_SIDE = 16  # where patch_size= is left out; a few more if 16 does not divide the resolution


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The sizes of a network, and how its parts are built: encoder, middle, and decoders that read both.

    Encoders map (x [B, image_channels, H, W], embedding [B, E]) to a list of features, middles (the last of them,
    embedding) to h_mid, and decoders (h_mid, features, embedding, masks of :meth:`mask_pyramid`) to an image; see
    :class:`factorkit.nn.unet.Decoder`.
    """

    resolution: int
    model_channels: int
    num_heads: int
    norm_groups: int
    dropout: float
    image_channels: int = IMAGE_CHANNELS

    #: settings of this backbone alone
    OWN: ClassVar[tuple[str, ...]]
    #: norm of all parts but the branches
    NORM: ClassVar[str]

    @classmethod
    def defaults(cls, resolution: int, patch_size: int | None) -> dict[str, Any]:
        """Return settings for where they are left out."""
        return {}

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every part."""
        return {"num_heads": self.num_heads, "norm_groups": self.norm_groups, "dropout": self.dropout}

    @property
    def size_multiple(self) -> int:
        """What height and width of an image must be divisible by."""
        raise NotImplementedError

    @property
    def embed(self) -> int:
        """Length of the time embedding."""
        raise NotImplementedError

    @property
    def region_channels(self) -> int:
        """Channels of the local feature behind the region tokens."""
        raise NotImplementedError

    def counts(self) -> dict[str, int]:
        """Return numbers that no model has more of than weights."""
        raise NotImplementedError

    def check(self, regions: int, half_resolution_masks: bool, latent_factor: int) -> None:
        """Raise ConfigError for sizes that cannot be built; it names the resolution of the photos, a factor larger."""
        raise NotImplementedError

    def describe_side(self, latent_factor: int) -> str:
        """Return the resolution of the photos and, if it is another, the network's own."""
        place = f", in latents of {self.resolution} pixels," if latent_factor > 1 else ""
        return f"resolution={self.resolution * latent_factor}{place}"

    def build_time(self) -> TimeEmbedding:
        """Build the embedding of time steps."""
        return TimeEmbedding(self.embed // 4)

    def build_encoder(self) -> Encoder | TokenEncoder:
        """Build the encoder."""
        raise NotImplementedError

    def build_middle(self) -> nn.Module:
        """Build the middle."""
        raise NotImplementedError

    def build_decoder(self, out_channels: int, extra: int = 0, norm: str | None = None) -> nn.Module:
        """Build a decoder to images.

        Args:
            out_channels: of its output.
            extra: channels by which h_mid and all skips are wider than the encoder makes them.
            norm: of all its norms; None: that of the encoder.
        """
        raise NotImplementedError

    def build_masks(self, regions: int, normalised_logits: bool, half_resolution_masks: bool) -> NetworkMasks:
        """Build what predicts masks from the encoding."""
        raise NotImplementedError

    def mask_pyramid(self, masks: Tensor) -> list[Tensor]:
        """Return masks [B, K, H, W] at the resolutions of a decoder, the finest first."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class UNetBackbone(Backbone):
    """The U-Net of the thesis."""

    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]

    OWN = ("channel_mult", "num_res_blocks", "attention_resolutions")
    NORM = "group"

    @property
    def size_multiple(self) -> int:
        """What height and width must be divisible by."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def embed(self) -> int:
        """Length of the time embedding."""
        return 4 * self.model_channels

    @property
    def region_channels(self) -> int:
        """Channels of the local feature behind the region tokens."""
        return 2 * self.model_channels

    def counts(self) -> dict[str, int]:
        """Return numbers that no model has more of than weights."""
        channels = self.model_channels * max(self.channel_mult)
        return {"blocks": self.num_res_blocks, "levels": len(self.channel_mult), "channels": channels}

    def check(self, regions: int, half_resolution_masks: bool, latent_factor: int) -> None:
        """Raise ConfigError for sizes that cannot be built."""
        halvings = len(self.channel_mult) - 1
        if self.resolution < 1 or self.resolution % 2**halvings:
            nearest = max(1, round(self.resolution / 2**halvings)) * 2**halvings
            raise ConfigError(
                f"{self.describe_side(latent_factor)} cannot be halved {halvings} times, as {len(self.channel_mult)} "
                f"levels require; use resolution={nearest * latent_factor}, or give channel_mult fewer numbers"
            )
        if regions > 1 and half_resolution_masks and not halvings:
            raise ConfigError(
                "half_resolution_masks needs a U-Net of at least two levels; give channel_mult more numbers"
            )

    def build_encoder(self) -> Encoder:
        """Build the encoder."""
        return Encoder(
            self.image_channels,
            self.model_channels,
            self.channel_mult,
            self.num_res_blocks,
            self.attention_resolutions,
            self.resolution,
            self.embed,
            **self.common,
        )

    def build_middle(self) -> Middle:
        """Build the middle."""
        return Middle(self.model_channels * self.channel_mult[-1], self.embed, **self.common)

    def build_decoder(
        self, out_channels: int, extra: int = 0, norm: str | None = None, levels_left_out: int = 0
    ) -> Decoder:
        """Build a decoder to images."""
        encoder_skips = [self.model_channels]
        for factor in self.channel_mult:
            encoder_skips += [self.model_channels * factor] * (self.num_res_blocks + 1)
        skips = encoder_skips[
            levels_left_out * (self.num_res_blocks + 1) : -1
        ]  # the coarsest level has no downsampling
        return Decoder(
            self.model_channels * self.channel_mult[-1] + extra,
            [channels + extra for channels in skips],
            self.model_channels,
            self.channel_mult[levels_left_out:],
            self.num_res_blocks,
            self.attention_resolutions,
            self.resolution >> levels_left_out,
            self.embed,
            out_channels,
            norm=norm or self.NORM,
            **self.common,
        )

    def build_masks(self, regions: int, normalised_logits: bool, half_resolution_masks: bool) -> NetworkMasks:
        """Build what predicts masks from the encoding."""
        left_out = int(half_resolution_masks)
        decoder = self.build_decoder(regions, levels_left_out=left_out)
        return NetworkMasks(decoder, normalised_logits, left_out * (self.num_res_blocks + 1), 1 + left_out)

    def mask_pyramid(self, masks: Tensor) -> list[Tensor]:
        """Return masks [B, K, H, W] at the resolutions of a decoder, the finest first."""
        return ops.mask_pyramid(masks, len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class UViTBackbone(Backbone):
    """A transformer with long skips (:mod:`factorkit.nn.uvit`)."""

    depth: int
    patch_size: int

    OWN = ("depth", "patch_size")
    NORM = "pixel"

    @classmethod
    def defaults(cls, resolution: int, patch_size: int | None) -> dict[str, Any]:
        """Return the settings that follow from the resolution."""
        if patch_size is None:
            sizes = range(1, max(2, resolution // TOKENS_PER_SIDE + 1))
            patch_size = max(size for size in sizes if resolution % size == 0)
        odd = {"half_resolution_masks": False} if patch_size % 2 else {}
        return {"depth": 13, "patch_size": patch_size, **odd}  # the depth of U-ViT-S

    @property
    def size_multiple(self) -> int:
        """What height and width must be divisible by."""
        return self.patch_size

    @property
    def embed(self) -> int:
        """Length of the time embedding."""
        return self.model_channels

    @property
    def region_channels(self) -> int:
        """Channels of the local feature behind the region tokens."""
        return self.model_channels // 4

    def counts(self) -> dict[str, int]:
        """Return numbers that no model has more of than weights."""
        return {"depth": self.depth, "channels": self.model_channels, "patch_size": self.patch_size}

    def check(self, regions: int, half_resolution_masks: bool, latent_factor: int) -> None:
        """Raise ConfigError for sizes that cannot be built."""
        patch, heads = self.patch_size, self.num_heads
        if patch < 1 or self.resolution % patch or self.resolution < 2 * patch:
            fitting = [size for size in range(1, self.resolution // 2 + 1) if self.resolution % size == 0]
            raise ConfigError(
                f"patch_size={patch} must divide {self.describe_side(latent_factor)} into at least 2 patches a side; "
                f"use one of {', '.join(map(str, fitting)) or 'none: a resolution of at least 2'}"
            )
        if self.depth < 3 or self.depth % 2 == 0:
            raise ConfigError(
                f"depth={self.depth} must be an odd number of blocks, 3 or more: two equal halves and a middle"
            )
        if self.model_channels % 8 or self.model_channels % heads:
            raise ConfigError(
                f"model_channels={self.model_channels} must be divisible by 8, and by num_heads={heads}, which share it"
            )
        if regions > 1 and half_resolution_masks and patch % 2:
            raise ConfigError(
                f"half_resolution_masks needs an even patch_size, not {patch}; give half_resolution_masks=False"
            )

    def build_encoder(self) -> TokenEncoder:
        """Build the encoder."""
        return TokenEncoder(
            self.image_channels,
            self.model_channels,
            self.depth // 2,
            self.patch_size,
            (self.resolution, self.resolution),
            self.embed,
            **self.common,
        )

    def build_middle(self) -> TransformerBlock:
        """Build the middle."""
        return TransformerBlock(self.model_channels, self.embed, **self.common)

    def build_decoder(self, out_channels: int, extra: int = 0, norm: str | None = None) -> TokenDecoder:
        """Build a decoder to images."""
        channels = self.model_channels + extra
        return TokenDecoder(
            channels,
            [channels] * (self.depth // 2),
            self.model_channels,
            self.patch_size,
            self.embed,
            out_channels,
            norm=norm or self.NORM,
            **self.common,
        )

    def build_masks(self, regions: int, normalised_logits: bool, half_resolution_masks: bool) -> NetworkMasks:
        """Build what predicts masks from the encoding."""
        upsample = 1 + int(half_resolution_masks)
        head = TokenMaskHead(self.model_channels, regions, self.patch_size // upsample, norm_groups=self.norm_groups)
        return NetworkMasks(head, normalised_logits, upsample=upsample)

    def mask_pyramid(self, masks: Tensor) -> list[Tensor]:
        """Return masks [B, K, H, W] at the resolutions of a decoder, the finest first."""
        return [F.avg_pool2d(masks, self.patch_size) if self.patch_size > 1 else masks]


BACKBONES: dict[str, type[Backbone]] = {"unet": UNetBackbone, "uvit": UViTBackbone}


def make_backbone(name: str, settings: Mapping[str, Any]) -> Backbone:
    """Return the backbone of this name with its sizes from ``settings``; others in them are not read.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in BACKBONES:
        raise ConfigError(f"backbone={name!r} is unknown; choose one of {', '.join(BACKBONES)}")
    kind = BACKBONES[name]
    return kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind) if field.name in settings})
