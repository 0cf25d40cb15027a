"""Properties of the factorized U-Net: the inputs of a branch, gradients, precision, memory layout and size."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from factorkit.segdiff.config import preset_config
from factorkit.segdiff.network import RegionTokens, count_parameters
from factorkit.segdiff.presets import PRESETS
from factorkit.utils.errors import ConfigError

REGIONAL = {"branch_norm": "pixel", "region_tokens": True, "normalised_logits": True, "half_resolution_masks": True}
UVIT = {**REGIONAL, "backbone": "uvit"}
DECODINGS = ("masked_skips", "concat", "masked_mid", "unshared")


@pytest.fixture(autouse=True)
def set_seed():
    torch.manual_seed(0)


def test_concat_decoder_uses_the_requested_norm(build_tiny):
    kinds = {m.kind for m in build_tiny(decoding="concat", branch_norm="pixel").decoder.modules() if hasattr(m, "kind")}
    assert kinds == {"pixel"}


def test_forward_in_fp32_equals_fp64_to_rounding(build_tiny, make_batch):
    model, (x, t) = build_tiny(**REGIONAL), make_batch()
    with torch.no_grad():
        exact = model(x, t)
        single = model.float()(x.float(), t)
    assert single.prediction.dtype == single.bottleneck.masks.dtype == torch.float32
    torch.testing.assert_close(single.prediction.double(), exact.prediction, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [{}, REGIONAL, UVIT], ids=["thesis", "regional", "uvit"])
def test_masks_at_every_decoder_resolution_sum_to_one(build_tiny, make_batch, form, monkeypatch):
    model, (x, t) = build_tiny(**form), make_batch()
    recorded = []
    inner = model.decoder.forward
    record = lambda h, s, e, pyramid: (recorded.extend(pyramid), inner(h, s, e, pyramid))[1]  # noqa: E731
    monkeypatch.setattr(model.decoder, "forward", record)
    with torch.no_grad():
        recorded.append(model(x, t).bottleneck.masks)
        recorded.append(model.segment(x, t))
    assert [m.shape[-1] for m in recorded] == ([8, 16, 16] if form is UVIT else [16, 8, 16, 16])
    for masks in recorded:
        assert masks.min() >= 0
        torch.testing.assert_close(masks.sum(1), torch.ones_like(masks[:, 0]))


def patch_halves(model, monkeypatch):
    """Make region 0 the right half of every image and region 1 the left half."""

    def logits(h, skips, embedding, pyramid=None):
        out = torch.full((len(h), 2, 16, 16), -1e4, dtype=h.dtype)
        out[:, 0, :, 8:] = out[:, 1, :, :8] = 1e4
        return out

    monkeypatch.setattr(model.masks.decoder, "forward", logits)


def disturb_output(part, change, monkeypatch):
    """Apply ``change`` to the output of ``part.forward``."""
    inner = part.forward
    monkeypatch.setattr(part, "forward", lambda *args: change(inner(*args)))


def disturb_left(h):
    """Add noise to the left half of ``h``."""
    h = h.clone()
    h[..., : h.shape[-1] // 2] += 5 * torch.randn_like(h[..., : h.shape[-1] // 2])
    return h


@pytest.mark.parametrize(("decoding", "sees_mid", "sees_skips"), [("masked_skips", 1, 0), ("masked_mid", 0, 1)])
@torch.no_grad()
def test_branch_masked_features_exclude_other_regions(
    build_tiny, make_batch, decoding, sees_mid, sees_skips, monkeypatch
):
    model, (x, t) = build_tiny(decoding=decoding, regions=2), make_batch()
    patch_halves(model, monkeypatch)
    baseline = model(x, t).bottleneck.branches
    with monkeypatch.context() as patch:
        disturb_output(model.middle, disturb_left, patch)
        by_mid = (model(x, t).bottleneck.branches - baseline).abs().amax((0, 2, 3, 4))
    with monkeypatch.context() as patch:  # all skips but the last, which is the input of h_mid
        disturb_output(model.encoder, lambda skips: [*map(disturb_left, skips[:-1]), skips[-1]], patch)
        by_skips = (model(x, t).bottleneck.branches - baseline).abs().amax((0, 2, 3, 4))
    assert (by_mid[0] > 0) == sees_mid
    assert (by_skips[0] > 0) == sees_skips
    assert by_mid[1] > 0 and by_skips[1] > 0


@torch.no_grad()
def test_unshared_decoders_with_equal_weights_equal_the_shared_one(build_tiny, make_batch):
    model, (x, t) = build_tiny(**REGIONAL), make_batch()
    apart = build_tiny(**REGIONAL, decoding="unshared")
    assert len(apart.decoder) == 3
    assert not torch.equal(apart.decoder[0].conv_out.weight, apart.decoder[1].conv_out.weight)
    weights = model.state_dict()
    shared = {k: v for k, v in weights.items() if not k.startswith("decoder.")}
    copies = {f"decoder.{i}.{k[8:]}": v for k, v in weights.items() if k.startswith("decoder.") for i in range(3)}
    apart.load_state_dict({**shared, **copies})
    torch.testing.assert_close(apart(x, t).prediction, model(x, t).prediction)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", [*DECODINGS, "one region"])
@pytest.mark.parametrize("form", ["thesis", "regional", "uvit"])
def test_every_parameter_after_some_steps_has_a_gradient(make_batch, decoding, form):
    changes = {"regions": 1} if decoding == "one region" else {"decoding": decoding}
    unet = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
    uvit = {"backbone": "uvit", "model_channels": 16, "depth": 3}
    changes |= uvit if form == "uvit" else {"form": form, **unet}
    small = {"masks": "network", "resolution": 16, "norm_groups": 4, "steps": 1}
    model = preset_config(None, **small, **changes).resolved().build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t = make_batch(torch.float32, count=8)
    for _ in range(4):  # Three zero-initialised layers in a row block the gradient of one another.
        optimizer.zero_grad()
        F.mse_loss(model(x, t).prediction, x).backward()
        optimizer.step()
    idle = {n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert idle == set()
    # The logit norm removes the mean of each region's logits, so the gradient of this bias is only rounding error.
    if form != "thesis" and changes.get("regions") != 1:
        assert model.masks.decoder.conv_out.bias.grad.abs().max() < 1e-6


@pytest.mark.parametrize("form", [{}, REGIONAL, UVIT], ids=["thesis", "regional", "uvit"])
@torch.no_grad()
def test_segment_without_decoder_equals_masks_of_the_forward_pass(build_tiny, make_batch, form, monkeypatch):
    model, (x, t) = build_tiny(**form), make_batch()
    expected = model(x, t).bottleneck.masks

    def fail_if_called(*args):
        raise AssertionError("segment() ran a decoder")

    monkeypatch.setattr(model.decoder, "forward", fail_if_called)
    if model.tokens is not None:
        monkeypatch.setattr(model.tokens, "forward", fail_if_called)
    assert torch.equal(model.segment(x, t), expected)


# --- evaluation and tokens ---


@pytest.mark.parametrize("form", [REGIONAL, UVIT], ids=["unet", "uvit"])
@torch.no_grad()
def test_forward_in_evaluation_is_independent_of_other_images(build_tiny, make_batch, form):
    model, (x, t) = build_tiny(**form), make_batch(count=8)
    before = {k: v.clone() for k, v in model.named_buffers()}
    together = model(x, t)
    for i in (0, 5):
        alone = model(x[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(together.prediction[i : i + 1], alone.prediction)
        torch.testing.assert_close(together.bottleneck.masks[i : i + 1], alone.bottleneck.masks)
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())


def test_region_token_is_independent_of_area_and_other_pixels():
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


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, REGIONAL, UVIT], ids=["thesis", "regional", "uvit"])
def test_gradients_equal_finite_differences(build_tiny, make_batch, form):
    model = build_tiny(**form, regions=2).train()
    x, t = make_batch(count=4)
    weights = torch.randn_like(x)

    def compute_value():
        prediction, regions = model(x, t)
        return (prediction * weights).sum() + regions.masks[:, 0].square().sum()

    x.requires_grad_()
    compute_value().backward()
    entries = [(p, torch.randint(p.numel(), ()).item()) for p in model.parameters()]
    sampled = [entries[i] for i in torch.randperm(len(entries))[:25]]
    sampled += [(x, 17), (model.masks.decoder.conv_out.weight, 3)]
    for tensor, i in sampled:
        flat, step = tensor.detach().view(-1), 1e-5
        values = []
        for sign in (1, -1):
            flat[i] += sign * step
            values.append(compute_value().item())
            flat[i] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        assert tensor.grad.view(-1)[i].item() == pytest.approx(numeric, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("form", [{}, REGIONAL, UVIT], ids=["thesis", "regional", "uvit"])
@torch.no_grad()
def test_forward_channels_last_equals_contiguous(build_tiny, make_batch, form):
    model, (x, t) = build_tiny(torch.float32, **form), make_batch(torch.float32)
    expected = model(x, t)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
    torch.testing.assert_close(got.prediction, expected.prediction, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.bottleneck.masks, expected.bottleneck.masks, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", [{}, REGIONAL, UVIT], ids=["thesis", "regional", "uvit"])
def test_forward_bf16_autocast_is_near_fp32(build_tiny, make_batch, form):
    model, (x, t) = build_tiny(torch.float32, **form), make_batch(torch.float32)
    expected = model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x, t)
    assert got.prediction.dtype == got.bottleneck.masks.dtype == torch.float32
    scale = expected.prediction.std()
    assert 0 < (got.prediction - expected.prediction).abs().mean() < 0.05 * scale
    torch.testing.assert_close(got.bottleneck.masks.sum(1), torch.ones(2, 16, 16))
    got.prediction.square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backbone", ["unet", "uvit"])
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.slow
def test_forward_and_backward_with_reference_ops_are_equal(build_tiny, make_batch, backbone, decoding, monkeypatch):
    form = REGIONAL if decoding in ("masked_skips", "unshared") else {}
    model, (x, t) = build_tiny(**form, backbone=backbone, decoding=decoding).train(), make_batch(count=4)
    results = []
    for flag in ("0", "1"):
        monkeypatch.setenv("FACTORKIT_REFERENCE", flag)
        twin = copy.deepcopy(model)
        prediction = twin(x, t).prediction
        prediction.square().sum().backward()
        results.append([prediction, *(p.grad for p in twin.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.slow
@pytest.mark.parametrize("form", [REGIONAL, UVIT], ids=["unet", "uvit"])
def test_compile_full_graph_equals_eager(build_tiny, make_batch, form):
    sizes = {"depth": 3} if form is UVIT else {"attention_resolutions": ()}
    model, (x, t) = build_tiny(torch.float32, **form, **sizes).train(), make_batch(torch.float32, count=8)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for run in (compiled, twin):
        run(x, t).prediction.square().mean().backward()
    for (name, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        add_name = lambda m, name=name: f"{name}: {m}"  # noqa: E731
        torch.testing.assert_close(ours.grad, plain.grad, atol=1e-5, rtol=1e-3, msg=add_name)


# --- sizes ---


@pytest.mark.parametrize(
    ("preset", "regions", "millions"),
    [("flowers64", 1, 121.06), ("flowers64", 3, 193.74), ("flowers128", 1, 95.0), ("flowers128", 3, 152.4)],
)
def test_parameter_counts_of_presets_equal_the_thesis(preset, regions, millions):
    with torch.device("meta"):
        model = preset_config(preset, regions=regions).resolved().build()
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_forward_has_their_resolution(preset):
    config = preset_config(preset).resolved()
    with torch.device("meta"):
        x = torch.empty(1, 3, config.resolution, config.resolution)
        out = config.build()(x, torch.zeros(1, dtype=torch.int64))
    assert out.prediction.shape == x.shape
    assert out.bottleneck.masks.shape == (1, config.num_leaf_regions, config.resolution, config.resolution)


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_network_incompatible_settings_raise(build_tiny, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_tiny(**changes)


def test_network_one_region_ignores_mask_settings(build_tiny):
    build_tiny(regions=1, channel_mult=(1,), **REGIONAL)
