"""Posed views: pictures of one scene with what is known of the cameras that took them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from factorkit.utils.errors import ConfigError, DataError

SceneLayout = Literal["object", "forward"]

RIGIDITY = 1e-3  # how far the columns of a rotation may be from orthonormal; files with few digits stay below it
SKEW = 1e-4  # what K may hold, in focal lengths, where it should hold nothing: rounding
COLORS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}


@dataclass(frozen=True, eq=False)
class Views:
    """V pictures of one scene, all of one size.

    Attributes:
        images: float32 [V, 3, H, W] in [0, 1], where there are masks composited over `background`.
        names: one for each view, all different.
        intrinsics: float32 [V, 3, 3] in pixels of these images, see :mod:`factorkit.rendering.cameras`.
        masks: float32 [V, 1, H, W], the opacity in [0, 1], or None.
        poses: float32 [V, 4, 4], camera to world, OpenGL's axes (x right, y up, looking along -z), or None: unknown.
        near, far: distances along the viewing direction between which everything lies, or None.
        layout: "object", the cameras stand around something, or "forward", they look the same way.
        background: float32 [3], the one colour behind everything, or None.

    Raises:
        DataError: no view, counts or shapes that do not fit, values that are not finite, a pose that is not rigid,
            intrinsics with skew or another last row than 0 0 1, near not below far, masks without any foreground.
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

    def __post_init__(self) -> None:
        _check(self)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def select(self, indices: Sequence[int] | Tensor | slice) -> Views:
        """The views at these indices (or where a boolean tensor [V] is true), in this order."""
        chosen = torch.arange(len(self))[indices].reshape(-1)
        per_view = {name: getattr(self, name) for name in ("images", "intrinsics", "masks", "poses")}
        per_view = {name: value if value is None else value[chosen] for name, value in per_view.items()}
        return replace(self, names=[self.names[i] for i in chosen.tolist()], **per_view)

    def resize(self, size: int | tuple[int, int]) -> Views:
        """The views at another size, each new pixel the mean over its area; the intrinsics follow.

        Args:
            size: pixels of the longer side, the shorter one in proportion; or (height, width).

        Raises:
            ConfigError: a side below 1 pixel.
        """
        height, width = target_size(size, *self.size)
        scale = torch.tensor([width / self.size[1], height / self.size[0], 1.0])
        return replace(
            self,
            images=resize_area(self.images, height, width).clamp(0, 1),
            masks=None if self.masks is None else resize_area(self.masks, height, width).clamp(0, 1),
            intrinsics=self.intrinsics * scale[:, None],
        )

    def with_background(self, background: str | Sequence[float] | Tensor, seed: int = 0) -> Views:
        """The same foreground over another background: "white", "black", a colour [3], or "noise", in every pixel a
        colour drawn evenly (after which there is no one background colour any more).

        Raises:
            ConfigError: there are no masks, or no background colour to take away.
        """
        if self.masks is None or self.background is None:
            missing = "masks" if self.masks is None else "known background colour"
            raise ConfigError(f"these views have no {missing}: their background cannot be exchanged")
        behind, color = make_background(background, self.images.shape, seed)
        images = self.images + (1 - self.masks) * (behind - self.background[:, None, None])
        return replace(self, images=images.clamp(0, 1), background=color)


def make_background(
    background: str | Sequence[float] | Tensor, shape: Sequence[int], seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """What to composite images of this shape [V, 3, H, W] over, in a shape that broadcasts, and its one colour [3].

    Raises:
        ConfigError: neither "white", "black", "noise" nor three numbers in [0, 1].
    """
    if isinstance(background, str) and background == "noise":
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)), None
    values = COLORS.get(background) if isinstance(background, str) else background
    color = None if values is None else torch.as_tensor(values, dtype=torch.float32)
    if color is None or color.shape != (3,) or not ((color >= 0) & (color <= 1)).all():
        raise ConfigError(f'background={background!r}: give "white", "black", "noise" or three numbers in [0, 1]')
    return color[:, None, None], color


