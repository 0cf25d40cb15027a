"""Optional metadata that is damaged or too large: the pixels are read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from factorkit.data import ImageDecodeError
from factorkit.data.decode import drop_jpeg_metadata, drop_png_metadata
from factorkit.data.open import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def encode(form: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, checksum: bytes | None = None) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data)) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + checksum


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


CHUNKS = {
    "short gAMA": chunk(b"gAMA", b"\1"),
    "short cHRM": chunk(b"cHRM", b"\0" * 3),
    "short pHYs": chunk(b"pHYs", b"\0"),
    "empty sRGB": chunk(b"sRGB", b""),
    "short tRNS": chunk(b"tRNS", b"\0"),
    "tRNS of a wrong checksum": chunk(b"tRNS", b"\0" * 6, b"\0" * 4),
    "eXIf of a wrong checksum": chunk(b"eXIf", b"MM\0*", b"\0" * 4),
    "zTXt of a wrong checksum": chunk(b"zTXt", b"k\0\0x", b"\0" * 4),
    "large iTXt": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000)),
    "unknown": chunk(b"ABCD", b"x"),
}
SEGMENTS = {
    "short Adobe": segment(0xEE, b"Adobe"),
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "damaged MPF": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\1"),
    "damaged IPTC": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\xff\xff"),
    "damaged EXIF": segment(0xE1, b"Exif\0\0" + b"\xff" * 50),
}


@pytest.mark.parametrize("damage", CHUNKS.values(), ids=CHUNKS)
def test_read_png_of_damaged_metadata_has_its_pixels(tmp_path, damage):
    data = encode("PNG")
    (tmp_path / "x.png").write_bytes(data[:33] + damage + data[33:])
    np.testing.assert_array_equal(np.asarray(open_source(tmp_path).read(0)), PIXELS)


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
@pytest.mark.parametrize("damage", SEGMENTS.values(), ids=SEGMENTS)
def test_read_jpeg_of_damaged_metadata_has_its_pixels(tmp_path, damage):
    data = encode("JPEG")
    (tmp_path / "x.jpg").write_bytes(data[:2] + damage + data[2:])
    np.testing.assert_array_equal(np.asarray(open_source(tmp_path).read(0)), np.asarray(Image.open(io.BytesIO(data))))


def test_drop_metadata_keeps_orientation_and_other_data(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode("JPEG", exif=exif)
    (tmp_path / "x.jpg").write_bytes(data[:2] + segment(0xEE, b"Adobe") + data[2:])
    assert open_source(tmp_path).read(0).size == (8, 12)
    for other in (b"", b"BM", data[:3], encode("PNG")[:20], encode("GIF")):
        assert drop_png_metadata(other) == other
    assert drop_jpeg_metadata(encode("PNG")) == encode("PNG")


def test_read_heic_under_another_suffix_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("factorkit.data.sources.list_supported_formats", lambda: ["JPEG", "PNG"])
    (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 99)
    with pytest.raises(ImageDecodeError, match=r"x.jpg: HEIC, whatever its suffix; pip install 'factorkit\[heic\]'"):
        open_source(tmp_path).read(0)
