"""The images and views of `benchmarks.alarms`: with and without objects, with true and with wrong cameras."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import roma
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.room_photos import make_photos
from factorkit.data import draw_flowers
from factorkit.data.datasets import open_dataset
from factorkit.data.masks import load_labelled
from factorkit.data.prepare import prepare
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views, resize_area
from factorkit.nerfdiff.cameras.poses import azimuth_degrees

PROBES, TRAINING_IMAGES = 48, 252
PHOTOS = {"flowers17": "flowers17_128", "horses": "weizmann_horse_128"}


def draw_textures(generator: torch.Generator, count: int, cells: int, size: int) -> Tensor:
    """Return random smooth colours [count, 3, size, size] in [0, 1] with so many cells to a side."""
    noise = torch.rand(count, 3, cells, cells, generator=generator)
    return F.interpolate(noise, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)


def draw_ellipses(generator: torch.Generator, count: int, size: int, large: bool) -> Tensor:
    """Return masks bool [count, size, size] of one ellipse each, large and central or small and anywhere."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    centre = (torch.rand(count, 2, generator=generator) - 0.5) * (0.2 if large else 1.0)
    radius = torch.tensor([0.5, 0.8] if large else [0.45, 0.45])
    radius = radius * (1 + 0.2 * (torch.rand(count, 1, generator=generator) - 0.5))
    across, down = (((p - centre[:, i, None, None]) / radius[:, i, None, None]) for i, p in enumerate((x, y)))
    return across**2 + down**2 < 1


