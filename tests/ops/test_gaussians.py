"""Gaussian splatting: closed forms, loops written from the equations, the reference's gradients, and bad numbers."""

from __future__ import annotations

import importlib
import math
import sys

import pytest
import torch

from factorkit import ops
from factorkit.ops import reference
from factorkit.ops.rasterize_gaussians import TILE, sort_into_tiles
from factorkit.utils.errors import OutOfMemoryError

module = importlib.import_module("factorkit.ops.rasterize_gaussians")
NAMES = ("means", "conics", "depths", "compensations")


def camera(size, dtype=torch.float64, focal=1.4):
    height, width = size
    view = torch.eye(4, dtype=dtype)
    view[2, 3] = 4.0
    side = max(size)
    return view, torch.tensor([[focal * side, 0, width / 2], [0, focal * side, height / 2], [0, 0, 1]], dtype=dtype)


def scene(count, size, dtype=torch.float64, channels=3, spread=1.0, seed=0):
    """Leaves (means, quaternions, scales, viewmatrix, intrinsics), colours and opacities."""
    torch.manual_seed(seed)
    leaves = [(torch.rand(count, 3) * 2 - 1) * spread, torch.randn(count, 4), torch.rand(count, 3) * 0.3 + 0.02]
    leaves = [*leaves, *camera(size), torch.rand(count, channels), torch.rand(count) * 1.1]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    return leaves[:5], leaves[5], leaves[6]


def render(leaves, colors, opacities, size, **settings):
    return ops.rasterize_gaussians(ops.project_gaussians(*leaves, size, **settings), colors, opacities, size)


def projected_leaves(count, size, channels=3, seed=0, dtype=torch.float64):
    """A projection whose tensors are leaves, colours and opacities."""
    leaves, colors, opacities = scene(count, size, dtype, channels, seed=seed)
    projected = ops.project_gaussians(*leaves, size)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in projected]
    return ops.ProjectedGaussians(*leaves), colors, opacities


def by_loops(projected, colors, opacities, size):
    """The definition, one pixel and Gaussian at a time."""
    height, width = size
    order = sorted(range(len(opacities)), key=lambda i: (projected.depths[i].item(), i))
    out = torch.zeros(height, width, colors.shape[1] + 2, dtype=colors.dtype)
    for row in range(height):
        for column in range(width):
            through = 1.0
            for i in order:
                a, b, c = projected.conics[i].tolist()
                dx, dy = (projected.means[i] - torch.tensor([column + 0.5, row + 0.5])).tolist()
                alpha = opacities[i].item() * math.exp(-(a * dx * dx + c * dy * dy) / 2 - b * dx * dy)
                alpha = min(alpha, 0.999)
                if projected.radii[i, 0] == 0 or alpha < 1 / 255:
                    continue
                if through * (1 - alpha) <= 1e-4:
                    break
                weight = through * alpha
                out[row, column, :-2] += weight * colors[i].detach()
                out[row, column, -2] += weight * projected.depths[i].item()
                through *= 1 - alpha
            out[row, column, -1] = 1 - through
    return out[..., :-2], out[..., -2], out[..., -1]


# --- closed forms ---


def test_project_isotropic_gaussian_head_on_gives_a_circle():
    view, intrinsics = camera((32, 48))
    means, quaternions = torch.zeros(1, 3).double(), torch.tensor([[1.0, 2.0, -1.0, 0.5]]).double()
    out = ops.project_gaussians(means, quaternions, torch.full((1, 3), 0.1).double(), view, intrinsics, (32, 48))
    variance = (1.4 * 48 * 0.1 / 4) ** 2
    torch.testing.assert_close(out.means, torch.tensor([[24.0, 16.0]]).double())
    expected = torch.tensor([[1 / (variance + 0.3), 0, 1 / (variance + 0.3)]]).double()
    torch.testing.assert_close(out.conics, expected)
    torch.testing.assert_close(out.compensations, torch.tensor([variance / (variance + 0.3)]).double())
    assert out.depths.tolist() == [4.0]
    assert out.radii.tolist() == [[math.ceil(math.sqrt(2 * math.log(255) * (variance + 0.3)))] * 2]


