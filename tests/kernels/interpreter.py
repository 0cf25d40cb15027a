"""Triton's interpreter on a newer NumPy than its release was written for, and in half the time."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any


def accept_arrays_of_one_element(interpreter: ModuleType) -> None:
    """Let interpreted scalars be Python integers.

    Triton up to 3.6 calls ``int()`` on arrays of shape [1], which NumPy 2.4 refuses.

    Args:
        interpreter: ``triton.runtime.interpreter``.
    """
    patch = interpreter._patch_lang_tensor

    def patch_with_item(tensor: type, scope: object) -> None:
        patch(tensor, scope)  # the scope restores __index__ after each launch
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_with_item


def list_builtins_once(interpreter: ModuleType) -> None:
    """Search each part of the language for its builtins once.

    Triton up to 3.6 searches all members of five parts at each call of a kernel and of each function in it, which
    takes half of the time of tiny launches.

    Args:
        interpreter: ``triton.runtime.interpreter``.
    """
    is_builtin = interpreter.tl.core.is_builtin
    names: dict[Any, list[str]] = {}

    def patch_listed(part: Any, builder: object, scope: object) -> None:
        if part not in names:
            names[part] = [name for name, member in inspect.getmembers(part) if is_builtin(member)]
        for name in names[part]:
            if is_builtin(member := getattr(part, name)):  # not yet patched, or restored since
                interpreter._patch_attr(part, name, member, builder, scope)

    interpreter._patch_builtin = patch_listed
