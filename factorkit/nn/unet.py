"""A U-Net over factorkit's ops: blocks, encoder, middle and decoder, with region masks where branches need them.

The plain DDPM (``regions=1`` of segdiff) is exactly encoder, middle and decoder in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.ops.projection import bias_is_separate

Layer = TypeVar("Layer", bound=nn.Module)
# Of attention on a CPU: forward and backward in bf16 take 7 times as long as in fp32 for 64 tokens (4 heads of 12
# channels), 1.6 times for 256, but .7 times for 1,024 tokens of 64 channels (one thread of an Intel Xeon with AMX).
MAX_TOKENS_FP32 = 256
# Of a linear layer there, in multiply-adds. Forward and backward of 32 rows of 64 channels to 96 take bf16 2.4 times as
# long as fp32, of 32 rows of 256 to 512 1.2 times, of 128 such rows .65 times.
MAX_PRODUCTS_FP32 = 1 << 22


def group_count(channels: int, max_groups: int) -> int:
    """Return the greatest number of groups up to ``max_groups`` that divides the channels, at least 4 in each."""
    return next(g for g in range(max(1, min(max_groups, channels // 4)), 0, -1) if channels % g == 0)


def zero_init(layer: Layer) -> Layer:
    """Set a layer to zero, so that its residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def sinusoid(t: Tensor, channels: int) -> Tensor:
    """Embed ``t`` [B] by cosines and sines of geometric frequencies (Vaswani et al. 2017): [B, C], C even."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Sequential):
    """sinusoid C → Linear 4C → SiLU → Linear 4C. Input t [B], output [B, 4C]."""

    def __init__(self, channels: int):
        super().__init__(nn.Linear(channels, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels))
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        """Embed times [B] in the precision of the weights."""
        return super().forward(sinusoid(t, self.channels).to(next(self.parameters()).dtype))


class LabelEmbedding(nn.Module):
    """A vector for each class, and one for "no label", which unlabelled and dropped labels share."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, channels)
        nn.init.normal_(self.table.weight, std=0.02)  # small beside the time embedding, so labels start as a hint

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels [B], int64, below 0 for none: [B, channels]."""
        return self.table(torch.where(labels < 0, self.num_classes, labels))


class Norm(nn.Module):
    """Affine normalisation of one of the kinds of :func:`factorkit.ops.group_norm_silu`."""

    def __init__(self, channels: int, max_groups: int, kind: str = "group"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups, self.kind = group_count(channels, max_groups), kind

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        masks: Tensor | None = None,
        activate: bool = True,
        input_bias: Tensor | None = None,
    ) -> Tensor:
        """Compute norm(x + input_bias) * (1 + scale) + shift, then SiLU if ``activate``."""
        return ops.group_norm_silu(
            x,
            self.weight,
            self.bias,
            scale,
            shift,
            groups=self.groups,
            norm=self.kind,
            masks=masks,
            activate=activate,
            input_bias=input_bias,
        )

    def with_inputs(
        self,
        u: Tensor,
        skip: Tensor | None = None,
        masks: Tensor | None = None,
        *modulation: Tensor,
        activate: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute the same of u, or of [u_k ; m_k * skip], and return u and the skip for what else reads them.

        See :func:`factorkit.ops.norm_silu_with_inputs`; ``modulation`` is scale and shift, or nothing.
        """
        affine = (self.weight, self.bias, *modulation)
        groups, kind = self.groups, self.kind
        return ops.norm_silu_with_inputs(u, skip, masks, *affine, groups=groups, norm=kind, activate=activate)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"{len(self.weight)}, groups={self.groups}, kind={self.kind!r}"


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a layer to rows x [N, C], under autocast on a CPU in fp32 where the products are few."""
    on_cpu = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not on_cpu or len(x) * layer.weight.numel() > MAX_PRODUCTS_FP32:
        return layer(x)
    with torch.autocast("cpu", enabled=False):
        return layer(x.to(layer.weight.dtype))


class ResBlock(nn.Module):
    """norm→SiLU→conv3 → norm·(1+scale)+shift→SiLU→dropout→conv3(zero), plus a shortcut.

    With ``skip_channels`` its input is [u ; skip], or [u_k ; m_k*skip] for every branch k when masks are given.
    """

    gathered_alone = True  # sharding: its weights are read in its own forward pass only

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embed: int,
        *,
        skip_channels: int = 0,
        norm_groups: int = 32,
        norm: str = "group",
        dropout: float = 0.0,
    ):
        super().__init__()
        total = channels + skip_channels
        self.norm1 = Norm(total, norm_groups, norm)
        self.conv1 = nn.Conv2d(total, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embed, 2 * out_channels)
        self.norm2 = Norm(out_channels, norm_groups, norm)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(total, out_channels, 1) if total != out_channels or skip_channels else nn.Identity()

    def forward(self, u: Tensor, embedding: Tensor, skip: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
        """U [B or B*K, C, H, W], embedding [rows of the output, E], skip [B, C_s, H, W], masks [B, K, H, W]."""
        h, u, skip = self.norm1.with_inputs(u, skip, masks)
        scale, shift = apply_linear(self.modulation, F.silu(embedding)).chunk(2, dim=1)
        separate = bias_is_separate(u)
        h = F.conv2d(h, self.conv1.weight, padding=1) if separate else self.conv1(h)
        h = self.dropout(self.norm2(h, scale, shift, masks=masks, input_bias=self.conv1.bias if separate else None))
        if skip is None:
            return self.shortcut(u) + self.conv2(h)
        weight, bias = cast(nn.Conv2d, self.shortcut).weight, cast(Tensor, self.shortcut.bias)
        residual = F.conv2d(h, self.conv2.weight, padding=1) if separate else self.conv2(h)
        bias = bias + cast(Tensor, self.conv2.bias) if separate else bias
        return ops.masked_skip_projection(u, skip, masks, weight, bias, residual)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(C)) v of each head: [N, heads, tokens, C].

    On a CPU, bf16 becomes fp32 where a gradient of few tokens is needed: PyTorch's backward pass is faster then.
    """
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    if not slow or q.shape[-2] > MAX_TOKENS_FP32:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(v.dtype)


