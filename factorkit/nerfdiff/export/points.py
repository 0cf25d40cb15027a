"""A scene and its cameras as files that other programs read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.cameras import write_colmap, write_transforms
from factorkit.nerfdiff.export.mesh import FAR, Shape, point_cloud, surface_mesh
from factorkit.nerfdiff.rays import within
from factorkit.nerfdiff.scene import field_space
from factorkit.rendering.render import Field
from factorkit.utils.errors import ConfigError, DataError

MESHES = (".ply", ".obj", ".glb")


def export(
    path: str | os.PathLike,
    views: Views,
    field: Field,
    *,
    kind: str | None = None,
    lower: Sequence[float] = (-1.0, -1.0, -1.0),
    upper: Sequence[float] = (1.0, 1.0, 1.0),
    points: int = 100_000,
    resolution: int = 128,
    level: float | None = None,
    far: float = FAR,
) -> Path:
    """Write one of

    - ``points`` (scene.ply): coloured points where the views see the scene's surface;
    - ``mesh`` (mesh.ply, or any .obj or .glb): the surface of equal density, by marching cubes, coloured;
    - ``nerfstudio`` (transforms.json): cameras, with the pictures in images_factorkit/ beside it;
    - ``colmap`` (a folder): cameras.txt, images.txt and points3D.txt with the coloured points, pictures in
      images_factorkit/.

    The field of forward-facing views lies in normalised device coordinates; points and mesh are brought back to the
    space of the cameras.

    Args:
        path: where to; folders are made, files of the same name replaced; pictures only in images_factorkit/, which no
            one else writes.
        views: pictures, intrinsics and poses, in the field's space.
        field: as :func:`factorkit.render` takes it.
        kind: one of the four; None: what the path says, see above.
        lower, upper: corners of the field's box outside of which it is not asked.
        points: how many, about; a view contributes what it sees.
        resolution: cells of the mesh along the box's longest side.
        level: density of the mesh's surface, per unit of length; None: light is halved within a 16th of the box's
            longest side.
        far: of forward-facing scenes, the depth in units of the nearest plane's beyond which nothing is written: theirs
            reach to infinity, where there are no coordinates.

    Returns:
        The path.

    Raises:
        ConfigError: a path that says no kind, an unknown kind, a mesh's suffix that is none of .ply, .obj and .glb,
            numbers below 1, or far not beyond the nearest plane.
        DataError: views without poses, a scene that no view sees, a density that never reaches the level.
    """
    path = Path(path)
    kind = _kind(path) if kind is None else kind
    if min(points, resolution) < 1:
        raise ConfigError(f"points={points}, resolution={resolution}: give at least 1 of each")
    if kind != "mesh" and views.poses is None:
        raise DataError(f"{path}: views without poses cannot be exported as {kind}; predict their poses first")

    if not far > 1:
        raise ConfigError(f"far={far}: give a depth beyond the nearest plane's, which is 1")
    space = field_space(views)
    upper = within(upper, far, space)

    def cloud() -> Shape:
        return point_cloud(field, views, lower, upper, points)

    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "points":
        cloud().save(path)
    elif kind == "mesh":
        if path.suffix.lower() not in MESHES:
            raise ConfigError(f"{path}: a mesh is written as {', '.join(MESHES)}")
        surface_mesh(field, lower, upper, resolution, level, space).save(path)
    elif kind == "nerfstudio":
        write_transforms(path, views)
    elif kind == "colmap":
        write_colmap(path, views, cloud())
    else:
        raise ConfigError(f"kind={kind!r}: give points, mesh, nerfstudio or colmap")
    return path


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".ply":
        return "mesh" if "mesh" in path.stem.lower() else "points"
    if suffix in MESHES:
        return "mesh"
    kinds = {".json": "nerfstudio", "": "colmap"}
    if suffix not in kinds:
        raise ConfigError(f"{path}: end it in .ply, .obj, .glb or .json, or name a folder for COLMAP")
    return kinds[suffix]
