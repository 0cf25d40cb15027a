"""Open views of a scene: chooses the reader for a path or object."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from factorkit.data.files import escape_name, fold_stem, format_examples, is_image, list_image_names
from factorkit.data.masks import image_stems
from factorkit.data.sources import FileSource
from factorkit.data.video import is_video
from factorkit.data.views.arrangement import Arrangement, arrange
from factorkit.data.views.arrays import is_posed_array, read_posed_array
from factorkit.data.views.colmap import is_colmap, read_colmap
from factorkit.data.views.dtu import is_dtu, read_dtu
from factorkit.data.views.foreground import add_masks, common_folder
from factorkit.data.views.images import DEFAULT_FOV, fit_masks, read_images, read_video
from factorkit.data.views.llff import is_llff, read_llff
from factorkit.data.views.loading import LazyView, SceneSettings, load_views
from factorkit.data.views.phones import is_polycam, is_record3d, read_polycam, read_record3d
from factorkit.data.views.splits import find_rows, split_every_eighth
from factorkit.data.views.srn import is_srn, read_srn
from factorkit.data.views.transforms import is_transforms, read_transforms
from factorkit.data.views.views import SceneLayout, Views
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.output_record import OutputFilter, is_output_folder

PosedReader = Callable[[Path, str | None], tuple[list[LazyView], SceneSettings]]
# Formats with poses, tried in this order; everything else is read as images without poses.
POSED_FORMATS: tuple[tuple[Callable[[Path], bool], PosedReader], ...] = (
    (is_transforms, read_transforms),
    (is_llff, read_llff),
    (is_srn, read_srn),
    (is_dtu, read_dtu),
    (is_polycam, read_polycam),
    (is_record3d, read_record3d),
    (is_colmap, read_colmap),
    (is_posed_array, read_posed_array),
)
EXPORTED_FILES = (("transforms.json", read_transforms), ("sparse/0/cameras.bin", read_colmap))  # by factorkit itself
# Foreground masks beside the images of any layout, in any case; others hold depth, labels or images as well.
MASK_FOLDERS = ("masks", "mask", "segmentation", "segmentations", "seg", "silhouettes", "silhouette", "mattes", "matte")
MAX_SCENE_DEPTH = 3  # folders below the given one that are searched for scenes
MAX_SNIFFED_BYTES = 2**26  # of a JSON file that may list cameras
# Signs of cameras in formats that are not read, with what to do.
UNREAD_CAMERAS = (
    ("cams/*_cam.txt", "MVSNet's cameras"),
    ("*ameras*.xml", "Metashape's cameras"),
    ("bundle.out", "Bundler's cameras"),
    ("database.db", "a COLMAP database without a model"),
    ("pose*/*.txt", "matrices of poses"),
    ("train/pose/*.txt", "NeRF++'s poses"),
    ("transforms*.json", "a transforms file"),
    ("cameras*.json", "a file of cameras"),
    ("cameras*.npz", "arrays of cameras"),
)


def open_views(
    source: Any,
    split: Literal["train", "test"] | None = None,
    resolution: int | None = None,
    background: str | Sequence[float] | None = "white",
    *,
    masks: Any = None,
    fov: float | None = None,
    layout: SceneLayout | Literal["auto"] | None = None,
    loss_masks: Any = None,
    default_fov: float = DEFAULT_FOV,
    min_views: int = 1,
    seed: int = 0,
) -> Views:
    """Open the views of one scene, with their cameras if the files define them.

    Args:
        source: one of
            a folder with transforms_train.json (NeRF's synthetic scenes) or transforms.json (nerfstudio), or such a
            file;
            a folder with poses_bounds.npy and images_8, images_4, images_2 or images (LLFF);
            a folder with rgb/, pose/ and intrinsics.txt (ShapeNet-SRN, NSVF);
            a folder with image/ and cameras_sphere.npz (NeuS, DTU);
            a COLMAP model, or a folder with one in sparse/0, sparse or colmap/sparse/0;
            raw keyframes of Polycam, or Record3D's metadata.json with rgb/;
            an .npz with images, poses and focal (as tiny_nerf_data.npz);
            a video, or images without poses: a folder (optionally with images/ and masks/), a .zip, an array, or
            anything else that :func:`factorkit.data.open_source` accepts;
            Views, which are only split and resized.
        split: "train" or "test" as defined by the files, else every 8th view is for testing. None: all views.
        resolution: pixels of the longer side; None: unchanged.
        background: colour behind transparent or masked images: "white", "black", three numbers in [0, 1], or "noise"
            (random per pixel); None leaves images with separate masks unchanged.
        masks: foreground masks, matched by name, without cameras also by position, for a video by the names of the
            views that are read; None: those in masks/ or mask/ beside the images; "none": do not look for any.
        fov: field of view in degrees along the longer side, for images without cameras; None: from EXIF, else
            `default_fov`.
        layout: "object" or "forward"; None or "auto": by the viewing directions. Given, it also turns the refusal of
            cameras that look at nothing in common into a warning.
        loss_masks: masks of value 0 where a view is not scored, matched by name.
        default_fov: field of view where neither cameras, nor `fov`, nor EXIF define it.
        min_views: number of views in the split below which files are refused.
        seed: seed of the noise.

    Raises:
        DataError: the path does not exist, its files are inconsistent, or the split has too few views; the message
            names the file.
        ConfigError: invalid arguments, or a video without the packages to decode it.

    Example:
        >>> from factorkit.data import open_views
        >>> open_views(images[:5], resolution=8).images.shape
        torch.Size([5, 3, 8, 8])
    """
    layout = _check_reading(split, fov, layout)
    if isinstance(source, Views):
        if masks is not None or loss_masks is not None:
            raise ConfigError("masks= and loss_masks= are for files; these are Views, which have their own")
        return _reopen(source, split, resolution, layout)
    listed = list_views(
        source,
        split,
        resolution,
        masks=masks,
        fov=fov,
        layout=layout,
        loss_masks=loss_masks,
        default_fov=default_fov,
        min_views=min_views,
    )
    return load_views(
        listed.views,
        arrangement=listed.arrangement,
        layout=layout or "object",
        notes=listed.notes,
        points=listed.points,
        resolution=resolution,
        background=background,
        seed=seed,
    )


class ListedViews(NamedTuple):
    """The views of a split before they are decoded.

    Attributes:
        views: with their sizes, lenses and poses as in the files.
        arrangement: of the whole scene; None without cameras.
        notes: sentences for the user on how the files were read.
        points: float64 [P, 3], sparse points of the scene in the coordinates of the files, or None.
    """

    views: list[LazyView]
    arrangement: Arrangement | None
    notes: tuple[str, ...]
    points: np.ndarray | None


def list_views(
    source: Any,
    split: Literal["train", "test"] | None = None,
    resolution: int | None = None,
    *,
    masks: Any = None,
    fov: float | None = None,
    layout: SceneLayout | Literal["auto"] | None = None,
    loss_masks: Any = None,
    default_fov: float = DEFAULT_FOV,
    min_views: int = 1,
) -> ListedViews:
    """List the views of one scene without decoding them; see :func:`open_views` for arguments and errors.

    Frames of a video alone are decoded and reduced to the resolution.
    """
    layout = _check_reading(split, fov, layout)
    path = Path(source).expanduser() if isinstance(source, (str, os.PathLike)) else None
    if path is not None and not path.exists():
        raise DataError(f"{path}: no such file or folder (current folder: {Path.cwd()}). Check the path.")
    read_posed, own = None, []
    if path is not None:
        own = _find_own_exports(path)
        read_posed = next((read for matches, read in POSED_FORMATS if read not in own and matches(path)), None)
    arrangement, given_masks = None, None if _is_none(masks) else masks
    if path is not None and read_posed is not None:
        views, settings = read_posed(path, split)
        if settings.poses is not None:
            arrangement = arrange(settings.poses, settings.bounds, layout, str(path))
        if fov is not None:
            warnings.warn(f"{path}: fov={fov:g} is not used, since the files define the cameras.", stacklevel=2)
        if masks is None:
            if isinstance(loss_masks, (str, os.PathLike)):
                settings = settings._replace(loss_folder=Path(loss_masks).expanduser())
            given_masks = _find_masks(path, settings)
        views, notes = add_masks(views, settings, given_masks, loss_masks)
    elif path is not None and is_video(path):
        views, settings = read_video(path, split, resolution, fov, default_fov)
        views, notes = add_masks(views, settings, given_masks, loss_masks)
        views = [fit_masks(view) for view in views]
    else:
        if path is not None and path.is_dir():
            _check_single_scene(path)
            if not own:
                _warn_about_unread_cameras(path)
        views, settings = read_images(source if path is None else path, split, masks, fov, default_fov)
        views, notes = add_masks(views, settings, None, loss_masks, upright=True)
    if len(views) < min_views:
        raise DataError(_describe_too_few(path, split, [view.name for view in views], settings.names, min_views))
    return ListedViews(views, arrangement, notes, settings.points)


def _describe_too_few(
    path: Path | None, split: str | None, names: Sequence[str], every: Sequence[str], min_views: int
) -> str:
    """Say how many views there are, how many of them the split has, and where the others are.

    ``names`` are of the files, of which those in ``every`` may lack the suffix.
    """
    text = f"{'the images' if path is None else escape_name(str(path))}: {format_count(len(every), 'view')}"
    used = find_rows(names, every)[0]
    if others := [name for i, name in enumerate(every) if i not in used]:
        are = "is" if len(others) == 1 else "are"
        use, other_use = ("testing", "training") if split == "test" else ("training", "testing")
        text += (
            f", {len(names)} of them for {use}; {format_examples(others)} {are} held out for {other_use} (every 8th "
            "view is held out from training, unless files or folders define the splits)"
        )
    text += f". At least {min_views} {'is' if min_views == 1 else 'are'} needed: give more images"
    if len(every) >= min_views and split != "test":
        text += ", or all of them as factorkit.data.open_views(...), which training does not split"
    return text


def _check_reading(
    split: str | None, fov: float | None, layout: SceneLayout | Literal["auto"] | None
) -> SceneLayout | None:
    """Check how views are to be read; return the layout, None where the cameras decide."""
    if split not in (None, "train", "test"):
        raise ConfigError(f'split={split!r}: give "train", "test" or nothing')
    if fov is not None and not 0 < fov < 180:
        raise ConfigError(f"fov={fov}: give degrees between 0 and 180")
    layout = None if layout == "auto" else layout
    if layout not in (None, "object", "forward"):
        raise ConfigError(f'layout={layout!r}: give "object", "forward" or "auto"')
    return layout


def _find_own_exports(folder: Path) -> list[PosedReader]:
    """Return the readers of what factorkit exported into a folder of the user's: a run's poses are not data.

    An output folder, or an exported file, that the user names himself is read.
    """
    if not folder.is_dir() or is_output_folder(folder):
        return []
    outputs = OutputFilter(folder)
    paths = [(folder / name, name, read) for name, read in EXPORTED_FILES]
    own = [(name, read) for path, name, read in paths if outputs.skips_file(str(path.parent), path.name)]
    if own:
        warnings.warn(
            f"{folder}: left out {', '.join(name for name, _ in own)}, which factorkit wrote: the poses of a run are "
            "not data. Give the file itself to read it",
            stacklevel=4,
        )
    return [read for _, read in own]


def _is_none(masks: Any) -> bool:
    return isinstance(masks, str) and masks == "none"


def _find_masks(path: Path, settings: SceneSettings) -> Path | FileSource | None:
    """Return the folder of foreground masks, unless the files use it for loss masks, or masks beside their images."""
    root = path if path.is_dir() else path.parent
    folders = sorted(child for child in root.iterdir() if child.name.lower() in MASK_FOLDERS and child.is_dir())
    for folder in sorted(folders, key=lambda folder: MASK_FOLDERS.index(folder.name.lower())):
        if list_image_names(folder):
            loss = settings.loss_folder
            if loss is None or not (loss.resolve() == folder.resolve() or folder.resolve() in loss.resolve().parents):
                return folder
    views = {fold_stem(name) for name in settings.names}
    beside = []
    for parent in {name[: name.rfind("/") + 1] for name in settings.names}:  # may lie outside of root
        files = (root / parent).iterdir() if (root / parent).is_dir() else ()
        names = [parent + file.name for file in files if is_image(file.name)]
        beside += [name for name in names if views.intersection(image_stems(name)[1:]) and fold_stem(name) not in views]
    common = common_folder(settings.names)
    return FileSource(root / common, [name[len(common) :] for name in sorted(beside)]) if beside else None


def _reopen(views: Views, split: str | None, resolution: int | None, layout: SceneLayout | None) -> Views:
    if split is not None:
        views = views.select(split_every_eighth(len(views), split))
    if resolution is not None:
        views = views.resize(resolution)
    return views if layout is None else replace(views, layout=layout)


def _check_single_scene(folder: Path) -> None:
    """Raise DataError if the subfolders are scenes: their images together are not one scene."""
    scenes = [scene.relative_to(folder).as_posix() for scene in _find_scenes(folder, MAX_SCENE_DEPTH)]
    if scenes:
        raise DataError(
            f"{folder}: contains {format_count(len(scenes), 'scene')} ({format_examples(scenes)}). Give one of them."
        )


def _find_scenes(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the scenes with cameras below a folder, none within another."""
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.is_symlink() or child.name.startswith(".") or is_output_folder(child):
            continue
        if any(matches(child) for matches, _ in POSED_FORMATS):
            yield child
        elif depth > 1:
            yield from _find_scenes(child, depth - 1)


def _warn_about_unread_cameras(folder: Path) -> None:
    """Warn if the folder has cameras in a format that is not read, or in a transforms file of another name."""
    for listing in sorted(folder.glob("*.json")):
        if listing.stat().st_size <= MAX_SNIFFED_BYTES and b'"transform_matrix"' in listing.read_bytes():
            warnings.warn(
                f"{folder}: {listing.name} lists cameras, but is not named transforms.json: the images are read "
                f"without poses. To use the poses, give the file: {listing}.",
                stacklevel=3,
            )
            return
    for pattern, what in UNREAD_CAMERAS:
        file = next(iter(sorted(folder.glob(pattern))), None)
        if file is not None:
            warnings.warn(
                f"{folder}: {file.relative_to(folder).as_posix()} looks like {what}, which this program does not read: "
                "the images are read without poses. To use the poses, convert them to nerfstudio's transforms.json "
                "(ns-process-data) or to a COLMAP model in sparse/0.",
                stacklevel=3,
            )
            return