def target_size(size: int | tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Height and width that `size` means for a picture: of the longer side, or both.

    Raises:
        ConfigError: a side below 1 pixel.
    """
    if isinstance(size, int):
        scale = size / max(height, width)
        wanted = (max(1, round(height * scale)), max(1, round(width * scale))) if size >= 1 else (size, size)
    else:
        wanted = (int(size[0]), int(size[1]))
    if min(wanted) < 1:
        raise ConfigError(f"size={size}: give at least 1 pixel a side")
    return wanted


def resize_area(images: Tensor, height: int, width: int) -> Tensor:
    """Images [..., H, W] at another size: each new pixel is the mean over the area it covers, fractions included, so
    that a pinhole camera's picture stays that camera's."""
    if images.shape[-2:] == (height, width):
        return images
    rows, columns = (_overlap(*sizes) for sizes in ((height, images.shape[-2]), (width, images.shape[-1])))
    return rows.to(images) @ images @ columns.T.to(images)


def _overlap(new: int, old: int) -> Tensor:
    """[new, old]: the share of new pixel i that lies in old pixel j."""
    edges = torch.arange(new + 1, dtype=torch.float64) * old / new
    pixel = torch.arange(old, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return shared.clamp_min(0) * new / old


def _check(views: Views) -> None:
    images, count = views.images, len(views.names)
    if images.dim() != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise DataError(f"images of shape {tuple(images.shape)}: give at least one view, as [V, 3, H, W]")
    height, width = images.shape[2:]
    shapes = {
        "images": (count, 3, height, width),
        "intrinsics": (count, 3, 3),
        "masks": (count, 1, height, width),
        "poses": (count, 4, 4),
        "background": (3,),
    }
    for name, shape in shapes.items():
        value = getattr(views, name)
        if value is None and name not in ("images", "intrinsics"):
            continue
        if tuple(value.shape) != shape:
            raise DataError(
                f"{name} of shape {tuple(value.shape)}, but there are {count} names and sides {height} x "
                f"{width}: expected {shape}"
            )
        if not value.isfinite().all():
            where = "" if name == "background" else f" in {_first(views.names, ~value.isfinite())}"
            raise DataError(f"{name}: values that are not finite{where}")
        if name in ("images", "masks", "background") and not (0 <= value.min() and value.max() <= 1):
            raise DataError(f"{name}: values from {value.min():.4g} to {value.max():.4g}, need 0 to 1. Rescale them.")
    if len(set(views.names)) < count:
        raise DataError(f"two views are named {max(views.names, key=views.names.count)}; give each a name of its own")
    if views.poses is not None:
        check_rigid(views.poses, views.names)
    if (views.intrinsics.diagonal(dim1=1, dim2=2)[:, :2] <= 0).any():
        raise DataError("intrinsics: a focal length is not positive")
    _check_no_skew(views.intrinsics, views.names)
    if views.near is not None and views.far is not None and not 0 <= views.near < views.far:
        raise DataError(f"near={views.near:g} and far={views.far:g}: need 0 <= near < far")
    if views.masks is not None and not (views.masks > 0.5).any():
        raise DataError("no foreground anywhere: every mask is empty. Is black meant to be the foreground?")
    if views.layout not in ("object", "forward"):
        raise DataError(f'layout={views.layout!r}: give "object" or "forward"')


def _check_no_skew(intrinsics: Tensor, names: Sequence[str]) -> None:
    focal = intrinsics[:, 0, 0]
    skewed = intrinsics[:, [0, 1], [1, 0]].abs().amax(1) > SKEW * focal
    if skewed.any():
        raise DataError(
            f"intrinsics: skew in {_first(names, skewed)}: rows and columns of pixels must be at right "
            "angles. Undistort the pictures first, for cameras without skew."
        )
    last = (intrinsics[:, 2] - intrinsics.new_tensor([0.0, 0, 1])).abs().amax(1) > SKEW
    if last.any():
        raise DataError(f"intrinsics: the last row of {_first(names, last)} is not 0 0 1. Divide K by its last number.")


def check_rigid(poses: Tensor, names: Sequence[str]) -> None:
    """Whether all of [V, 4, 4] are a rotation and a translation.

    Raises:
        DataError: one is not finite, stretches, mirrors, or has another last row; the message names it.
    """
    if not poses.isfinite().all():
        raise DataError(f"the pose of {_first(names, ~poses.isfinite())} holds values that are not finite")
    turn = poses[:, :3, :3].double()
    off = (turn.mT @ turn - torch.eye(3, dtype=torch.float64)).abs().amax((1, 2))
    last = (poses[:, 3].double() - torch.tensor([0.0, 0, 0, 1])).abs().amax(1)
    for bad, problem in (
        (off > RIGIDITY, "stretches or shears"),
        (torch.linalg.det(turn) < 0, "mirrors"),
        (last > RIGIDITY, "has a last row other than 0 0 0 1"),
    ):
        if bad.any():
            raise DataError(
                f"the pose of {_first(names, bad)} is not rigid: it {problem}. Give camera-to-world "
                "matrices of a rotation and a translation."
            )


def _first(names: Sequence[str], bad: Tensor) -> str:
    """The name of the first view with anything bad, and how many more there are."""
    which = bad.flatten(1).any(1) if bad.dim() > 1 else bad
    count = int(which.sum())
    return names[int(which.int().argmax())] + (f" (and {count - 1} more)" if count > 1 else "")
