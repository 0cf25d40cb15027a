"""Gaussians as splat files, written and read: the .ply of 3DGS, and .spz, a sixth of its size."""

from __future__ import annotations

import gzip
import math
import warnings
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.export.shapes import to_y_up
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.ops.encodings import MAX_DEGREE, harmonic_basis
from factorkit.utils.errors import DataError, format_count

NUM_DIRECTIONS = 64  # that determine the 16 coefficients of rotated harmonics; they are exact from 16 on
HARMONICS = (MAX_DEGREE + 1) ** 2
COLUMNS = {"xyz": 3, "f_dc_": 3, "opacity": 1, "scale_": 3, "rot_": 4}  # of the .ply, besides f_rest_*
PLY_TYPES = {"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"}
PLY_TYPES |= {"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"}
PLY_TYPES |= {"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"}
MAX_HEADER = 1 << 16  # bytes


def save_splats(path: Path, suffix: str, field: GaussianField, moved: Similarity | None, up: Tensor) -> None:
    """Write the Gaussians as .ply, or as .spz with y up, as that format demands.

    Viewers draw no background behind them, and the appearance is the mean one.

    Args:
        path: the file.
        suffix: ".ply" or ".spz".
        field: the Gaussians.
        moved: from the field's coordinates to those of the file; None: the same.
        up: [3] in the coordinates of the file; of a .spz before it is turned.
    """
    if suffix == ".ply":
        return save_ply(path, field, moved)
    none = Similarity(torch.eye(3).double(), torch.zeros(3).double(), torch.ones(()).double())
    turn, moved = torch.from_numpy(to_y_up(up)).double(), none if moved is None else moved
    save_spz(path, field, Similarity(turn @ moved.rotation, turn @ moved.translation, moved.scale))


def save_ply(path: Path, field: GaussianField, moved: Similarity | None) -> None:
    """Write the Gaussians: f_dc_*, f_rest_* (by channel), opacity (logit), scale_* (log), rot_* (w, x, y, z)."""
    means, log_scales, quaternions, opacities, harmonics = move_gaussians(field, moved)
    columns = {
        "xyz": means,
        **{f"n{axis}": torch.zeros(len(means), 1) for axis in "xyz"},
        "f_dc_": harmonics[:, 0],
        "f_rest_": harmonics[:, 1:].transpose(1, 2).flatten(1),
        "opacity": opacities[:, None],
        "scale_": log_scales,
        "rot_": quaternions,
    }
    names = [name for prefix, values in columns.items() for name in _column_names(prefix, values.shape[1])]
    table = torch.cat([values.float() for values in columns.values()], dim=1).numpy().astype("<f4")
    properties = "".join(f"property float {name}\n" for name in names)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{properties}end_header\n"
    path.write_bytes(header.encode("ascii") + np.ascontiguousarray(table).tobytes())


