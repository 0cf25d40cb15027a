"""The factorized U-Net in straightforward PyTorch, the baseline of the benchmarks.

It uses the modules and weights of a U-Net :class:`~factorkit.segdiff.network.FactorizedDenoiser` with masked skips and
computes the same function: ``folded=False`` runs the decoder once for every branch, each skip multiplied by its mask
and concatenated; ``folded=True`` runs all branches as one batch, channels last. Norms are torch's, in fp32 as in
guided-diffusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.diffusion.denoiser import Denoised
from factorkit.nn.unet import Attention, Decoder, Norm, ResBlock
from factorkit.ops.norm_pytorch import GROUP_EPS, MASK_FLOOR, MASKED_GROUP_EPS, PIXEL_EPS
from factorkit.ops.region import POOL_FLOOR
from factorkit.segdiff.network import FactorizedDenoiser, Regions, at_least_fp32


class Textbook(nn.Module):
    """Has the interface of ``model``, without the branches. Changes the layout of its weights."""

    def __init__(self, model: FactorizedDenoiser, folded: bool):
        super().__init__()
        if model.decoding != "masked_skips":
            raise ValueError(f"the textbook model masks the skips; got decoding={model.decoding!r}")
        self.layout = torch.channels_last if folded else torch.contiguous_format
        self.model, self.folded = model.to(memory_format=self.layout), folded

    def forward(self, x_t: Tensor, t: Tensor) -> Denoised:
        net, regions, x_t = self.model, self.model.regions, x_t.contiguous(memory_format=self.layout)
        embedding = net.time(t)
        skips = encode(net, x_t, embedding)
        h = middle(net, skips[-1], embedding)
        if regions == 1:
            prediction = at_least_fp32(decode(net.decoder, h, skips, embedding, None))
            return Denoised(prediction, Regions(torch.ones_like(prediction[:, :1]), None))
        logits = at_least_fp32(decode(net.masks.decoder, h, skips[net.masks.skips_left_out :], embedding, None))
        if net.masks.upsample > 1:
            logits = upsample(logits)
        if net.masks.norm is not None:
            logits = net.masks.norm(logits)
        masks = logits.softmax(1)
        embeddings = embedding[:, None].expand(-1, regions, -1)
        if net.tokens is not None:
            pooled = pool(at_least_fp32(net.tokens.feature(x_t)), masks)
            embeddings = embeddings + net.tokens.embed(pooled).to(embedding.dtype)
        pyramid = [masks]
        for _ in range(len(net.encoder.levels) - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        if self.folded:
            outs = decode(net.decoder, h, skips, embeddings.flatten(0, 1), pyramid).unflatten(0, masks.shape[:2])
        else:
            one = lambda k: decode(net.decoder, h, skips, embeddings[:, k], [m[:, k : k + 1] for m in pyramid])  # noqa: E731
            outs = torch.stack([one(k) for k in range(regions)], dim=1)
        return Denoised((at_least_fp32(outs) * masks[:, :, None]).sum(1), Regions(masks, None))


@torch.compiler.disable  # Inductor of torch 2.13 gives it zero gradients (pytorch issue 185509, docs/speed.md)
def upsample(logits: Tensor) -> Tensor:
    return F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)


def encode(net: FactorizedDenoiser, x: Tensor, embedding: Tensor) -> list[Tensor]:
    h = net.encoder.conv_in(x)
    skips = [h]
    for level in net.encoder.levels:
        for i, block in enumerate(level.blocks):
            h = residual(block, h, embedding, None)
            if level.attention:
                h = attend(level.attention[i], h, None)
            skips.append(h)
        if level.down is not None:
            h = level.down(h)
            skips.append(h)
    return skips


def middle(net: FactorizedDenoiser, h: Tensor, embedding: Tensor) -> Tensor:
    h = attend(net.middle.attention, residual(net.middle.block1, h, embedding, None), None)
    return residual(net.middle.block2, h, embedding, None)


def decode(decoder: Decoder, h: Tensor, skips: list[Tensor], embedding: Tensor, pyramid: list[Tensor] | None) -> Tensor:
    remaining, levels = list(skips), list(pyramid) if pyramid else [None] * len(decoder.levels)
    if pyramid:
        h = repeat(h, pyramid[0])
    for level in decoder.levels:
        masks = levels.pop()
        for i, block in enumerate(level.blocks):
            skip = remaining.pop()
            if masks is not None:
                skip = repeat(skip, masks) * masks.flatten(0, 1)[:, None].to(skip.dtype)
            h = residual(block, torch.cat([h, skip], dim=1), embedding, masks)
            if level.attention:
                h = attend(level.attention[i], h, masks)
        if level.up is not None:
            h = F.conv2d(double(h), level.up.weight, level.up.bias, padding=1)
    return decoder.conv_out(F.silu(normalise(decoder.norm_out, h, masks)))


def double(x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    # In bf16 Inductor of torch 2.13 gives that zero gradients (the same issue), but not a copy.
    n, c, h, w = x.shape
    copies = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, h, 2, w, 2, c)
    return copies.reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def repeat(x: Tensor, masks: Tensor) -> Tensor:
    return x if masks.shape[1] == 1 else x.repeat_interleave(masks.shape[1], dim=0)


def residual(block: ResBlock, x: Tensor, embedding: Tensor, masks: Tensor | None) -> Tensor:
    h = block.conv1(F.silu(normalise(block.norm1, x, masks)))
    scale, shift = block.modulation(F.silu(embedding))[:, :, None, None].chunk(2, dim=1)
    h = F.silu(normalise(block.norm2, h, masks) * (1 + scale) + shift)
    return block.shortcut(x) + block.conv2(block.dropout(h))


def attend(attention: Attention, x: Tensor, masks: Tensor | None) -> Tensor:
    n, c, h, w = x.shape
    qkv = attention.qkv(normalise(attention.norm, x, masks))
    q, k, v = qkv.reshape(n, 3, attention.num_heads, c // attention.num_heads, h * w).transpose(3, 4).unbind(1)
    out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(n, c, h, w)
    return x + attention.project(out)


def normalise(norm: Norm, x: Tensor, masks: Tensor | None) -> Tensor:
    values = at_least_fp32(x)
    if norm.kind == "group":
        return F.group_norm(values, norm.groups, norm.weight, norm.bias, GROUP_EPS).to(x.dtype)
    if norm.kind == "pixel":
        normal = values * torch.rsqrt(values.square().mean(1, keepdim=True) + PIXEL_EPS)
    else:
        grouped = values.unflatten(1, (norm.groups, -1))
        weights = masks.flatten(0, 1)[:, None, None] + MASK_FLOOR
        weights = weights / (weights.sum((3, 4), keepdim=True) * grouped.shape[2])
        mean = (grouped * weights).sum((2, 3, 4), keepdim=True)
        variance = ((grouped - mean).square() * weights).sum((2, 3, 4), keepdim=True)
        normal = ((grouped - mean) * torch.rsqrt(variance + MASKED_GROUP_EPS)).flatten(1, 2)
    return (normal * norm.weight[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


def pool(features: Tensor, masks: Tensor) -> Tensor:
    """Region tokens [B, K, C]."""
    means = [(features * m).sum((2, 3)) / (m.sum((2, 3)) + POOL_FLOOR) for m in masks.split(1, dim=1)]
    return torch.stack(means, dim=1)