def test_rasterize_two_overlapping_gaussians_gives_their_blend():
    means = torch.tensor([[8.5, 8.5]]).double().repeat(2, 1)
    conics, radii = torch.tensor([[0.1, 0.0, 0.2]]).double().repeat(2, 1), torch.full((2, 2), 9, dtype=torch.int32)
    projected = ops.ProjectedGaussians(means, conics, torch.tensor([3.0, 2.0]).double(), radii, torch.ones(2).double())
    out = ops.rasterize_gaussians(projected, torch.eye(2).double(), torch.tensor([0.5, 0.25]).double(), (17, 17))
    behind, front = 0.5 * math.exp(-(0.1 * 4 + 0.2) / 2), 0.25 * math.exp(-(0.1 * 4 + 0.2) / 2)  # at (2, 1) pixels
    weights = torch.tensor([behind * (1 - front), front]).double()
    torch.testing.assert_close(out.color[9, 10], weights)
    torch.testing.assert_close(out.depth[9, 10], 3 * weights[0] + 2 * weights[1])
    torch.testing.assert_close(out.opacity[9, 10], weights.sum())


def test_rasterize_at_one_pixel_equals_composite():
    projected, colors, opacities = projected_leaves(40, (1, 1))
    with torch.no_grad():
        got = ops.rasterize_gaussians(projected, colors, opacities, (1, 1))
        shift = projected.means - 0.5
        a, b, c = projected.conics.unbind(1)
        power = 0.5 * (a * shift[:, 0] ** 2 + c * shift[:, 1] ** 2) + b * shift[:, 0] * shift[:, 1]
        alpha = (opacities * (-power).exp()).clamp_max(0.999)
        order = [i for i in projected.depths.argsort().tolist() if alpha[i] >= 1 / 255]
        ends = (1 - alpha[order]).cumprod(0) > 1e-4
        order = torch.tensor(order)[ends]
        t = torch.arange(len(order) + 1).double()[None]
        sigma = -torch.log1p(-alpha[order])[None]
        want = ops.composite(sigma, colors[order][None], t[:, :-1].contiguous(), t[:, 1:].contiguous())
    torch.testing.assert_close(got.color[0], want.color)
    torch.testing.assert_close(got.opacity[0], want.opacity)


@pytest.mark.parametrize("size", [(9, 20), (17, 16)])
def test_rasterize_equals_its_definition(size):
    projected, colors, opacities = projected_leaves(25, size, 2)
    with torch.no_grad():
        projected = projected._replace(depths=(projected.depths * 4).round() / 4)  # ties
        got = ops.rasterize_gaussians(projected, colors, opacities, size)
    torch.testing.assert_close(tuple(got), by_loops(projected, colors, opacities, size))


def test_spherical_harmonics_are_orthonormal():
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(200_000, 3, dtype=torch.float64), dim=1)
    basis = ops.spherical_harmonics(directions, torch.eye(16).double().expand(len(directions), 16, 16))
    gram = 4 * math.pi * basis.T @ basis / len(directions)
    torch.testing.assert_close(gram, torch.eye(16).double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spherical_harmonics_gradients_match_finite_differences(degree):
    torch.manual_seed(0)
    leaves = [torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 16, 2, dtype=torch.float64)]
    leaves = [x.requires_grad_() for x in leaves]
    torch.autograd.gradcheck(lambda d, c: ops.spherical_harmonics(d, c, degree), leaves)


def test_spherical_harmonics_wrong_shapes_raise():
    with pytest.raises(ValueError, match="coefficients"):
        ops.spherical_harmonics(torch.zeros(2, 3), torch.zeros(2, 5, 3))
    with pytest.raises(ValueError, match="degree=2"):
        ops.spherical_harmonics(torch.zeros(2, 3), torch.zeros(2, 4, 3), 2)


