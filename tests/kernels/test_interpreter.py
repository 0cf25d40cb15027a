"""The interpreter's shim, with a stand-in for Triton 3.6."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import numpy as np
from interpreter import accept_arrays_of_one_element


def test_scalar_of_triton_3_6_under_numpy_2_4_is_an_index():
    class Tensor:
        handle = SimpleNamespace(data=np.array([3]))

    patched = []

    def patch(tensor, scope):
        patched.append(scope)
        tensor.__index__ = lambda self: "refused by NumPy"

    interpreter = SimpleNamespace(_patch_lang_tensor=patch)
    accept_arrays_of_one_element(interpreter)
    interpreter._patch_lang_tensor(Tensor, "scope")
    assert patched == ["scope"] and operator.index(Tensor()) == 3
