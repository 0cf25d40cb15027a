"""Encoder, middle and decoder of the U-Net. ``regions=1`` of segdiff is exactly these three in a row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from factorkit.nn.blocks import Attention, Downsample, Norm, ResBlock, Upsample, zero_init


class Encoder(nn.Module):
    """The first half of the U-Net.

    Args:
        channels: of the input image.
        model_channels: C; level i has C * channel_mult[i] channels at resolution / 2^i.
        num_res_blocks: residual blocks a level.
        attention_resolutions: resolutions (pixels a side) at which every block is followed by attention.
        resolution: pixels a side of the input.
        embed: length of the time embedding.
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
        now = model_channels
        for i, multiplier in enumerate(channel_mult):
            level = nn.ModuleDict({"blocks": nn.ModuleList(), "attention": nn.ModuleList()})
            for _ in range(num_res_blocks):
                level["blocks"].append(
                    ResBlock(now, model_channels * multiplier, embed, norm_groups=norm_groups, dropout=dropout)
                )
                now = model_channels * multiplier
                if resolution >> i in attention_resolutions:
                    level["attention"].append(Attention(now, num_heads=num_heads, norm_groups=norm_groups))
                self.skip_channels.append(now)
            if i < len(channel_mult) - 1:
                level["down"] = Downsample(now)
                self.skip_channels.append(now)
            self.levels.append(level)
        self.out_channels = now

    def forward(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """All features, conv_in's and the downsamplers' among them, finest first; the last is the coarsest level's."""
        h = self.conv_in(x)
        skips = [h]
        for level in self.levels:
            for i, block in enumerate(level["blocks"]):
                h = block(h, embedding)
                if level["attention"]:
                    h = level["attention"][i](h)
                skips.append(h)
            if "down" in level:
                h = level["down"](h)
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
        return self.block2(self.attention(self.block1(h, embedding)), embedding)


class Decoder(nn.Module):
    """The second half of the U-Net, one block more a level than the encoder; K branches at once when masks are given.

    Args:
        channels: of h_mid.
        skip_channels: as the encoder lists them (finest first).
        channel_mult, num_res_blocks: the encoder's; a decoder over ``channel_mult[1:]`` stops at half the resolution.
        out_channels: of the answer.
        resolution: pixels a side of the answer.
        norm: ``"group"`` | ``"masked_group"`` | ``"pixel"``, all norms of this decoder.
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
        now = channels
        for i in reversed(range(len(channel_mult))):
            level = nn.ModuleDict({"blocks": nn.ModuleList(), "attention": nn.ModuleList()})
            out = model_channels * channel_mult[i]
            for _ in range(num_res_blocks + 1):
                level["blocks"].append(
                    ResBlock(
                        now,
                        out,
                        embed,
                        skip_channels=remaining.pop(),
                        norm_groups=norm_groups,
                        norm=norm,
                        dropout=dropout,
                    )
                )
                now = out
                if resolution >> i in attention_resolutions:
                    level["attention"].append(Attention(now, num_heads=num_heads, norm_groups=norm_groups, norm=norm))
            if i > 0:
                level["up"] = Upsample(now)
            self.levels.append(level)
        self.norm_out = Norm(now, norm_groups, norm)
        self.conv_out = zero_init(nn.Conv2d(now, out_channels, 3, padding=1))

    def forward(
        self, h: Tensor, skips: Sequence[Tensor], embedding: Tensor, pyramid: Sequence[Tensor] | None = None
    ) -> Tensor:
        """
        Args:
            h: h_mid [B, C, h, w], shared by all branches, or [B*K, C, h, w].
            skips: the encoder's features, finest first, never masked by the caller.
            embedding: [B, E], or [B*K, E] with masks.
            pyramid: the masks [B, K, H/2^i, W/2^i] of every level i, finest first; None for a plain decoder.

        Returns:
            [B, out, H, W], or [B*K, out, H, W] with masks.
        """
        remaining = list(skips)
        levels = [None] * len(self.levels) if pyramid is None else list(pyramid)
        for level in self.levels:
            masks = levels.pop()
            for i, block in enumerate(level["blocks"]):
                h = block(h, embedding, remaining.pop(), masks)
                if level["attention"]:
                    h = level["attention"][i](h, masks)
            if "up" in level:
                h = level["up"](h)
        return self.conv_out(self.norm_out(h, masks=masks))
