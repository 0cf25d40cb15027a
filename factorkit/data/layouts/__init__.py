"""Published data sets in their original layouts: one reader per module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from factorkit.data.layouts import (
    celebamask,
    cub200,
    davis2017,
    ecssd,
    ffhq,
    flowers102,
    huggingface,
    imagenet,
    shapes3d,
    voc2012,
    webdataset,
)
from factorkit.data.layouts.base import DatasetFiles, Reader

_IMAGENET_FOLDERS = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "imagenet")
_VOC_FOLDERS = ("", "VOC2012", "VOCdevkit/VOC2012")
_DAVIS_FOLDERS, _FFHQ_FOLDERS = ("", "DAVIS"), ("", "ffhq-dataset")
# How a data set is recognised: its reader, the folders (below the given one) that may hold it, and patterns that all
# match a file or folder in there. The first row that matches counts.
SIGNS: tuple[tuple[Reader, tuple[str, ...], tuple[str, ...]], ...] = (
    (flowers102.READER, ("", "102flowers", "flowers-102"), ("jpg", "setid.mat")),
    (cub200.READER, ("", "CUB_200_2011"), ("images", "images.txt", "classes.txt")),
    (celebamask.READER, ("", "CelebAMask-HQ"), ("CelebA-HQ-img", "CelebAMask-HQ-mask-anno")),
    *((ffhq.READER, _FFHQ_FOLDERS, (folder,)) for folder in ffhq.FOLDERS),
    (imagenet.READER, _IMAGENET_FOLDERS, ("train/n" + 8 * "[0-9]",)),
    (voc2012.READER, _VOC_FOLDERS, ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")),
    *((davis2017.READER, _DAVIS_FOLDERS, (f"JPEGImages/{r}", "ImageSets/2017")) for r in davis2017.RESOLUTIONS),
    (shapes3d.READER, ("",), (shapes3d.FILE,)),
    (ecssd.READER, ("", "ECSSD"), ("images", "ground_truth_mask")),
    (huggingface.READER, ("",), ("dataset_dict.json",)),
    (huggingface.READER, ("",), ("dataset_info.json", "state.json")),
    (webdataset.READER, ("",), ("*.tar",)),
)
SUFFIXES = {".h5": shapes3d.READER, ".hdf5": shapes3d.READER, ".tar": webdataset.READER}  # of single files
READERS: tuple[Reader, ...] = tuple({reader.name: reader for reader, _, _ in SIGNS}.values())


def recognise_layout(data: Any) -> tuple[Reader, Any] | None:
    """Return the reader of a published data set and the folder, file or object to read; None if it is none of them."""
    is_path = isinstance(data, (str, Path))
    if type(data).__module__.partition(".")[0] == "datasets" or (
        is_path and str(data).startswith(huggingface.HUB_PREFIX)
    ):
        return huggingface.READER, data
    if not is_path:
        return None
    path = Path(data).expanduser()
    for reader, subfolders, patterns in SIGNS:
        for folder in (path / subfolder for subfolder in subfolders):
            if all(any(folder.glob(pattern)) for pattern in patterns):
                return reader, folder.resolve()
    suffix = path.suffix.lower()
    return (SUFFIXES[suffix], path) if suffix in SUFFIXES else None


def read_layout(data: Any) -> tuple[Reader, DatasetFiles] | None:
    """Recognise a published data set; return its reader and contents, or None if it is none of them.

    Raises:
        DataError: it is recognised, but incomplete or damaged.
        ConfigError: an extra of the package is missing.
    """
    if (match := recognise_layout(data)) is None:
        return None
    reader, where = match
    files = reader.read(where)
    return None if files is None else (reader, files)


__all__ = ["READERS", "DatasetFiles", "Reader", "read_layout"]
