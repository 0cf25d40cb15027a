"""The conversions between float images and uint8 pixels.

"Unit" values are floats in [0, 1], "signed" images floats in [-1, 1] (the range of the diffusion networks), "pixels"
uint8. Float images are channels first [..., C, H, W], pixels channels last [..., H, W, C].
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor


def unit_to_uint8(values: Tensor | np.ndarray) -> np.ndarray:
    """Convert numbers or booleans in [0, 1] to uint8 of the same shape, rounded; values outside are clipped."""
    if isinstance(values, Tensor):
        return values.detach().clamp(0, 1).mul(255).round().byte().cpu().numpy()
    return np.round(255 * np.clip(np.asarray(values, dtype=np.float32), 0, 1)).astype(np.uint8)


@overload
def uint8_to_unit(values: Tensor) -> Tensor: ...
@overload
def uint8_to_unit(values: np.ndarray) -> np.ndarray: ...
def uint8_to_unit(values: Any) -> Any:
    """Convert uint8 to fp32 in [0, 1], same shape."""
    return values.float() / 255 if isinstance(values, Tensor) else values.astype(np.float32) / 255


def images_to_pixels(images: Tensor) -> np.ndarray:
    """Convert unit images [..., C, H, W] to pixels [..., H, W, C]."""
    return np.ascontiguousarray(unit_to_uint8(images.movedim(-3, -1)))


def pixels_to_images(pixels: np.ndarray) -> Tensor:
    """Convert pixels [..., H, W, C] to unit images [..., C, H, W]."""
    return uint8_to_unit(torch.from_numpy(np.array(pixels)).movedim(-1, -3))


def pixels_to_signed(pixels: Tensor) -> Tensor:
    """Convert pixels [N, H, W, 3] to signed images [N, 3, H, W] in channels_last memory."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def signed_to_pixels(images: Tensor) -> np.ndarray:
    """Convert signed images [N, 3, H, W] to pixels [N, H, W, 3], rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def signed_to_unit(images: Tensor) -> Tensor:
    """Convert signed images to unit images on the CPU, clipped, same shape."""
    return ((images.float() + 1) / 2).clamp(0, 1).cpu()
