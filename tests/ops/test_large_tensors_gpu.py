"""Tensors of more than 2^31 elements on a GPU: their last part is as if it were alone."""

from __future__ import annotations

import pytest
import torch

from factorkit import ops

GIB = 2**30
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def need_memory():
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < 48:
        pytest.skip(f"needs 48 GiB of free GPU memory; {free:.0f} GiB are free")
    yield
    torch.cuda.empty_cache()


def test_norm_beyond_2_31_elements_matches_its_last_image():
    rows, channels, side = 2**31 // (64 * 256 * 256) + 1, 64, 256
    x = torch.empty(rows, channels, side, side, dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    x.normal_()
    assert x.numel() > 2**31
    weight, bias = torch.randn(2, channels, device="cuda")
    with torch.no_grad():
        got = ops.group_norm_silu(x, weight, bias, groups=8)[-1:]
        want = ops.group_norm_silu(x[-1:], weight, bias, groups=8)
    torch.testing.assert_close(got, want)


def test_composite_beyond_2_31_elements_matches_its_last_rays():
    rays, samples = 2**31 // (3 * 128) + 1000, 128
    count = rays * samples
    assert 3 * count > 2**31
    t_start = torch.arange(samples, device="cuda", dtype=torch.float32).repeat(rays)
    values = t_start, t_start + 0.5
    sigma = torch.rand(count, device="cuda").requires_grad_()
    rgb = torch.rand(count, 3, device="cuda").requires_grad_()
    offsets = torch.arange(0, count + 1, samples, device="cuda")
    results = []
    for low in (0, count - 100 * samples):
        part = [x[low:] for x in (sigma, rgb, *values)]
        color = ops.composite(*part, offsets[low // samples :] - low).color[-100:]
        grads = torch.autograd.grad(color.sum(), (sigma, rgb))
        results.append([color.detach(), *(g[-100 * samples :].clone() for g in grads)])
        del part, color, grads
    torch.testing.assert_close(*results)
