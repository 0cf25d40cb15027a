"""The conversions between float images and uint8 pixels.

"Unit" values are floats in [0, 1], "signed" images floats in [-1, 1] (the range of the diffusion networks), "pixels"
uint8. Float images are channels first [..., C, H, W], pixels channels last [..., H, W, C].
"""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

RGB_TO_XYZ = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
WHITE_D65 = [0.95047, 1.0, 1.08883]


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
    # In place: fresh memory for every operation took 10 times as long on batches of large photos.
    return pixels.permute(0, 3, 1, 2).to(torch.float32, copy=True).div_(127.5).sub_(1)


def signed_to_pixels(images: Tensor) -> np.ndarray:
    """Convert signed images [N, 3, H, W] to pixels [N, H, W, 3], rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def signed_to_unit(images: Tensor) -> Tensor:
    """Convert signed images to unit images on the CPU, clipped, same shape."""
    return ((images.float() + 1) / 2).clamp(0, 1).cpu()


def signed_to_lab(images: Tensor) -> Tensor:
    """Convert signed sRGB images [..., 3, H, W] to CIE Lab (white point D65): L in [0, 100], a and b about +-100."""
    srgb = (images.float() + 1) / 2
    linear = torch.where(srgb > 0.04045, ((srgb.clamp_min(0) + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    xyz = torch.einsum("ij,...jhw->...ihw", linear.new_tensor(RGB_TO_XYZ), linear)
    xyz = xyz / linear.new_tensor(WHITE_D65)[:, None, None]
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)