@torch.no_grad()
def move_gaussians(field: GaussianField, moved: Similarity | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return means, log scales, unit quaternions, opacity logits and harmonics [N, 16, 3], in fp64."""
    parts = (field.means, field.log_scales, field.quaternions, field.opacities)
    means, log_scales, quaternions, opacities = (x.cpu().double() for x in parts)
    quaternions = torch.nn.functional.normalize(quaternions, dim=1)
    harmonics = torch.cat([field.colors, field.directional], dim=1).cpu().double()
    if moved is not None:
        import roma

        turn = roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(moved.rotation.cpu()))
        quaternions = roma.quat_product(turn.expand_as(quaternions).roll(-1, 1), quaternions.roll(-1, 1)).roll(1, 1)
        harmonics = rotation_of_harmonics(moved.rotation.cpu()) @ harmonics
        means, log_scales = moved.apply_points(means), log_scales + moved.scale.cpu().log()
    return means, log_scales, quaternions, opacities, harmonics


def rotation_of_harmonics(rotation: Tensor) -> Tensor:
    """Return the matrix [16, 16] that turns the coefficients of a function on the sphere with it."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(NUM_DIRECTIONS, 3, generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=1)
    return torch.linalg.pinv(harmonic_basis(directions, MAX_DEGREE)) @ harmonic_basis(directions @ rotation, MAX_DEGREE)


def _column_names(prefix: str, count: int) -> list[str]:
    if prefix == "xyz":
        return list(prefix)
    return [prefix] if count == 1 else [f"{prefix}{i}" for i in range(count)]


# --- read ---


def read_splats(path: Path) -> GaussianField:
    """Read Gaussians from the binary .ply of 3DGS or from .spz, with harmonics of degree 0 to 3.

    Gaussians with a number that is not finite are left out, which a warning says.

    Raises:
        DataError: the file is missing or truncated, or holds something else than Gaussians.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    is_spz = path.suffix.lower() == ".spz"
    arrays = _read_spz(path, content) if is_spz else _read_ply(path, content)
    parts = {name: torch.from_numpy(x.astype("f4")) for name, x in arrays.items()}
    count = len(parts["means"])
    finite = torch.stack([x.flatten(1).isfinite().all(1) for x in parts.values()]).all(0)
    if not finite.any():
        raise DataError(f"{path}: none of its {format_count(count, 'Gaussian')} is finite")
    if not finite.all():
        left_out = format_count(int((~finite).sum()), "Gaussian")
        warnings.warn(f"{path}: {left_out} with numbers that are not finite left out", stacklevel=2)
        parts = {k: x[finite] for k, x in parts.items()}
    field = GaussianField(int(finite.sum()))
    field.antialiased = bool(parts.pop("antialiased", torch.zeros(1)).any())
    harmonics = torch.nn.functional.pad(parts.pop("harmonics"), (0, 0, 0, HARMONICS))[:, :HARMONICS]
    field.load_state_dict(
        {**parts, "opacities": parts["opacities"][:, 0], "colors": harmonics[:, :1], "directional": harmonics[:, 1:]}
    )
    return field.requires_grad_(False)


def _read_ply(path: Path, content: bytes) -> dict[str, np.ndarray]:
    """Return means, log_scales, quaternions, opacities [N, 1] and harmonics [N, K, 3]."""
    table = _read_vertices(path, content)
    names = table.dtype.names or ()
    rest = sum(name.startswith("f_rest_") for name in names)
    sizes = COLUMNS | {"f_rest_": rest}
    missing = [name for k, n in sizes.items() for name in (_column_names(k, n) if n else ()) if name not in names]
    if missing:
        raise DataError(
            f"{path} holds no Gaussians: its vertices lack {', '.join(missing)}. Points, meshes and compressed splats "
            "are not read; give the .ply that 3DGS trainings write"
        )
    if rest % 3 or 1 + rest // 3 not in [(d + 1) ** 2 for d in range(MAX_DEGREE + 1)]:
        raise DataError(f"{path}: {rest} properties f_rest_*; harmonics of degree 0 to 3 have 0, 9, 24 or 45")
    parts = {k: np.stack([table[name] for name in _column_names(k, n)], 1) for k, n in sizes.items() if n}
    harmonics = parts["f_dc_"][:, None]
    if rest:
        higher = parts["f_rest_"].reshape(len(table), 3, -1).transpose(0, 2, 1)
        harmonics = np.concatenate([harmonics, higher], axis=1)
    own = {"means": "xyz", "log_scales": "scale_", "quaternions": "rot_", "opacities": "opacity"}
    return {"harmonics": harmonics, **{name: parts[column] for name, column in own.items()}}


def _read_vertices(path: Path, content: bytes) -> np.ndarray:
    """Return the vertices of a binary .ply as a structured array."""
    end = content.find(b"end_header", 0, MAX_HEADER)
    end = content.find(b"\n", end) + 1 if end >= 0 else 0
    if not content.startswith(b"ply") or not end:
        raise DataError(f"{path} is not a .ply file, or its header is damaged")
    byte_order, elements, fields = "", {}, []
    for words in (line.split() for line in content[:end].decode("latin-1").splitlines()):
        if words[:1] == ["format"]:
            byte_order = {"binary_little_endian": "<", "binary_big_endian": ">"}.get(words[1], "")
        elif words[:1] == ["element"] and len(words) == 3 and words[2].isdecimal():
            elements[words[1]] = int(words[2])
        elif words[:1] == ["property"] and list(elements) == ["vertex"]:
            if len(words) != 3 or words[1] not in PLY_TYPES:
                raise DataError(f"{path}: vertices with the property {' '.join(words[1:])} are no Gaussians")
            fields.append((words[2], words[1]))
    if elements.get("face"):
        raise DataError(f"{path} is a mesh of {format_count(elements['face'], 'face')}; give a .ply of Gaussians")
    if not byte_order:
        raise DataError(f"{path} is a .ply in text form; convert it to binary_little_endian")
    count = elements.get("vertex", 0)
    if next(iter(elements), "") != "vertex" or not count:
        raise DataError(f"{path} holds no Gaussians: its first element is not a list of vertices, or is empty")
    if len({name for name, _ in fields}) < len(fields):
        raise DataError(f"{path}: two properties of its vertices have one name")
    kind = np.dtype([(name, byte_order + PLY_TYPES[word]) for name, word in fields])
    present = (len(content) - end) / max(kind.itemsize, 1)
    if present < count or (len(elements) == 1 and present > count):
        raise DataError(f"{path} is truncated or damaged: {count} vertices in its header, {present:g} in the file")
    return np.frombuffer(content, kind, count, end)


# --- .spz (github.com/nianticlabs/spz): version 3 is written, 2 and 3 are read ---

SPZ_MAGIC, SPZ_VERSION, SPZ_BITS = 0x5053474E, 3, 22  # of a coordinate, besides its sign and one to spare
MAX_FRACTION_BITS = 20
SPZ_COLOR = 0.15  # factor of f_dc_* in a byte's range


def save_spz(path: Path, field: GaussianField, moved: Similarity) -> None:
    """Write the Gaussians as .spz: gzip of positions in 24 bits, rotations in 32, everything else in 8.

    Log scales are clamped to -10 to 5.9, harmonics above degree 0 to -1 to 1.

    Raises:
        DataError: positions beyond 4 million units.
    """
    means, log_scales, quaternions, opacities, harmonics = (x.numpy() for x in move_gaussians(field, moved))
    extent = float(np.abs(means).max())
    if not extent < 1 << SPZ_BITS:
        raise DataError(f"positions up to {extent:g} do not fit a .spz file; write a .ply")
    fraction = min(MAX_FRACTION_BITS, SPZ_BITS - math.frexp(extent)[1])
    fixed = np.round(means * 2.0**fraction).astype("<i4")
    magnitude, rows = np.abs(quaternions), np.arange(len(means))
    largest = magnitude.argmax(1)
    signs = (quaternions < 0) ^ (quaternions[rows, largest] < 0)[:, None]
    parts = np.round(511 * magnitude * math.sqrt(2)).astype(np.uint32) | signs.astype(np.uint32) << 9
    packed = (largest.astype(np.uint32) - 1) % 4  # numbered as x, y, z, w
    for i in (1, 2, 3, 0):
        packed = np.where(largest == i, packed, packed << 10 | parts[:, i])
    header = np.array([SPZ_MAGIC, SPZ_VERSION, len(means)], "<u4").tobytes() + bytes(
        [MAX_DEGREE, fraction, field.antialiased, 0]
    )
    arrays = [
        fixed.view(np.uint8).reshape(-1, 3, 4)[..., :3],
        _to_bytes(255 / (1 + np.exp(-opacities))),
        _to_bytes(255 * (0.5 + SPZ_COLOR * harmonics[:, 0])),
        _to_bytes(16 * (log_scales + 10)),
        packed.astype("<u4"),
        _to_bytes(128 + 128 * harmonics[:, 1:]),
    ]
    content = header + b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)
    path.write_bytes(gzip.compress(content, mtime=0))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.round(values).clip(0, 255).astype(np.uint8)


def _read_spz(path: Path, content: bytes) -> dict[str, np.ndarray]:
    """Return what :func:`_read_ply` does, and whether the Gaussians are antialiased [N, 1]."""
    unzip = zlib.decompressobj(wbits=31)
    try:
        header = unzip.decompress(content, 16).ljust(16, b"\0")
        magic, version, count = (int(x) for x in np.frombuffer(header, "<u4", 3))
        degree, fraction = header[12], header[13]
        if magic != SPZ_MAGIC or version not in (2, 3) or degree > MAX_DEGREE:
            shape = f"version {version}, degree {degree}" if magic == SPZ_MAGIC else "no .spz header"
            raise DataError(f"{path} has {shape}; versions 2 and 3 with degrees 0 to 3 are read. Convert it to .ply")
        sizes = [9, 1, 3, 3, 3 if version == 2 else 4, 3 * ((degree + 1) ** 2 - 1)]  # bytes of each Gaussian
        data = unzip.decompress(unzip.unconsumed_tail, count * sum(sizes) + 1)
    except zlib.error as error:
        raise DataError(f"{path} is not a .spz file, or is damaged: {error}") from error
    if len(data) != count * sum(sizes) or not count:
        raise DataError(f"{path} is empty, truncated or damaged: {format_count(count, 'Gaussian')} in its header")
    ends = np.cumsum([0, *(count * size for size in sizes)])
    blocks = [np.frombuffer(data[a:b], np.uint8).reshape(count, -1) for a, b in pairwise(ends)]
    fixed = np.zeros((count, 3, 4), np.uint8)
    fixed[..., 1:] = blocks[0].reshape(count, 3, 3)  # the high bytes, for the sign
    opacity = blocks[1].clip(0.5, 254.5) / 255
    quaternions = np.zeros((count, 4))
    if version == 2:
        quaternions[:, 1:] = blocks[4] / 127.5 - 1
        quaternions[:, 0] = np.sqrt((1 - np.square(quaternions[:, 1:]).sum(1)).clip(0))
    else:
        packed = np.ascontiguousarray(blocks[4]).view("<u4")[:, 0]
        largest = ((packed >> 30) + 1) % 4
        for i in (0, 3, 2, 1):  # in the reverse of the order in which they were packed
            part = (packed & 511) / (511 * math.sqrt(2)) * np.where(packed & 512, -1, 1)
            quaternions[:, i] = np.where(largest == i, 0, part)
            packed = np.where(largest == i, packed, packed >> 10)
        quaternions[np.arange(count), largest] = np.sqrt((1 - np.square(quaternions).sum(1)).clip(0))
    return {
        "means": (fixed.view("<i4")[..., 0] >> 8) / 2.0**fraction,
        "log_scales": blocks[3] / 16 - 10,
        "quaternions": quaternions,
        "opacities": np.log(opacity / (1 - opacity)),
        "antialiased": np.full((count, 1), header[14] & 1),
        "harmonics": np.concatenate(
            [(blocks[2][:, None] / 255 - 0.5) / SPZ_COLOR, (blocks[5].reshape(count, -1, 3) - 128.0) / 128], axis=1
        ),
    }
