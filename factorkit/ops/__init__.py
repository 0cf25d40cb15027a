"""The operations the models are made of, each a ``torch.library`` op: ``torch.ops.factorkit.<name>``.

Importing this package registers them. The models call the functions below and nothing else, so a kernel registered for
cpu or cuda later changes no line of a model. ``factorkit.ops.reference`` holds what each op means.
"""

from factorkit.ops import reference
from factorkit.ops.frequency_encoding import frequency
from factorkit.ops.hash_encoding import annealing_weights, growing_resolutions, hash_grid
from factorkit.ops.norm import group_norm_silu
from factorkit.ops.region import mask_pyramid, region_blend, region_pool
from factorkit.ops.skip import masked_skip_concat, masked_skip_norm_silu, masked_skip_projection

#: What runs behind each op on each device, for ``factorkit doctor``.
IMPLEMENTATIONS = {
    name: "PyTorch (cpu, cuda)"
    for name in (
        "frequency",
        "group_norm_silu",
        "mask_pyramid",
        "masked_skip_concat",
        "masked_skip_norm_silu",
        "masked_skip_projection",
        "region_blend",
        "region_pool",
    )
} | {"hash_grid": "C++ (cpu), CUDA where built with it; else PyTorch"}

__all__ = ["IMPLEMENTATIONS", "annealing_weights", "growing_resolutions", "reference", *IMPLEMENTATIONS]
