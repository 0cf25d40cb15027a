"""Views in a transforms.json: NeRF's synthetic scenes from Blender, nerfstudio's format, and instant-ngp's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from factorkit.data.masks import IGNORED_BEGINNING
from factorkit.data.views.camera_keys import (
    describe_ignored,
    merge_settings,
    parse_distortion,
    parse_intrinsics,
    refuse_unmodelled,
)
from factorkit.data.views.cameras import IntrinsicsFunction
from factorkit.data.views.image_files import FileFinder
from factorkit.data.views.loading import LazyView, SceneSettings, image_reader, loss_mask_reader
from factorkit.data.views.splits import SPLIT_NAMES, SPLITS, normalize_name, select_listed, select_split
from factorkit.data.views.views import check_rigid
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.files import read_json


class _File(NamedTuple):
    """A parsed transforms file."""

    path: Path
    content: dict[str, Any]
    names: list[str]  # `file_path` of each frame
    poses: np.ndarray  # [F, 4, 4]


def is_transforms(path: Path) -> bool:
    """Return whether this is a transforms file, or a folder with one."""
    if path.is_dir():
        return any((path / name).is_file() for name in ("transforms.json", *(f"transforms_{n}.json" for n in SPLITS)))
    return path.suffix.lower() == ".json"


def read_transforms(path: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """List the views of a split.

    Blender's folders have one file per split. nerfstudio's file may list `train_filenames`, `val_filenames` and
    `test_filenames`, all or some, ScanNet++'s has `test_frames`, and a frame may have `split`; otherwise folders such
    as train/ and test/ decide, else every 8th frame is for testing. A file named after a split
    (transforms_test.json), if given itself, is read as a whole. Test views are never among the training views.

    Raises:
        DataError: invalid JSON, no frames, more than half of the images missing, an invalid pose, contradictory splits,
            or a setting that changes the geometry and is not supported.
    """
    if path.is_dir() and any((path / f"transforms_{name}.json").is_file() for name in SPLITS):
        return _read_split_files(path, split)
    path = path / "transforms.json" if path.is_dir() else path
    is_split_file = any(path.stem == f"transforms_{name}" for name in SPLITS)
    file = _parse_file(path)
    indices, notes = (list(range(len(file.names))), ()) if is_split_file else _select_frames(file, split)
    siblings = [path.with_name(f"transforms_{name}.json") for name in SPLITS] if is_split_file else []
    scene = [file, *(_parse_file(other) for other in siblings if other != path and other.is_file())]
    return _list_views([(file, indices)], scene, notes)


def _read_split_files(folder: Path, split: str | None) -> tuple[list[LazyView], SceneSettings]:
    """Read a folder with the files of some splits; without transforms_train.json, transforms.json has the others."""
    paths = {name: folder / f"transforms_{name}.json" for name in SPLITS}
    if not paths["train"].is_file() and (folder / "transforms.json").is_file():
        paths["train"] = folder / "transforms.json"
    files = {name: _parse_file(path) for name, path in paths.items() if path.is_file()}
    notes: tuple[str, ...] = ()
    if split == "train" and "train" not in files:
        raise DataError(f"{paths['train']}: no such file. The frames of {', '.join(files)} are not trained on.")
    selected = list(files) if split is None else [split]
    if split == "test" and "test" not in files:
        if "val" not in files:
            raise DataError(f"{paths['test']}: no such file, but it is needed for split='test'")
        selected, notes = ["val"], ("There is no transforms_test.json: transforms_val.json is the test split.",)
    parts: list[tuple[_File, list[int]]] = []
    used: set[str] = set()
    for name in selected:
        file, held_out = files[name], set(used)
        if split == "train":
            held_out |= {normalize_name(other) for key in ("val", "test") if key in files for other in files[key].names}
        indices = [i for i, other in enumerate(file.names) if normalize_name(other) not in held_out]
        repeated = len(file.names) - len(indices)
        if repeated:
            why = "also views of val or test" if split == "train" else "already listed by another split"
            notes += (f"{file.path.name}: left out {repeated} of {format_count(len(file.names), 'frame')}: {why}.",)
        used |= {normalize_name(file.names[i]) for i in indices}
        if indices:
            parts.append((file, indices))
    if not parts:
        raise DataError(
            f"{paths['train']}: all of its frames are also in transforms_val.json or transforms_test.json, so no view "
            "is left for training. Give each split its own frames, or name transforms_train.json itself to read it all."
        )
    return _list_views(parts, list(files.values()), notes)


def _parse_file(path: Path) -> _File:
    try:
        content = read_json(path)
        if content.get("test_frames"):  # ScanNet++
            test_names = [frame["file_path"] for frame in content["test_frames"]]
            content["test_filenames"] = [*(content.get("test_filenames") or ()), *test_names]
            content["frames"] = [*content["frames"], *content["test_frames"]]
        frames = content["frames"]
        entries = [(frame["file_path"], frame["transform_matrix"]) for frame in frames]
        texts = [frame[key] for frame in frames for key in ("file_path", "mask_path") if frame.get(key) is not None]
        texts += [name for names in _split_lists(content).values() for name in names]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a file name is not a string")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a transforms file ({type(error).__name__}: {error}). It needs `frames`, each with "
            "`file_path` and `transform_matrix`."
        ) from error
    if not frames:
        raise DataError(f"{path}: no frames in it")
    poses = np.stack([_parse_pose(matrix, name, path) for name, matrix in entries])
    check_rigid(torch.from_numpy(poses), [name for name, _ in entries])
    return _File(path, content, [name for name, _ in entries], poses)


def _for_one_size(
    intrinsics: IntrinsicsFunction, name: str, file: Path, first: list[tuple[str, int, int]]
) -> IntrinsicsFunction:
    """Refuse an image of another size than the first that a focal length in pixels without `w` and `h` is for."""

    def checked(height: int, width: int) -> np.ndarray:
        if not first:
            first.append((name, height, width))
        other, *size = first[0]
        if size != [height, width]:
            raise DataError(
                f"{file}: one `fl_x` in pixels without `w` and `h`, but {other} has {size[1]} x {size[0]} pixels and "
                f"{name} {width} x {height}. Add the `w` and `h` that it is for."
            )
        return intrinsics(height, width)

    return checked


def _list_views(
    parts: Sequence[tuple[_File, list[int]]], scene: Sequence[_File], notes: tuple[str, ...]
) -> tuple[list[LazyView], SceneSettings]:
    """List the frames at these indices of each file; `scene` are all files, which determine layout and coordinates."""
    views: list[LazyView] = []
    keys: set[str] = set()
    loss_folder, num_moving = None, 0
    first_sizes: dict[
        Any, list[tuple[str, int, int]]
    ] = {}  # of the images that one focal length without w and h is for
    for file, indices in parts:
        root, frames = file.path.parent, file.content["frames"]
        finder = FileFinder(root)
        paths = finder.find_all([file.names[i] for i in indices], str(file.path))
        for position, path in paths.items():
            i = indices[position]
            settings = merge_settings(file.content, frames[i])
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
            refuse_unmodelled(settings, name, file.path)
            keys |= settings.keys()
            mask, read_loss_mask = settings.get("mask_path"), None
            if mask is not None:
                if (mask_file := finder.find(mask)) is None:
                    raise DataError(f"{file.path}: the mask {mask} of {name} is missing")
                read_loss_mask, loss_folder = loss_mask_reader(mask_file), mask_file.parent
            elif (moving := path.with_name(f"{IGNORED_BEGINNING}{path.stem}.png")).is_file():
                read_loss_mask, num_moving = loss_mask_reader(moving, is_inverted=True), num_moving + 1
            intrinsics = parse_intrinsics(settings, name, file.path)
            if "fl_x" in settings and "w" not in settings:
                first = first_sizes.setdefault(settings["fl_x"], [])
                intrinsics = _for_one_size(intrinsics, name, file.path, first)
            lens = parse_distortion(settings, name, file.path)
            read_image, pose = image_reader(path), file.poses[i]
            views.append(LazyView(name, read_image, intrinsics, pose, None, lens, read_loss_mask))
        notes += finder.notes
    if loss_folder is not None:
        notes += ("`mask_path`: pixels of value 0 are not scored; it does not define the object's silhouette.",)
    if num_moving:
        notes += (f"{format_count(num_moving, 'mask')} of moving parts ({IGNORED_BEGINNING}x.png): not scored there.",)
    names = [normalize_name(name) for file in scene for name in file.names]
    poses = np.concatenate([file.poses for file in scene])
    return views, SceneSettings(names, poses, None, notes + describe_ignored(keys), loss_folder)


def _split_lists(content: dict[str, Any]) -> dict[str, list[str]]:
    """Return the names of each split, from `train_filenames` and the like, or from `split` of each frame."""
    lists = {name: list(values) for name in SPLITS if (values := content.get(f"{name}_filenames")) is not None}
    for frame in content["frames"]:
        if (split := frame.get("split")) is not None:
            if str(split).lower() not in SPLIT_NAMES:
                raise ValueError(f"`split` is {split!r:.40}; give train, val or test")
            lists.setdefault(SPLIT_NAMES[str(split).lower()], []).append(frame["file_path"])
    return lists


def _select_frames(file: _File, split: str | None) -> tuple[list[int], tuple[str, ...]]:
    """Return the frames of a split, and sentences on how it was chosen."""
    if lists := _split_lists(file.content):
        return select_listed(lists, file.names, split, str(file.path))
    return select_split(file.names, split)


def _parse_pose(values: Any, name: str, file: Path) -> np.ndarray:
    """Return a pose [4, 4]; some writers omit its last row."""
    try:
        matrix = np.array(values, dtype=np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{file}: the transform_matrix of {name} is not a matrix of numbers: {error}") from error
    if matrix.shape == (3, 4):
        matrix = np.concatenate([matrix, [[0.0, 0, 0, 1]]])
    if matrix.shape != (4, 4):
        raise DataError(f"{file}: the transform_matrix of {name} has shape {list(matrix.shape)}, not [4, 4]")
    return matrix
