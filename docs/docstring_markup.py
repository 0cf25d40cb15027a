"""A griffe extension: what docstrings write as in Sphinx, written as in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe


class DocstringMarkup(griffe.Extension):
    """Turn :role:`~a.b` into code, and the section "Example" into griffe's "Examples"."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Convert the markup of one docstring."""
        if obj.docstring is not None:
            text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
