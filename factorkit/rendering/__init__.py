"""Rendering of fields: cameras, sampling along rays, and volume rendering over the ops."""

from factorkit.rendering.cameras import (
    Rays,
    contract,
    from_ndc,
    image_rays,
    intrinsics_from_fov,
    look_at,
    ndc_rays,
    orbit,
    pixel_rays,
    uncontract,
)
from factorkit.rendering.occupancy import OccupancyGrid
from factorkit.rendering.render import Rendered, render
from factorkit.rendering.sampling import OccupancySampling, UnboundedSampling, UniformSampling

__all__ = [
    "OccupancyGrid",
    "OccupancySampling",
    "Rays",
    "Rendered",
    "UnboundedSampling",
    "UniformSampling",
    "contract",
    "from_ndc",
    "image_rays",
    "intrinsics_from_fov",
    "look_at",
    "ndc_rays",
    "orbit",
    "pixel_rays",
    "render",
    "uncontract",
]
