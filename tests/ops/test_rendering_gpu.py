"""The rendering ops on CUDA against the same ops on the CPU, on torch's current stream, without needless waiting.

Races and foreign addresses: PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck (then racecheck) python
-m pytest -m gpu tests/ops
"""

from __future__ import annotations

import pytest
import torch

from factorkit import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def ragged(channels: int, dtype: torch.dtype):
    counts = [10, 4, 0, 6, 33, 1200, 2100, 1]
    n = sum(counts) + 5
    t_start = torch.arange(n, dtype=torch.float64) / 4
    leaves = [torch.rand(n) * 0.5, torch.randn(n, channels), t_start, t_start + torch.rand(n) / 4]
    wide = torch.promote_types(dtype, torch.float32)
    kinds = (dtype, dtype, wide, wide)
    leaves = [x.to(kind).requires_grad_() for x, kind in zip(leaves, kinds, strict=True)]
    return leaves, torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]), torch.rand(channels, dtype=wide)


def on_cuda(tensors):
    return [x.detach().cuda().requires_grad_(x.requires_grad) for x in tensors]


def march_scene(dtype=torch.float32):
    torch.manual_seed(1)
    origins = torch.randn(3000, 3, dtype=dtype) * 2
    directions = torch.rand(3000, 3, dtype=dtype) * 2 - 1 - origins
    occupancy = torch.where(torch.rand(2, 64**3 // 8) < 0.1, 255, 0).to(torch.uint8)
    return origins, directions, torch.rand(3000, dtype=dtype) * 0.2, torch.full((3000,), 3.0, dtype=dtype), occupancy


MARCH = dict(lower=[-1, -1, -1], upper=[1, 1, 1.5], step=0.004, seed=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 7, 32])
@pytest.mark.parametrize("early_stop", [0.0, 0.3])
def test_composite(dtype, channels, early_stop):
    torch.manual_seed(0)
    leaves, offsets, background = ragged(channels, dtype)
    there = on_cuda([*leaves, background.requires_grad_()])
    settings = dict(early_stop=early_stop, weights=True, distortion=True)
    want = ops.composite(*leaves, offsets, background=background, **settings)
    torch.use_deterministic_algorithms(True, warn_only=True)  # unwritten memory holds NaN
    got = ops.composite(*there[:4], offsets.cuda(), background=there[4], **settings)
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([x.cpu() for x in got], list(want), **tolerance)
    grads = [torch.randn_like(x) for x in want]
    expected = torch.autograd.grad(want, [*leaves, background], grads)
    found = torch.autograd.grad(got, there, [g.cuda() for g in grads])
    torch.use_deterministic_algorithms(False)
    if dtype in (torch.bfloat16, torch.float16):
        tolerance = dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close([x.cpu() for x in found], list(expected), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_marching_with_a_fixed_step_is_bit_identical(dtype):
    scene = march_scene(dtype)
    want = ops.march_rays(*scene, **MARCH)
    got = ops.march_rays(*(x.cuda() for x in scene), **MARCH)
    assert len(want.t_start) > 1000
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


def splat_scene(dtype, count=400, size=(70, 90)):
    torch.manual_seed(3)
    view, lens = torch.eye(4), torch.tensor([[120.0, 0, size[1] / 2], [0, 120.0, size[0] / 2], [0, 0, 1]])
    view[2, 3] = 4
    leaves = [torch.rand(count, 3) * 2 - 1, torch.randn(count, 4), torch.rand(count, 3) * 0.2 + 0.02, view, lens]
    leaves += [torch.rand(count, 3), torch.rand(count) * 0.9]
    return [x.to(dtype).requires_grad_() for x in leaves], size


def splat(leaves, size, **options):
    return tuple(
        ops.rasterize_gaussians(ops.project_gaussians(*leaves[:5], size), leaves[5], leaves[6], size, **options)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussians(dtype):
    leaves, size = splat_scene(dtype)
    there = on_cuda(leaves)
    want = splat(leaves, size)
    torch.use_deterministic_algorithms(True, warn_only=True)  # unwritten memory holds NaN
    got = splat(there, size)
    grads = [torch.randn_like(x) for x in want]
    found = torch.autograd.grad(got, there, [g.cuda() for g in grads])
    torch.use_deterministic_algorithms(False)
    expected = torch.autograd.grad(want, leaves, grads)
    for a, b in zip((*got, *found), (*want, *expected), strict=True):
        assert (a.cpu() - b).norm() <= (1e-3 if dtype == torch.float32 else 1e-8) * b.norm()


def test_gaussians_equal_those_of_gsplat():
    pytest.importorskip("gsplat")
    leaves, size = splat_scene(torch.float32)
    leaves = on_cuda(leaves)
    want, got = splat(leaves, size), splat(leaves, size, backend="gsplat")
    grads = [torch.randn_like(x) for x in want]
    found, expected = (torch.autograd.grad(x, leaves, grads, retain_graph=True) for x in (got, want))
    for a, b in zip((*got, *found), (*want, *expected), strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


def test_intersections_and_resampling():
    torch.manual_seed(2)
    o, d = (torch.randn(1000, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    there = on_cuda([o, d])
    box = [-1] * 3, [1] * 3
    want, got = ops.intersect_box(o, d, *box), ops.intersect_box(*there, *box)
    torch.testing.assert_close([x.cpu() for x in got], list(want))
    grads = [torch.randn_like(x) for x in want]
    found = torch.autograd.grad(got, there, [g.cuda() for g in grads])
    torch.testing.assert_close([x.cpu() for x in found], list(torch.autograd.grad(want, (o, d), grads)))
    t = torch.rand(50, 31, dtype=torch.float64).cumsum(1)
    given = t[:, :-1], t[:, 1:], torch.rand(50, 30, dtype=torch.float64)
    torch.testing.assert_close(
        ops.sample_pdf(*(x.cuda() for x in given), 17, seed=4).cpu(), ops.sample_pdf(*given, 17, seed=4)
    )


def test_capacity_never_synchronises_and_exact_form_once():
    scene = [x.cuda() for x in march_scene()]
    ops.march_rays(*scene, **MARCH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        s = ops.march_rays(*scene, **MARCH, capacity=100_000)
        sigma = torch.ones_like(s.t_start).requires_grad_()
        out = ops.composite(sigma, sigma[:, None].detach(), s.t_start, s.t_end, s.ray_offsets)
        out.color.sum().backward()
        with pytest.raises(RuntimeError, match="synchroniz"):
            ops.march_rays(*scene, **MARCH)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_side_stream():
    """Inputs that are still being made on a side stream are waited for, because the kernel runs on that stream."""
    leaves, offsets, background = ragged(3, torch.float32)
    want = ops.composite(*leaves, offsets, background=background).color
    there, offsets, background = on_cuda(leaves), offsets.cuda(), background.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late = [x * 1 for x in there]
        got = ops.composite(*late, offsets, background=background).color
    stream.synchronize()
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)
