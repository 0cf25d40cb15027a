"""The ops as torch sees them, and the whole factorized U-Net through the kernels."""

from __future__ import annotations

import pytest
import torch
from kernel_compare import assert_close, rand, soft_masks

from factorkit import kernels, ops
from factorkit.nn import unet
from factorkit.ops import dispatch, projection, reference
from factorkit.segdiff.backbones import UNetBackbone, UViTBackbone
from factorkit.segdiff.network import FactorizedDenoiser


def cases():
    torch.manual_seed(7)
    u, skip, masks = rand(2, 2, 3, 2), rand(2, 4, 3, 2), soft_masks(2, 2, 3, 2)
    weight, bias, scale, shift = rand(6), rand(6), rand(4, 6), rand(4, 6)
    o = torch.ops.factorkit
    for norm in ("group", "masked_group", "pixel"):
        m = masks if norm == "masked_group" else None
        x, tail = rand(4, 6, 3, 2), (2, norm, True)
        yield f"norm-{norm}", o.norm_silu, (x, None, m, weight, bias, scale, shift, None, *tail)
        yield f"input-bias-{norm}", o.norm_silu, (x, None, m, weight, bias, scale, shift, rand(6), *tail)
        yield f"skip-{norm}", o.norm_silu, (u, skip, masks, weight, bias, None, None, None, *tail)
    yield "add", o.masked_skip_add, (rand(2, 4, 3, 2), skip, masks, rand(4), rand(4, 4, 3, 2))
    yield "add-own", o.masked_skip_add, (rand(4, 4, 3, 2), skip, masks, None, None)
    yield "pyramid", o.mask_pyramid, (soft_masks(1, 2, 4, 4), 2)
    yield "pool", o.region_pool, (rand(2, 2, 3, 2), masks)
    yield "blend", o.region_blend, (rand(2, 2, 3, 2).contiguous(), rand(4, 2, 3, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, *_ in cases()])
def test_opcheck(name, dtype):
    op, args = next((op, args) for n, op, args in cases() if n == name)
    # Values may differ in bf16 by how often they are rounded; what is checked there are schema, fakes and layouts.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    tests += ["test_aot_dispatch_dynamic"] if dtype == torch.float32 else []
    cast = [a.to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
    torch.library.opcheck(op, cast, test_utils=tests)


def test_unsupported_tensors_run_as_pytorch():
    x, w = torch.randn(2, 6, 3, 3, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    assert not dispatch.triton_takes((x, w))
    want = reference.norm_silu(x, None, None, w, w, None, None, None, 2, "group")
    torch.testing.assert_close(ops.group_norm_silu(x, w, w, groups=2), want)
    empty = torch.zeros(0, 6, 3, 3)
    assert ops.group_norm_silu(empty, torch.ones(6), torch.ones(6), groups=2).shape == empty.shape
    w = torch.ones(12)
    skip_norm = ops.masked_skip_norm_silu(empty, empty, torch.zeros(0, 2, 3, 3), w, w, groups=2)
    assert skip_norm.shape == (0, 12, 3, 3)
    assert ops.region_pool(empty, torch.zeros(0, 2, 3, 3)).shape == (0, 2, 6)
    assert ops.region_blend(torch.zeros(0, 2, 3, 3), empty[:, :3])[1].shape == (0, 3, 3, 3)


def test_autocast_does_not_change_statistics_and_masks():
    masks = soft_masks(2, 2, 4, 4)
    x, w = rand(4, 6, 4, 4), rand(6)
    with torch.autocast(x.device.type, torch.bfloat16):
        tokens = ops.region_pool(x[:2], masks)
        y = ops.group_norm_silu(x, w, w, groups=2, norm="masked_group", masks=masks)
    assert_close(tokens, reference.region_pool(x[:2].double(), masks.double()))
    exact = [v.double() for v in (x, w, w)]
    assert_close(
        y, reference.norm_silu(exact[0], None, masks.double(), *exact[1:], None, None, None, 2, "masked_group")
    )


COMMON = {"resolution": 4, "num_heads": 2, "norm_groups": 4, "dropout": 0.0}
UNET = UNetBackbone(model_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), **COMMON)
UVIT = UViTBackbone(model_channels=16, depth=3, patch_size=2, **COMMON)


@pytest.mark.parametrize(
    ("backbone", "branch_norm"),
    [(UNET, "group"), (UNET, "masked_group"), (UNET, "pixel"), (UVIT, "pixel"), (UVIT, "masked_group")],
)
def test_factorized_denoiser_on_kernels_matches_reference(backbone, branch_norm, monkeypatch):
    """Forward and every parameter's gradient equal those of the same model on the references, in fp64."""
    model = FactorizedDenoiser(
        backbone,
        regions=3,
        branch_norm=branch_norm,
        region_tokens=branch_norm != "group",
        normalised_logits=branch_norm == "pixel",
    )
    with torch.no_grad():
        for p in model.parameters():  # zero-initialised layers would hide everything before them
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() < 2 else p[0].numel() ** -0.5))
    x, t, target = torch.randn(2, 3, 4, 4), torch.tensor([3, 700]), torch.randn(2, 3, 4, 4)

    def step(model, x, target):
        out = model(x, t)
        masks = out.bottleneck.masks
        upstream = torch.linspace(-1, 1, masks.numel(), dtype=x.dtype).reshape(masks.shape)
        loss = (out.prediction - target).square().mean() + (masks * upstream).mean()
        return out, torch.autograd.grad(loss, list(model.parameters()))

    launched = []
    for module in (unet, projection):
        monkeypatch.setattr(module, "bias_is_separate", lambda x: True)  # as on a GPU
    monkeypatch.setattr(kernels.tiles, "start", spy(kernels.tiles.start, launched))
    last = {"memory_format": torch.channels_last}
    out, grads = step(model.to(**last), x.contiguous(**last), target)
    expected = {"masked_add_kernel", "blend_kernel"}
    expected |= {"pixel_backward_kernel"} if backbone is UVIT else {"branch_gradients_kernel", "pyramid_kernel"}
    expected |= {"statistics_kernel", "branch_pass_kernel"} if branch_norm == "masked_group" else set()
    assert expected <= set(launched)

    count = len(launched)
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    exact, wanted = step(model.double(), x.double(), target.double())
    assert len(launched) == count, "the reference launched a kernel"
    assert_close(out.prediction, exact.prediction, "prediction", size=1.0)
    assert_close(out.bottleneck.masks, exact.bottleneck.masks, "masks")
    largest = max(w.norm() for w in wanted)
    for (name, _), got, want in zip(model.named_parameters(), grads, wanted, strict=True):
        error = (got.double() - want).norm() / (want.norm() + 1e-3 * largest)
        assert error < 2e-4, f"gradient for {name} is off by {error:.1e}"


def spy(start, launched):
    def record(kernel, *rest):
        launched.append(kernel.fn.__name__)
        start(kernel, *rest)

    return record
