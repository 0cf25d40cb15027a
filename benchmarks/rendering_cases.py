"""Ops of rendering and encodings as PyTorch, factorkit and others do them, for benchmarks/test_ops.py."""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import OpCase, Run
from factorkit import ops
from factorkit.ops import reference
from factorkit.ops.rasterize_gaussians import sort_into_tiles
from factorkit.utils.errors import first_line

SAMPLES, CHANNELS = 128, 3  # along a ray
BOX = [-1.0] * 3, [1.0] * 3
STEP = 2 * 3**0.5 / 1024
SAMPLE_BYTES = 24  # density, colour and both edges, which each pass reads
GRADIENT_BYTES = 16  # of density and colour; of the edges another 8
GAUSSIANS_PER_RAY, SPLAT_SIZE = 10, {"cpu": 128, "cuda": 800}  # 10,240 Gaussians at 128 pixels on the CPU
RENDERING_OPS = (
    "composite dense",
    "composite packed",
    "march_rays",
    "intersect_box",
    "sample_pdf",
    "hash_grid linear",
    "hash_grid quintic",
    "frequency",
    "project_gaussians",
    "rasterize_gaussians",
    "rasterize_gaussians tenth",
    "spherical_harmonics",
)


def import_peer(name: str) -> ModuleType | str:
    """Return a module, or why it cannot be used: nerfacc compiles when imported, and raises anything where it fails."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return f"{name} is absent: {type(error).__name__}: {first_line(error)}"


def rendering_op(name: str, rays: int, device: torch.device) -> OpCase:
    """Make an op with this many rays of 128 samples or points, fp32."""
    op, _, form = name.partition(" ")
    if op == "composite":
        return composite_dense(rays, device) if form == "dense" else composite_packed(rays, device)
    if op == "hash_grid":
        return hash_grid_case(rays, device, form)
    if op in ("project_gaussians", "rasterize_gaussians", "spherical_harmonics"):
        return gaussians_case(op, GAUSSIANS_PER_RAY * rays // (10 if form == "tenth" else 1), device)
    origins, directions = make_rays(rays, device)
    near, far = ops.intersect_box(origins, directions, *BOX)
    if op == "march_rays":
        return march_case(origins, directions, near, far)
    if op == "intersect_box":
        inputs = [origins.requires_grad_(), directions.requires_grad_()]
        return OpCase(
            inputs, lambda o, d: ops.intersect_box(o, d, *BOX), lambda o, d: reference.intersect_box(o, d, *BOX)
        )
    if op == "sample_pdf":
        edges = torch.rand(rays, SAMPLES + 1, device=device).cumsum(1)
        return OpCase(
            [edges[:, :-1].contiguous(), edges[:, 1:].contiguous(), torch.rand(rays, SAMPLES, device=device)],
            lambda *x: ops.sample_pdf(*x, SAMPLES),
            lambda *x: reference.sample_pdf(*x, None, SAMPLES, None),
        )
    points = torch.rand(rays * SAMPLES, 3, device=device).requires_grad_()
    return OpCase([points], lambda x: ops.frequency(x, 10), lambda x: reference.frequency(x, 10, None))


def make_rays(rays: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return origins and directions of a square image's rays towards the box."""
    line = torch.linspace(-0.5, 0.5, max(1, round(rays**0.5)), device=device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    directions = F.normalize(F.pad(grid, (0, 1), value=-1.0), dim=1)
    origins = torch.tensor([0.1, -0.05, 3.0], device=device).expand_as(directions).contiguous()
    return origins, directions


def composite_dense(rays: int, device: torch.device) -> OpCase:
    """Colour, depth and opacity, with gradients for all inputs."""
    edges = torch.rand(rays, SAMPLES + 1, device=device).cumsum(1) * (4 / SAMPLES)
    t_start, t_end = (x.contiguous() for x in (edges[:, :-1], edges[:, 1:]))
    sigma = torch.rand(rays, SAMPLES, device=device) * 4
    colors = torch.rand(rays, SAMPLES, CHANNELS, device=device)
    inputs = [x.requires_grad_() for x in (sigma, colors, t_start, t_end, torch.rand(CHANNELS, device=device))]

    def with_nerfacc(sigma, rgb, t_start, t_end, background):
        weights = nerfacc.render_weight_from_density(t_start, t_end, sigma)[0]
        opacity = nerfacc.accumulate_along_rays(weights, None)
        color = nerfacc.accumulate_along_rays(weights, rgb) + (1 - opacity) * background
        depth = nerfacc.accumulate_along_rays(weights, ((t_start + t_end) / 2)[..., None])
        return color, depth[:, 0], opacity[:, 0]

    nerfacc = import_peer("nerfacc")
    return OpCase(
        inputs,
        lambda s, c, a, b, background: tuple(ops.composite(s, c, a, b, background=background)[:3]),
        lambda s, c, a, b, background: reference.composite(s, c, a, b, None, background, 0.0)[:3],
        {"nerfacc": with_nerfacc if isinstance(nerfacc, ModuleType) else absent(nerfacc)},
        moved=moved_by_composite(rays * SAMPLES, GRADIENT_BYTES + 8),
    )


def composite_packed(rays: int, device: torch.device) -> OpCase:
    """Colour and opacity of packed rays, with gradients for density and colour, as in training."""
    count = rays * SAMPLES
    t_start = torch.rand(rays, SAMPLES, device=device).cumsum(1).flatten() * (4 / SAMPLES)
    t_end = t_start + 4 / SAMPLES
    sigma, rgb = torch.rand(count, device=device) * 2, torch.rand(count, CHANNELS, device=device)
    offsets = torch.arange(0, count + 1, SAMPLES, device=device)
    ray = torch.arange(rays, device=device).repeat_interleave(SAMPLES)

    def ours(sigma, rgb):
        out = ops.composite(sigma, rgb, t_start, t_end, offsets)
        return out.color, out.opacity

    def plain(sigma, rgb):
        color, _, opacity, *_ = reference.composite(sigma, rgb, t_start, t_end, offsets, None, 0.0)
        return color, opacity

    def with_nerfacc(sigma, rgb):
        packed = {"ray_indices": ray, "n_rays": rays}
        weights = nerfacc.render_weight_from_density(t_start, t_end, sigma, **packed)[0]
        color = nerfacc.accumulate_along_rays(weights, rgb, **packed)
        return color, nerfacc.accumulate_along_rays(weights, None, **packed)[:, 0]

    nerfacc = import_peer("nerfacc")
    if isinstance(nerfacc, ModuleType) and device.type == "cpu":
        nerfacc = "nerfacc renders packed samples on CUDA only"
    peers = {"nerfacc": with_nerfacc if isinstance(nerfacc, ModuleType) else absent(nerfacc)}
    inputs = [sigma.requires_grad_(), rgb.requires_grad_()]
    return OpCase(inputs, ours, plain, peers, moved_by_composite(count, GRADIENT_BYTES))


def moved_by_composite(samples: int, gradient_bytes: int) -> dict[str, int]:
    """Return the bytes that compositing must move."""
    return {"forward": SAMPLE_BYTES * samples, "both": (2 * SAMPLE_BYTES + gradient_bytes) * samples}


def march_case(origins: Tensor, directions: Tensor, near: Tensor, far: Tensor) -> OpCase:
    """March through a 128^3 grid that holds a shell, about 5 percent of its cells."""
    line = (torch.arange(128, device=origins.device) + 0.5) / 64 - 1
    radius = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).norm(dim=0)
    occupied = ((radius - 0.6).abs() < 0.045).reshape(-1, 8)
    occupancy = (occupied * 2 ** torch.arange(8, device=origins.device)).sum(1).to(torch.uint8)[None]
    volume = occupied.reshape(1, 1, 128, 128, 128).float()
    inputs = [origins, directions, near, far, occupancy]

    def look_up_all_steps(origins, directions, near, far, occupancy):
        steps = torch.arange(int((far - near).max() / STEP) + 1, device=near.device)
        t = near[:, None] + steps * STEP
        points = origins[:, None] + (t + STEP / 2)[..., None] * directions[:, None]
        values = F.grid_sample(volume, points.flip(-1)[None, :, :, None], "nearest", align_corners=False)
        inside = (values[0, 0, :, :, 0] > 0.5) & (t < far[:, None])
        return t[inside], inside.sum(1).cumsum(0)

    return OpCase(
        inputs,
        lambda *x: tuple(ops.march_rays(*x, *BOX, step=STEP)[:2]),
        lambda *x: reference.march_rays(*x, *BOX, STEP, float("inf"), 0.0, None)[:2],
        {"grid_sample": look_up_all_steps},
    )


