"""Images of one scene with what is known of their cameras."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from factorkit.utils.errors import ConfigError, DataError

SceneLayout = Literal["object", "forward"]

RIGIDITY_TOLERANCE = 1e-3  # maximum error of R^T R; loose enough for files with few digits
SKEW_TOLERANCE = 1e-4  # maximum skew of K in focal lengths; allows for rounding
MIN_FOCAL = 0.088  # focal length over the image's side: a field of view of 160 degrees
LOSS_MASK_THRESHOLD = 0.999  # share of a resized pixel that must be scored for it to be scored
# Attributes with one row for each view.
PER_VIEW = ("images", "intrinsics", "masks", "poses", "loss_masks", "content_sizes", "times")
COLORS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}


@dataclass(frozen=True, eq=False)
class Views:
    """V images of one scene, all of one size, each with its own intrinsics.

    Attributes:
        images: float32 [V, 3, H, W] in [0, 1], composited over `background` if there are masks.
        names: a unique name for each view.
        intrinsics: float32 [V, 3, 3] in pixels of these images, see :mod:`factorkit.rendering.cameras`.
        masks: float32 [V, 1, H, W], the opacity in [0, 1], or None.
        poses: float32 [V, 4, 4], camera to world, OpenGL axes (x right, y up, looking along -z), or None if unknown.
        near, far: range of depths along the viewing direction that contains the scene, or None.
        layout: "object": cameras around an object; "forward": cameras that look in similar directions.
        background: float32 [3], uniform background colour, or None.
        loss_masks: float32 [V, 1, H, W], 1 where a view is scored and 0 where not (nerfstudio's `mask_path`), or None
            if all pixels are. Unlike `masks` they say nothing about the scene.
        content_sizes: [V, 2], height and width of each view in the middle of its image if views of other shapes are
            padded (with a loss mask of 0), or None if all fill their images.
        points: float32 [P, 3], sparse points of the scene in the coordinates of `poses`, or None.
        origin: the position in the files that is the origin of `poses`, if that was moved.
        notes: sentences for the user on how the files were read.
        has_focal: whether the focal lengths are known, from cameras, EXIF or the user; False: they are a guess.
        times: float64 [V], when the views were taken, in seconds from any start, or None if not known of all views.

    Raises:
        DataError: no views, inconsistent shapes, values that are not finite, a pose that is not rigid, invalid
            intrinsics, near not below far, or masks without any foreground.
    """

    images: Tensor
    names: list[str]
    intrinsics: Tensor
    masks: Tensor | None = None
    poses: Tensor | None = None
    near: float | None = None
    far: float | None = None
    layout: SceneLayout = "object"
    background: Tensor | None = None
    loss_masks: Tensor | None = None
    content_sizes: Tensor | None = None
    points: Tensor | None = None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    notes: tuple[str, ...] = ()
    has_focal: bool = True
    times: Tensor | None = None

    def __post_init__(self) -> None:
        _check_views(self)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def select(self, indices: Sequence[int] | Tensor | slice) -> Views:
        """Return the views at these indices (or where a boolean tensor [V] is True), in this order."""
        rows = torch.arange(len(self))[indices].reshape(-1)
        per_view = {name: getattr(self, name) for name in PER_VIEW}
        per_view = {name: value if value is None else value[rows] for name, value in per_view.items()}
        return replace(self, names=[self.names[i] for i in rows.tolist()], **per_view)

    def resize(self, size: int | tuple[int, int]) -> Views:
        """Return the views at another size, with their intrinsics; each pixel is the mean over its area.

        Args:
            size: pixels of the longer side, keeping the aspect ratio; or (height, width).

        Raises:
            ConfigError: a side below 1 pixel.
        """
        height, width = target_size(size, *self.size)
        scale = torch.tensor([width / self.size[1], height / self.size[0], 1.0])
        return replace(
            self,
            images=resize_area(self.images, height, width).clamp(0, 1),
            masks=None if self.masks is None else resize_area(self.masks, height, width).clamp(0, 1),
            loss_masks=None
            if self.loss_masks is None
            else (resize_area(self.loss_masks, height, width) > LOSS_MASK_THRESHOLD).float(),
            intrinsics=self.intrinsics * scale[:, None],
            content_sizes=None if self.content_sizes is None else self.content_sizes * scale[[1, 0]],
        )

    def own_size(self, index: int, longer: int | None = None) -> tuple[int, int]:
        """Return height and width of a view without its padding, or those with another longer side."""
        content = self.size if self.content_sizes is None else self.content_sizes[index].tolist()
        height, width = (max(1, round(side)) for side in content)
        return (height, width) if longer is None else target_size(longer, height, width)

    def content_region(self, index: int, size: tuple[int, int]) -> tuple[slice, slice]:
        """Return the rows and columns of a view without its padding in an image of the padded views at another size."""
        sides = self.size if self.content_sizes is None else self.content_sizes[index].tolist()
        lengths = [max(1, round(new * side / old)) for new, side, old in zip(size, sides, self.size, strict=True)]
        starts = [(new - length) // 2 for new, length in zip(size, lengths, strict=True)]
        return slice(starts[0], starts[0] + lengths[0]), slice(starts[1], starts[1] + lengths[1])

    def own_intrinsics(self, index: int, size: tuple[int, int]) -> Tensor:
        """Return K [3, 3] of a view without its padding in pixels of an image of this size."""
        content = torch.tensor(self.size) if self.content_sizes is None else self.content_sizes[index]
        top, left = ((torch.tensor(self.size) - content) / 2).tolist()
        scale = torch.tensor([size[1] / float(content[1]), size[0] / float(content[0]), 1.0])
        return (self.intrinsics[index] - torch.tensor([[0, 0, left], [0, 0, top], [0, 0, 0]])) * scale[:, None]

    def reframe(self, intrinsics: Tensor, size: tuple[int, int]) -> Views:
        """Return the views as another camera at the same place and with the same axes sees them.

        Pixels that the views do not show have their background colour, else the nearest colour, and a loss mask of 0.

        Args:
            intrinsics: K [3, 3] of the other camera in pixels of the new size.
            size: its height and width.
        """
        height, width = size
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        rays = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ torch.linalg.inv(intrinsics.cpu()).T
        parts = []
        for i in range(len(self)):
            view = self.select([i])
            ratio = intrinsics.cpu().diagonal()[:2] / view.intrinsics[0].diagonal()[:2]
            if (ratio < 1).any():  # average first, as a camera with larger pixels does
                fx, fy = ratio.clamp(max=1).tolist()
                view = view.resize((max(1, round(view.size[0] * fy)), max(1, round(view.size[1] * fx))))
            at = (rays @ view.intrinsics[0].T)[..., :2] / torch.tensor([view.size[1], view.size[0]]) * 2 - 1
            inside = (at.abs() <= 1).all(-1)[None, None].float()
            channels = [value for value in (view.images, view.masks, view.loss_masks) if value is not None]
            sampled = torch.nn.functional.grid_sample(
                torch.cat(channels, dim=1), at[None], padding_mode="border", align_corners=False
            )
            parts.append((sampled, inside))
        values = torch.cat([sampled for sampled, _ in parts])
        inside = torch.cat([inside for _, inside in parts])
        images, scored = values[:, :3], inside
        if self.background is not None:
            images = images * inside + (1 - inside) * self.background[:, None, None]
        if self.loss_masks is not None:
            scored = inside * (values[:, -1:] > LOSS_MASK_THRESHOLD)
        return replace(
            self,
            images=images.clamp(0, 1),
            masks=None if self.masks is None else (values[:, 3:4] * inside).clamp(0, 1),
            loss_masks=None if self.loss_masks is None and bool(inside.all()) else scored,
            intrinsics=intrinsics.cpu().expand(len(self), 3, 3),
            content_sizes=None,
        )

    def with_background(self, background: str | Sequence[float] | Tensor, seed: int = 0) -> Views:
        """Return the same foreground over another background.

        Args:
            background: "white", "black", a colour [3], or "noise" (random per pixel; `background` becomes None).
            seed: seed of the noise.

        Raises:
            ConfigError: the views have no masks or no uniform background.
        """
        if self.masks is None or self.background is None:
            missing = "masks" if self.masks is None else "known background colour"
            raise ConfigError(f"these views have no {missing}: their background cannot be replaced")
        backdrop, color = make_background(background, self.images.shape, seed)
        images = self.images + (1 - self.masks) * (backdrop - self.background[:, None, None])
        return replace(self, images=images.clamp(0, 1), background=color)


def make_background(
    background: str | Sequence[float] | Tensor, shape: Sequence[int], seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Make a background for images [V, 3, H, W].

    Returns:
        The background in a shape that broadcasts to the images, and its uniform colour [3] or None.

    Raises:
        ConfigError: not "white", "black", "noise" or three numbers in [0, 1].
    """
    if isinstance(background, str) and background == "noise":
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)), None
    values = COLORS.get(background) if isinstance(background, str) else background
    color = None if values is None else torch.as_tensor(values, dtype=torch.float32)
    if color is None or color.shape != (3,) or not ((color >= 0) & (color <= 1)).all():
        raise ConfigError(f'background={background!r}: give "white", "black", "noise" or three numbers in [0, 1]')
    return color[:, None, None], color


