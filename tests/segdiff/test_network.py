"""What the factorized U-Net promises beyond its equations: what a branch sees, gradients, precision, layout, size."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from factorkit.segdiff.config import PRESETS, preset_config
from factorkit.segdiff.masks.network import RegionLogitNorm
from factorkit.segdiff.network import RegionTokens, count_parameters
from factorkit.utils.errors import ConfigError

REGIONAL = {"branch_norm": "pixel", "region_tokens": True, "normalised_logits": True, "half_resolution_masks": True}
DECODINGS = ("masked_skips", "concat", "masked_mid", "unshared")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_concat_takes_the_norm_it_is_given(tiny):
    kinds = {m.kind for m in tiny(decoding="concat", branch_norm="pixel").decoder.modules() if hasattr(m, "kind")}
    assert kinds == {"pixel"}


def test_fp32_is_fp64_to_rounding(tiny, batch):
    model, (x, t) = tiny(**REGIONAL), batch()
    with torch.no_grad():
        exact = model(x, t)
        single = model.float()(x.float(), t)
    assert single.prediction.dtype == single.bottleneck.masks.dtype == torch.float32
    torch.testing.assert_close(single.prediction.double(), exact.prediction, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [{}, REGIONAL])
def test_masks_sum_to_one_at_every_resolution_the_decoder_sees(tiny, batch, form, monkeypatch):
    model, (x, t) = tiny(**form), batch()
    seen = []
    inner = model.decoder.forward
    watched = lambda h, s, e, pyramid: (seen.extend(pyramid), inner(h, s, e, pyramid))[1]  # noqa: E731
    monkeypatch.setattr(model.decoder, "forward", watched)
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

    monkeypatch.setattr(model.masks.decoder, "forward", logits)


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
def test_a_branch_sees_all_of_h_mid_and_its_part_of_the_skips(tiny, batch, decoding, sees_mid, sees_skips, monkeypatch):
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
def test_unshared_decoders_with_equal_weights_are_the_shared_one(tiny, batch):
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
def test_every_parameter_learns(batch, decoding, form):
    changes = {"regions": 1} if decoding == "one region" else {"decoding": decoding}
    small = {
        "resolution": 16,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "norm_groups": 4,
    }
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
        assert model.masks.decoder.conv_out.bias.grad.abs().max() < 1e-6


@pytest.mark.parametrize("form", [{}, REGIONAL])
@torch.no_grad()
def test_segmenting_runs_no_decoder_and_gives_the_masks_of_the_forward_pass(tiny, batch, form, monkeypatch):
    model, (x, t) = tiny(**form), batch()
    expected = model(x, t).bottleneck.masks

    def never(*given):
        raise AssertionError("segment() ran a decoder")

    monkeypatch.setattr(model.decoder, "forward", never)
    if model.tokens is not None:
        monkeypatch.setattr(model.tokens, "forward", never)
    assert torch.equal(model.segment(x, t), expected)


# --- normalised logits and tokens ---


def test_logit_norm_normalises_each_region_over_the_batch():
    norm = RegionLogitNorm(3).train()
    logits = torch.randn(8, 3, 6, 6) * torch.tensor([1.0, 3.0, 7.0])[:, None, None]
    logits[:3, 0] += 50.0
    out = norm(logits)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), unbiased=False), torch.full((3,), 1.5), atol=1e-3, rtol=0)
    with torch.no_grad():
        norm.gain.fill_(4.0)
    torch.testing.assert_close(norm(logits), out * (4.0 / 1.5))


def test_logit_norm_ignores_what_softmax_ignores():
    norm, logits = RegionLogitNorm(3).train(), torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(norm(logits), norm(logits + 9 * torch.randn(4, 1, 6, 6)), atol=1e-4, rtol=1e-4)


def test_running_averages_of_the_logit_norm_follow_the_batches():
    norm = RegionLogitNorm(2, momentum=0.25).train()
    logits = torch.randn(4, 2, 5, 5) + torch.tensor([3.0, -1.0])[:, None, None]
    centred = logits - logits.mean(1, keepdim=True)
    norm(logits)
    mean, variance = centred.mean((0, 2, 3)), centred.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(norm.mean, 0.25 * mean)
    torch.testing.assert_close(norm.variance, 0.75 + 0.25 * variance)


@torch.no_grad()
def test_in_evaluation_an_image_does_not_depend_on_its_companions(tiny, batch):
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


# --- numbers ---


@pytest.mark.parametrize("form", [{}, {**REGIONAL}])
def test_gradients_are_those_of_finite_differences(tiny, batch, form):
    model = tiny(**form, regions=2, num_res_blocks=1).train()
    x, t = batch(count=4)
    weights = torch.randn_like(x)

    def value():
        prediction, regions = model(x, t)
        return (prediction * weights).sum() + regions.masks[:, 0].square().sum()

    x.requires_grad_()
    value().backward()
    entries = [(p, torch.randint(p.numel(), ()).item()) for p in model.parameters()]
    picked = [entries[i] for i in torch.randperm(len(entries))[:25]]
    picked += [(x, 17), (model.masks.decoder.conv_out.weight, 3)]
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
def test_channels_last_gives_the_same(tiny, batch, form):
    model, (x, t) = tiny(torch.float32, **form), batch(torch.float32)
    expected = model(x, t)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(got.prediction, expected.prediction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.bottleneck.masks, expected.bottleneck.masks, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", [{}, REGIONAL])
def test_bf16_autocast_is_near_fp32(tiny, batch, form):
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
def test_the_reference_ops_give_the_same_numbers(tiny, batch, decoding, monkeypatch):
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


def test_it_compiles_without_a_graph_break(tiny, batch):
    model, (x, t) = tiny(torch.float32, **REGIONAL, attention_resolutions=()).train(), batch(torch.float32, count=8)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (compiled, twin):
        run(x, t).prediction.square().mean().backward()
    for (name, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        named = lambda m, name=name: f"{name}: {m}"  # noqa: E731
        torch.testing.assert_close(ours.grad, plain.grad, atol=1e-5, rtol=1e-3, msg=named)


# --- sizes ---


@pytest.mark.parametrize(
    ("preset", "regions", "millions"),
    [("flowers64", 1, 121.06), ("flowers64", 3, 193.74), ("flowers128", 1, 95.0), ("flowers128", 3, 152.4)],
)
def test_parameter_counts_of_the_thesis_models(preset, regions, millions):
    with torch.device("meta"):
        model = preset_config(preset, regions=regions).resolved().build()
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_answer_at_their_resolution(preset):
    config = preset_config(preset).resolved()
    with torch.device("meta"):
        x = torch.empty(1, 3, config.resolution, config.resolution)
        out = config.build()(x, torch.zeros(1, dtype=torch.int64))
    assert out.prediction.shape == x.shape
    assert out.bottleneck.masks.shape == (1, config.num_leaf_regions, config.resolution, config.resolution)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"regions": 0}, r"regions=0.*regions=1 is the plain DDPM"),
        ({"resolution": 17}, r"resolution=17.*resolution=16"),
        ({"resolution": 23, "channel_mult": (1, 1, 2, 2)}, r"cannot be halved 3 times.*resolution=24"),
        ({"resolution": 1}, r"resolution=1 .*resolution=2"),
        ({"decoding": "both"}, r"decoding='both'.*masked_skips, concat"),
        ({"decoding": "concat", "branch_norm": "masked_group"}, r"decoding='concat'.*branch_norm='group'"),
        ({"decoding": "masked_mid", "branch_norm": "masked_group"}, r"branch_norm='group'"),
        ({"decoding": "concat", "region_tokens": True}, r"region_tokens=False"),
        ({"channel_mult": (2,), "half_resolution_masks": True}, r"channel_mult more"),
    ],
)
def test_parts_that_cannot_work_together_are_refused_with_the_cure(tiny, changes, says):
    with pytest.raises(ConfigError, match=says):
        tiny(**changes)


def test_one_region_does_not_mind_settings_of_masks_it_lacks(tiny):
    tiny(regions=1, channel_mult=(1,), **REGIONAL)
