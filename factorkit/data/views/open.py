"""Open views of a scene: chooses the reader for a path or object."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from factorkit.data.files import format_examples
from factorkit.data.video import is_video
from factorkit.data.views.arrays import is_posed_array, read_posed_array
from factorkit.data.views.images import read_images, read_video
from factorkit.data.views.llff import is_llff, read_llff
from factorkit.data.views.loading import LazyView, SceneSettings, load_views, split_every_eighth
from factorkit.data.views.srn import is_srn, read_srn
from factorkit.data.views.transforms import is_transforms, read_transforms
from factorkit.data.views.views import SceneLayout, Views
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.output_record import is_output_folder

PosedReader = Callable[[Path, str | None], tuple[list[LazyView], SceneSettings]]
# Formats with poses, tried in this order; everything else is read as images without poses.
POSED_FORMATS: tuple[tuple[Callable[[Path], bool], PosedReader], ...] = (
    (is_transforms, read_transforms),
    (is_llff, read_llff),
    (is_srn, read_srn),
    (is_posed_array, read_posed_array),
)
COLMAP_FOLDERS = (".", "sparse/0", "sparse", "colmap/sparse/0")  # where a scene's COLMAP model may be


def open_views(
    source: Any,
    split: Literal["train", "test"] | None = None,
    resolution: int | None = None,
    background: str | Sequence[float] | None = "white",
    *,
    masks: Any = None,
    fov: float | None = None,
    layout: SceneLayout | None = None,
    seed: int = 0,
) -> Views:
    """Open the views of one scene, with their cameras if the files define them.

    Args:
        source: one of
            a folder with transforms_train.json (NeRF's synthetic scenes) or transforms.json (nerfstudio), or such a
            file;
            a folder with poses_bounds.npy and images_8, images_4, images_2 or images (LLFF);
            a folder with rgb/, pose/ and intrinsics.txt (one instance of ShapeNet-SRN);
            an .npz with images, poses and focal (as tiny_nerf_data.npz);
            a video, or images without poses: a folder (optionally with images/ and masks/), a .zip, an array, or
            anything else that :func:`factorkit.data.open_source` accepts; COLMAP cameras in such a folder are not read,
            with a warning;
            Views, which are only split and resized.
        split: "train" or "test" as defined by the files, else every 8th view is for testing. None: all views.
        resolution: pixels of the longer side; None: unchanged.
        background: colour behind transparent or masked images: "white", "black", three numbers in [0, 1], or "noise"
            (random per pixel); None leaves images with separate masks unchanged.
        masks: masks of images without poses, matched by name or position.
        fov: field of view in degrees along the longer side, for images without cameras; None: from EXIF, else 50.
        layout: "object" or "forward"; None: by format, for nerfstudio by the viewing directions.
        seed: seed of the noise.

    Raises:
        DataError: the path does not exist, or its files are inconsistent; the message names the file.
        ConfigError: invalid arguments, or a video without the packages to decode it.

    Example:
        >>> from factorkit.data import open_views
        >>> open_views(images[:5], resolution=8).images.shape
        torch.Size([5, 3, 8, 8])
    """
    if split not in (None, "train", "test"):
        raise ConfigError(f'split={split!r}: give "train", "test" or nothing')
    if fov is not None and not 0 < fov < 180:
        raise ConfigError(f"fov={fov}: give degrees between 0 and 180")
    if isinstance(source, Views):
        return _reopen(source, split, resolution, layout)
    path = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if path is not None and not path.exists():
        raise DataError(f"{path}: no such file or folder (current folder: {Path.cwd()}). Check the path.")
    read_posed = None if path is None else next((read for matches, read in POSED_FORMATS if matches(path)), None)
    if path is not None and read_posed is not None:
        views, settings = read_posed(path, split)
    elif path is not None and is_video(path):
        views, settings = read_video(path, split, resolution, fov)
    else:
        if path is not None and path.is_dir():
            _check_single_scene(path)
            _warn_about_colmap(path)
        views, settings = read_images(source if path is None else path, split, masks, fov)
    if masks is not None and any(view.pose is not None for view in views):
        raise ConfigError("masks= is for images without poses; files with poses define their masks themselves")
    if layout is not None:
        settings = settings._replace(layout=layout)
    return load_views(views, settings, resolution=resolution, background=background, seed=seed)


def _reopen(views: Views, split: str | None, resolution: int | None, layout: SceneLayout | None) -> Views:
    if split is not None:
        views = views.select(split_every_eighth(len(views), split))
    if resolution is not None:
        views = views.resize(resolution)
    return views if layout is None else replace(views, layout=layout)


def _check_single_scene(folder: Path) -> None:
    """Raise DataError if the subfolders are scenes: their images together are not one scene."""
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not is_output_folder(child))
    scenes = [child.name for child in children if any(matches(child) for matches, _ in POSED_FORMATS)]
    if scenes:
        raise DataError(f"{folder}: contains {len(scenes)} scenes ({format_examples(scenes)}). Give one of them.")


def _warn_about_colmap(folder: Path) -> None:
    """Warn if the folder has a COLMAP model, which is not read."""
    for name in COLMAP_FOLDERS:
        for suffix in ("bin", "txt"):
            if all((folder / name / f"{part}.{suffix}").is_file() for part in ("cameras", "images")):
                cameras = (Path(name) / f"cameras.{suffix}").as_posix()
                warnings.warn(
                    f"{folder}: the COLMAP cameras ({cameras}) are not read; training will search for the poses of "
                    "these images. To use COLMAP's poses, convert them to nerfstudio's transforms.json "
                    "(ns-process-data images --skip-colmap).",
                    stacklevel=3,
                )
                return
