"""Pictures in whatever form a user has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from factorkit.data.images import to_rgb
from factorkit.data.sources import CHANNELS, Source, open_source
from factorkit.errors import DataError


def as_pictures(images: Any) -> tuple[list[Image.Image], list[str]]:
    """Whatever a user has, as upright RGB pictures at their own sizes, with names.

    Alpha is composited over white, an array's as a file's.

    Raises:
        DataError: an array or tensor that is no picture, or nothing to read.
    """
    if isinstance(images, (list, tuple)) and images and all(isinstance(i, (Tensor, np.ndarray)) for i in images):
        pictures = [picture for image in images for picture in as_pictures(image)[0]]
        return pictures, [f"{i:06d}" for i in range(len(pictures))]
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = images.float() if images.is_floating_point() else images  # numpy has no bfloat16
        if images.dim() == 3:
            images = images[None]
        if images.dim() != 4 or images.shape[1] not in CHANNELS:
            raise DataError(
                f"a tensor of images is [B, C, H, W] or [C, H, W], C being 1, 3 or 4; this one is {tuple(images.shape)}"
            )
        images = images.permute(0, 2, 3, 1).numpy()
    elif isinstance(images, Image.Image):
        return [to_rgb(images)], ["image"]
    elif isinstance(images, np.ndarray) and images.ndim == 3 and images.shape[-1] in CHANNELS:
        images = images[None]
    source = images if isinstance(images, Source) else open_source(images)
    return [source.read(i) for i in range(len(source))], list(source.names)