def make_images(name: str, seed: int, size: int, data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return training images and probes, uint8 [N, size, size, 3], and the foreground of the probes if there is any."""
    generator, count = torch.Generator().manual_seed(seed), PROBES + TRAINING_IMAGES
    if name in PHOTOS:
        dataset = open_dataset(data / PHOTOS[name])
        labelled = load_labelled(dataset.test_images, dataset.test_masks, size)
        training = np.array(prepare(dataset.train, size, progress=False).images[:400])
        return training, labelled.images[:PROBES], labelled.foreground[:PROBES]
    kind, _, change = name.partition(", ")
    if change:
        return change_images(*make_images(kind, seed, size, data), change, generator, data)
    masks = None
    if name == "flowers":
        pixels, foreground = draw_flowers(count, size, seed=seed)
        return pixels[PROBES:], pixels[:PROBES], foreground[:PROBES]
    if name == "noise":
        pixels = torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8).numpy()
        return pixels[PROBES:], pixels[:PROBES], None
    if name == "texture":
        masks = draw_ellipses(generator, count, size, large=False)
        fine, coarse = (draw_textures(generator, count, cells, size) for cells in (8, 3))
        images = torch.where(masks[:, None], fine, coarse)
    elif name == "persons":
        masks = draw_ellipses(generator, count, size, large=True)
        row = torch.arange(size)[:, None].expand(size, size)
        upper, lower = (torch.rand(count, 3, 1, 1, generator=generator) for _ in range(2))
        waist = size * (0.35 + 0.3 * torch.rand(count, 1, 1, generator=generator))
        clothes = torch.where((row < waist)[:, None], upper, lower)
        clothes = clothes + 0.05 * torch.randn(count, 3, size, size, generator=generator)
        images = torch.where(masks[:, None], clothes, draw_textures(generator, count, 5, size))
    elif name == "landscape":
        ground = torch.where(torch.linspace(0, 1, size)[None, None, :, None] < 0.5, 0.8, 0.3)
        images = ground + 0.15 * (draw_textures(generator, count, 4, size) - 0.5)
        images = images + 0.05 * torch.randn(count, 3, size, size, generator=generator)
    elif name == "smooth":
        images = draw_textures(generator, count, 6, size)
    elif name == "one colour":
        images = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, size, size)
    elif name == "halves":  # two colours, split at the same place in all images
        first, second = (torch.rand(count, 3, 1, 1, generator=generator) for _ in range(2))
        images = torch.where((torch.arange(size) < size / 2)[None, None, None], first, second)
        images = images + 0.05 * torch.randn(count, 3, size, size, generator=generator)
    elif name == "stripes":  # of any direction, width, phase and two colours
        angle, width, phase = (
            torch.rand(3, count, 1, 1, generator=generator) * torch.tensor([3.14, 6, 6.28])[:, None, None, None]
        ).unbind()
        y, x = torch.meshgrid(*[torch.arange(size).float()] * 2, indexing="ij")
        wave = torch.sin((x * angle.cos() + y * angle.sin()) / (2 + width) + phase)[:, None] / 2 + 0.5
        first, second = (torch.rand(count, 3, 1, 1, generator=generator) for _ in range(2))
        images = first * wave + second * (1 - wave)
    elif name == "leaves":  # crops of photos of ferns, in which nothing is an object
        images = crop_views(generator, count, size, data)
    elif name == "frames":  # objects along all borders, so that the centre is the ground
        side = torch.linspace(-1, 1, size).abs()
        masks = torch.maximum(side[:, None], side)[None] > 0.5 + 0.3 * torch.rand(count, 1, 1, generator=generator)
        ground, frame = (
            draw_textures(generator, count, 3, size) * 0.4 + 0.6 * torch.rand(count, 3, 1, 1, generator=generator)
            for _ in range(2)
        )
        images = torch.where(masks[:, None], frame, ground)
    elif name == "discs":  # of any colours before leaves
        masks = draw_ellipses(generator, count, size, large=True)
        images = torch.where(
            masks[:, None], torch.rand(count, 3, 1, 1, generator=generator), crop_views(generator, count, size, data)
        )
    else:
        images = 0.5 + 0.3 * (draw_textures(generator, count, 2, size) - 0.5)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return pixels[PROBES:], pixels[:PROBES], None if masks is None else masks[:PROBES].numpy()


def crop_views(generator: torch.Generator, count: int, size: int, data: Path) -> Tensor:
    """Return random crops [count, 3, size, size] in [0, 1] of the photos of ferns, a quarter of their sides."""
    views = open_views(data / "llff_fern_504", None, 4 * size).images
    rows = torch.randint(0, len(views), (count,), generator=generator).tolist()
    starts = [torch.randint(0, side - size + 1, (count,), generator=generator).tolist() for side in views.shape[2:]]
    return torch.stack([views[i, :, y : y + size, x : x + size] for i, y, x in zip(rows, *starts, strict=True)])


def change_images(
    training: np.ndarray,
    probes: np.ndarray,
    truth: np.ndarray | None,
    change: str,
    generator: torch.Generator,
    data: Path,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the images and probes of :func:`make_images` with one change.

    Those from "shuffled" to "rows" leave no object.
    """
    kind, _, number = change.partition(" ")
    size = probes.shape[1]

    def each(change: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray, None]:
        return change(training), change(probes), None

    def shuffle(images: np.ndarray) -> np.ndarray:
        cell = int(number)
        cells = images.reshape(len(images), size // cell, cell, size // cell, cell, 3).swapaxes(2, 3)
        cells = cells.reshape(len(images), -1, cell, cell, 3)
        order = torch.rand(cells.shape[:2], generator=generator).argsort(1).numpy()
        cells = np.take_along_axis(cells, order[:, :, None, None, None], 1)
        return (
            cells.reshape(len(images), size // cell, size // cell, cell, cell, 3).swapaxes(2, 3).reshape(images.shape)
        )

    def enlarge_corners(images: np.ndarray) -> np.ndarray:
        corners = (Image.fromarray(image[: size // 3, : size // 3]) for image in images)
        return np.stack([np.array(corner.resize((size, size), Image.Resampling.BICUBIC)) for corner in corners])

    def reorder_rows(images: np.ndarray) -> np.ndarray:
        order = torch.rand(images.shape[:2], generator=generator).argsort(1).numpy()
        return np.take_along_axis(images, order[:, :, None, None], 1)

    def tint(images: np.ndarray) -> np.ndarray:
        gain = 0.4 + 0.6 * torch.rand(len(images), 1, 1, 3, generator=generator).numpy()
        return (images * gain).astype(np.uint8)

    def blur(images: np.ndarray) -> np.ndarray:
        small = F.avg_pool2d(torch.from_numpy(images).float().permute(0, 3, 1, 2), int(number))
        large = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 255)
        return large.permute(0, 2, 3, 1).byte().numpy()

    if kind == "shuffled":
        return each(shuffle)
    if kind == "rows":
        return each(reorder_rows)
    if kind == "corners":
        return each(enlarge_corners)
    if kind == "first":
        return training[: int(number)], probes, truth
    if kind == "grey":
        return *(
            np.repeat(images.mean(3, keepdims=True).astype(np.uint8), 3, 3) for images in (training, probes)
        ), truth
    if kind == "noisy":
        noise = np.random.default_rng(0)
        return *(
            (images + noise.normal(0, int(number), images.shape)).clip(0, 255).astype(np.uint8)
            for images in (training, probes)
        ), truth
    if kind in ("tinted", "blurred", "dark"):
        alter = {"tinted": tint, "blurred": blur, "dark": lambda images: (images * 0.3).astype(np.uint8)}[kind]
        return alter(training), alter(probes), truth
    if kind == "upside-down":
        return *(np.ascontiguousarray(images[:, ::-1]) for images in (training, probes)), truth if truth is None else (
            np.ascontiguousarray(truth[:, ::-1])
        )
    if kind == "rolled":  # each around by its own shift, with its foreground
        rng = np.random.default_rng(0)
        shifts = [tuple(rng.integers(0, size, 2)) for _ in range(len(training) + len(probes))]
        roll = lambda images, shifts: np.stack([np.roll(i, s, (0, 1)) for i, s in zip(images, shifts, strict=True)])  # noqa: E731
        own = shifts[: len(probes)]
        return roll(training, shifts[len(probes) :]), roll(probes, own), truth if truth is None else roll(truth, own)
    if kind == "negative":
        return 255 - training, 255 - probes, truth
    if kind == "and":  # half of each set
        others = make_images(number, 0, size, data)
        count = min(len(training), len(others[0]))
        pairs = zip((training[:count], probes, truth), (others[0][:count], others[1], others[2]), strict=True)
        return tuple(
            np.concatenate([a[::2], b[1::2]])[np.arange(len(a) // 2 * 2).reshape(2, -1).T.ravel()] for a, b in pairs
        )
    raise ValueError(change)


def make_layers(seed: int, count: int = 16, size: int = 24) -> Views:
    """Return forward-facing views of a textured square at depth 2 before a wall at depth 6."""
    generator, focal = torch.Generator().manual_seed(seed), 1.2 * size
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[:, :2, 3] = torch.rand(count, 2, generator=generator) - 0.5
    intrinsics = torch.tensor([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]]).repeat(count, 1, 1)
    y, x = torch.meshgrid(*[(torch.arange(size) + 0.5 - size / 2) / focal] * 2, indexing="ij")
    layers = []
    for depth in (6, 2):
        texture = draw_textures(generator, 1, 6, 64).expand(count, -1, -1, -1)
        grid = torch.stack([poses[:, 0, 3, None, None] + depth * x, poses[:, 1, 3, None, None] - depth * y], -1)
        layers.append((F.grid_sample(texture, grid / 4, align_corners=False), (grid.abs() < 0.7).all(-1)[:, None]))
    images = torch.where(layers[1][1], layers[1][0], layers[0][0])
    names = [f"{i:02d}.png" for i in range(count)]
    return Views(images, names, intrinsics, poses=poses, near=1.2, far=9.0, layout="forward")


def open_scene_views(name: str, seed: int, data: Path, size: int = 24) -> Views:
    """Return views with true cameras: 40 around an object, 49 in a room, or 16 to 20 forward-facing ones."""
    if name == "procedural":
        return make_procedural_views(40, size, seed=seed)
    if name == "square":
        return make_layers(seed)
    if name == "room":
        return make_photos(seed, size=(96, 128), tiles=True)[0].resize(32)
    generator = torch.Generator().manual_seed(seed)
    if name == "lego":
        views = open_views(data / "nerf_lego_200", "train", size)
        return views.select(torch.randperm(len(views), generator=generator)[:40].sort().values)
    views = open_views(data / "llff_fern_504", None, 32 if seed == 0 else size)
    return views if seed < 2 else views.select(torch.randperm(len(views), generator=generator)[:16].sort().values)


def turn_about_z(poses: Tensor, degrees: Tensor) -> Tensor:
    rotation, angle = torch.eye(4).repeat(len(poses), 1, 1), degrees.deg2rad()
    rotation[:, 0, 0] = rotation[:, 1, 1] = angle.cos()
    rotation[:, 0, 1], rotation[:, 1, 0] = -angle.sin(), angle.sin()
    return rotation @ poses


def rotate(rotvec: Tensor, poses: Tensor) -> Tensor:
    """Return poses [V, 4, 4] rotated about the origin by axis-angle vectors [V, 3]."""
    rotation = torch.eye(4).repeat(len(poses), 1, 1)
    rotation[:, :3, :3] = roma.rotvec_to_rotmat(rotvec)
    return rotation @ poses


def damage(views: Views, fault: str, seed: int, data: Path) -> Views:
    """Return views with one fault."""
    generator, count, poses = torch.Generator().manual_seed(100 + seed), len(views), views.poses.clone()
    kind, _, number = fault.partition(" ")
    centre = poses[:, :3, 3].mean(0)
    if kind == "":
        return views
    if kind in ("forward", "object"):
        near, far = (1.0, 6.0) if kind == "forward" else (None, None)
        return replace(views, layout=kind, near=near, far=far)
    if kind == "first":
        return views.select(slice(0, int(number)))
    if kind == "noise":
        return replace(views, images=torch.rand(views.images.shape, generator=generator))
    if kind == "unrelated":
        photos = prepare(open_dataset(data / PHOTOS["flowers17"]).train, 32, progress=False).images
        images = torch.from_numpy(np.array(photos[seed * 40 : seed * 40 + count])).permute(0, 3, 1, 2) / 255.0
        return replace(views, images=resize_area(images, *views.size))
    if kind == "uncentred":
        offsets = float(number) / 100 * (2 * torch.rand(count, 2, generator=generator) - 1)  # shares of the sides
        transform = torch.eye(2, 3).repeat(count, 1, 1)
        transform[:, :, 2] = 2 * offsets
        grid = F.affine_grid(transform, list(views.images.shape), align_corners=False)
        shifted = F.grid_sample(views.images, grid, padding_mode="border", align_corners=False)
        return replace(views, images=shifted)
    if kind == "focal":
        intrinsics = views.intrinsics.clone()
        intrinsics[:, :2, :2] *= float(number)
        return replace(views, intrinsics=intrinsics)
    if kind == "exchanged":
        poses = poses[torch.randperm(count, generator=generator)]
    elif kind in ("half", "quarter"):
        rows = torch.randperm(count, generator=generator)[: count // (2 if kind == "half" else 4)]
        poses[rows] = torch.diag(torch.tensor([-1.0, -1, 1, 1])) @ poses[rows]
    elif kind == "mirror":
        flip = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
        poses = flip @ poses @ flip
    elif kind == "collapsed":
        poses = turn_about_z(poses, -azimuth_degrees(poses[:, :3, 3]) * 8 / 9)
    elif kind == "jitter":
        poses = turn_about_z(poses, float(number) * torch.randn(count, generator=generator))
    elif kind == "uneven":
        poses = turn_about_z(poses, float(number) * azimuth_degrees(poses[:, :3, 3]).deg2rad().sin())
    elif kind == "tilt":  # about the camera's right axis, through the origin
        rotvec = -math.radians(float(number)) * poses[:, :3, 0]
        poses = rotate(rotvec, poses)
    elif kind == "roll":
        degrees = float(number) * torch.randn(count, 1, generator=generator)
        poses[:, :3, :3] = rotate(degrees.deg2rad() * poses[:, :3, 2], poses)[:, :3, :3]
    elif kind == "zoom":
        poses[:, :3, 3] *= (float(number) / 100 * torch.randn(count, 1, generator=generator)).exp()
    elif kind == "random" and views.layout == "object":
        poses = make_procedural_views(count, 8, seed=50 + seed).poses
    elif kind == "random":
        poses[:, :3, 3] = centre + poses[:, :3, 3].std(0) * torch.randn(count, 3, generator=generator)
    elif kind == "one":
        poses[:, :3, 3] = centre + 0.02 * (poses[:, :3, 3] - centre)
    elif kind == "inverse":
        poses = torch.linalg.inv(poses)
    elif kind == "backward":
        poses[:, :3, 3] = 2 * centre - poses[:, :3, 3]
    return replace(views, poses=poses)
