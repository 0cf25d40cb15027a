"""Metadata of encoded images: dropped where nothing here reads it, since Pillow refuses an image for damaged ones."""

from __future__ import annotations

import struct
import zlib

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# PNG 3, section 11: what the pixels, their depth, orientation and number of frames need
PNG_CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PNG_NEEDED = (b"tRNS", b"eXIf", b"sBIT", b"acTL", b"fcTL", b"fdAT")
PNG_TRANSPARENCY_BYTES = {0: 2, 2: 6}  # of tRNS, by colour type: grey, RGB
PNG_COLOR_TYPE = 25  # offset
# JPEG markers, ITU-T T.81 table B.1, that a decoder does not need, and the least length of those that it does
JPEG_START, JPEG_SCAN, JPEG_COMMENT, JPEG_EXIF = b"\xff\xd8", 0xDA, 0xFE, 0xE1
JPEG_APPLICATION = range(0xE0, 0xF0)
JPEG_NEEDED = {0xE0: 16, 0xEE: 14}  # JFIF and Adobe: they name the colour space


def drop_png_metadata(data: bytes) -> bytes:
    """Return a PNG without the chunks that are not needed, or damaged; other data as they are."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, position, is_changed = [PNG_SIGNATURE], len(PNG_SIGNATURE), False
    while position + 12 <= len(data):  # length, type, content, checksum
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind in PNG_CRITICAL or (kind in PNG_NEEDED and _is_sound(data, kind, position, end)):
            kept.append(data[position:end])
        else:
            is_changed = True
        position = end
    return b"".join([*kept, data[position:]]) if is_changed else data


def _is_sound(data: bytes, kind: bytes, position: int, end: int) -> bool:
    """Return whether an ancillary chunk has the right checksum, and transparency the right length."""
    if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
        return False
    length = end - position - 12
    return kind != b"tRNS" or length == PNG_TRANSPARENCY_BYTES.get(data[PNG_COLOR_TYPE], length)


def drop_jpeg_metadata(data: bytes) -> bytes:
    """Return a JPEG with no metadata but EXIF, and JFIF and Adobe's marker if long enough; other data as they are."""
    if not data.startswith(JPEG_START):
        return data
    kept, position = [JPEG_START], 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], struct.unpack(">H", data[position + 2 : position + 4])[0]
        if marker == JPEG_SCAN:
            break
        is_needed = marker == JPEG_EXIF or length >= JPEG_NEEDED.get(marker, 2**16)
        if is_needed or not (marker in JPEG_APPLICATION or marker == JPEG_COMMENT):
            kept.append(data[position : position + 2 + length])
        position += 2 + length
    return b"".join([*kept, data[position:]])
