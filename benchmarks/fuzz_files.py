"""Undamaged files from which the fuzzed ones are made."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)


def small(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)
    return path


def labelled(folder: Path, count: int) -> None:
    for i in range(count):
        small(folder / f"images/{i}.png", i)
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask_values(i)).save(folder / f"masks/{i}.png")


def mask_values(seed: int) -> np.ndarray:
    return (pixels(seed)[..., 0] > 128).astype(np.uint8)


def encoded(suffix: str, mode: str, values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(values)
    channel = values if values.ndim == 2 else values[..., 0]
    if mode == "I;16":
        image = Image.fromarray(channel.astype(np.uint16) * 200)
    elif mode == "F":
        image = Image.fromarray(channel.astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    kind = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix.upper())
    image.save(buffer, kind, **({"exif": exif()} if suffix in ("jpg", "webp") else {}))
    return buffer.getvalue()


def exif() -> Image.Exif:
    result = Image.Exif()
    result[0x0112] = 6  # lies on its side
    result.get_ifd(0x8769)[0xA405] = 35
    return result