# --- against the reference ---


@pytest.fixture
def fill_memory_with_nan():
    """Fresh memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("low_pass", [0.0, 0.3])
@pytest.mark.parametrize("spread", [1.0, 4.0])  # 4: around and behind the camera, beyond the margins
def test_project_matches_reference(fill_memory_with_nan, low_pass, spread):
    leaves, _, _ = scene(200, (30, 44), spread=spread)
    want = reference.project_gaussians(*leaves, 44, 30, 0.01, math.inf, low_pass)
    got = ops.project_gaussians(*leaves, (30, 44), low_pass=low_pass)
    outputs = [getattr(got, name) for name in NAMES]
    torch.testing.assert_close(outputs, list(want[:4]))
    assert torch.equal(got.radii, want[4]) and 10 < (want[4] > 0).all(1).sum() < 201
    grads = [torch.randn_like(x) for x in want[:4]]
    found = torch.autograd.grad(outputs, leaves, grads)
    torch.testing.assert_close(found, torch.autograd.grad(want[:4], leaves, grads), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("channels", [1, 3, 4, 32])
@pytest.mark.parametrize("size", [(16, 16), (37, 50)])
def test_rasterize_matches_reference(fill_memory_with_nan, channels, size):
    projected, colors, opacities = projected_leaves(120, size, channels)
    inputs = [projected.means, projected.conics, projected.depths, colors, opacities]
    tiles = sort_into_tiles(*inputs, projected.radii, width=size[1], height=size[0])
    want = reference.rasterize_gaussians(*inputs, *tiles, size[1], size[0])
    got = ops.rasterize_gaussians(projected, colors, opacities, size)
    torch.testing.assert_close(tuple(got), want)
    grads = [torch.randn_like(x) for x in want]
    found = torch.autograd.grad(tuple(got), inputs, grads)
    torch.testing.assert_close(found, torch.autograd.grad(want, inputs, grads), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_the_counting_sort_equal_those_of_torch(dtype):
    projected, colors, opacities = projected_leaves(300, (70, 50), dtype=dtype)
    inputs = [projected.means, projected.conics, projected.depths.round(), colors, opacities, projected.radii]
    order, offsets = torch.ops.factorkit.count_tiles(*inputs, 50, 70)
    ids = torch.ops.factorkit.fill_tiles(*inputs, order, offsets, int(offsets[-1]), 50, 70)
    want = sort_into_tiles(*inputs, width=50, height=70)
    assert torch.equal(offsets, want[0]) and torch.equal(ids, want[1]) and len(offsets) == 4 * 5 + 1


def test_rasterize_fp32_agrees_with_fp64():
    leaves, colors, opacities = scene(200, (48, 48), torch.float32)
    single = render(leaves, colors, opacities, (48, 48))
    double = render([x.double() for x in leaves], colors.double(), opacities.double(), (48, 48))
    for a, b in zip(single, double, strict=True):
        assert (a - b).abs().max() < 1e-2 and (a - b).abs().mean() < 1e-5  # a pixel may differ by one end or 1/255


def test_rasterize_threads_change_no_bit():
    leaves, colors, opacities = scene(300, (64, 48), torch.float32)
    results, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = render(leaves, colors, opacities, (64, 48))
        grads = torch.autograd.grad(out.color.square().sum() + out.depth.sum(), [*leaves, colors, opacities])
        results.append([*out, *grads])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- gradients ---


@pytest.mark.slow
def test_gradcheck_of_the_whole_chain():
    leaves, colors, opacities = scene(6, (7, 9))
    inputs = [*leaves, colors, opacities]
    torch.autograd.gradcheck(lambda *x: tuple(render(x[:5], x[5], x[6], (7, 9))), inputs, atol=1e-6)


def test_gradcheck_of_rasterize_with_ties_in_depth():
    projected, colors, opacities = projected_leaves(6, (7, 9))
    fixed = projected._replace(depths=projected.depths.detach().round())  # another order is another image

    def run(means, conics, colors, opacities):
        return tuple(ops.rasterize_gaussians(fixed._replace(means=means, conics=conics), colors, opacities, (7, 9)))

    torch.autograd.gradcheck(run, [projected.means, projected.conics, colors, opacities], atol=1e-6)


def test_gradient_of_depths_that_are_equal_is_the_weight_of_each():
    projected, _, opacities = projected_leaves(6, (7, 9))
    depths = torch.tensor([3.0, 4.0, 3.0, 4.0, 4.0, 3.0], dtype=torch.float64, requires_grad=True)
    out = ops.rasterize_gaussians(projected._replace(depths=depths), torch.eye(6).double(), opacities, (7, 9))
    (grad,) = torch.autograd.grad(out.depth.sum(), depths)
    torch.testing.assert_close(grad, out.color.sum((0, 1)).detach())


def test_second_order_gradients_match_finite_differences():
    leaves, colors, opacities = scene(3, (4, 4))
    with torch.no_grad():
        opacities.clamp_max_(0.8)

    def loss(means, opacities):
        return render([means, *leaves[1:]], colors, opacities, (4, 4)).color.square().sum()

    torch.autograd.gradgradcheck(loss, [leaves[0], opacities], atol=1e-5)


def rigid_motion(seed):
    torch.manual_seed(seed)
    skew = torch.zeros(4, 4, dtype=torch.float64)
    a, b, c, *shift = torch.randn(6, dtype=torch.float64).tolist()
    skew[:3] = torch.tensor([[0, -a, b, shift[0]], [a, 0, -c, shift[1]], [-b, c, 0, shift[2]]], dtype=torch.float64)
    return skew


def test_camera_gradient_matches_finite_differences_in_se3():
    leaves, colors, opacities = scene(30, (20, 20))
    weights = torch.rand(20, 20, 3, dtype=torch.float64)

    def loss(step, generator):
        view = leaves[3].detach() @ torch.linalg.matrix_exp(step * generator)
        return (render([*leaves[:3], view, leaves[4]], colors, opacities, (20, 20)).color * weights).sum()

    for seed in range(3):
        generator = rigid_motion(seed)
        step = torch.zeros((), dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(loss(step, generator), step)
        with torch.no_grad():
            numeric = (loss(torch.tensor(1e-7), generator) - loss(torch.tensor(-1e-7), generator)) / 2e-7
        torch.testing.assert_close(slope, numeric, rtol=1e-4, atol=1e-4)


def test_rigid_motion_of_scene_and_camera_changes_nothing():
    leaves, colors, opacities = scene(40, (24, 24))
    with torch.no_grad():
        want = render(leaves, colors, opacities, (24, 24))
        motion = torch.linalg.matrix_exp(rigid_motion(5))
        w = torch.sqrt(1 + motion[:3, :3].trace()) / 2
        skew = motion[:3, :3] - motion[:3, :3].T
        turn = torch.stack([w, *(x / (4 * w) for x in (skew[2, 1], skew[0, 2], skew[1, 0]))])
        w2, v2 = leaves[1][:, :1], leaves[1][:, 1:]
        vector = turn[0] * v2 + w2 * turn[1:] + torch.linalg.cross(turn[1:].expand_as(v2), v2)
        quaternions = torch.cat([turn[0] * w2 - (v2 @ turn[1:])[:, None], vector], dim=1)
        means = leaves[0] @ motion[:3, :3].T + motion[:3, 3]
        moved = [means, quaternions, leaves[2], leaves[3] @ torch.linalg.inv(motion), leaves[4]]
        torch.testing.assert_close(tuple(render(moved, colors, opacities, (24, 24))), tuple(want))


# --- bad numbers ---


@pytest.mark.parametrize("count", [0, 5])
def test_nothing_in_view_gives_zeros_and_zero_gradients(count):
    leaves, colors, opacities = scene(count, (18, 20))
    with torch.no_grad():
        leaves[3][2, 3] = -50.0  # all behind the camera
    out = render(leaves, colors, opacities, (18, 20))
    assert all((x == 0).all() for x in out)
    grads = torch.autograd.grad(out.color.sum() + out.depth.sum(), [*leaves, colors, opacities])
    assert all((x == 0).all() for x in grads)


BAD = {"means": 0, "quaternions": 1, "scales": 2}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
@pytest.mark.parametrize("where", [*BAD, "colors", "opacities"])
def test_gaussian_with_a_bad_number_is_not_drawn(where, value):
    leaves, colors, opacities = scene(20, (20, 20))
    bad = {**{name: leaves[i] for name, i in BAD.items()}, "colors": colors, "opacities": opacities}[where]
    with torch.no_grad():
        kept = opacities.clone()
        kept[3] = 0.0
        want = render(leaves, colors, kept, (20, 20))
        bad[3] = value
    out = render(leaves, colors, opacities, (20, 20))
    grads = torch.autograd.grad(out.color.sum(), [*leaves, colors, opacities])
    assert all(x.isfinite().all() for x in (*out, *grads)) or value == 1e200
    if not (value == 1e200 and where in ("colors", "opacities")):  # those are numbers like others
        torch.testing.assert_close(tuple(out), tuple(want))


@pytest.mark.parametrize("where", [(3, (0, 0)), (3, (2, 3)), (4, (0, 0)), (4, (1, 1)), (4, (0, 2))])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_camera_with_a_bad_number_sees_nothing(where, value):
    leaves, colors, opacities = scene(20, (20, 20))
    with torch.no_grad():
        leaves[where[0]][where[1]] = value
    projected = ops.project_gaussians(*leaves, (20, 20))
    assert all((x == 0).all() for x in projected)
    out = ops.rasterize_gaussians(projected, colors, opacities, (20, 20))
    grads = torch.autograd.grad(out.color.sum() + out.depth.sum(), [*leaves, colors, opacities])
    assert all((x == 0).all() for x in (*out, *grads))


def test_gaussians_behind_and_around_the_camera_leave_the_others_alone():
    leaves, colors, opacities = scene(20, (20, 20))
    with torch.no_grad():
        leaves[0][::2, 2] = -torch.tensor([4.0, 3.991, 5.0, 50.0, 4.01]).double().repeat(2)  # near plane: -3.99
        front = [*(x[1::2].clone().requires_grad_() for x in leaves[:3]), *leaves[3:]]
    out, want = render(leaves, colors, opacities, (20, 20)), render(front, colors[1::2], opacities[1::2], (20, 20))
    torch.testing.assert_close(tuple(out), tuple(want))
    grads = torch.autograd.grad(out.color.sum(), leaves[:3])
    for found, expected in zip(grads, torch.autograd.grad(want.color.sum(), front[:3]), strict=True):
        assert (found[::2] == 0).all()
        torch.testing.assert_close(found[1::2], expected)


def test_zero_quaternion_is_no_rotation_without_gradient():
    leaves, colors, opacities = scene(4, (20, 20))
    with torch.no_grad():
        leaves[1][:] = torch.tensor([2.0, 0.0, 0.0, 0.0])
        want = render(leaves, colors, opacities, (20, 20))
        leaves[1].zero_()
    out = render(leaves, colors, opacities, (20, 20))
    torch.testing.assert_close(tuple(out), tuple(want))
    (grad,) = torch.autograd.grad(out.color.sum(), leaves[1])
    assert (grad == 0).all()


def test_scales_of_zero_give_the_low_pass_filter_or_nothing():
    leaves, colors, opacities = scene(4, (20, 20))
    with torch.no_grad():
        leaves[2].zero_()
    projected = ops.project_gaussians(*leaves, (20, 20))
    conics = torch.tensor([1 / 0.3, 0, 1 / 0.3]).double().expand(4, 3)
    torch.testing.assert_close(projected.conics.detach(), conics)
    grads = torch.autograd.grad(render(leaves, colors, opacities, (20, 20)).color.sum(), [*leaves, colors])
    assert all(x.isfinite().all() for x in grads) and (projected.compensations == 1e-3).all()
    assert (ops.project_gaussians(*leaves, (20, 20), low_pass=0.0).radii == 0).all()


def test_pairs_that_exceed_the_memory_raise_with_the_memory_needed(monkeypatch):
    leaves, colors, opacities = scene(20, (20, 20))
    projected = ops.project_gaussians(*leaves, (20, 20))
    monkeypatch.setattr("factorkit.utils.memory.CHECKED_BYTES", 0)
    ops.rasterize_gaussians(projected, colors, opacities, (20, 20))
    monkeypatch.setattr("factorkit.utils.memory.free_memory", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match=r"pairs of Gaussians and tiles need 0.0 GiB .* use fewer or smaller"):
        ops.rasterize_gaussians(projected, colors, opacities, (20, 20))
    monkeypatch.setattr(module, "MAX_PAIRS", 10)
    with pytest.raises(ValueError, match="more than 10: use fewer"):
        ops.rasterize_gaussians(projected, colors, opacities, (20, 20))


class FakeGsplat:
    """The functions of gsplat 1.5 that are called, with its names and shapes, by this package's reference."""

    def isect_tiles(self, means2d, radii, depths, tile_size, tile_width, tile_height):
        count = means2d.shape[-2]
        shapes = [x.shape for x in (means2d, radii, depths)]
        assert shapes == [(1, count, 2), (1, count, 2), (1, count)] and radii.dtype == torch.int32 and tile_size == TILE
        lower = ((means2d[0] - radii[0]) / tile_size).floor().clamp_min(0).long()
        upper = ((means2d[0] + radii[0]) / tile_size).ceil().long().minimum(torch.tensor([tile_width, tile_height]))
        pairs = [
            (y * tile_width + x, float(depths[0, i].detach()), i)
            for i in range(count)
            if (radii[0, i] > 0).all()
            for y in range(lower[i, 1], upper[i, 1])
            for x in range(lower[i, 0], upper[i, 0])
        ]
        pairs.sort()
        return None, torch.tensor([tile for tile, _, _ in pairs]), torch.tensor([i for *_, i in pairs]).int()

    def isect_offset_encode(self, isect_ids, n_images, tile_width, tile_height):
        assert n_images == 1
        starts = torch.searchsorted(isect_ids, torch.arange(tile_width * tile_height))
        return starts.reshape(1, tile_height, tile_width).int()

    def rasterize_to_pixels(
        self, means2d, conics, colors, opacities, image_width, image_height, tile_size, isect_offsets, flatten_ids
    ):
        assert conics.shape[0] == colors.shape[0] == opacities.shape[0] == 1 and tile_size == TILE
        offsets = torch.cat([isect_offsets.flatten(), torch.tensor([len(flatten_ids)])])
        inputs = (means2d[0], conics[0], 0 * opacities[0], colors[0], opacities[0], offsets, flatten_ids)
        color, _, opacity = reference.rasterize_gaussians(*inputs, image_width, image_height)
        return color[None], opacity[None, ..., None]


