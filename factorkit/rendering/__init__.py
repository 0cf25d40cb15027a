"""Rendering of fields: cameras, sampling along rays, and volume rendering over the ops."""

from factorkit.rendering.cameras import (
    Rays,
    from_ndc,
    image_rays,
    intrinsics_from_fov,
    look_at,
    ndc_rays,
    orbit,
    pixel_rays,
)
from factorkit.rendering.occupancy import OccupancyGrid
from factorkit.rendering.render import OccupancySampling, Rendered, UniformSampling, render

__all__ = [
    "OccupancyGrid",
    "OccupancySampling",
    "Rays",
    "Rendered",
    "UniformSampling",
    "from_ndc",
    "image_rays",
    "intrinsics_from_fov",
    "look_at",
    "ndc_rays",
    "orbit",
    "pixel_rays",
    "render",
]
