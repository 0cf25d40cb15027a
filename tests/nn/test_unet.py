"""The parts of the U-Net compared with formulas written with torch functions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from factorkit.nn import unet
from factorkit.nn.unet import (
    MAX_PRODUCTS_FP32,
    MAX_TOKENS_FP32,
    Attention,
    Decoder,
    Downsample,
    Encoder,
    Middle,
    Norm,
    ResBlock,
    TimeEmbedding,
    Upsample,
    apply_linear,
    attend,
    group_count,
    sinusoid,
)
from factorkit.ops import projection


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


def randomize_weights(module):
    """Randomize zero-initialised layers, which would hide the layers before them."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return module.double()


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("channels", "most", "expected"),
    [(128, 32, 32), (512, 32, 32), (16, 8, 4), (48, 8, 8), (1030, 32, 10), (131, 32, 1), (7, 32, 1), (3, 8, 1)],
)
def test_group_count_is_the_largest_valid_divisor(channels, most, expected):
    assert group_count(channels, most) == expected


def test_sinusoid_equals_cosines_and_sines():
    features = sinusoid(torch.tensor([0, 7, 999]), 8)
    for row, t in zip(features, (0, 7, 999), strict=True):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=0)


def test_time_embedding_equals_two_linear_layers_in_weight_precision():
    time = randomize_weights(TimeEmbedding(8))
    t = torch.tensor([3, 400])
    first, _, second = time
    expected = second(F.silu(first(sinusoid(t, 8).double())))
    assert time(t).shape == (2, 32)
    torch.testing.assert_close(time(t), expected)


