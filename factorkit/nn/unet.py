"""Encoder, middle and decoder of the U-Net. ``regions=1`` of segdiff is exactly these three in a row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from factorkit.nn.blocks import Attention, Downsample, Norm, ResBlock, Upsample, zero_init


class Encoder(nn.Module):
    """The first half of the U-Net.

    Args:
        channels: of the input image.
        width: C; level i has C * multipliers[i] channels at resolution / 2^i.
        blocks: residual blocks a level.
        attention: resolutions (pixels a side) at which every block is followed by attention.
        resolution: pixels a side of the input.
        embed: length of the time embedding.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        resolution: int,
        embed: int,
        *,
        heads: int = 4,
        groups: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.levels = nn.ModuleList()
        #: channels of each skip, in the order the encoder makes them; the decoder takes them from the end
        self.skip_channels = [width]
        now = width
        for i, multiplier in enumerate(multipliers):
            level = nn.ModuleDict({"blocks": nn.ModuleList(), "attention": nn.ModuleList()})
            for _ in range(blocks):
                level["blocks"].append(ResBlock(now, width * multiplier, embed, groups=groups, dropout=dropout))
                now = width * multiplier
                if resolution >> i in attention:
                    level["attention"].append(Attention(now, heads=heads, groups=groups))
                self.skip_channels.append(now)
            if i < len(multipliers) - 1:
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

    def __init__(self, channels: int, embed: int, *, heads: int = 4, groups: int = 32, dropout: float = 0.0):
        super().__init__()
        self.block1 = ResBlock(channels, channels, embed, groups=groups, dropout=dropout)
        self.attention = Attention(channels, heads=heads, groups=groups)
        self.block2 = ResBlock(channels, channels, embed, groups=groups, dropout=dropout)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.block2(self.attention(self.block1(h, embedding)), embedding)


class Decoder(nn.Module):
    """The second half of the U-Net, one block more a level than the encoder; K branches at once when masks are given.

    Args:
        channels: of h_mid.
        skip_channels: as the encoder lists them (finest first).
        multipliers, blocks: the encoder's; a decoder over ``multipliers[1:]`` stops at half the resolution.
        out_channels: of the answer.
        resolution: pixels a side of the answer.
        norm: ``"group"`` | ``"masked_group"`` | ``"pixel"``, all norms of this decoder.
    """

    def __init__(
        self,
        channels: int,
        skip_channels: Sequence[int],
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        resolution: int,
        embed: int,
        out_channels: int,
        *,
        heads: int = 4,
        groups: int = 32,
        norm: str = "group",
        dropout: float = 0.0,
    ):
        super().__init__()
        remaining = list(skip_channels)
        self.levels = nn.ModuleList()
        now = channels
        for i in reversed(range(len(multipliers))):
            level = nn.ModuleDict({"blocks": nn.ModuleList(), "attention": nn.ModuleList()})
            out = width * multipliers[i]
            for _ in range(blocks + 1):
                level["blocks"].append(
                    ResBlock(now, out, embed, skip_channels=remaining.pop(), groups=groups, norm=norm, dropout=dropout)
                )
                now = out
                if resolution >> i in attention:
                    level["attention"].append(Attention(now, heads=heads, groups=groups, norm=norm))
            if i > 0:
                level["up"] = Upsample(now)
            self.levels.append(level)
        self.norm_out = Norm(now, groups, norm)
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
