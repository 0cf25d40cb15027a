"""The factorized U-ViT against its equations (docs/backbones.md), in plain torch with the same weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from factorkit.segdiff.backbones import UViTBackbone
from tests.nn.naive_uvit import naive_block, naive_decoder, naive_encoder, naive_pixels
from tests.segdiff.test_equations import REGIONAL

UVIT = {**REGIONAL, "backbone": "uvit"}


def affine(layer, v):
    return layer.weight @ v + layer.bias


def naive_time(time, t):
    """Embed a time step; cosines and sines are in single precision."""
    frequencies = torch.exp(-math.log(10_000) / (time.channels // 2) * torch.arange(time.channels // 2.0))
    wave = torch.cat([(t * frequencies).cos(), (t * frequencies).sin()])
    return affine(time[2], F.silu(affine(time[0], wave.to(time[0].weight.dtype))))


def naive_masks(model, tokens, columns):
    """Softmax over the regions of the logits [B, K, H, W], normalised over the batch."""
    logits = torch.stack([naive_pixels(model.masks.decoder, image, columns) for image in tokens])
    logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
    logits, norm = logits - logits.mean(1, keepdim=True), model.masks.norm
    mean, variance = norm.mean, norm.variance
    if norm.training:
        mean, variance = logits.mean((0, 2, 3)), logits.var((0, 2, 3), unbiased=False)
    scaled = (logits - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    return (norm.gain * scaled).softmax(1)


def naive_token(tokens, x, mask):
    """Embed the mean of a local feature over the mask [H, W] of an image [3, H, W]."""
    first, _, second = tokens.feature
    feature = F.conv2d(F.silu(F.conv2d(x, first.weight, first.bias, padding=1)), second.weight, second.bias, padding=1)
    pooled = (mask * feature).sum((1, 2)) / (mask.sum() + 0.5)
    norm, expand, _, contract = tokens.embed
    pooled = (pooled - pooled.mean()) / (pooled.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
    return affine(contract, F.silu(affine(expand, pooled)))


def naive_uvit(model, x, t):
    """Return masks [B, K, H, W] and prediction [B, 3, H, W]; without masks, the one decoder sees all of the skips."""
    patch, columns = model.backbone.patch_size, x.shape[3] // model.backbone.patch_size
    embeddings = [naive_time(model.time, step) for step in t.tolist()]
    skips = [naive_encoder(model.encoder, image, e) for image, e in zip(x, embeddings, strict=True)]
    middles = [naive_block(model.middle, s[-1], e) for s, e in zip(skips, embeddings, strict=True)]
    inputs = list(zip(middles, skips, embeddings, strict=True))
    if model.masks is None:
        return torch.ones_like(x[:, :1]), torch.stack([naive_decoder(model.decoder, *i, columns) for i in inputs])
    masks, predictions = naive_masks(model, middles, columns), []
    for image, regions, (middle, stored, embedding) in zip(x, masks, inputs, strict=True):
        prediction = 0
        for mask in regions:
            own = embedding if model.tokens is None else embedding + naive_token(model.tokens, image, mask)
            shares = mask.unfold(0, patch, patch).unfold(1, patch, patch).mean((2, 3)).flatten()
            prediction = prediction + mask * naive_decoder(model.decoder, middle, stored, own, columns, shares)
        predictions.append(prediction)
    return masks, torch.stack(predictions)


def find_norms(*parts):
    return {module.kind for part in parts for module in part.modules() if hasattr(module, "kind")}


def differentiate(model, outputs, x):
    """Return the gradients of x and all parameters, from random upstream gradients of the outputs."""
    torch.manual_seed(6)
    upstream = [torch.randn(output.shape, dtype=torch.float64).to(output.dtype) for output in outputs]
    return torch.autograd.grad(outputs, [x, *model.parameters()], upstream)


@pytest.mark.parametrize("size", [(16, 16), (8, 16)])
@torch.no_grad()
def test_uvit_in_evaluation_equals_its_equations(build_tiny, make_batch, size):
    model, (x, t) = build_tiny(**UVIT), make_batch(size=size)
    prediction, regions = model(x, t)
    masks, expected = naive_uvit(model, x, t)
    assert masks.amax(1).mean() > 0.5, "masks near 1/K would not distinguish the branches"
    torch.testing.assert_close(regions.masks, masks)
    torch.testing.assert_close(prediction, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("norm", ["pixel", "masked_group", "group"])
def test_uvit_in_training_and_its_gradients_equal_its_equations(build_tiny, make_batch, norm, dtype):
    """In fp32 all features are channels last, so that the compiled kernels take them."""
    exact, (x, t) = build_tiny(**{**UVIT, "branch_norm": norm}).train(), make_batch()
    model = copy.deepcopy(exact).to(dtype, memory_format=torch.channels_last)
    own = x.to(dtype, memory_format=torch.channels_last).requires_grad_()
    prediction, regions = model(own, t)
    assert find_norms(model.decoder) == {norm} and find_norms(model.encoder, model.middle, model.masks) == {"pixel"}
    masks, expected = naive_uvit(exact, x.requires_grad_(), t)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    pairs = zip(
        ["prediction", "masks", "x", *dict(model.named_parameters())],
        [prediction, regions.masks, *differentiate(model, (prediction, regions.masks), own)],
        [expected, masks, *differentiate(exact, (expected, masks), x)],
        strict=True,
    )
    for name, value, wanted in pairs:
        size = wanted.norm().item()
        assert size > 0.1 or name == "masks.decoder.conv_out.bias", name  # which the norm takes away
        assert (value.double() - wanted).norm() < tolerance * max(size, 1.0), name


@torch.no_grad()
def test_one_region_equals_the_plain_uvit(build_tiny, make_batch):
    model, (x, t) = build_tiny(regions=1, backbone="uvit", branch_norm="masked_group"), make_batch()
    prediction, regions = model(x, t)
    torch.testing.assert_close(prediction, naive_uvit(model, x, t)[1])
    assert (regions.masks == 1).all() and regions.masks.shape == (2, 1, 16, 16)
    assert model.masks is None and model.tokens is None and find_norms(model) == {"pixel"}


@torch.no_grad()
def test_uvit_with_masks_of_one_equals_the_plain_uvit(build_tiny, make_batch, monkeypatch):
    """Branches that see all skips and have no region tokens are K equal plain decoders."""
    model, (x, t) = build_tiny(backbone="uvit", branch_norm="pixel"), make_batch()
    plain = build_tiny(regions=1, backbone="uvit")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("masks.")})
    monkeypatch.setattr(UViTBackbone, "mask_pyramid", lambda self, masks: [torch.ones(2, 3, 8, 8).double()])
    prediction, regions = model(x, t)
    expected = plain(x, t).prediction
    torch.testing.assert_close(prediction, expected)
    torch.testing.assert_close(regions.branches, expected[:, None].expand(-1, 3, -1, -1, -1))
