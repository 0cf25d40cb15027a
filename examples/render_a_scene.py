"""Render a known field on the CPU, in seconds.

    python examples/render_a_scene.py OUT

Writes scene.png, scene_depth.png (near is bright), scene_normals.png, scene_orbit.gif, and an overview of all,
scene_overview.png. The field is a formula: two rings and three pearls over a chequered table. An occupancy grid skips
empty space. One pass renders colour, depth and normals; a second one towards the light renders shadows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import factorkit
from factorkit.rendering import OccupancyGrid, OccupancySampling, Rays, image_rays, intrinsics_from_fov, look_at, orbit

LIGHT_DIRECTION = torch.nn.functional.normalize(torch.tensor([-0.5, -0.7, 0.6]), dim=0)
COLORS = torch.tensor(
    [
        [0.86, 0.20, 0.05],
        [0.95, 0.80, 0.55],
        [0.02, 0.30, 0.36],
        [0.95, 0.58, 0.12],
        [0.85, 0.84, 0.80],
        [0.08, 0.10, 0.15],
    ]
)
SURFACE_WIDTH = 0.006  # distance over which the density rises, in units of length
PEARL_CENTERS = torch.tensor([[-0.62, 0.0, -0.31], [0.31, 0.54, -0.31], [0.31, -0.54, -0.31]])


def distances(p: Tensor) -> Tensor:
    """Return signed distances [M, 4] to a lying ring, a standing ring, the nearest pearl and the table."""
    x, y, z = p.unbind(1)
    lying = torch.hypot(torch.hypot(x, y) - 0.36, z + 0.28) - 0.1
    standing = torch.hypot(torch.hypot(x - 0.36, z + 0.02) - 0.26, y) - 0.055
    pearl = torch.cdist(p, PEARL_CENTERS).amin(1) - 0.14
    table = torch.maximum((z + 0.5).abs() - 0.05, torch.hypot(x, y) - 0.92)
    return torch.stack([lying, standing, pearl, table], dim=1)


def field(p: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return density (a logistic of the signed distance, after Yariv et al. 2021) and albedo."""
    each = distances(p)
    nearest, index = each.min(dim=1)
    density = 4 / SURFACE_WIDTH * torch.sigmoid(-nearest / SURFACE_WIDTH)
    with torch.no_grad():
        turn = torch.atan2(p[:, 1], p[:, 0])
        stripes = (0.5 + 0.5 * torch.sin(9 * turn))[:, None]
        checks = ((5 * p[:, 0]).floor() + (5 * p[:, 1]).floor()).remainder(2)[:, None]
        warm, cream, teal, gold, white, slate = COLORS
        albedos = torch.stack(
            [torch.lerp(cream, warm, stripes), teal.expand_as(p), gold.expand_as(p), torch.lerp(slate, white, checks)]
        )
    return density, albedos[index, torch.arange(len(p))]


def render_view(pose: Tensor, sampling: OccupancySampling, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return lit colour [H, W, 3], depth [H, W] (NaN in the sky) and normals [H, W, 3]."""
    rays = image_rays(pose, intrinsics_from_fov(40.0, height, width), height, width)
    rendered = factorkit.render(field, rays, sampling, normals=True, early_stop=1e-3, chunk=8192)
    depth = torch.where(rendered.opacity > 0.5, rendered.depth / rendered.opacity, torch.nan)
    # Shadows: opacity along a ray from just above each surface point towards the light.
    points = rays.origins + depth.nan_to_num(0)[..., None] * rays.directions + 0.03 * rendered.normals
    towards = Rays(points, LIGHT_DIRECTION.expand_as(points))
    shadow = factorkit.render(field, towards, sampling, early_stop=1e-2, chunk=8192).opacity
    facing = (rendered.normals @ LIGHT_DIRECTION).clamp_min(0) * (1 - shadow)
    ambient = 0.5 + 0.5 * rendered.normals[..., 2]
    lit = rendered.color * (0.85 * facing + 0.25 * ambient * rendered.opacity)[..., None]
    elevation = rays.directions[..., 2:].clamp(-0.6, 0.4)
    sky_color = torch.tensor([0.62, 0.72, 0.84]) + elevation * torch.tensor([0.40, 0.30, 0.15])
    return (lit + (1 - rendered.opacity[..., None]) * sky_color).clamp(0, 1).pow(1 / 2.2), depth, rendered.normals


def to_image(values: Tensor) -> Image.Image:
    """Return an 8-bit image of values in [0, 1]."""
    return Image.fromarray(np.uint8(255 * values.clamp(0, 1).numpy() + 0.5))


def draw_overview(still: Image.Image, small: list[Image.Image], frames: list[Image.Image]) -> Image.Image:
    """Return the still with small images beside it and frames of the orbit below."""
    gap, (width, height) = 6, still.size
    side = ((width - gap) // 2, (height - gap) // 2)
    whole = width + gap + side[0]
    below = (whole - gap * (len(frames) - 1)) // len(frames)
    page = Image.new("RGB", (whole, height + gap + below * height // width), "white")
    page.paste(still, (0, 0))
    for i, one in enumerate(small):
        page.paste(one.resize(side, Image.Resampling.LANCZOS), (width + gap, i * (side[1] + gap)))
    for i, one in enumerate(frames):
        page.paste(one.resize((below, below * height // width)), (i * (below + gap), height + gap))
    return page


def main() -> None:
    """Render all images into the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--size", type=int, default=360, help="height of the still; the orbit has a third of it")
    parser.add_argument("--frames", type=int, default=36)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    grid = OccupancyGrid((-1, -1, -1), (1, 1, 1), resolution=64, threshold=1e-3)
    for _ in range(8):
        grid.update(lambda points: field(points, points)[0])
    sampling = OccupancySampling(grid, step=0.008)
    share = grid.share_occupied().item()
    print(f"{time.perf_counter() - start:5.1f} s  occupancy grid: {share:.0%} of its cells")

    height, width = args.size, args.size * 4 // 3
    eye, centre, up = torch.tensor([2.4, -1.9, 1.5]), torch.tensor([0.0, 0, -0.3]), torch.tensor([0.0, 0, 1])
    color, depth, normals = render_view(look_at(eye, centre, up), sampling, height, width)
    near, far = np.nanmin(depth), np.nanmax(depth)  # NaN is the sky
    stills = {
        "scene.png": to_image(color),
        "scene_depth.png": to_image(((far - depth) / (far - near) * 0.9 + 0.1).nan_to_num(0)),
        "scene_normals.png": to_image(normals / 2 + 0.5),
    }
    for name, image in stills.items():
        image.save(args.out / name)
    print(f"{time.perf_counter() - start:5.1f} s  {', '.join(stills)}, {width} x {height}")

    small = OccupancySampling(grid, step=0.012)
    poses = orbit(args.frames, 3.3, 28.0)
    poses[:, :3, 3] += centre
    frames = [to_image(render_view(pose, small, height // 3, width // 3)[0]) for pose in poses]
    first, *rest = frames
    first.save(args.out / "scene_orbit.gif", save_all=True, append_images=rest, duration=70, loop=0)
    print(f"{time.perf_counter() - start:5.1f} s  scene_orbit.gif, {args.frames} frames")
    still, *small = (image.convert("RGB") for image in stills.values())
    draw_overview(still, small, frames[:: max(1, len(frames) // 6)][:6]).save(
        args.out / "scene_overview.png", optimize=True
    )


if __name__ == "__main__":
    main()
