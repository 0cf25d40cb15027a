"""Opens views wherever they lie: each layout of files has its reader, this chooses among them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from factorkit.data.video import is_video
from factorkit.data.views.arrays import is_posed_array, read_posed_array
from factorkit.data.views.images import read_pictures, read_video
from factorkit.data.views.llff import is_llff, read_llff
from factorkit.data.views.loading import every_eighth, load
from factorkit.data.views.srn import is_srn, read_srn
from factorkit.data.views.transforms import is_transforms, read_transforms
from factorkit.data.views.views import SceneLayout, Views
from factorkit.utils.errors import ConfigError, DataError

# What fits is read with its poses; anything else is pictures.
POSED = ((is_transforms, read_transforms), (is_llff, read_llff), (is_srn, read_srn), (is_posed_array, read_posed_array))
COLMAP = (".", "sparse/0", "sparse", "colmap/sparse/0")  # where its models lie in the folder of a scene


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
    """Views of one scene, with their cameras where the files tell them.

    Args:
        source: one of
            a folder with transforms_train.json (NeRF's synthetic scenes) or transforms.json (nerfstudio), or such a
            file;
            a folder with poses_bounds.npy and images_8, images_4, images_2 or images (LLFF);
            a folder with rgb/, pose/ and intrinsics.txt (one instance of ShapeNet-SRN);
            an .npz with images, poses and focal (as tiny_nerf_data.npz);
            a video, or pictures without poses: a folder (with images/ and masks/ in it, or without), a .zip, an array,
            whatever :func:`factorkit.data.open_source` takes; COLMAP's cameras in such a folder are not read, which a
            warning says;
            Views, which are only split and resized.
        split: "train" or "test" as the files say; where they say nothing every 8th view, from the first on, is for the
            test. None: all views.
        resolution: pixels of the longer side; None: as they are.
        background: what transparent pictures, and those with masks, are put over: "white", "black", a colour of three
            numbers in [0, 1], "noise" (every pixel another colour); None leaves pictures with separate masks as taken.
        masks: for pictures without poses, their masks, matched by name or position.
        fov: for pictures without cameras, the angle in degrees that the longer side sees; None: what the pictures' EXIF
            data say, else 50.
        layout: "object" or "forward"; None: what the kind of files says, for nerfstudio's the cameras' directions.
        seed: of the noise.

    Raises:
        DataError: nothing there, or files that contradict themselves; the message names the file and what to do.
        ConfigError: settings other than these, or a video without the packages that read one.

    Example:
        >>> from factorkit.data import open_views
        >>> open_views(pictures[:5], resolution=8).images.shape
        torch.Size([5, 3, 8, 8])
    """
    if split not in (None, "train", "test"):
        raise ConfigError(f'split={split!r}: give "train", "test" or nothing')
    if fov is not None and not 0 < fov < 180:
        raise ConfigError(f"fov={fov}: give degrees between 0 and 180")
    if isinstance(source, Views):
        return _again(source, split, resolution, layout)
    path = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if path is not None and not path.exists():
        raise DataError(f"{path}: no such file or folder (looked in {Path.cwd()}). Check the spelling of the path.")
    reader = None if path is None else next((read for fits, read in POSED if fits(path)), None)
    if path is not None and reader is not None:
        shots, known = reader(path, split)
    elif path is not None and is_video(path):
        shots, known = read_video(path, split, resolution, fov)
    else:
        if path is not None and path.is_dir():
            _check_one_scene(path)
            _warn_of_colmap(path)
        shots, known = read_pictures(source if path is None else path, split, masks, fov)
    if masks is not None and any(shot.pose is not None for shot in shots):
        raise ConfigError("masks= is for pictures without poses; files with poses name their masks themselves")
    if layout is not None:
        known["layout"] = layout
    return load(shots, resolution=resolution, background=background, seed=seed, **known)


def _again(views: Views, split: str | None, resolution: int | None, layout: SceneLayout | None) -> Views:
    if split is not None:
        views = views.select(every_eighth(len(views), split))
    if resolution is not None:
        views = views.resize(resolution)
    return views if layout is None else replace(views, layout=layout)


def _check_one_scene(folder: Path) -> None:
    """Raise DataError where the folder holds scenes instead of being one: their pictures together are no scene."""
    children = sorted(child for child in folder.iterdir() if child.is_dir())
    scenes = [child.name for child in children if any(fits(child) for fits, _ in POSED)]
    if scenes:
        some = ", ".join(scenes[:3]) + (", ..." if len(scenes) > 3 else "")
        raise DataError(f"{folder}: not a scene, but a folder of {len(scenes)} ({some}). Give one of them.")


def _warn_of_colmap(folder: Path) -> None:
    """Warn where the folder holds cameras of COLMAP's: no reader takes them."""
    for name in COLMAP:
        for suffix in ("bin", "txt"):
            if all((folder / name / f"{part}.{suffix}").is_file() for part in ("cameras", "images")):
                warnings.warn(
                    f"{folder}: COLMAP's cameras ({(Path(name) / f'cameras.{suffix}').as_posix()}) are not read, these "
                    "are pictures without poses, which training will search for; to use COLMAP's, convert them to "
                    "nerfstudio's transforms.json (ns-process-data images --skip-colmap).",
                    stacklevel=3,
                )
                return
