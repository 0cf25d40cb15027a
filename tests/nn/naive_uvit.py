"""The equations of a U-ViT in plain torch, one image at a time, with the weights of the product's modules.

Tokens are a matrix [T, C] in reading order; an embedding is a vector, a mask one number for each token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

EPS = {"group": 1e-5, "masked_group": 1e-4, "pixel": 1e-3}


def as_tokens(feature):
    """Return features [C, h, w] as tokens."""
    return feature.flatten(1).T


def linear(layer, tokens):
    """Apply a 1x1 convolution."""
    return tokens @ layer.weight[:, :, 0, 0].T + layer.bias


def naive_norm(norm, tokens, mask=None):
    if norm.kind == "pixel":
        return tokens / (tokens.square().mean(1, keepdim=True) + EPS["pixel"]).sqrt() * norm.weight + norm.bias
    weights = mask + 1e-3 if norm.kind == "masked_group" else torch.ones_like(tokens[:, 0])
    weights, parts = weights / weights.sum(), []
    for part in tokens.chunk(norm.groups, 1):
        mean = (weights @ part).mean()
        variance = (weights @ (part - mean).square()).mean()
        parts.append((part - mean) / (variance + EPS[norm.kind]).sqrt())
    return torch.cat(parts, 1) * norm.weight + norm.bias


def naive_attention(attention, tokens):
    """Attend head by head; queries and keys of a head have a root mean square of 1 before their gain."""
    query, key = linear(attention.qk, tokens).chunk(2, 1)
    out = []
    for q, k, v in zip(
        *(x.chunk(attention.num_heads, 1) for x in (query, key, linear(attention.v, tokens))), strict=True
    ):
        q, k = (x / (x.square().mean(1, keepdim=True) + EPS["pixel"]).sqrt() * attention.gain for x in (q, k))
        out.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v)
    return linear(attention.project, torch.cat(out, 1))


def naive_block(block, tokens, embedding, skip=None, mask=None):
    if skip is not None:
        masked = skip if mask is None else mask[:, None] * skip
        tokens = linear(block.merge, torch.cat([tokens, masked], 1))
    a1, b1, g1, a2, b2, g2 = (block.modulation.weight @ F.silu(embedding) + block.modulation.bias).chunk(6)
    tokens = tokens + g1 * naive_attention(block.attention, naive_norm(block.norm1, tokens, mask) * (1 + a1) + b1)
    hidden = F.silu(linear(block.expand, naive_norm(block.norm2, tokens, mask) * (1 + a2) + b2))
    return tokens + g2 * linear(block.contract, hidden)


def naive_patches(encoder, x):
    """Return the tokens of one image [3, H, W]: patches, times the weights, plus their interpolated positions."""
    p = encoder.patch.kernel_size[0]
    grid = (x.shape[1] // p, x.shape[2] // p)
    places = F.interpolate(encoder.position, size=grid, mode="bicubic", align_corners=False)
    cells = [
        torch.einsum("oijk,ijk->o", encoder.patch.weight, x[:, top : top + p, left : left + p])
        for top in range(0, x.shape[1], p)
        for left in range(0, x.shape[2], p)
    ]
    return torch.stack(cells) + encoder.patch.bias + as_tokens(places[0])


def naive_encoder(encoder, x, embedding):
    """Return the tokens behind each block."""
    tokens, skips = naive_patches(encoder, x), []
    for block in encoder.blocks:
        tokens = naive_block(block, tokens, embedding)
        skips.append(tokens)
    return skips


def naive_pixels(head, tokens, columns, mask=None):
    """Map tokens, ``columns`` in a row, to an image [out, H, W]."""
    scale = head.scale
    cells = linear(head.expand, F.silu(naive_norm(head.norm_out, tokens, mask)))
    rows = []
    for row in cells.split(columns):  # the numbers of a cell: line, column, channel
        squares = [cell.reshape(scale, scale, -1).permute(2, 0, 1) for cell in row]
        rows.append(torch.cat(squares, 2))
    image = F.silu(torch.cat(rows, 1))
    return F.conv2d(image[None], head.conv_out.weight, head.conv_out.bias, padding=1)[0]


def naive_decoder(decoder, tokens, skips, embedding, columns, mask=None):
    """Decode tokens to an image [out, H, W], the last skip first; ``mask`` multiplies the skips."""
    for block, skip in zip(decoder.blocks, reversed(skips), strict=True):
        tokens = naive_block(block, tokens, embedding, skip, mask)
    return naive_pixels(decoder, tokens, columns, mask)
