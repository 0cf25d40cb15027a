"""The operations the models are made of, each a ``torch.library`` op: ``torch.ops.factorkit.<name>``.

Importing this package registers them. The models call the functions below and nothing else, so a kernel registered for
cpu or cuda later changes no line of a model. ``factorkit.ops.reference``, ``reference_encoding`` and
``reference_rendering`` hold what each op means.
"""

from factorkit.ops import fused, reference, reference_encoding, reference_rendering
from factorkit.ops.composite import Rendering, composite
from factorkit.ops.frequency_encoding import frequency
from factorkit.ops.hash_encoding import annealing_weights, growing_resolutions, hash_grid
from factorkit.ops.intersect import intersect_box, intersect_sphere
from factorkit.ops.march import Samples, march_rays
from factorkit.ops.norm import group_norm_silu
from factorkit.ops.region import mask_pyramid, region_blend, region_blend_mse, region_pool
from factorkit.ops.resample import sample_pdf
from factorkit.ops.skip import masked_skip_concat, masked_skip_norm_silu, masked_skip_projection

#: What runs behind each op on each device of a complete installation, for ``factorkit doctor``: C++ and CUDA need
#: factorkit._C, Triton needs triton, and PyTorch stands in for each.
IMPLEMENTATIONS = {
    "composite": "C++ (cpu), CUDA (cuda)",
    "frequency": "PyTorch (cpu, cuda)",
    "group_norm_silu": "C++ (cpu), Triton (cuda)",
    "hash_grid": "C++ (cpu), CUDA (cuda)",
    "intersect_box": "C++ (cpu), CUDA (cuda)",
    "intersect_sphere": "C++ (cpu), CUDA (cuda)",
    "march_rays": "C++ (cpu), CUDA (cuda)",
    "mask_pyramid": "PyTorch (cpu), Triton (cuda)",
    "masked_skip_concat": "PyTorch (cpu), Triton (cuda)",
    "masked_skip_norm_silu": "C++ (cpu), Triton (cuda)",
    "masked_skip_projection": "PyTorch (cpu), PyTorch and Triton (cuda)",
    "region_blend": "PyTorch (cpu), Triton (cuda)",
    "region_blend_mse": "PyTorch (cpu), Triton (cuda)",
    "region_pool": "PyTorch (cpu), Triton (cuda)",
    "sample_pdf": "C++ (cpu), CUDA (cuda)",
}

__all__ = [
    "IMPLEMENTATIONS",
    "Rendering",
    "Samples",
    "annealing_weights",
    "composite",
    "frequency",
    "fused",
    "group_norm_silu",
    "growing_resolutions",
    "hash_grid",
    "intersect_box",
    "intersect_sphere",
    "march_rays",
    "mask_pyramid",
    "masked_skip_concat",
    "masked_skip_norm_silu",
    "masked_skip_projection",
    "reference",
    "reference_encoding",
    "reference_rendering",
    "region_blend",
    "region_blend_mse",
    "region_pool",
    "sample_pdf",
]