def hash_grid_case(rays: int, device: torch.device, interpolation: str) -> OpCase:
    """16 levels of 2 features from 16 to 512 cells, tables of 2^16 rows, on points along short rays."""
    origins, directions = torch.rand(rays, 1, 3), F.normalize(torch.randn(rays, 1, 3), dim=2)
    x = (origins + torch.linspace(0, 0.5, SAMPLES)[:, None] * directions).clamp(0, 1).reshape(-1, 3).to(device)
    table = (torch.rand(16, 2**16, 2) * 2e-4 - 1e-4).to(device)
    resolutions, weights = ops.growing_resolutions(16, 512, 16), torch.ones(16, device=device)
    quintic = interpolation == "quintic"
    return OpCase(
        [x.requires_grad_(), table.requires_grad_()],
        lambda x, table: ops.hash_grid(x, table, resolutions, interpolation=interpolation),
        lambda x, table: reference.hash_grid(x, table, weights, resolutions, quintic),
    )


def gaussians_case(op: str, count: int, device: torch.device) -> OpCase:
    """Small Gaussians that fill a square image; rasterize_gaussians is timed with the projection before it."""
    side = SPLAT_SIZE[device.type]
    size, scales = (side, side), torch.rand(count, 3, device=device) * 4 / count**0.5 + 1 / count**0.5
    means = torch.rand(count, 3, device=device) * 2 - 1
    if op == "spherical_harmonics":
        harmonics = [means.requires_grad_(), torch.rand(count, 16, 3, device=device).requires_grad_()]
        return OpCase(harmonics, ops.spherical_harmonics, ops.spherical_harmonics)
    view = torch.eye(4, device=device)
    view[2, 3] = 4
    lens = torch.tensor([[1.4 * side, 0, side / 2], [0, 1.4 * side, side / 2], [0, 0, 1]], device=device)
    inputs = [x.requires_grad_() for x in (means, torch.randn(count, 4, device=device), scales, view, lens)]

    def project(*x: Tensor) -> tuple[Tensor, ...]:
        return reference.project_gaussians(*x, side, side, 0.01, float("inf"), 0.3)

    def plain(*x: Tensor) -> tuple[Tensor, ...]:
        means, conics, depths, _, radii = project(*x[:5])
        splats = (means, conics, depths, *x[5:])
        with torch.no_grad():
            tiles = sort_into_tiles(*splats, radii, width=side, height=side)
        return reference.rasterize_gaussians(*splats, *tiles, side, side)

    if op == "project_gaussians":
        return OpCase(inputs, lambda *x: tuple(ops.project_gaussians(*x, size))[:3], lambda *x: project(*x)[:3])
    inputs += [torch.rand(*shape, device=device).requires_grad_() for shape in ((count, 3), (count,))]

    def ours(*x: Tensor, backend: str = "factorkit") -> tuple[Tensor, ...]:
        return tuple(ops.rasterize_gaussians(ops.project_gaussians(*x[:5], size), *x[5:], size, backend=backend))

    gsplat = import_peer("gsplat") if device.type == "cuda" else "gsplat renders on CUDA only"
    peer = partial(ours, backend="gsplat") if isinstance(gsplat, ModuleType) else absent(gsplat)
    return OpCase(inputs, ours, plain, {"gsplat": peer})


def absent(reason: str) -> Run:
    """Return a stand-in for a peer that cannot run here."""

    def run(*inputs: Tensor) -> Tensor:
        raise ModuleNotFoundError(reason)

    return run
