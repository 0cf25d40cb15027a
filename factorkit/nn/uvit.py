"""A transformer with long skips (U-ViT, Bao et al. 2023) over factorkit's ops, for the same callers as the U-Net.

    h = P x + position                       P cuts the image into patches: one token each
    s_i = h = block_i(h)                     i = 1 ... n, the encoder half
    h = block(h)                             the middle
    h = block(W_i [h ; s_i])                 i = n ... 1, the decoder half: skips in reverse order
    block:  h + g_1 attention(a_1 norm(h) + b_1),  then  h + g_2 mlp(a_2 norm(h) + b_2)

Scales a, shifts b and gates g are linear in SiLU(time + class), and start so that every block is the identity
(adaLN-zero, Peebles & Xie 2023). Queries and keys are normalised (Dehghani et al. 2023). Norms divide each token by its
root mean square. Branch k of a factorized model reads W_i [h_k ; m_k * s_i], with m_k the mask's average over each
patch.

Tokens are features [N, C, h, w] in the channels-last layout: a token lies in one piece, and the ops of the U-Net apply.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit import ops
from factorkit.nn.unet import Norm, attend, zero_init

MLP_FACTOR = 4  # hidden channels of a block's two layers, in units of its channels
PIXEL_CHANNELS = 16  # of the features at the resolution of the image, behind the tokens
POSITION_STD = 0.02  # of the initial position embedding (Bao et al. 2023)


class TokenAttention(nn.Module):
    """Self-attention over all tokens. Queries and keys of each head have a root mean square of 1, times one gain."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Conv2d(channels, 2 * channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        # one gain for both: only the product of theirs would matter
        self.gain = nn.Parameter(torch.ones(channels // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """Attend within x [N, C, h, w]."""
        n, c, height, width = x.shape
        tokens, size = height * width, c // self.num_heads
        # [N, size, tokens, 2 heads], channels last: the norm is over the channels of one head
        qk = self.qk(x).permute(0, 2, 3, 1).reshape(n, tokens, 2 * self.num_heads, size).permute(0, 3, 1, 2)
        qk = ops.group_norm_silu(qk, self.gain, torch.zeros_like(self.gain), groups=1, norm="pixel", activate=False)
        q, k = qk.permute(0, 3, 2, 1).chunk(2, dim=1)
        v = self.v(x).permute(0, 2, 3, 1).reshape(n, tokens, self.num_heads, size).transpose(1, 2)
        out = attend(q, k, v).transpose(1, 2).reshape(n, height, width, c)
        return self.project(out.permute(0, 3, 1, 2))


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each modulated and gated by the embedding.

    With ``skip_channels`` its input is W [u ; skip], or W [u_k ; m_k * skip] for every branch k when masks are given.

    Args:
        channels: of the tokens.
        embed: length of the embedding.
        num_heads: of the attention; divides channels.
        in_channels: of u, where it has others than ``channels``; needs ``skip_channels``.
        norm: ``"group"`` | ``"masked_group"`` | ``"pixel"``.
    """

    gathered_alone = True  # sharding: its weights are read in its own forward pass only

    def __init__(
        self,
        channels: int,
        embed: int,
        *,
        num_heads: int,
        skip_channels: int = 0,
        in_channels: int | None = None,
        norm_groups: int = 32,
        norm: str = "pixel",
        dropout: float = 0.0,
    ):
        super().__init__()
        total = (in_channels or channels) + skip_channels
        self.merge = nn.Conv2d(total, channels, 1) if skip_channels else None
        self.norm1, self.norm2 = Norm(channels, norm_groups, norm), Norm(channels, norm_groups, norm)
        self.attention = TokenAttention(channels, num_heads)
        self.expand = nn.Conv2d(channels, MLP_FACTOR * channels, 1)
        self.contract = nn.Conv2d(MLP_FACTOR * channels, channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.modulation = zero_init(nn.Linear(embed, 6 * channels))

    def forward(self, u: Tensor, embedding: Tensor, skip: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
        """U [B or B*K, C, h, w], embedding [rows of the output, E], skip [B, C_s, h, w], masks [B, K, h, w]."""
        if self.merge is not None:
            assert skip is not None
            u = ops.masked_skip_projection(u, skip, masks, self.merge.weight, cast(Tensor, self.merge.bias))
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(F.silu(embedding)).chunk(6, dim=1)
        h, u, _ = self.norm1.with_inputs(u, None, masks, scale1, shift1, activate=False)
        u = u + self.dropout(self.attention(h)) * gate1[:, :, None, None]
        h, u, _ = self.norm2.with_inputs(u, None, masks, scale2, shift2, activate=False)
        h = self.contract(F.silu(self.expand(h)))
        return u + self.dropout(h) * gate2[:, :, None, None]


class TokenEncoder(nn.Module):
    """Patches, positions and the first half of the blocks.

    Args:
        channels: of the input image.
        model_channels: of the tokens.
        depth: number of blocks.
        patch_size: side of a patch in pixels.
        size: height and width of the training images; positions of other sizes are interpolated.
        embed: length of the time embedding.
        num_heads, norm_groups, dropout: as of :class:`TransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        model_channels: int,
        depth: int,
        patch_size: int,
        size: tuple[int, int],
        embed: int,
        *,
        num_heads: int,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        #: rows and columns of tokens
        self.grid = (size[0] // patch_size, size[1] // patch_size)
        self.patch = nn.Conv2d(channels, model_channels, patch_size, stride=patch_size)
        self.position = nn.Parameter(POSITION_STD * torch.randn(1, model_channels, *self.grid))
        self.blocks = nn.ModuleList(
            TransformerBlock(model_channels, embed, num_heads=num_heads, norm_groups=norm_groups, dropout=dropout)
            for _ in range(depth)
        )
        #: channels of each skip, in the order the encoder makes them; the decoder takes them from the end
        self.skip_channels = [model_channels] * depth
        self.out_channels = model_channels

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Return the tokens [B, C, H / patch, W / patch] behind each block, the first block's first."""
        h = self.patch(x)
        position: Tensor = self.position
        if position.shape[2:] != h.shape[2:]:
            position = F.interpolate(position, size=h.shape[2:], mode="bicubic", align_corners=False)
        h = h + position.to(h.dtype)
        skips = []
        for block in self.blocks:
            h = block(h, embedding)
            skips.append(h)
        return skips


class PixelHead(nn.Module):
    """From tokens to pixels: norm, SiLU, a linear layer to the pixels of each patch, SiLU, a 3x3 convolution.

    Args:
        channels: of the tokens.
        out_channels: of the output.
        scale: pixels of the output along a side of a token.
        norm_groups, norm: as of :class:`TransformerBlock`.
    """

    def __init__(self, channels: int, out_channels: int, scale: int, *, norm_groups: int = 32, norm: str = "pixel"):
        super().__init__()
        self.scale = scale
        self.norm_out = Norm(channels, norm_groups, norm)
        self.expand = nn.Conv2d(channels, PIXEL_CHANNELS * scale**2, 1)
        self.conv_out = zero_init(nn.Conv2d(PIXEL_CHANNELS, out_channels, 3, padding=1))

    def to_pixels(self, h: Tensor, masks: Tensor | None = None) -> Tensor:
        """Map tokens [N, C, h, w] to [N, out, scale * h, scale * w]; masks [B, K, h, w] for the norm only."""
        h = self.expand(self.norm_out(h, masks=masks))
        n, _, height, width = h.shape
        scale = self.scale
        # a copy that keeps the channels last, as torch's pixel_shuffle does not on every device
        cells = h.permute(0, 2, 3, 1).reshape(n, height, width, scale, scale, PIXEL_CHANNELS)
        pixels = cells.transpose(2, 3).reshape(n, height * scale, width * scale, PIXEL_CHANNELS)
        return self.conv_out(F.silu(pixels.permute(0, 3, 1, 2)))


class TokenMaskHead(PixelHead):
    """Mask logits from the middle's tokens alone, called as a decoder is; the encoder's skips are not read."""

    def forward(self, h: Tensor, skips: Sequence[Tensor], embedding: Tensor) -> Tensor:
        """Map tokens [B, C, h, w] to logits [B, K, scale * h, scale * w]."""
        return self.to_pixels(h)


class TokenDecoder(PixelHead):
    """The second half of the blocks and the pixels; K branches at once if masks are given.

    Args:
        channels: of the middle's tokens.
        skip_channels: as the encoder lists them; one block reads each.
        model_channels: of this decoder's tokens.
        patch_size: side of a patch in pixels.
        embed: length of the embedding.
        out_channels: of the image.
        num_heads, norm_groups, norm, dropout: as of :class:`TransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        skip_channels: Sequence[int],
        model_channels: int,
        patch_size: int,
        embed: int,
        out_channels: int,
        *,
        num_heads: int,
        norm_groups: int = 32,
        norm: str = "pixel",
        dropout: float = 0.0,
    ):
        super().__init__(model_channels, out_channels, patch_size, norm_groups=norm_groups, norm=norm)
        widths = [channels] + [model_channels] * (len(skip_channels) - 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                model_channels,
                embed,
                num_heads=num_heads,
                skip_channels=skip,
                in_channels=width,
                norm_groups=norm_groups,
                norm=norm,
                dropout=dropout,
            )
            for width, skip in zip(widths, reversed(skip_channels), strict=True)
        )

    def forward(
        self, h: Tensor, skips: Sequence[Tensor], embedding: Tensor, pyramid: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Decode tokens to [B, out, H, W], or [B*K, out, H, W] with masks.

        Args:
            h: the middle's tokens [B, C, h, w], shared by all branches, or [B*K, C, h, w].
            skips: the encoder's tokens, without masks applied.
            embedding: [B, E], or [B*K, E] with masks.
            pyramid: one entry, the masks [B, K, h, w] of the tokens; None for a plain decoder.
        """
        masks = None if pyramid is None else pyramid[0]
        for block, skip in zip(cast(Iterable[nn.Module], self.blocks), reversed(skips), strict=True):
            h = block(h, embedding, skip, masks)
        return self.to_pixels(h, masks)
