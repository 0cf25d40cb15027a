"""Damage of every kind, drawn from a seeded generator: to bytes, to JSON, to arrays and to command lines."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
HEAD = 64  # bytes in which formats keep sizes and types, where every other change is made


def pick(rng: Rng, options: Sequence[Any]) -> Any:
    """One of them; `rng.choice` would turn them into an array."""
    return options[int(rng.integers(len(options)))]


# --- bytes ---


def damage(data: bytes, rng: Rng) -> bytes:
    """One to four changes somewhere, often near the beginning."""
    for _ in range(int(rng.integers(1, 5))):
        data = pick(rng, (_flip, _flip, _overwrite, _overwrite, _number, _number, _cut, _insert, _drop, _repeat))(
            data, rng
        )
    return data


def _place(data: bytes, rng: Rng) -> int:
    end = min(HEAD, len(data)) if rng.random() < 0.5 else len(data)
    return int(rng.integers(end)) if end else 0


def _flip(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :] if data else data


def _overwrite(data: bytes, rng: Rng) -> bytes:
    at, size = _place(data, rng), int(rng.integers(1, 17))
    filling = pick(rng, (bytes(size), b"\xff" * size, rng.bytes(size)))
    return data[:at] + filling + data[at + size :]


def _number(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    number = struct.pack(pick(rng, ("<I", ">I")), pick(rng, INTERESTING))[: pick(rng, (1, 2, 4))]
    return data[:at] + number + data[at + len(number) :]


def _cut(data: bytes, rng: Rng) -> bytes:
    return data[: _place(data, rng)]


def _insert(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.bytes(int(rng.integers(1, 65))) + data[at:]


def _drop(data: bytes, rng: Rng) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + int(rng.integers(1, 65)) :]


def _repeat(data: bytes, rng: Rng) -> bytes:
    a, b = sorted((_place(data, rng), _place(data, rng)))
    return data[:b] + data[a:]


def mend_png(data: bytes) -> bytes:
    """A PNG with its checksums put right, so that what is wrong in its chunks reaches the decoder."""
    result, at = [data[:8]], 8
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        result.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + size
    return b"".join(result)


# --- JSON ---


def strange_value(rng: Rng) -> Any:
    """A value that JSON can hold and no setting wants."""
    return pick(
        rng,
        (
            None,
            True,
            "",
            "x",
            "\0",
            "../../../etc/passwd",
            "a" * 5000,
            "ä\ud800",
            "NaN",
            -1,
            0,
            1,
            2**31,
            2**63,
            10**400,
            -(10**9),
            0.5,
            1e308,
            -1e-308,
            float("nan"),
            float("inf"),
            [],
            {},
            [[]],
            [None],
            {"": ""},
            [1, "a", None],
            [[1.0] * 4] * 4,
            {"a": {"b": []}},
            nested(200),
        ),
    )


def nested(depth: int) -> list:
    """Lists in lists."""
    result: list = []
    for _ in range(depth):
        result = [result]
    return result


def damage_tree(tree: Any, rng: Rng) -> Any:
    """The same JSON with one thing in it replaced, left out, doubled, or put into another."""
    if isinstance(tree, Mapping) and tree and rng.random() < 0.85:
        key = pick(rng, list(tree))
        how = rng.random()
        if how < 0.12:
            return {k: v for k, v in tree.items() if k != key}
        if how < 0.18:
            return {**tree, "unheard_of": tree[key]}
        return {**tree, key: strange_value(rng) if how < 0.5 else damage_tree(tree[key], rng)}
    if isinstance(tree, list) and tree and rng.random() < 0.85:
        at = int(rng.integers(len(tree)))
        how = rng.random()
        if how < 0.1:
            return tree[:at] + tree[at + 1 :]
        if how < 0.2:
            return [*tree[:at], tree[at], *tree[at:]]
        value = strange_value(rng) if how < 0.5 else damage_tree(tree[at], rng)
        return [*tree[:at], value, *tree[at + 1 :]]
    return strange_value(rng)


def damage_json(tree: Any, rng: Rng) -> bytes:
    """Damaged JSON: still JSON in three of four, else damaged as bytes, or deep enough to end a parser's stack."""
    how = rng.random()
    if how < 0.75:
        for _ in range(int(rng.integers(1, 4))):
            tree = damage_tree(tree, rng)
        return json.dumps(tree).encode()
    if how < 0.95:
        return damage(json.dumps(tree).encode(), rng)
    deep = (b"[" * 100_000, b'{"a":' * 100_000)
    return pick(rng, (*deep, b"9" * 10_000, b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0", b"[1e999]"))


# --- arrays ---


def damage_array(array: np.ndarray, rng: Rng) -> np.ndarray:
    """Another type, shape or value."""
    how = int(rng.integers(10))
    if how == 0:
        numbers = ("f2", "f4", "f8", "i1", "i8", "u2", "c16", "?", "U4", "S3", ">i4", ">f8")
        return array.astype(pick(rng, ("U1", "S3", "O") if array.dtype.kind == "U" else numbers))
    if how == 1:
        return array.reshape(-1)
    if how == 2:
        return array[None]
    if how == 3:
        return array.reshape(1, -1)[:, :0]
    if how == 4:
        return np.array(pick(rng, (0, -1, 1.5, "x", np.nan, True, 2**63)))
    if how == 5 and array.ndim:
        return np.concatenate([array, array])[: int(rng.integers(1, 2 * len(array) + 1))]
    if how == 6:
        return np.array(array.tolist(), dtype=object)
    if how == 7:
        return np.zeros(3, dtype=[("a", "f4"), ("b", "i2", (2,))])
    if how == 8:
        return np.swapaxes(array, 0, -1) if array.ndim > 1 else array.reshape(1, -1)
    result = array.astype("f8") if array.dtype.kind in "iufb" else array.astype("U8")
    if result.size and result.dtype.kind == "f":
        result.flat[int(rng.integers(result.size))] = pick(rng, (np.nan, np.inf, -np.inf, 1e300, -1e300, -1.0))
    return result


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encode_npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def damage_npy(array: np.ndarray, rng: Rng) -> bytes:
    """A .npy with a damaged array, a damaged header, or damaged as bytes."""
    how = rng.random()
    if how < 0.6:
        return encode_npy(damage_array(array, rng))
    if how < 0.8:
        return damage(encode_npy(array), rng)
    header = pick(
        rng,
        (
            "{'descr': '|u1', 'fortran_order': False, 'shape': (4611686018427387904, 8), }",
            "{'descr': '<f8'}",
            "{",
            "",
            "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
            "[" * 3000,
            "{'descr': '<f8', 'fortran_order': True, 'shape': (-1, 17), }",
            "__import__('os')",
            "1" + "+1" * 3000,
            "{'descr': '|V0', 'fortran_order': False, 'shape': (3, 8, 8, 3), }",
            "{'descr': '<M8[ns]', 'fortran_order': False, 'shape': (3, 17), }",
            "{'descr': '|u1', 'fortran_order': False, 'shape': (100000, 1000, 1000, 3), }",
        ),
    ).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.tobytes()


def damage_npz(arrays: Mapping[str, np.ndarray], rng: Rng) -> bytes:
    """A .npz with a damaged member, one too few or under another name, or damaged as bytes."""
    changed, name = dict(arrays), pick(rng, list(arrays))
    how = rng.random()
    if how < 0.1:
        del changed[name]
    elif how < 0.2:
        changed[name + "_"] = changed.pop(name)
    elif how < 0.7:
        changed[name] = damage_array(changed[name], rng)
    return encode_npz(changed) if how < 0.7 else damage(encode_npz(changed), rng)


# --- command lines ---

WORDS = (
    "",
    "-",
    "--",
    "--out",
    "--json",
    "--debug",
    "--help",
    "-h",
    "-n",
    "-t",
    "--steps",
    "--seed",
    "--data",
    "--preset",
    "--device",
    "--size",
    "--formats",
    "labels",
    "coco",
    "nan",
    "inf",
    "-1",
    "0",
    "1e9",
    "99999999999999999999",
    "None",
    "True",
    "[]",
    "{}",
    "a=b",
    "--out=",
    "--steps=x",
    "\x00",
    "\x1b[31m",
    "ä\ud800",
    "%s%n",
    "../..",
    "/proc/version",
    "*",
    "x" * 3000,
    "cuda:99",
    "meta",
    "mps",
    "cpu",
    "--regions",
    "--no-such-flag",
    "--resolution",
    "--holdout",
    "--masks",
    "--images",
    "--ignore",
    "--fit",
    "--views",
    "--region",
    "--from",
    "--guidance",
    "--classes",
    "all",
    "@file",
    "--t",
)


def damage_words(words: Sequence[str], rng: Rng) -> list[str]:
    """A command line with words put in, left out, repeated, replaced or swapped."""
    result = list(words)
    for _ in range(int(rng.integers(1, 5))):
        at, how = int(rng.integers(len(result) + 1)), rng.random()
        if how < 0.4 or not result:
            result.insert(at, pick(rng, WORDS))
        elif how < 0.7:
            result[at % len(result)] = pick(rng, WORDS)
        elif how < 0.85:
            del result[at % len(result)]
        else:
            result.insert(at, pick(rng, result))
    return result