def target_size(size: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Convert a size (the longer side, or both sides) to height and width for an image of this height and width.

    Raises:
        ConfigError: a side below 1 pixel.
    """
    if isinstance(size, int):
        scale = size / max(height, width)
        target = (max(1, round(height * scale)), max(1, round(width * scale))) if size >= 1 else (size, size)
    else:
        target = (int(size[0]), int(size[1]))
    if min(target) < 1:
        raise ConfigError(f"size={size}: give at least 1 pixel a side")
    return target


def resize_area(images: Tensor, height: int, width: int) -> Tensor:
    """Resize images [..., H, W]: each new pixel is the mean over the exact area it covers.

    The result is the image of the same pinhole camera at another resolution.
    """
    if images.shape[-2:] == (height, width):
        return images
    rows, columns = (
        _overlap_weights(new, old, images.device).to(images.dtype)
        for new, old in zip((height, width), images.shape[-2:], strict=True)
    )
    return rows @ images @ columns.T


def _overlap_weights(new: int, old: int, device: torch.device) -> Tensor:
    """Return [new, old]: the fraction of new pixel i that lies in old pixel j."""
    edges = torch.arange(new + 1, dtype=torch.float64, device=device) * old / new
    pixel = torch.arange(old, dtype=torch.float64, device=device)
    overlap = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return overlap.clamp_min(0) * new / old


def _check_views(views: Views) -> None:
    images, count = views.images, len(views.names)
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise DataError(f"images of shape {tuple(images.shape)}: give at least one view, as [V, 3, H, W]")
    height, width = images.shape[2:]
    shapes = {
        "images": (count, 3, height, width),
        "intrinsics": (count, 3, 3),
        "masks": (count, 1, height, width),
        "poses": (count, 4, 4),
        "loss_masks": (count, 1, height, width),
        "content_sizes": (count, 2),
        "times": (count,),
        "background": (3,),
    }
    for name, shape in shapes.items():
        value = getattr(views, name)
        if value is None and name not in ("images", "intrinsics"):
            continue
        if tuple(value.shape) != shape:
            raise DataError(
                f"{name} of shape {tuple(value.shape)}, expected {shape} for {count} names and images of {height} x "
                f"{width} pixels"
            )
        if not value.isfinite().all():
            where = "" if name == "background" else f" in {_name_first(views.names, ~value.isfinite())}"
            raise DataError(f"{name}: values that are not finite{where}")
        if name in ("images", "masks", "loss_masks", "background") and not (value.min() >= 0 and value.max() <= 1):
            raise DataError(f"{name}: values from {value.min():.4g} to {value.max():.4g}, need 0 to 1. Rescale them.")
    if len(set(views.names)) < count:
        raise DataError(f"two views are named {max(views.names, key=views.names.count)}; names must be unique")
    if views.poses is not None:
        check_rigid(views.poses, views.names)
    _check_intrinsics(views.intrinsics, views.names, height, width)
    if views.near is not None and views.far is not None and not 0 <= views.near < views.far:
        raise DataError(f"near={views.near:g} and far={views.far:g}: need 0 <= near < far")
    if views.masks is not None and not (views.masks > 0.5).any():
        raise DataError("no foreground: all masks are empty. Are they inverted?")
    if views.loss_masks is not None and not (views.loss_masks > 0.5).any():
        raise DataError("no pixel is scored: all loss masks are empty. Are they inverted?")
    if views.layout not in ("object", "forward"):
        raise DataError(f'layout={views.layout!r}: give "object" or "forward"')


def _check_intrinsics(intrinsics: Tensor, names: Sequence[str], height: int, width: int) -> None:
    if (intrinsics.diagonal(dim1=1, dim2=2)[:, :2] <= 0).any():
        raise DataError("intrinsics: a focal length is not positive")
    is_wide = (intrinsics.diagonal(dim1=1, dim2=2)[:, :2] < MIN_FOCAL * torch.tensor([width, height])).any(1)
    if is_wide.any():
        worst = intrinsics[int(is_wide.int().argmax()), 0, 0].item()
        raise DataError(
            f"intrinsics: the focal length of {_name_first(names, is_wide)} is {worst:.4g} pixels for images of "
            f"{width} x {height}, a field of view beyond 160 degrees. Give intrinsics in pixels."
        )
    is_skewed = intrinsics[:, [0, 1], [1, 0]].abs().amax(1) > SKEW_TOLERANCE * intrinsics[:, 0, 0]
    if is_skewed.any():
        raise DataError(
            f"intrinsics: K of {_name_first(names, is_skewed)} has skew, which is not supported. Undistort the images "
            "to cameras without skew first."
        )
    is_bad = (intrinsics[:, 2] - intrinsics.new_tensor([0.0, 0, 1])).abs().amax(1) > SKEW_TOLERANCE
    if is_bad.any():
        raise DataError(
            f"intrinsics: the last row of {_name_first(names, is_bad)} is not 0 0 1. Divide K by its last number."
        )


def check_rigid(poses: Tensor, names: Sequence[str]) -> None:
    """Check that poses [V, 4, 4] are rotations and translations.

    Raises:
        DataError: a pose is not finite, stretches, mirrors, or has another last row.
    """
    if not poses.isfinite().all():
        raise DataError(f"the pose of {_name_first(names, ~poses.isfinite())} has values that are not finite")
    rotation = poses[:, :3, :3].double()
    error = (rotation.mT @ rotation - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    last_row_error = (poses[:, 3].double() - torch.tensor([0.0, 0, 0, 1])).abs().amax(1)
    for is_bad, problem in (
        (error > RIGIDITY_TOLERANCE, "stretches or shears"),
        (torch.linalg.det(rotation) < 0, "mirrors"),
        (last_row_error > RIGIDITY_TOLERANCE, "has a last row other than 0 0 0 1"),
    ):
        if is_bad.any():
            raise DataError(
                f"the pose of {_name_first(names, is_bad)} is not rigid: it {problem}. Give camera-to-world matrices "
                "of a rotation and a translation."
            )


def _name_first(names: Sequence[str], is_bad: Tensor) -> str:
    """Return the name of the first bad view, and the number of others."""
    per_view = is_bad.flatten(1).any(1) if is_bad.dim() > 1 else is_bad
    count = int(per_view.sum())
    return names[int(per_view.int().argmax())] + (f" (and {count - 1} more)" if count > 1 else "")
