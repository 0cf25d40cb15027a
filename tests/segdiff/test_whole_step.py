"""Activation memory with checkpointed branches, and the memory layout of all features, in a training step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from factorkit.segdiff.config import preset_config
from factorkit.segdiff.network import recomputation_options

REGIONAL = {"branch_norm": "pixel", "region_tokens": True, "normalised_logits": True, "half_resolution_masks": True}
UVIT = {"backbone": "uvit", "model_channels": 16, "depth": 5, "patch_size": 2}
SMALL = {
    "masks": "network",
    "resolution": 16,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "norm_groups": 4,
}


def run_step(model, x, t):
    """Return prediction, masks, and gradients of all parameters from random upstream gradients of both."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)  # for the dropout
    prediction, regions = model(x, t)
    torch.manual_seed(6)
    upstream = [torch.randn_like(v) for v in (prediction, regions.masks)]
    torch.autograd.backward([prediction, regions.masks], upstream)
    return prediction.detach(), regions.masks.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["masked_skips", "masked_mid", "unshared"])
@pytest.mark.parametrize("form", [{}, REGIONAL, {**REGIONAL, "backbone": "uvit"}])
def test_step_with_checkpointed_branches_is_equal(build_tiny, make_batch, decoding, form):
    form = {**form, "region_tokens": False} if decoding == "masked_mid" else form
    model, (x, t) = build_tiny(**form, decoding=decoding).train(), make_batch(count=4)
    plain, plain_masks, grads = run_step(copy.deepcopy(model), x, t)
    model.checkpoint_branches = True
    prediction, masks, result = run_step(model, x, t)
    torch.testing.assert_close(prediction, plain)
    torch.testing.assert_close(masks, plain_masks)
    for name, grad in grads.items():
        torch.testing.assert_close(result[name], grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("on_cuda", [False, True])
def test_dropout_of_a_recomputed_branch_is_the_same(build_tiny, make_batch, monkeypatch, on_cuda):
    """A new dropout mask would make the gradient differ from that of the loss; on CUDA no random state is saved."""
    if on_cuda:
        options = recomputation_options(0.5, on_cuda=True)
        assert not options["preserve_rng_state"]
        monkeypatch.setattr("factorkit.segdiff.network.recomputation_options", lambda *at: options)
        monkeypatch.setattr(F, "dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0])
    model, (x, t) = build_tiny(dropout=0.5, checkpoint_branches=True).train(), make_batch()
    *_, result = run_step(model, x, t)
    weight = model.decoder.conv_out.weight
    along, ends = torch.randn_like(weight), []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(along, alpha=sign * 1e-5)
        prediction, masks, _ = run_step(model, x, t)
        torch.manual_seed(6)
        ends.append(sum((v * torch.randn_like(v)).sum().item() for v in (prediction, masks)))
        with torch.no_grad():
            weight.sub_(along, alpha=sign * 1e-5)
    numeric = (ends[0] - ends[1]) / 2e-5
    assert (result["decoder.conv_out.weight"] * along).sum().item() == pytest.approx(numeric, rel=1e-5)


def count_saved_bytes(model, x, t) -> int:
    """Return the bytes saved for the backward pass, each storage once, without the weights."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def record(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        prediction = model(x, t).prediction
    assert prediction.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("form", [{}, REGIONAL])
@pytest.mark.slow
def test_memory_of_checkpointed_branches_is_independent_of_their_number(build_tiny, make_batch, form):
    x, t = make_batch(torch.float32, count=4)
    saved = {
        (regions, once_more): count_saved_bytes(
            build_tiny(torch.float32, **form, regions=regions, checkpoint_branches=once_more).train(), x, t
        )
        for regions in (2, 6)
        for once_more in (False, True)
    }
    # Only masks, logits and branch predictions grow: a few numbers per pixel.
    assert saved[6, True] < 1.2 * saved[2, True]
    assert saved[6, False] > 1.9 * saved[2, False]
    assert saved[2, True] < 0.7 * saved[2, False]


class LayoutRecorder(TorchDispatchMode):
    """Record the operations whose output features are not channels last, and the names of all operations."""

    SIZES = ((16, 16), (8, 8))

    def __init__(self):
        super().__init__()
        self.names, self.turned, self.last = set(), set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            # Masks, logits and images have at most 3 channels and the layout of the region ops.
            # Those of one row are gradients of a position embedding.
            if not isinstance(x, torch.Tensor) or x.dim() != 4 or len(x) == 1:
                continue
            if x.shape[1] > 3 and x.shape[2:] in self.SIZES:
                self.last += 1
                if x.stride(1) != 1:
                    self.turned.add((str(func), tuple(x.shape), x.stride()))
        return out


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes", [{"form": "thesis"}, {}, {"branch_norm": "masked_group", "checkpoint_branches": True}, UVIT]
)
def test_features_in_forward_and_backward_are_channels_last(changes, half, monkeypatch):
    """Forward and backward convert no layout, and attention is torch's fused kernel."""
    monkeypatch.setattr("factorkit.nn.uvit.PIXEL_CHANNELS", 12)  # 16 would make rows look like channels
    sizes = SMALL if "backbone" not in changes else {"masks": "network", "resolution": 16, "norm_groups": 4}
    model = preset_config(None, **sizes, **changes, steps=1).resolved().build().train()
    with torch.no_grad():
        for p in model.parameters():  # A gradient of zeros may have any layout.
            p.add_(torch.randn_like(p) * 0.1)
    x = torch.randn(5, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with LayoutRecorder() as recorded:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            prediction = model(x, torch.tensor([3, 999, 400, 5, 30])).prediction
        (prediction * torch.randn_like(prediction)).sum().backward()
    assert recorded.turned == set()
    assert recorded.last > 150
    assert "_scaled_dot_product_flash_attention_for_cpu" in recorded.names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", ["thesis", "regional"])
def test_step_on_gpu_converts_no_layout(form):
    """Conversions inside cuDNN are invisible to torch, so the profiler looks for them."""
    sizes = {**SMALL, "model_channels": 32, "norm_groups": 8}
    model = preset_config(None, **sizes, form=form, steps=1).resolved().build().cuda().train()
    x = torch.randn(8, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    t = torch.arange(8, device="cuda")
    for _ in range(2):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
            with torch.autocast("cuda", torch.bfloat16):
                prediction = model(x, t).prediction
            prediction.square().sum().backward()
            torch.cuda.synchronize()
    names = {event.key for event in profiled.key_averages()}
    assert len(names) > 10
    assert [n for n in names if "nchwtonhwc" in n.lower() or "nhwctonchw" in n.lower()] == []
