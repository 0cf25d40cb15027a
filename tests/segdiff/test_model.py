"""The factorized U-Net against its equations (thesis 2.2-2.7), written naively with the same weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from factorkit.errors import ConfigError
from factorkit.segdiff.config import PRESETS, preset_config
from factorkit.segdiff.model import FactorizedUNet, RegionLogitNorm, RegionTokens, parameter_count

TINY = {
    "regions": 3, "resolution": 16, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (8,), "heads": 2, "groups": 4,
}  # fmt: skip
REGIONAL = {"branch_norm": "masked_group", "region_tokens": True, "normalised_logits": True, "half_resolution_masks": True}
DECODINGS = ("masked_skips", "concat", "masked_mid", "unshared")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(dtype=torch.float64, **changes) -> FactorizedUNet:
    """A tiny network with no weight left at zero and masks far from uniform."""
    model = FactorizedUNet(**{**TINY, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        if model.regions > 1:
            model.mask_generator.conv_out.weight.mul_(3)
        for buffer in model.buffers():  # running averages that are told apart from their initial values
            buffer.add_(torch.rand_like(buffer) * 0.5)
    return model.to(dtype).eval()


def batch(dtype=torch.float64, size=(16, 16), count=2):
    return torch.randn(count, 3, *size, dtype=dtype), torch.tensor([30, 730, 210, 5, 999, 400, 31, 600][:count])


# --- the U-Net once more, as plainly as it can be said; skips come masked and concatenated --------------------------------


def naive_norm(x, norm, mask=None):
    if norm.kind == "group":
        return F.group_norm(x, norm.groups, norm.weight, norm.bias, eps=1e-5)
    if norm.kind == "pixel":
        return x / (x.square().mean(1, keepdim=True) + 1e-3).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
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
    for qh, kh, vh in zip(*(z.chunk(attention.heads, 1) for z in (q, k, v)), strict=True):
        weights = (qh.transpose(1, 2) @ kh / math.sqrt(qh.shape[1])).softmax(-1)
        out.append(vh @ weights.transpose(1, 2))
    return x + attention.project(torch.cat(out, 1).reshape(x.shape))


def naive_encoder(encoder, x, embedding):
    h = F.conv2d(x, encoder.conv_in.weight, encoder.conv_in.bias, padding=1)
    skips = [h]
    for level in encoder.levels:
        for i, block in enumerate(level["blocks"]):
            h = naive_block(block, h, embedding)
            h = naive_attention(level["attention"][i], h) if len(level["attention"]) else h
            skips.append(h)
        if "down" in level:
            h = F.conv2d(h, level["down"].weight, level["down"].bias, stride=2, padding=1)
            skips.append(h)
    return skips


def naive_middle(middle, h, embedding):
    h = naive_attention(middle.attention, naive_block(middle.block1, h, embedding))
    return naive_block(middle.block2, h, embedding)


def naive_decoder(decoder, h, skips, embedding, mask=None):
    """``mask`` [B, 1, H, W] only weighs masked norms."""
    skips = list(skips)
    for level in decoder.levels:
        here = None if mask is None else F.interpolate(mask, h.shape[2:], mode="area")
        for i, block in enumerate(level["blocks"]):
            h = naive_block(block, torch.cat([h, skips.pop()], 1), embedding, here)
            h = naive_attention(level["attention"][i], h, here) if len(level["attention"]) else h
        if "up" in level:
            up = level["up"]
            h = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), up.weight, up.bias, padding=1)
    assert not skips, "every skip is used once"
    return decoder.conv_out(F.silu(naive_norm(h, decoder.norm_out, mask)))


def naive_trunk(model, x, t):
    embedding = model.time(t)
    skips = naive_encoder(model.encoder, x, embedding)
    return embedding, skips, naive_middle(model.middle, skips[-1], embedding)


def masked(skips, mask):
    """h_enc * m_k at every resolution, the mask averaged over the area of each coarser pixel."""
    return [s * F.interpolate(mask, s.shape[2:], mode="area") for s in skips]


@torch.no_grad()
def naive_thesis(model, x, t, decoding="masked_skips"):
    embedding, skips, h = naive_trunk(model, x, t)
    masks = naive_decoder(model.mask_generator, h, skips, embedding).softmax(1)
    if decoding == "concat":
        widen = lambda f: torch.cat([f, F.interpolate(masks, f.shape[2:], mode="area")], 1)  # noqa: E731
        return masks, naive_decoder(model.decoder, widen(h), [widen(s) for s in skips], embedding)
    prediction = 0
    for k in range(model.regions):
        mask = masks[:, k : k + 1]
        decoder = model.decoder[k] if decoding == "unshared" else model.decoder
        if decoding == "masked_mid":
            out = naive_decoder(decoder, masked([h], mask)[0], skips, embedding)
        else:
            out = naive_decoder(decoder, h, masked(skips, mask), embedding, mask)
        prediction = prediction + mask * out
    return masks, prediction


@torch.no_grad()
def naive_regional(model, x, t):
    embedding, skips, h = naive_trunk(model, x, t)
    logits = naive_decoder(model.mask_generator, h, skips[model.blocks + 1 :], embedding)
    logits = F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)
    logits = logits - logits.mean(1, keepdim=True)
    norm, level = model.logit_norm, t // 100
    mean, variance = norm.mean[level][:, :, None, None], norm.variance[level][:, :, None, None]
    masks = (norm.gain * (logits - mean) / (variance + 1e-5).sqrt()).softmax(1)
    feature = model.tokens.feature(x)
    prediction = 0
    for k in range(model.regions):
        mask = masks[:, k : k + 1]
        token = (mask * feature).sum((2, 3)) / (mask.sum((2, 3)) + 0.5)
        out = naive_decoder(model.decoder, h, masked(skips, mask), embedding + model.tokens.embed(token), mask)
        prediction = prediction + mask * out
    return masks, prediction


# --- the equations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", DECODINGS)
def test_thesis_form_is_its_equations(decoding):
    model = tiny(decoding=decoding)
    x, t = batch()
    with torch.no_grad():
        prediction, regions = model(x, t)
    masks, expected = naive_thesis(model, x, t, decoding)
    assert masks.amax(1).mean() > 0.5, "masks near 1/K would not tell the branches apart"
    torch.testing.assert_close(regions.masks, masks)
    torch.testing.assert_close(prediction, expected)
    if decoding != "concat":
        assert regions.branches.shape == (2, 3, 3, 16, 16)
        torch.testing.assert_close((regions.branches * regions.masks[:, :, None]).sum(1), expected)


@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_regional_form_is_its_formulas_also_off_the_square(size):
    model = tiny(**REGIONAL)
    x, t = batch(size=size)
    with torch.no_grad():
        prediction, regions = model(x, t)
    masks, expected = naive_regional(model, x, t)
    torch.testing.assert_close(regions.masks, masks)
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("norm", ["pixel", "masked_group"])
def test_branch_norms_are_their_formulas(norm):
    model = tiny(branch_norm=norm)
    kinds = {m.kind for m in model.decoder.modules() if hasattr(m, "kind")}
    elsewhere = {m.kind for part in (model.encoder, model.middle, model.mask_generator) for m in part.modules()
                 if hasattr(m, "kind")}  # fmt: skip
    assert (kinds, elsewhere) == ({norm}, {"group"})
    x, t = batch()
    with torch.no_grad():
        torch.testing.assert_close(model(x, t).prediction, naive_thesis(model, x, t)[1])


def test_concat_takes_the_norm_it_is_given():
    kinds = {m.kind for m in tiny(decoding="concat", branch_norm="pixel").decoder.modules() if hasattr(m, "kind")}
    assert kinds == {"pixel"}


def test_fp32_is_fp64_to_rounding():
    model, (x, t) = tiny(**REGIONAL), batch()
    with torch.no_grad():
        exact = model(x, t)
        single = model.float()(x.float(), t)
    assert single.prediction.dtype == single.bottleneck.masks.dtype == torch.float32
    torch.testing.assert_close(single.prediction.double(), exact.prediction, atol=1e-4, rtol=1e-4)


def test_one_region_is_the_plain_unet():
    model, (x, t) = tiny(regions=1), batch()
    with torch.no_grad():
        prediction, regions = model(x, t)
        embedding, skips, h = naive_trunk(model, x, t)
        torch.testing.assert_close(prediction, naive_decoder(model.decoder, h, skips, embedding))
        in_a_row = model.decoder(model.middle(model.encoder(x, embedding)[-1], embedding), skips, embedding)
    torch.testing.assert_close(prediction, in_a_row)
    assert (regions.masks == 1).all() and regions.masks.shape == (2, 1, 16, 16)
    assert not hasattr(model, "mask_generator")


@pytest.mark.parametrize("form", [{}, REGIONAL])
def test_masks_sum_to_one_at_every_resolution_the_decoder_sees(form, monkeypatch):
    model, (x, t) = tiny(**form), batch()
    seen = []
    inner = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda h, s, e, pyramid: (seen.extend(pyramid), inner(h, s, e, pyramid))[1])
    with torch.no_grad():
        seen.append(model(x, t).bottleneck.masks)
        seen.append(model.segment(x, t))
    assert [m.shape[-1] for m in seen] == [16, 8, 16, 16]
    for masks in seen:
        assert masks.min() >= 0
        torch.testing.assert_close(masks.sum(1), torch.ones_like(masks[:, 0]))


def halves(model, monkeypatch):
    """Region 0 sees the right half of the picture, region 1 the left one, whatever the network thinks."""
    def logits(h, skips, embedding, pyramid=None):
        out = torch.full((len(h), 2, 16, 16), -1e4, dtype=h.dtype)
        out[:, 0, :, 8:] = out[:, 1, :, :8] = 1e4
        return out

    monkeypatch.setattr(model.mask_generator, "forward", logits)


def disturb(part, change, monkeypatch):
    """``part.forward`` with its answer changed."""
    inner = part.forward
    monkeypatch.setattr(part, "forward", lambda *given: change(inner(*given)))


def left(h):
    """``h`` plus noise in its left half."""
    h = h.clone()
    h[..., : h.shape[-1] // 2] += 5 * torch.randn_like(h[..., : h.shape[-1] // 2])
    return h


@pytest.mark.parametrize(("decoding", "sees_mid", "sees_skips"), [("masked_skips", 1, 0), ("masked_mid", 0, 1)])
@torch.no_grad()
def test_a_branch_sees_all_of_h_mid_and_only_its_part_of_the_skips(decoding, sees_mid, sees_skips, monkeypatch):
    model, (x, t) = tiny(decoding=decoding, regions=2), batch()
    halves(model, monkeypatch)
    calm = model(x, t).bottleneck.branches
    with monkeypatch.context() as patch:
        disturb(model.middle, left, patch)
        by_mid = (model(x, t).bottleneck.branches - calm).abs().amax((0, 2, 3, 4))
    with monkeypatch.context() as patch:  # all skips but the last, which h_mid is made from
        disturb(model.encoder, lambda skips: [*map(left, skips[:-1]), skips[-1]], patch)
        by_skips = (model(x, t).bottleneck.branches - calm).abs().amax((0, 2, 3, 4))
    assert (by_mid[0] > 0) == sees_mid
    assert (by_skips[0] > 0) == sees_skips
    assert by_mid[1] > 0 and by_skips[1] > 0


@torch.no_grad()
def test_unshared_decoders_with_equal_weights_are_the_shared_one():
    model, (x, t) = tiny(**REGIONAL), batch()
    apart = tiny(**REGIONAL, decoding="unshared")
    assert len(apart.decoder) == 3
    assert not torch.equal(apart.decoder[0].conv_out.weight, apart.decoder[1].conv_out.weight)
    weights = model.state_dict()
    shared = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
    copies = {f"decoder.{i}.{k[8:]}": v for k, v in weights.items() if k.startswith("decoder.") for i in range(3)}
    apart.load_state_dict({**shared, **copies})
    torch.testing.assert_close(apart(x, t).prediction, model(x, t).prediction)


@pytest.mark.parametrize("decoding", [*DECODINGS, "one region"])
@pytest.mark.parametrize("form", ["thesis", "regional"])
def test_every_parameter_learns(decoding, form):
    changes = {"regions": 1} if decoding == "one region" else {"decoding": decoding}
    small = {k: v for k, v in TINY.items() if k not in changes}
    model = preset_config(None, form=form, steps=1, **small, **changes).resolved().build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t = batch(torch.float32, count=8)
    for _ in range(4):  # zero-initialised layers hide one another, and three lie in a row
        optimizer.zero_grad()
        F.mse_loss(model(x, t).prediction, x).backward()
        optimizer.step()
    idle = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert idle == set()
    # the logit norm takes the mean of each region's logits out, so this bias has only rounding errors to learn from
    if form == "regional" and changes.get("regions") != 1:
        assert model.mask_generator.conv_out.bias.grad.abs().max() < 1e-6


@pytest.mark.parametrize("form", [{}, REGIONAL])
@torch.no_grad()
def test_segmenting_runs_no_decoder_and_gives_the_masks_of_the_forward_pass(form, monkeypatch):
    model, (x, t) = tiny(**form), batch()
    expected = model(x, t).bottleneck.masks

    def never(*given):
        raise AssertionError("segment() ran a decoder")

    monkeypatch.setattr(model.decoder, "forward", never)
    if model.tokens is not None:
        monkeypatch.setattr(model.tokens, "forward", never)
    assert torch.equal(model.segment(x, t), expected)


# --- normalised logits and tokens --------------------------------------------------------------------------------------------


def test_logit_norm_normalises_each_region_among_images_of_like_noise():
    norm = RegionLogitNorm(3, 1000).train()
    offsets = torch.tensor([0.0, 50.0])  # images of low and of high noise live far apart
    t = torch.tensor([900, 3, 905, 1, 910, 2, 915, 0])
    logits = torch.randn(8, 3, 6, 6) * torch.tensor([1.0, 3.0, 7.0])[:, None, None]
    logits[:, 0] += offsets[(t > 500).long()][:, None, None]
    out = norm(logits, t)
    for chosen in (t > 500, t <= 500):
        part = out[chosen]
        torch.testing.assert_close(part.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(part.std((0, 2, 3), unbiased=False), torch.full((3,), 1.5), atol=1e-3, rtol=0)
    with torch.no_grad():
        norm.gain.fill_(4.0)
    torch.testing.assert_close(norm(logits, t), out * (4.0 / 1.5))


def test_logit_norm_ignores_what_softmax_ignores():
    norm, t = RegionLogitNorm(3, 1000).train(), torch.tensor([5, 80, 400, 700])
    logits = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(norm(logits, t), norm(logits + 9 * torch.randn(4, 1, 6, 6), t), atol=1e-4, rtol=1e-4)


def test_running_averages_of_the_logit_norm_follow_the_levels_that_occur():
    norm = RegionLogitNorm(2, 1000, momentum=0.25).train()
    logits = torch.randn(4, 2, 5, 5) + torch.tensor([3.0, -1.0])[:, None, None]
    centred = logits - logits.mean(1, keepdim=True)
    norm(logits, torch.tensor([120, 199, 150, 100]))
    mean, variance = centred.mean((0, 2, 3)), centred.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.mean[1], 0.25 * mean)
    torch.testing.assert_close(norm.variance[1], 0.75 + 0.25 * variance)
    others = [i for i in range(10) if i != 1]
    assert (norm.mean[others] == 0).all() and (norm.variance[others] == 1).all()


@torch.no_grad()
def test_in_evaluation_an_image_does_not_depend_on_its_companions():
    model, (x, t) = tiny(**REGIONAL), batch(count=8)
    before = {k: v.clone() for k, v in model.named_buffers()}
    together = model(x, t)
    for i in (0, 5):
        alone = model(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together.prediction[i : i + 1], alone.prediction)
        torch.testing.assert_close(together.bottleneck.masks[i : i + 1], alone.bottleneck.masks)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def test_a_region_token_does_not_depend_on_the_area_and_only_on_its_own_pixels():
    tokens = RegionTokens(3, 8, 16).double()
    image = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    image[..., 32:] = 1.0
    small, large = torch.zeros(2, 1, 1, 64, 64, dtype=torch.float64)
    small[..., 10:30, 36:56] = large[..., 2:62, 36:60] = 1.0
    torch.testing.assert_close(tokens(image, small), tokens(image, large), atol=2e-2, rtol=2e-2)
    elsewhere = image.clone()
    elsewhere[..., :30] = torch.randn(1, 3, 64, 30, dtype=torch.float64)
    torch.testing.assert_close(tokens(image, small), tokens(elsewhere, small))


# --- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {**REGIONAL}])
def test_gradients_are_those_of_finite_differences(form):
    model = tiny(**form, regions=2, blocks=1).train()
    x, t = batch(count=4)
    weights = torch.randn_like(x)

    def value():
        prediction, regions = model(x, t)
        return (prediction * weights).sum() + regions.masks[:, 0].square().sum()

    x.requires_grad_()
    value().backward()
    entries = [(p, i) for p in model.parameters() for i in (torch.randint(p.numel(), ()).item(),)]
    picked = [entries[i] for i in torch.randperm(len(entries))[:25]] + [(x, 17), (model.mask_generator.conv_out.weight, 3)]
    for tensor, i in picked:
        flat, step = tensor.detach().view(-1), 1e-5
        there = []
        for sign in (1, -1):
            flat[i] += sign * step
            there.append(value().item())
            flat[i] -= sign * step
        numeric = (there[0] - there[1]) / (2 * step)
        assert tensor.grad.view(-1)[i].item() == pytest.approx(numeric, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("form", [{}, REGIONAL])
@torch.no_grad()
def test_channels_last_gives_the_same(form):
    model, (x, t) = tiny(torch.float32, **form), batch(torch.float32)
    expected = model(x, t)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(got.prediction, expected.prediction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.bottleneck.masks, expected.bottleneck.masks, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", [{}, REGIONAL])
def test_bf16_autocast_is_near_fp32(form):
    model, (x, t) = tiny(torch.float32, **form), batch(torch.float32)
    expected = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, t)
    assert got.prediction.dtype == got.bottleneck.masks.dtype == torch.float32
    scale = expected.prediction.std()
    assert 0 < (got.prediction - expected.prediction).abs().mean() < 0.05 * scale
    torch.testing.assert_close(got.bottleneck.masks.sum(1), torch.ones(2, 16, 16))
    got.prediction.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("decoding", DECODINGS)
def test_the_reference_ops_give_the_same_numbers(decoding, monkeypatch):
    form = REGIONAL if decoding in ("masked_skips", "unshared") else {}
    model, (x, t) = tiny(**form, decoding=decoding).train(), batch(count=4)
    results = []
    for flag in ("0", "1"):
        monkeypatch.setenv("FACTORKIT_REFERENCE", flag)
        twin = copy.deepcopy(model)
        prediction = twin(x, t).prediction
        prediction.square().sum().backward()
        results.append([prediction, *(p.grad for p in twin.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


def test_it_compiles_without_a_graph_break():
    model, (x, t) = tiny(torch.float32, **REGIONAL, attention=()).train(), batch(torch.float32, count=8)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (compiled, twin):
        run(x, t).prediction.square().mean().backward()
    for (name, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


# --- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "regions", "millions"),
    [("flowers64", 1, 121.06), ("flowers64", 3, 193.74), ("flowers128", 1, 95.0), ("flowers128", 3, 152.4)],
)
def test_parameter_counts_of_the_thesis_models(preset, regions, millions):
    with torch.device("meta"):
        model = preset_config(preset, regions=regions).resolved().build()
    assert parameter_count(model) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_answer_at_their_resolution(preset):
    config = preset_config(preset).resolved()
    with torch.device("meta"):
        x = torch.empty(1, 3, config.resolution, config.resolution)
        out = config.build()(x, torch.zeros(1, dtype=torch.int64))
    assert out.prediction.shape == x.shape
    assert out.bottleneck.masks.shape == (1, config.regions, config.resolution, config.resolution)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regions": 0}, r"regions=0.*regions=1 is the plain DDPM"),
        ({"resolution": 17}, r"resolution=17.*resolution=16"),
        ({"resolution": 23, "multipliers": (1, 1, 2, 2)}, r"cannot be halved 3 times.*resolution=24"),
        ({"resolution": 1}, r"resolution=1 .*resolution=2"),
        ({"decoding": "both"}, r"decoding='both'.*masked_skips, concat"),
        ({"decoding": "concat", "branch_norm": "masked_group"}, r"decoding='concat'.*branch_norm='group'"),
        ({"decoding": "masked_mid", "branch_norm": "masked_group"}, r"branch_norm='group'"),
        ({"decoding": "concat", "region_tokens": True}, r"region_tokens=False"),
        ({"multipliers": (2,), "half_resolution_masks": True}, r"more multipliers"),
    ],
)
def test_parts_that_cannot_work_together_are_refused_with_the_cure(changes, says):
    with pytest.raises(ConfigError, match=says):
        FactorizedUNet(**{**TINY, **changes})


def test_one_region_does_not_mind_settings_of_masks_it_lacks():
    FactorizedUNet(**{**TINY, "regions": 1, "multipliers": (1,), **REGIONAL})
