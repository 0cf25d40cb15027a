"""The operations the models are made of, each a ``torch.library`` op: ``torch.ops.factorkit.<name>``.

Importing this package registers them. The models call the functions below and nothing else, so a kernel registered for
cpu or cuda later changes no line of a model. ``factorkit.ops.reference`` holds what each op means.
"""

from factorkit.ops import fused, reference
from factorkit.ops.norm import group_norm_silu
from factorkit.ops.region import mask_pyramid, region_blend, region_blend_mse, region_pool
from factorkit.ops.skip import masked_skip_concat, masked_skip_norm_silu, masked_skip_projection

#: What runs behind each op on each device of a complete installation, for ``factorkit doctor``: C++ needs factorkit._C,
#: Triton needs triton, and PyTorch stands in for either.
IMPLEMENTATIONS = {
    "group_norm_silu": "C++ (cpu), Triton (cuda)",
    "mask_pyramid": "PyTorch (cpu), Triton (cuda)",
    "masked_skip_concat": "PyTorch (cpu), Triton (cuda)",
    "masked_skip_norm_silu": "C++ (cpu), Triton (cuda)",
    "masked_skip_projection": "PyTorch (cpu), PyTorch and Triton (cuda)",
    "region_blend": "PyTorch (cpu), Triton (cuda)",
    "region_blend_mse": "PyTorch (cpu), Triton (cuda)",
    "region_pool": "PyTorch (cpu), Triton (cuda)",
}

__all__ = [
    "IMPLEMENTATIONS",
    "fused",
    "group_norm_silu",
    "mask_pyramid",
    "masked_skip_concat",
    "masked_skip_norm_silu",
    "masked_skip_projection",
    "reference",
    "region_blend",
    "region_blend_mse",
    "region_pool",
]
