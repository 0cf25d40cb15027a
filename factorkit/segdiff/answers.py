"""What a segdiff run answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from factorkit.segdiff.hierarchy import level_labels, level_masks


class Segmentation(NamedTuple):
    """Regions of real images, at their own sizes.

    Attributes:
        labels: the most probable region of each pixel, int64 [B, H, W]; a list of [H, W] where sizes differ.
        masks: its soft masks, fp32 [B, K, H, W], summing to 1 over K; a list of [K, H, W] where sizes differ.
        names: where each image came from.
        nesting: of a hierarchy, into how many regions each level splits; labels and masks are of the deepest level.
    """

    labels: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    names: list[str]
    nesting: tuple[int, ...] = ()

    def level(self, level: int) -> Segmentation:
        """The regions at one level of a hierarchy, 1 the coarsest. Raises ConfigError where there is no such level."""
        nesting = self.nesting or (len(self.masks[0]),)
        masks = [level_masks(masks, nesting, level) for masks in self.masks]
        labels = [level_labels(labels, nesting, level) for labels in self.labels]
        if isinstance(self.masks, Tensor):
            masks, labels = torch.stack(masks), torch.stack(labels)
        return Segmentation(labels, masks, self.names, nesting[:level])


class Frame(NamedTuple):
    """One step of the refinement from noise to image (fig. 2.10)."""

    t: int
    images: Tensor  # [n, 3, R, R] in [0, 1], the clean image as the model guesses it at level t
    masks: Tensor  # [n, K, R, R]


class Generation(NamedTuple):
    """Images drawn from noise, with the masks they were made through.

    Attributes:
        images: [n, 3, R, R] in [0, 1].
        masks: [n, K, R, R].
        labels: int64 [n, R, R].
        trajectory: every denoising step, noise first, where it was asked for.
        classes: what each image was asked to be of, None for anything; None where nothing was asked.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    trajectory: list[Frame] | None
    classes: list[str | None] | None = None
