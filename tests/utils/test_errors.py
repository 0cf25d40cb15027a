from __future__ import annotations

import pytest

from factorkit.utils.errors import first_mismatch, format_count


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "image", "1 image"),
        (0, "image", "0 images"),
        (2, "labelled image", "2 labelled images"),
        (3, "entry", "3 entries"),
    ],
)
def test_format_count_noun_is_plural_but_for_one(number, noun, text):
    assert format_count(number, noun) == text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("CUDA error: out of memory\nCUDA kernel errors might be\nFor debugging", "CUDA error: out of memory"),
        ("Error(s) in loading state_dict for Net:\n\tMissing a. \n\tUnexpected b. ", "Missing a., and 1 more"),
        ("Error(s) in loading state_dict for Net:", "Error(s) in loading state_dict for Net:"),
        ("", "RuntimeError('')"),
    ],
)
def test_first_mismatch_other_error_than_of_load_state_dict_keeps_its_first_line(message, text):
    assert first_mismatch(RuntimeError(message)) == text