def test_gsplat_backend_calls_its_interface_and_returns_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "gsplat", FakeGsplat())
    leaves, colors, opacities = scene(30, (40, 20), torch.float32)
    with torch.no_grad():
        colors[3, 1], opacities[5] = math.nan, math.inf
        opacities.clamp_max_(0.9)
        opacities[5] = math.inf
    inputs = [*leaves, colors, opacities]
    projected = ops.project_gaussians(*leaves, (40, 20))
    want = ops.rasterize_gaussians(projected, colors, opacities, (40, 20))
    got = module._rasterize_with_gsplat(projected, colors, opacities, (40, 20))
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-4, atol=1e-5)
    upstream = [torch.randn_like(x) for x in want]
    found, expected = (torch.autograd.grad(tuple(x), inputs, upstream, retain_graph=True) for x in (got, want))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_gsplat_backend_on_the_cpu_raises():
    leaves, colors, opacities = scene(4, (20, 20), torch.float32)
    with pytest.raises(ValueError, match='backend="gsplat" needs float32 on CUDA; got torch.float32 on cpu'):
        ops.rasterize_gaussians(ops.project_gaussians(*leaves, (20, 20)), colors, opacities, (20, 20), backend="gsplat")


def test_wrong_arguments_raise():
    leaves, colors, opacities = scene(4, (20, 20))
    projected = ops.project_gaussians(*leaves, (20, 20))
    with pytest.raises(ValueError, match="quaternions must be"):
        ops.project_gaussians(leaves[0], leaves[1][:, :3], *leaves[2:], (20, 20))
    with pytest.raises(ValueError, match="near"):
        ops.project_gaussians(*leaves, (20, 20), near=0.0)
    with pytest.raises(ValueError, match="colors must be"):
        ops.rasterize_gaussians(projected, torch.zeros(4, 33).double(), opacities, (20, 20))
    with pytest.raises(ValueError, match="opacities must be"):
        ops.rasterize_gaussians(projected, colors, opacities[:3], (20, 20))
    with pytest.raises(ValueError, match="backend='other'"):
        ops.rasterize_gaussians(projected, colors, opacities, (20, 20), backend="other")