@pytest.mark.parametrize(("channels", "out", "skip"), [(8, 8, 0), (8, 12, 0), (8, 8, 4), (8, 12, 8)])
def test_res_block_equals_its_equation(channels, out, skip):
    block = randomize_weights(ResBlock(channels, out, 16, skip_channels=skip, norm_groups=2))
    u, s, embedding = rand(3, channels, 6, 5), rand(3, skip, 6, 5), rand(3, 16)
    x = torch.cat([u, s], 1)
    normal = lambda h, n: F.group_norm(h, n.groups, n.weight, n.bias, eps=1e-5)  # noqa: E731
    h = F.conv2d(F.silu(normal(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = F.linear(F.silu(embedding), block.modulation.weight, block.modulation.bias).split(out, 1)
    h = F.silu(normal(h, block.norm2) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    plain = channels == out and not skip
    expected = h + (x if plain else F.conv2d(x, block.shortcut.weight, block.shortcut.bias))
    torch.testing.assert_close(block(u, embedding, s if skip else None), expected)


@pytest.mark.parametrize("norm", ["group", "masked_group", "pixel"])
def test_res_block_masked_branches_equal_separate_blocks(norm):
    block = randomize_weights(ResBlock(8, 8, 16, skip_channels=4, norm_groups=2, norm=norm))
    u, skip, embedding = rand(6, 8, 4, 4), rand(3, 4, 4, 4), rand(6, 16)
    masks = rand(3, 2, 4, 4).softmax(1)
    together = block(u, embedding, skip, masks).unflatten(0, (3, 2))
    for k in range(2):
        rows = slice(k, None, 2)
        alone = block(u[rows], embedding[rows], skip, masks[:, k : k + 1])
        torch.testing.assert_close(together[:, k], alone)
    elsewhere = block(u, embedding, skip, masks.flip(1)).unflatten(0, (3, 2))
    assert not torch.allclose(together, elsewhere)


@pytest.mark.parametrize("masked", [True, False])
def test_res_block_with_biases_added_once_equals_separate_additions(masked, monkeypatch):
    block = randomize_weights(ResBlock(8, 6, 16, skip_channels=4, norm_groups=2))
    u, skip, embedding = rand(6, 8, 5, 3), rand(3 if masked else 6, 4, 5, 3), rand(6, 16)
    masks, upstream = (rand(3, 2, 5, 3).softmax(1) if masked else None), rand(6, 6, 5, 3)

    def run():
        out = block(u, embedding, skip, masks)
        return out, *torch.autograd.grad(out, list(block.parameters()), upstream)

    separate = run()
    for module in (unet, projection):
        monkeypatch.setattr(module, "bias_is_separate", lambda x: True)
    torch.testing.assert_close(run(), separate)


@pytest.mark.parametrize("norm", ["group", "masked_group", "pixel"])
def test_unet_with_biases_in_norms_and_sums_equals_separate_additions(norm, monkeypatch):
    encoder = randomize_weights(Encoder(2, 4, (1, 2), 1, (2,), 4, 16, num_heads=2, norm_groups=2))
    middle = randomize_weights(Middle(8, 16, num_heads=2, norm_groups=2))
    decoder = Decoder(8, encoder.skip_channels, 4, (1, 2), 1, (2,), 4, 16, 3, num_heads=2, norm_groups=2, norm=norm)
    parts = torch.nn.ModuleList([encoder, middle, randomize_weights(decoder)])
    x, embedding, upstream = rand(2, 2, 4, 4), rand(2, 16), rand(6, 3, 4, 4)
    pyramid = [rand(2, 3, size, size).softmax(1) for size in (4, 2)]

    def run():
        skips = encoder(x, embedding)
        rows = embedding.repeat_interleave(3, 0)
        out = decoder(middle(skips[-1], embedding), skips, rows, pyramid)
        return out, *torch.autograd.grad(out, list(parts.parameters()), upstream)

    separate = run()
    for module in (unet, projection):
        monkeypatch.setattr(module, "bias_is_separate", lambda x: True)
    for block in (m for m in parts.modules() if isinstance(m, ResBlock)):
        monkeypatch.setattr(block.conv1, "forward", None)  # nobody adds its bias
    torch.testing.assert_close(run(), separate)


def test_res_block_dropout_precedes_the_second_convolution():
    block = randomize_weights(ResBlock(8, 8, 16, norm_groups=2, dropout=0.999999)).train()
    u, embedding = rand(2, 8, 4, 4), rand(2, 16)
    expected = u + block.conv2.bias[:, None, None]
    torch.testing.assert_close(block(u, embedding), expected.expand_as(u))


def test_attention_equals_its_equation():
    attention = randomize_weights(Attention(8, num_heads=2, norm_groups=2))
    x = rand(2, 8, 3, 4)
    h = F.group_norm(x, attention.norm.groups, attention.norm.weight, attention.norm.bias)
    q, k, v = F.conv2d(h, attention.qkv.weight, attention.qkv.bias).flatten(2).chunk(3, 1)
    heads = []
    for head in range(2):
        qh, kh, vh = (z[:, 4 * head : 4 * head + 4] for z in (q, k, v))
        weights = (torch.einsum("bci,bcj->bij", qh, kh) / math.sqrt(4)).softmax(-1)
        heads.append(torch.einsum("bij,bcj->bci", weights, vh))
    out = F.conv2d(torch.cat(heads, 1).reshape(x.shape), attention.project.weight, attention.project.bias)
    torch.testing.assert_close(attention(x), x + out)


@pytest.mark.parametrize(
    ("tokens", "gradient", "expected"),
    [(64, True, torch.float32), (64, False, torch.bfloat16), (MAX_TOKENS_FP32 + 1, True, torch.bfloat16)],
)
def test_attend_bf16_on_cpu_runs_in_fp32_where_that_is_faster(monkeypatch, tokens, gradient, expected):
    dtypes, attention = [], F.scaled_dot_product_attention

    def record(q, k, v):
        out = attention(q, k, v)
        dtypes.append(out.dtype)
        return out

    q, k, v = (torch.randn(2, 2, tokens, 6).bfloat16().requires_grad_(gradient) for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.softmax(exact[0] @ exact[1].mT / 6**0.5, -1) @ exact[2]
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v)
    assert (dtypes, out.dtype) == ([expected], torch.bfloat16)
    torch.testing.assert_close(out.double(), wanted, atol=0.02, rtol=0.02)
    if gradient:
        upstream = torch.randn_like(wanted)
        found = torch.autograd.grad(out, (q, k, v), upstream.bfloat16())
        for x, y in zip(found, torch.autograd.grad(wanted, exact, upstream), strict=True):
            assert (x.double() - y).norm() < 0.02 * y.norm()


def test_attention_indivisible_heads_become_one():
    assert Attention(6, num_heads=4).num_heads == 1
    assert Attention(8, num_heads=4).num_heads == 4


def test_resampling_layers_equal_their_definitions():
    down, up = randomize_weights(Downsample(3)), randomize_weights(Upsample(3))
    x = rand(1, 3, 6, 4)
    torch.testing.assert_close(down(x), F.conv2d(x, down.weight, down.bias, stride=2, padding=1))
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(up(x), F.conv2d(doubled, up.weight, up.bias, padding=1))


def test_encoder_returns_all_features_finest_first():
    encoder = Encoder(3, 8, (1, 2, 3), 2, (4,), 16, 16, norm_groups=4)
    skips = encoder(torch.randn(2, 3, 16, 16), torch.randn(2, 16))
    expected = [(8, 16)] * 3 + [(8, 8), (16, 8), (16, 8)] + [(16, 4), (24, 4), (24, 4)]
    assert [(s.shape[1], s.shape[2]) for s in skips] == expected
    assert encoder.skip_channels == [c for c, _ in expected]
    assert encoder.out_channels == 24
    assert [len(level.attention) for level in encoder.levels] == [0, 0, 2]


def test_decoder_has_one_block_more_per_level():
    encoder = Encoder(3, 8, (1, 2), 2, (8,), 16, 16, norm_groups=4)
    decoder = Decoder(16, encoder.skip_channels, 8, (1, 2), 2, (8,), 16, 16, 5, norm_groups=4)
    assert [len(level.blocks) for level in decoder.levels] == [3, 3]
    assert [len(level.attention) for level in decoder.levels] == [3, 0], "coarsest level first"
    widths = [block.shortcut.in_channels for level in decoder.levels for block in level.blocks]
    assert widths == [16 + 16, 16 + 16, 16 + 8, 16 + 8, 8 + 8, 8 + 8]
    skips = encoder(torch.randn(2, 3, 16, 16), torch.randn(2, 16))
    assert decoder(skips[-1], skips, torch.randn(2, 16)).shape == (2, 5, 16, 16)


def test_blocks_at_initialisation_are_identity_and_decoder_zero():
    u, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    middle = Middle(8, 16, norm_groups=2)
    torch.testing.assert_close(middle(u, embedding), u)
    decoder = Decoder(8, [8, 8], 8, (1,), 1, (), 4, 16, 3, norm_groups=2)
    assert decoder(u, [u, u], embedding).abs().max() == 0


def test_masked_norm_without_masks_raises():
    with pytest.raises(ValueError, match="needs masks"):
        Norm(8, 2, "masked_group")(torch.randn(2, 8, 3, 3))


@pytest.mark.parametrize(("rows", "expected"), [(4, torch.float32), (MAX_PRODUCTS_FP32 // 64 + 1, torch.bfloat16)])
def test_apply_linear_under_autocast_on_cpu_runs_in_fp32_where_the_products_are_few(rows, expected):
    layer, x = torch.nn.Linear(8, 8), torch.randn(rows, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = apply_linear(layer, x)
    assert out.dtype == expected
    torch.testing.assert_close(out.float(), layer(x.float()), rtol=2e-2, atol=2e-2)
