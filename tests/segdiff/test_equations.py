"""The factorized U-Net against its equations (thesis 2.2-2.7), written naively with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

REGIONAL = {"branch_norm": "pixel", "region_tokens": True, "normalised_logits": True, "half_resolution_masks": True}
DECODINGS = ("masked_skips", "concat", "masked_mid", "unshared")


# --- a naive U-Net; the caller masks the skips ---


def naive_norm(x, norm, mask=None):
    if norm.kind == "group":
        return F.group_norm(x, norm.groups, norm.weight, norm.bias, eps=1e-5)
    if norm.kind == "pixel":
        x = x / (x.square().mean(1, keepdim=True) + 1e-3).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]
    weights = (mask + 1e-3) / (mask + 1e-3).sum((2, 3), keepdim=True)  # [B, 1, H, W]
    parts = []
    for part in x.chunk(norm.groups, 1):
        mean = (part * weights).sum((2, 3)).mean(1)[:, None, None, None]
        variance = ((part - mean).square() * weights).sum((2, 3)).mean(1)[:, None, None, None]
        parts.append((part - mean) / (variance + 1e-4).sqrt())
    return torch.cat(parts, 1) * norm.weight[:, None, None] + norm.bias[:, None, None]


def naive_block(block, x, embedding, mask=None):
    h = F.conv2d(F.silu(naive_norm(x, block.norm1, mask)), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = block.modulation(F.silu(embedding))[:, :, None, None].chunk(2, 1)
    h = F.silu(naive_norm(h, block.norm2, mask) * (1 + scale) + shift)
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    same = isinstance(block.shortcut, torch.nn.Identity)
    return h + (x if same else F.conv2d(x, block.shortcut.weight, block.shortcut.bias))


def naive_attention(attention, x, mask=None):
    q, k, v = attention.qkv(naive_norm(x, attention.norm, mask)).flatten(2).chunk(3, 1)
    out = []
    for qh, kh, vh in zip(*(z.chunk(attention.num_heads, 1) for z in (q, k, v)), strict=True):
        weights = (qh.transpose(1, 2) @ kh / math.sqrt(qh.shape[1])).softmax(-1)
        out.append(vh @ weights.transpose(1, 2))
    return x + attention.project(torch.cat(out, 1).reshape(x.shape))


def naive_encoder(encoder, x, embedding):
    h = F.conv2d(x, encoder.conv_in.weight, encoder.conv_in.bias, padding=1)
    skips = [h]
    for level in encoder.levels:
        for i, block in enumerate(level.blocks):
            h = naive_block(block, h, embedding)
            h = naive_attention(level.attention[i], h) if len(level.attention) else h
            skips.append(h)
        if level.down is not None:
            h = F.conv2d(h, level.down.weight, level.down.bias, stride=2, padding=1)
            skips.append(h)
    return skips


def naive_middle(middle, h, embedding):
    h = naive_attention(middle.attention, naive_block(middle.block1, h, embedding))
    return naive_block(middle.block2, h, embedding)


def naive_decoder(decoder, h, skips, embedding, mask=None):
    """``mask`` [B, 1, H, W] only affects masked norms."""
    skips = list(skips)
    for level in decoder.levels:
        here = None if mask is None else F.interpolate(mask, h.shape[2:], mode="area")
        for i, block in enumerate(level.blocks):
            h = naive_block(block, torch.cat([h, skips.pop()], 1), embedding, here)
            h = naive_attention(level.attention[i], h, here) if len(level.attention) else h
        if level.up is not None:
            up = level.up
            h = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), up.weight, up.bias, padding=1)
    assert not skips, "every skip must be used once"
    return decoder.conv_out(F.silu(naive_norm(h, decoder.norm_out, mask)))


def naive_trunk(model, x, t):
    embedding = model.time(t)
    skips = naive_encoder(model.encoder, x, embedding)
    return embedding, skips, naive_middle(model.middle, skips[-1], embedding)


def mask_skips(skips, mask):
    """h_enc * m_k at every resolution, the mask averaged over the area of each coarser pixel."""
    return [s * F.interpolate(mask, s.shape[2:], mode="area") for s in skips]


@torch.no_grad()
def naive_thesis(model, x, t, decoding="masked_skips"):
    embedding, skips, h = naive_trunk(model, x, t)
    masks = naive_decoder(model.masks.decoder, h, skips, embedding).softmax(1)
    if decoding == "concat":
        widen = lambda f: torch.cat([f, F.interpolate(masks, f.shape[2:], mode="area")], 1)  # noqa: E731
        return masks, naive_decoder(model.decoder, widen(h), [widen(s) for s in skips], embedding)
    prediction = 0
    for k in range(model.regions):
        mask = masks[:, k : k + 1]
        decoder = model.decoder[k] if decoding == "unshared" else model.decoder
        if decoding == "masked_mid":
            out = naive_decoder(decoder, mask_skips([h], mask)[0], skips, embedding)
        else:
            out = naive_decoder(decoder, h, mask_skips(skips, mask), embedding, mask)
        prediction = prediction + mask * out
    return masks, prediction


@torch.no_grad()
def naive_regional(model, x, t):
    embedding, skips, h = naive_trunk(model, x, t)
    logits = naive_decoder(model.masks.decoder, h, skips[model.masks.skips_left_out :], embedding)
    logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)
    logits = logits - logits.mean(1, keepdim=True)
    norm = model.masks.norm
    mean, variance = norm.mean[:, None, None], norm.variance[:, None, None]
    masks = (norm.gain * (logits - mean) / (variance + 1e-5).sqrt()).softmax(1)
    feature = model.tokens.feature(x)
    prediction = 0
    for k in range(model.regions):
        mask = masks[:, k : k + 1]
        token = (mask * feature).sum((2, 3)) / (mask.sum((2, 3)) + 0.5)
        out = naive_decoder(model.decoder, h, mask_skips(skips, mask), embedding + model.tokens.embed(token), mask)
        prediction = prediction + mask * out
    return masks, prediction


# --- the equations ---


@pytest.mark.parametrize("decoding", DECODINGS)
def test_thesis_form_equals_its_equations(build_tiny, make_batch, decoding):
    model = build_tiny(decoding=decoding)
    x, t = make_batch()
    with torch.no_grad():
        prediction, regions = model(x, t)
    masks, expected = naive_thesis(model, x, t, decoding)
    assert masks.amax(1).mean() > 0.5, "masks near 1/K would not distinguish the branches"
    torch.testing.assert_close(regions.masks, masks)
    torch.testing.assert_close(prediction, expected)
    if decoding != "concat":
        assert regions.branches.shape == (2, 3, 3, 16, 16)
        torch.testing.assert_close((regions.branches * regions.masks[:, :, None]).sum(1), expected)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_regional_form_of_any_shape_equals_its_equations(build_tiny, make_batch, size):
    model = build_tiny(**REGIONAL)
    x, t = make_batch(size=size)
    with torch.no_grad():
        prediction, regions = model(x, t)
    masks, expected = naive_regional(model, x, t)
    torch.testing.assert_close(regions.masks, masks)
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("norm", ["pixel", "masked_group"])
def test_branch_norms_equal_their_equations(build_tiny, make_batch, norm):
    model = build_tiny(branch_norm=norm)
    kinds = {m.kind for m in model.decoder.modules() if hasattr(m, "kind")}
    elsewhere = {
        m.kind
        for part in (model.encoder, model.middle, model.masks.decoder)
        for m in part.modules()
        if hasattr(m, "kind")
    }
    assert (kinds, elsewhere) == ({norm}, {"group"})
    x, t = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(model(x, t).prediction, naive_thesis(model, x, t)[1])


def test_one_region_equals_the_plain_unet(build_tiny, make_batch):
    model, (x, t) = build_tiny(regions=1), make_batch()
    with torch.no_grad():
        prediction, regions = model(x, t)
        embedding, skips, h = naive_trunk(model, x, t)
        torch.testing.assert_close(prediction, naive_decoder(model.decoder, h, skips, embedding))
        in_a_row = model.decoder(model.middle(model.encoder(x, embedding)[-1], embedding), skips, embedding)
    torch.testing.assert_close(prediction, in_a_row)
    assert (regions.masks == 1).all() and regions.masks.shape == (2, 1, 16, 16)
    assert model.masks is None
