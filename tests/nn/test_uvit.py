"""The parts of the transformer with long skips against their equations, with the same weights."""

from __future__ import annotations

import pytest
import torch

from factorkit.nn.uvit import TokenDecoder, TokenEncoder, TokenMaskHead, TransformerBlock
from tests.nn.naive_uvit import as_tokens, naive_block, naive_decoder, naive_encoder, naive_pixels

D, HEADS, EMBED = 16, 2, 8


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


def randomize(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module.double()


def build(patch=2, resolution=8, depth=2):
    encoder = TokenEncoder(3, D, depth, patch, (resolution, resolution), EMBED, num_heads=HEADS)
    decoder = TokenDecoder(D, encoder.skip_channels, D, patch, EMBED, 3, num_heads=HEADS)
    middle = TransformerBlock(D, EMBED, num_heads=HEADS)
    return randomize(encoder), randomize(middle), randomize(decoder)


@torch.no_grad()
def test_encoder_middle_and_decoder_equal_plain_loops():
    encoder, middle, decoder = build(patch=4)
    x, embedding = torch.randn(2, 3, 8, 8).double(), torch.randn(2, EMBED).double()
    skips = encoder(x, embedding)
    out = decoder(middle(skips[-1], embedding), skips, embedding)
    for n in range(2):
        stored = naive_encoder(encoder, x[n], embedding[n])
        for feature, expected in zip(skips, stored, strict=True):
            torch.testing.assert_close(as_tokens(feature[n]), expected)
        tokens = naive_block(middle, stored[-1], embedding[n])
        torch.testing.assert_close(out[n], naive_decoder(decoder, tokens, stored, embedding[n], 2))


@torch.no_grad()
def test_branches_of_the_decoder_equal_plain_loops_over_masked_skips():
    _, _, decoder = build()
    h, skips = torch.randn(2, D, 4, 4).double(), [torch.randn(2, D, 4, 4).double() for _ in range(2)]
    masks, embedding = torch.rand(2, 3, 4, 4).double(), torch.randn(6, EMBED).double()
    out = decoder(h, skips, embedding, [masks])
    for n in range(2):
        stored = [as_tokens(skip[n]) for skip in skips]
        for k in range(3):
            branch, mask = 3 * n + k, masks[n, k].flatten()
            expected = naive_decoder(decoder, as_tokens(h[n]), stored, embedding[branch], 4, mask)
            torch.testing.assert_close(out[branch], expected)


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
