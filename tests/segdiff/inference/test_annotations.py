"""COCO's run-length encoding: decoded by the format's description, and by pycocotools where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factorkit.segdiff.inference.annotations import encode, make_annotations


def decode(result) -> np.ndarray:
    """Characters to 5-bit groups, groups to differences, differences to runs, runs to columns of pixels."""
    runs, number, shift = [], 0, 0
    for character in result["counts"]:
        group = ord(character) - 48
        assert 0 <= group < 64
        number |= (group & 31) << shift
        shift += 5
        if not group & 32:
            if group & 16:
                number -= 1 << shift
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number, shift = 0, 0
    height, width = result["size"]
    pixels = np.concatenate([np.full(run, i % 2 == 1) for i, run in enumerate(runs)] or [np.zeros(0, bool)])
    return pixels.reshape(width, height).T


def masks() -> list[np.ndarray]:
    large = np.zeros((300, 2000), bool)  # runs of several characters
    large[10:280, 100:1900] = True
    large[150] = ~large[150]
    return [
        np.zeros((3, 5), bool),
        np.ones((4, 2), bool),
        np.array([[True]]),
        np.eye(7, dtype=bool),
        np.random.default_rng(0).random((31, 17)) < 0.5,
        large,
        np.arange(40_000).reshape(1, -1) > 39_990,
    ]


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: f"{mask.shape}")
def test_encode_decodes_to_the_same_mask(mask):
    result = encode(mask)
    assert result["size"] == list(mask.shape) and isinstance(result["counts"], str)
    assert np.array_equal(decode(result), mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_encode_any_mask_decodes_to_itself(height, width, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    assert np.array_equal(decode(encode(mask)), mask)


def test_encode_known_mask_gives_known_text():
    """Columns first: 1 pixel outside, 2 inside, 3 outside; then the fourth number less the second."""
    mask = np.array([[0, 1, 0], [1, 0, 0]], bool)
    assert encode(mask)["counts"] == "123"
    mask = np.array([[0] * 20 + [1] * 10 + [0] * 40 + [1] * 4], bool)
    assert decode(encode(mask)).tolist() == mask.tolist()
    assert encode(mask)["counts"] == "d0:X1J"  # 20, 10, 40 and 4 - 10 = -6


@pytest.mark.parametrize("mask", masks(), ids=lambda mask: f"{mask.shape}")
def test_encode_is_read_by_pycocotools(mask):
    coco = pytest.importorskip("pycocotools.mask")
    result = encode(mask)
    assert np.array_equal(coco.decode(result).astype(bool), mask)
    assert coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode() == result["counts"]


def test_annotations_have_areas_and_boxes_of_present_regions():
    labels = np.zeros((6, 8), np.uint8)
    labels[2:5, 3:7] = 2
    first, second = make_annotations(labels, 4)
    assert (first["region"], first["area"], first["bbox"]) == (0, 48 - 12, [0, 0, 8, 6])
    assert (second["region"], second["area"], second["bbox"]) == (2, 12, [3, 2, 4, 3])
    assert np.array_equal(decode(second["segmentation"]), labels == 2)
