"""Scenes and cameras as files for other programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.metrics.pose import Similarity
from factorkit.nerfdiff.export.cameras import COLMAP_FILES, make_colmap, make_transforms
from factorkit.nerfdiff.export.images import ExportView, list_stored
from factorkit.nerfdiff.export.shapes import MAX_DEPTH, Shape, move_shape, point_cloud, surface_mesh
from factorkit.nerfdiff.export.splats import save_splats
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.nerfdiff.rays import limit_depth
from factorkit.nerfdiff.scene import box_camera, view_poses
from factorkit.rendering.render import Field
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.output_record import OutputRecord, check_file, writing_file

MESH_SUFFIXES = (".ply", ".obj", ".glb")
SPLAT_SUFFIXES = (".ply", ".spz")
KINDS = ("points", "mesh", "splats", "nerfstudio", "colmap")
PLY_WORDS = {"mesh": "mesh", "splats": "splat", "points": "point"}  # in the name of a .ply, for its kind
CAMERA_KINDS = ("nerfstudio", "colmap")
Coordinates = Literal["run", "given"]


def export(
    path: str | os.PathLike[str],
    views: Views,
    field: Field,
    *,
    kind: str | None = None,
    lower: Sequence[float] = (-1.0, -1.0, -1.0),
    upper: Sequence[float] = (1.0, 1.0, 1.0),
    points: int = 100_000,
    resolution: int = 128,
    level: float | None = None,
    far: float = MAX_DEPTH,
    coordinates: Coordinates = "run",
    to_given: Similarity | None = None,
    images: Sequence[ExportView] | None = None,
    localised: Tensor | None = None,
    source: str = "export",
    overwrite: bool = False,
) -> Path:
    """Write a scene or its cameras.

    - ``points`` (scene.ply; points.ply of a scene of Gaussians): coloured points on the surface that the views show;
    - ``mesh`` (mesh.ply, or any .obj or .glb): the surface of equal density, by marching cubes, coloured;
    - ``splats`` (splats.ply, any .spz, and scene.ply of a scene of Gaussians): the Gaussians of ``field="gaussians"``,
      in the format of 3DGS or compressed to a sixth of its size;
    - ``nerfstudio`` (transforms.json): cameras, with the images in images_factorkit/ beside it;
    - ``colmap`` (a folder): a binary model with coloured points in sparse/0/, images in images/.

    Points and mesh are in the coordinates of the cameras, also in forward-facing scenes; a .glb is rotated so that y is
    up, as glTF demands, and so is a .spz. Lengths are in the unit of the coordinates.

    Args:
        views: images, intrinsics and poses, in the field's coordinates.
        field: as :func:`factorkit.render` takes it.
        kind: one of the five; None: derived from the path, see above.
        lower: corner of the field's box.
        upper: opposite corner of the field's box.
        points: approximate number of points.
        resolution: cells of the mesh along the box's longest side.
        level: density of the mesh's surface, per unit of length; None: light is halved within a 16th of the box's
            longest side.
        far: depth of forward-facing scenes, in near-plane depths, beyond which nothing is written; their box extends to
            infinity.
        coordinates: "run": the field's; "given": those of the training data, by ``to_given``.
        to_given: maps from the field's coordinates to those of the training data; also written as
            ``applied_transform``. None: unknown.
        images: the views as they are written, in the order of ``views``, and then those of ``localised``; None: those
            of ``views``.
        localised: poses [L, 4, 4] of images that are no training views; None: there are none.
        source: identifies the scene; files that were written for another one are not replaced.
        overwrite: replace them, and files of another origin, as well.

    Returns:
        The path.

    Raises:
        ConfigError: splats of a field without Gaussians, an unknown kind,
            suffix or coordinates, numbers below 1, or ``far`` not beyond the near plane.
        DataError: views without poses, a scene that no view shows, a density that never reaches the level, a lens that
            COLMAP does not have, or coordinates that need more digits than the file has.
        WriteError: a file of another origin is in the way.
    """
    path = Path(path)
    kind = kind_of(path, field) if kind is None else kind
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown; give {', '.join(KINDS)}")
    if kind == "mesh" and path.suffix.lower() not in MESH_SUFFIXES:
        raise ConfigError(f"{path}: a mesh is written as {', '.join(MESH_SUFFIXES)}")
    if kind == "splats" and path.suffix.lower() not in SPLAT_SUFFIXES:
        raise ConfigError(f"{path}: splats are written as {' or '.join(SPLAT_SUFFIXES)}")
    if kind == "splats" and not isinstance(field, GaussianField):
        raise ConfigError(f'{path}: the scene has no Gaussians to write as splats; train it with field="gaussians"')
    if min(points, resolution) < 1:
        raise ConfigError(f"points={points}, resolution={resolution}: give at least 1 of each")
    if kind != "mesh" and views.poses is None:
        raise DataError(f"{path}: views without poses cannot be exported as {kind}; predict their poses first")
    if not far > 1:
        raise ConfigError(f"far={far}: give a depth beyond the near plane, which is at 1")
    if coordinates not in ("run", "given") or (coordinates == "given" and to_given is None):
        needed = "; it needs training data with cameras" if coordinates == "given" else '; give "run" or "given"'
        raise ConfigError(f"coordinates={coordinates!r}{needed}")
    camera = box_camera(views)
    upper = limit_depth(upper, far, camera)
    moved = to_given if coordinates == "given" else None

    def make_shape() -> Shape:
        if kind == "mesh":
            return surface_mesh(field, lower, upper, resolution, level, camera)
        return point_cloud(field, views, lower, upper, points)

    up = torch.tensor([0.0, 1.0, 0.0] if camera.forward_facing else [0.0, 0.0, 1.0], dtype=torch.float64)
    up = up if moved is None else moved.rotation @ up
    if kind == "splats":
        assert isinstance(field, GaussianField)
        with writing_file(path, source, overwrite=overwrite) as temporary:
            save_splats(temporary, path.suffix.lower(), field, moved, up)
        return path
    if kind not in CAMERA_KINDS:
        check_file(path, source, overwrite=overwrite)
        shape = move_shape(make_shape(), moved)
        with writing_file(path, source, overwrite=overwrite) as temporary:
            shape.save(temporary, up)
        return path
    images = list_stored(views) if images is None else images
    poses = view_poses(views).double()
    poses = poses if localised is None else torch.cat([poses, localised.double()])
    poses = poses if moved is None else moved.apply(poses)
    folder = path.parent if kind == "nerfstudio" else path
    with OutputRecord(folder, overwrite=overwrite) as record:
        if kind == "nerfstudio":
            applied = None if to_given is None or moved is not None else to_given.inverse()
            files = make_transforms(path.name, images, poses, applied)
        else:
            record.check(COLMAP_FILES, source)
            files = make_colmap(images, poses, move_shape(make_shape(), moved))
        record.write(files, source)
    return path


def kind_of(path: Path, field: Field) -> str:
    """Return what of a field is written to a path by its name; raises ConfigError if that does not say it."""
    suffix = path.suffix.lower()
    if suffix == ".ply":
        usual = "splats" if isinstance(field, GaussianField) else "points"
        return next((kind for kind, word in PLY_WORDS.items() if word in path.stem.lower()), usual)
    if suffix in MESH_SUFFIXES:
        return "mesh"
    kinds = {".spz": "splats", ".json": "nerfstudio", "": "colmap"}
    if suffix not in kinds:
        raise ConfigError(f"{path}: end it in .ply, .obj, .glb, .spz or .json, or give a folder for COLMAP")
    return kinds[suffix]
