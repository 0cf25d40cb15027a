"""The operations the models are made of, each a ``torch.library`` op: ``torch.ops.factorkit.<name>``.

Importing this package registers them. The models call the functions below and nothing else, so a kernel registered for
cpu or cuda later changes no line of a model. ``factorkit.ops.reference`` and ``factorkit.ops.reference_rendering`` hold
what each op means.
"""

from factorkit.ops import reference, reference_rendering
from factorkit.ops.composite import Rendering, composite
from factorkit.ops.intersect import intersect_box, intersect_sphere
from factorkit.ops.march import Samples, march_rays
from factorkit.ops.norm import group_norm_silu
from factorkit.ops.region import mask_pyramid, region_blend, region_pool
from factorkit.ops.resample import sample_pdf
from factorkit.ops.skip import masked_skip_concat, masked_skip_norm_silu, masked_skip_projection

#: What runs behind each op on each device, for ``factorkit doctor``.
IMPLEMENTATIONS = {
    name: "PyTorch (cpu, cuda)"
    for name in (
        "group_norm_silu",
        "mask_pyramid",
        "masked_skip_concat",
        "masked_skip_norm_silu",
        "masked_skip_projection",
        "region_blend",
        "region_pool",
    )
} | {
    name: "C++ (cpu), CUDA (cuda)"
    for name in ("composite", "intersect_box", "intersect_sphere", "march_rays", "sample_pdf")
}

__all__ = ["IMPLEMENTATIONS", "Rendering", "Samples", "reference", "reference_rendering", *IMPLEMENTATIONS]
