"""Triton's interpreter on a newer NumPy than its release was written for."""

from __future__ import annotations

from types import ModuleType


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
