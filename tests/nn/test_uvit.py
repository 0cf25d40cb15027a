"""The transformer with long skips against its equations, written token by token with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from factorkit.nn.uvit import PIXEL_CHANNELS, TokenDecoder, TokenEncoder, TokenMaskHead, TransformerBlock

D, HEADS, EMBED = 16, 2, 8


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


def randomize(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


def naive_norm(norm, v):
    """Normalise one token [C]."""
    return v / (v.square().mean() + 1e-3).sqrt() * norm.weight + norm.bias


def apply(linear, v):
    """Apply a 1x1 convolution to one token [C]."""
    return linear.weight[:, :, 0, 0] @ v + linear.bias


def naive_attention(attention, tokens):
    """Attend within a list of tokens [C], head by head."""
    size = D // HEADS
    out = [torch.zeros(D, dtype=torch.float64) for _ in tokens]
    normed = lambda v: v / (v.square().mean() + 1e-3).sqrt() * attention.gain  # noqa: E731
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        queries = [normed(apply(attention.qk, v)[:D][part]) for v in tokens]
        keys = [normed(apply(attention.qk, v)[D:][part]) for v in tokens]
        values = [apply(attention.v, v)[part] for v in tokens]
        for i, query in enumerate(queries):
            weights = torch.stack([query @ key / math.sqrt(size) for key in keys]).softmax(0)
            out[i][part] = sum(w * value for w, value in zip(weights, values, strict=True))
    return [apply(attention.project, v) for v in out]


def naive_block(block, tokens, embedding, skips=None, mask=None):
    """Transform a list of tokens [C] of one image by a block; ``mask`` holds a number for each token."""
    if skips is not None:
        mask = [1.0] * len(tokens) if mask is None else mask
        joined = [torch.cat([u, m * s]) for u, s, m in zip(tokens, skips, mask, strict=True)]
        tokens = [apply(block.merge, v) for v in joined]
    a1, b1, g1, a2, b2, g2 = block.modulation(F.silu(embedding)).chunk(6)
    mixed = naive_attention(block.attention, [naive_norm(block.norm1, v) * (1 + a1) + b1 for v in tokens])
    tokens = [v + g1 * h for v, h in zip(tokens, mixed, strict=True)]
    hidden = [apply(block.expand, naive_norm(block.norm2, v) * (1 + a2) + b2) for v in tokens]
    return [v + g2 * apply(block.contract, F.silu(h)) for v, h in zip(tokens, hidden, strict=True)]


def naive_patches(encoder, x):
    """Return the tokens of one image [3, H, W]: patches in reading order, times the weights, plus their positions."""
    p = encoder.patch.kernel_size[0]
    rows, columns = x.shape[1] // p, x.shape[2] // p
    cells = [x[:, r * p : (r + 1) * p, c * p : (c + 1) * p] for r in range(rows) for c in range(columns)]
    places = encoder.position[0].flatten(1).T
    return [
        torch.einsum("oijk,ijk->o", encoder.patch.weight, cell) + encoder.patch.bias + place
        for cell, place in zip(cells, places, strict=True)
    ]


def naive_pixels(head, tokens, side):
    """Map tokens [C] of one image, ``side`` in a row, to [out, H, W]."""
    scale = head.scale
    image = torch.zeros(PIXEL_CHANNELS, side * scale, side * scale, dtype=torch.float64)
    for i, v in enumerate(tokens):
        cell = apply(head.expand, F.silu(naive_norm(head.norm_out, v))).reshape(scale, scale, PIXEL_CHANNELS)
        top, left = i // side * scale, i % side * scale
        image[:, top : top + scale, left : left + scale] = cell.permute(2, 0, 1)
    return head.conv_out(F.silu(image)[None])[0]


def build(patch=2, resolution=8, depth=2):
    encoder = TokenEncoder(3, D, depth, patch, (resolution, resolution), EMBED, num_heads=HEADS)
    decoder = TokenDecoder(D, encoder.skip_channels, D, patch, EMBED, 3, num_heads=HEADS)
    middle = TransformerBlock(D, EMBED, num_heads=HEADS)
    return randomize(encoder), randomize(middle), randomize(decoder)


def as_tokens(x):
    """Return the tokens [C] of features [C, h, w]."""
    return list(x.flatten(1).T)


@torch.no_grad()
def test_encoder_middle_and_decoder_equal_plain_loops():
    encoder, middle, decoder = build(patch=4)
    x, embedding = torch.randn(2, 3, 8, 8).double(), torch.randn(2, EMBED).double()
    skips = encoder(x, embedding)
    out = decoder(middle(skips[-1], embedding), skips, embedding)
    for n in range(2):
        tokens, stored = naive_patches(encoder, x[n]), []
        for block in encoder.blocks:
            tokens = naive_block(block, tokens, embedding[n])
            stored.append(tokens)
        for feature, expected in zip(skips, stored, strict=True):
            torch.testing.assert_close(as_tokens(feature[n]), expected)
        tokens = naive_block(middle, tokens, embedding[n])
        for block in decoder.blocks:
            tokens = naive_block(block, tokens, embedding[n], stored.pop())
        torch.testing.assert_close(out[n], naive_pixels(decoder, tokens, 2))


@torch.no_grad()
def test_branches_of_the_decoder_equal_plain_loops_over_masked_skips():
    _, _, decoder = build()
    h, skips = torch.randn(2, D, 4, 4).double(), [torch.randn(2, D, 4, 4).double() for _ in range(2)]
    masks, embedding = torch.rand(2, 3, 4, 4).double(), torch.randn(6, EMBED).double()
    out = decoder(h, skips, embedding, [masks])
    for n in range(2):
        for k in range(3):
            tokens, mask = as_tokens(h[n]), masks[n, k].flatten().tolist()
            for block, skip in zip(decoder.blocks, reversed(skips), strict=True):
                tokens = naive_block(block, tokens, embedding[3 * n + k], as_tokens(skip[n]), mask)
            torch.testing.assert_close(out[3 * n + k], naive_pixels(decoder, tokens, 4))


@torch.no_grad()
def test_decoder_with_masks_of_one_equals_the_plain_decoder():
    encoder, middle, decoder = build()
    x, embedding = torch.randn(2, 3, 8, 8).double(), torch.randn(2, EMBED).double()
    skips = encoder(x, embedding)
    h = middle(skips[-1], embedding)
    plain = decoder(h, skips, embedding)
    ones = torch.ones(2, 3, 4, 4).double()
    branches = decoder(h, skips, embedding.repeat_interleave(3, 0), [ones])
    torch.testing.assert_close(branches, plain.repeat_interleave(3, 0))


@pytest.mark.parametrize("shared", [True, False])
def test_masked_skip_on_tokens_passes_gradcheck(shared):
    block = randomize(TransformerBlock(8, EMBED, num_heads=2, skip_channels=8))
    u = torch.randn(2 if shared else 4, 8, 2, 2).double().requires_grad_()
    skip, masks = torch.randn(2, 8, 2, 2).double().requires_grad_(), torch.rand(2, 2, 2, 2).double().requires_grad_()
    embedding = torch.randn(4, EMBED).double().requires_grad_()
    assert torch.autograd.gradcheck(block, (u, embedding, skip, masks), fast_mode=True)


def test_fresh_block_is_the_identity_and_fresh_decoder_predicts_zero():
    block = TransformerBlock(D, EMBED, num_heads=HEADS)
    x, embedding = torch.randn(2, D, 4, 4), torch.randn(2, EMBED)
    assert torch.equal(block(x, embedding), x)
    decoder = TokenDecoder(D, [D], D, 2, EMBED, 3, num_heads=HEADS)
    assert not decoder(x, [x], embedding).any()


def test_attention_of_scaled_tokens_is_the_same():
    """Normalised queries and keys bound the logits: large tokens do not saturate the softmax."""
    attention = TransformerBlock(D, EMBED, num_heads=HEADS).attention.double()
    x = 10 * torch.randn(1, D, 4, 4).double()
    for layer in (attention.qk, attention.v, attention.project):
        torch.nn.init.zeros_(layer.bias)
    torch.testing.assert_close(attention(100 * x) / 100, attention(x), atol=1e-3, rtol=1e-2)


@torch.no_grad()
def test_encoder_of_another_size_interpolates_positions():
    encoder, _, _ = build()
    embedding = torch.randn(1, EMBED).double()
    torch.nn.init.constant_(encoder.position, 0.7)
    plain = encoder(torch.ones(1, 3, 8, 8).double(), embedding)
    wide = encoder(torch.ones(1, 3, 4, 16).double(), embedding)
    assert wide[0].shape == (1, D, 2, 8)
    torch.testing.assert_close(wide[-1][0, :, 0, 0], plain[-1][0, :, 0, 0])


def test_mask_head_reads_the_middle_alone():
    head = randomize(TokenMaskHead(D, 3, 2))
    h = torch.randn(2, D, 4, 4).double()
    assert head(h, [], torch.zeros(0)).shape == (2, 3, 8, 8)
    torch.testing.assert_close(head(h, [], torch.zeros(0))[0], naive_pixels(head, as_tokens(h[0]), 4))
