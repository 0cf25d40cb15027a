"""Ahead-of-time compilation for GPUs that are not here: every kernel, every choice made for the presets.

``pytest -s tests/kernels/test_compiled.py`` prints registers and shared memory as a table.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="the kernels' tests need triton: pip install -e '.[test]' on Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets in this process and compiles nothing", allow_module_level=True)

from ahead_of_time import compile_all, recorded
from preset_launches import training_step

#: kernels whose loads of features must be 128 bits wide; the others read small tensors
WIDE = {
    "affine",
    "blend",
    "blend_backward",
    "branch_gradients",
    "branch_pass",
    "masked_add",
    "moments",
    "pixel_backward",
    "pixel_forward",
    "pool_backward",
    "sums",
    "tokens",
}


@pytest.fixture(scope="module")
def variants():
    """One of each kernel, dtype and set of constants; the rest differ only in which arguments are divisible by 16."""
    with recorded() as found:
        training_step("flowers64", 128, branch_norm="group")
        training_step("flowers64", 128, branch_norm="masked_group")
        training_step("flowers64", 128, form="regional")
        training_step("flowers128", 32, form="regional")
        training_step("flowers64", 128, form="regional", regions=7, channel_mult=(1, 2), num_res_blocks=1)
        training_step("flowers64", 128, form="regional", channel_mult=(1, 2), num_res_blocks=1, half=False)
        training_step("demo", 16)
        training_step("fast64", 16)
        training_step("uvit64", 16)
    return list({str(variant): variant for variant in found}.values())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.slow
def test_no_spills_and_wide_loads(variants, capability):
    compiled = compile_all(variants, capability)
    print(f"\nsm_{capability}: registers, shared bytes, widest load in bits")
    for variant, c in zip(variants, compiled, strict=True):
        print(f"{c.registers:4d} {c.shared:6d} {c.widest_load:4d}  {variant}")
    for variant, c in zip(variants, compiled, strict=True):
        assert c.spills == 0, f"{variant} spills on sm_{capability}"
        narrow = variant.name in WIDE and c.widest_load < 128
        assert not narrow, f"{variant} loads {c.widest_load} bits at most"