# --- as torch sees them ---


@pytest.mark.slow
def test_opcheck():
    leaves, colors, opacities = scene(10, (20, 20))
    torch.library.opcheck(torch.ops.factorkit.project_gaussians, (*leaves, 20, 20, 0.01, math.inf, 0.3))
    projected, colors, opacities = projected_leaves(10, (20, 20))
    inputs = (projected.means, projected.conics, projected.depths, colors, opacities)
    tiles = (*(x.detach() for x in inputs), projected.radii)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.factorkit.count_tiles, (*tiles, 20, 20), test_utils=tests)
    order, offsets = torch.ops.factorkit.count_tiles(*tiles, 20, 20)
    pairs = int(offsets[-1])
    torch.library.opcheck(torch.ops.factorkit.fill_tiles, (*tiles, order, offsets, pairs, 20, 20), test_utils=tests)
    ids = torch.ops.factorkit.fill_tiles(*tiles, order, offsets, pairs, 20, 20)
    torch.library.opcheck(torch.ops.factorkit.rasterize_gaussians, (*inputs, offsets, ids, 20, 20))
    with torch.no_grad():
        settings = (20, 20, 0.01, math.inf, 0.3)
        outputs = torch.ops.factorkit.project_gaussians(*leaves, *settings)
        upstream = (*map(torch.randn_like, outputs[:3]), None, outputs[4], *leaves, *settings, True)
        torch.library.opcheck(torch.ops.factorkit.project_gaussians_backward, upstream, test_utils=tests)
        outputs = torch.ops.factorkit.rasterize_gaussians(*inputs, offsets, ids, 20, 20)
        upstream = (torch.randn_like(outputs[0]), None, None, *outputs[3:], *inputs, offsets, ids, 20, 20)
        torch.library.opcheck(torch.ops.factorkit.rasterize_gaussians_backward, upstream, test_utils=tests)


def test_forced_reference_gives_the_same_image(monkeypatch):
    leaves, colors, opacities = scene(30, (2 * TILE, TILE))
    want = render(leaves, colors, opacities, (2 * TILE, TILE))
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    torch.testing.assert_close(tuple(render(leaves, colors, opacities, (2 * TILE, TILE))), tuple(want))
