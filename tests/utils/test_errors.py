from __future__ import annotations

import pytest

from factorkit.utils.errors import format_count


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
