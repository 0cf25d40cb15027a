"""The operations of the models, each a ``torch.library`` op: ``torch.ops.factorkit.<name>``.

Importing this package registers them. Each module is a family of ops and reads from the equation to the kernel:
reference in plain PyTorch, public function, implementations for CPU and CUDA, gradient. Models call only the functions
below. :mod:`factorkit.ops.reference` collects the references.
"""

from factorkit.ops import reference
from factorkit.ops.composite import Rendering, composite, sample_pdf
from factorkit.ops.encodings import annealing_weights, frequency, growing_resolutions, hash_grid, spherical_harmonics
from factorkit.ops.intersect import intersect_box
from factorkit.ops.march import Samples, march_rays
from factorkit.ops.norm import group_norm_silu, masked_skip_norm_silu, norm_silu_with_inputs
from factorkit.ops.project_gaussians import ProjectedGaussians, project_gaussians
from factorkit.ops.projection import masked_skip_projection
from factorkit.ops.rasterize_gaussians import Splatting, rasterize_gaussians
from factorkit.ops.region import mask_pyramid, region_blend, region_pool

#: The implementation of each op on each device in a complete installation, for ``factorkit doctor``. C++ and CUDA need
#: factorkit._C, Triton needs triton; PyTorch replaces each of them where it is missing.
IMPLEMENTATIONS = {
    "composite": "C++ (cpu), CUDA (cuda)",
    "frequency": "PyTorch (cpu, cuda)",
    "group_norm_silu": "C++ (cpu), Triton (cuda)",
    "hash_grid": "C++ (cpu), CUDA (cuda)",
    "intersect_box": "C++ (cpu), CUDA (cuda)",
    "march_rays": "C++ (cpu), CUDA (cuda)",
    "mask_pyramid": "C++ (cpu), Triton (cuda)",
    "masked_skip_norm_silu": "C++ (cpu), Triton (cuda)",
    "masked_skip_projection": "C++, for large ones PyTorch too (cpu), PyTorch and Triton (cuda)",
    "project_gaussians": "C++ (cpu), CUDA (cuda)",
    "rasterize_gaussians": "C++ (cpu), CUDA (cuda)",
    "region_blend": "C++ (cpu), Triton (cuda)",
    "region_pool": "C++ (cpu), Triton (cuda)",
    "sample_pdf": "C++ (cpu), CUDA (cuda)",
    "spherical_harmonics": "PyTorch (cpu, cuda)",
}

__all__ = [
    "IMPLEMENTATIONS",
    "ProjectedGaussians",
    "Rendering",
    "Samples",
    "Splatting",
    "annealing_weights",
    "composite",
    "frequency",
    "group_norm_silu",
    "growing_resolutions",
    "hash_grid",
    "intersect_box",
    "march_rays",
    "mask_pyramid",
    "masked_skip_norm_silu",
    "masked_skip_projection",
    "norm_silu_with_inputs",
    "project_gaussians",
    "rasterize_gaussians",
    "reference",
    "region_blend",
    "region_pool",
    "sample_pdf",
    "spherical_harmonics",
]
