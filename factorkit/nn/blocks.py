"""Residual block, attention and resampling; each takes region masks where a branch decoder needs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops


def group_count(channels: int, most: int) -> int:
    """The greatest number of groups up to ``most`` that divides the channels and leaves at least 4 in each."""
    return next(g for g in range(max(1, min(most, channels // 4)), 0, -1) if channels % g == 0)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """A residual branch that starts as the identity."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Norm(nn.Module):
    """Affine normalisation of one of the kinds of :func:`factorkit.ops.group_norm_silu`."""

    def __init__(self, channels: int, groups: int, kind: str = "group"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups, self.kind = group_count(channels, groups), kind

    def forward(self, x, scale=None, shift=None, *, masks=None, activate=True) -> Tensor:
        return ops.group_norm_silu(
            x, self.weight, self.bias, scale, shift, groups=self.groups, norm=self.kind, masks=masks, activate=activate
        )

    def of_skip(self, u: Tensor, skip: Tensor, masks: Tensor | None) -> Tensor:
        """SiLU(norm([u_k ; m_k * skip])) without the concatenation in sight."""
        return ops.masked_skip_norm_silu(u, skip, masks, self.weight, self.bias, groups=self.groups, norm=self.kind)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups={self.groups}, kind={self.kind!r}"


class ResBlock(nn.Module):
    """norm→SiLU→conv3 → norm·(1+scale)+shift→SiLU→dropout→conv3(zero), plus a shortcut.

    With ``skip_channels`` its input is [u ; skip], or [u_k ; m_k*skip] for every branch k when masks are given.
    """

    gathered_alone = True  # its weights are read in its own forward pass and nowhere else

    def __init__(
        self,
        channels: int,
        out: int,
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
        self.conv1 = nn.Conv2d(total, out, 3, padding=1)
        self.modulation = nn.Linear(embed, 2 * out)
        self.norm2 = Norm(out, norm_groups, norm)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out, out, 3, padding=1))
        self.shortcut = nn.Conv2d(total, out, 1) if total != out or skip_channels else nn.Identity()

    def forward(self, u: Tensor, embedding: Tensor, skip: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
        """u [B or B*K, C, H, W], embedding [rows of the answer, E], skip [B, C_s, H, W], masks [B, K, H, W]."""
        if skip is None:
            h, base = self.norm1(u, masks=masks), self.shortcut(u)
        else:
            h = self.norm1.of_skip(u, skip, masks)
            base = ops.masked_skip_projection(u, skip, masks, self.shortcut.weight, self.shortcut.bias)
        scale, shift = self.modulation(F.silu(embedding)).chunk(2, dim=1)
        h = self.norm2(self.conv1(h), scale, shift, masks=masks)
        return base + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all pixels, with a zero-initialised projection."""

    gathered_alone = True  # its weights are read in its own forward pass and nowhere else

    def __init__(self, channels: int, *, num_heads: int = 4, norm_groups: int = 32, norm: str = "group"):
        super().__init__()
        self.num_heads = num_heads if channels % num_heads == 0 else 1
        self.norm = Norm(channels, norm_groups, norm)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.project = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x, masks=masks, activate=False))
        # pixels before channels on the way in and out, as they lie: no copy, and none in the backward pass
        parts = qkv.permute(0, 2, 3, 1).reshape(n, h * w, 3, self.num_heads, c // self.num_heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)
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
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))
