"""Every op in plain differentiable PyTorch, to read and to check kernels against.

Nothing here runs in a model unless FACTORKIT_REFERENCE=1 is set, or factorkit._C has no kernel for the device.
"""

from factorkit.ops.composite import composite_by_sums as composite
from factorkit.ops.composite import invert_distribution as sample_pdf
from factorkit.ops.encodings import encode_waves as frequency
from factorkit.ops.encodings import interpolate_vertices as hash_grid
from factorkit.ops.intersect import cross_slabs as intersect_box
from factorkit.ops.march import march_all_steps as march_rays
from factorkit.ops.norm import norm_silu
from factorkit.ops.project_gaussians import project_by_matrices as project_gaussians
from factorkit.ops.projection import project_masked_skip as masked_skip_projection
from factorkit.ops.rasterize_gaussians import rasterize_by_tiles as rasterize_gaussians
from factorkit.ops.region import average_features as region_pool
from factorkit.ops.region import average_masks as mask_pyramid
from factorkit.ops.region import blend_branches as region_blend
from factorkit.ops.skip import add_masked_skip as masked_skip_add
from factorkit.ops.skip import concatenate_masked_skip

__all__ = [
    "composite",
    "concatenate_masked_skip",
    "frequency",
    "hash_grid",
    "intersect_box",
    "march_rays",
    "mask_pyramid",
    "masked_skip_add",
    "masked_skip_projection",
    "norm_silu",
    "project_gaussians",
    "rasterize_gaussians",
    "region_blend",
    "region_pool",
    "sample_pdf",
]