class Attention(nn.Module):
    """Self-attention over all pixels, with a zero-initialised projection."""

    gathered_alone = True  # sharding: its weights are read in its own forward pass only

    def __init__(self, channels: int, *, num_heads: int = 4, norm_groups: int = 32, norm: str = "group"):
        super().__init__()
        self.num_heads = num_heads if channels % num_heads == 0 else 1
        self.norm = Norm(channels, norm_groups, norm)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Attend within x [N, C, H, W]; masks only for the norm."""
        n, c, height, width = x.shape
        h, x, _ = self.norm.with_inputs(x, None, masks, activate=False)
        qkv = self.qkv(h)
        # The layout is channels-last, so putting pixels before channels copies nothing, forward or backward.
        parts = qkv.permute(0, 2, 3, 1).reshape(n, height * width, 3, self.num_heads, c // self.num_heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        out = attend(q, k, v).transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)
        return x + self.project(out)


class Downsample(nn.Conv2d):
    """3x3 convolution with stride 2."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, padding=1)


class Upsample(nn.Conv2d):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Double height and width of x [N, C, H, W]."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, an attention behind each of them or none at all, and the resampling, if any."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.attention = nn.ModuleList(), nn.ModuleList()
        self.down: Downsample | None = None
        self.up: Upsample | None = None


class Encoder(nn.Module):
    """The first half of the U-Net.

    Args:
        channels: of the input image.
        model_channels: C; level i has C * channel_mult[i] channels at resolution / 2^i.
        channel_mult: one factor a level, finest first.
        num_res_blocks: residual blocks per level.
        attention_resolutions: resolutions (pixels a side) at which every block is followed by attention.
        resolution: pixels a side of the input.
        embed: length of the time embedding.
        num_heads: of the attention.
        norm_groups: upper bound of the groups of a norm.
        dropout: probability, in every block.
    """

    def __init__(
        self,
        channels: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        resolution: int,
        embed: int,
        *,
        num_heads: int = 4,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, model_channels, 3, padding=1)
        self.levels = nn.ModuleList()
        #: channels of each skip, in the order the encoder makes them; the decoder takes them from the end
        self.skip_channels = [model_channels]
        width = model_channels
        for i, factor in enumerate(channel_mult):
            level = Level()
            for _ in range(num_res_blocks):
                out = model_channels * factor
                level.blocks.append(ResBlock(width, out, embed, norm_groups=norm_groups, dropout=dropout))
                width = out
                if resolution >> i in attention_resolutions:
                    level.attention.append(Attention(width, num_heads=num_heads, norm_groups=norm_groups))
                self.skip_channels.append(width)
            if i < len(channel_mult) - 1:
                level.down = Downsample(width)
                self.skip_channels.append(width)
            self.levels.append(level)
        self.out_channels = width

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Return the features of conv_in, every block and every downsampling, finest first."""
        h = self.conv_in(x)
        skips = [h]
        for level in cast(Iterable[Level], self.levels):
            for i, block in enumerate(level.blocks):
                h = block(h, embedding)
                if level.attention:
                    h = level.attention[i](h)
                skips.append(h)
            if level.down is not None:
                h = level.down(h)
                skips.append(h)
        return skips


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the coarsest resolution."""

    def __init__(self, channels: int, embed: int, *, num_heads: int = 4, norm_groups: int = 32, dropout: float = 0.0):
        super().__init__()
        self.block1 = ResBlock(channels, channels, embed, norm_groups=norm_groups, dropout=dropout)
        self.attention = Attention(channels, num_heads=num_heads, norm_groups=norm_groups)
        self.block2 = ResBlock(channels, channels, embed, norm_groups=norm_groups, dropout=dropout)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Transform h [B, C, h, w] with the embedding [B, E]."""
        return self.block2(self.attention(self.block1(h, embedding)), embedding)


class Decoder(nn.Module):
    """The second half of the U-Net, one more block per level than the encoder; K branches at once if masks are given.

    The arguments are the encoder's, except for those below. A decoder over ``channel_mult[1:]`` stops at half the
    resolution.

    channels: of h_mid; skip_channels: as the encoder lists them; out_channels and resolution: of the output; norm:
    ``"group"`` | ``"masked_group"`` | ``"pixel"``, of all norms of this decoder.
    """

    def __init__(
        self,
        channels: int,
        skip_channels: Sequence[int],
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        resolution: int,
        embed: int,
        out_channels: int,
        *,
        num_heads: int = 4,
        norm_groups: int = 32,
        norm: str = "group",
        dropout: float = 0.0,
    ):
        super().__init__()
        remaining = list(skip_channels)
        self.levels = nn.ModuleList()
        width = channels
        block = partial(ResBlock, norm_groups=norm_groups, norm=norm, dropout=dropout)
        for i in reversed(range(len(channel_mult))):
            level = Level()
            for _ in range(num_res_blocks + 1):
                out = model_channels * channel_mult[i]
                level.blocks.append(block(width, out, embed, skip_channels=remaining.pop()))
                width = out
                if resolution >> i in attention_resolutions:
                    level.attention.append(Attention(width, num_heads=num_heads, norm_groups=norm_groups, norm=norm))
            if i > 0:
                level.up = Upsample(width)
            self.levels.append(level)
        self.norm_out = Norm(width, norm_groups, norm)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(
        self, h: Tensor, skips: Sequence[Tensor], embedding: Tensor, pyramid: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Decode features to [B, out, H, W], or [B*K, out, H, W] with masks.

        Args:
            h: h_mid [B, C, h, w], shared by all branches, or [B*K, C, h, w].
            skips: the encoder's features, finest first, without masks applied.
            embedding: [B, E], or [B*K, E] with masks.
            pyramid: the masks [B, K, H/2^i, W/2^i] of every level i, finest first; None for a plain decoder.
        """
        remaining = list(skips)
        levels = [None] * len(self.levels) if pyramid is None else list(pyramid)
        for level in cast(Iterable[Level], self.levels):
            masks = levels.pop()
            for i, block in enumerate(level.blocks):
                h = block(h, embedding, remaining.pop(), masks)
                if level.attention:
                    h = level.attention[i](h, masks)
            if level.up is not None:
                h = level.up(h)
        return self.conv_out(self.norm_out(h, masks=masks))
