"""Data sets of the Hugging Face library `datasets`: from the hub, from a folder, or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.layouts.base import DatasetFiles, LabelSource, Reader, import_extra
from factorkit.data.sources import EncodedSource, hash_values
from factorkit.utils.errors import DataError

HUB_PREFIX = "hf:"
MASK_COLUMNS = ("mask", "masks", "segmentation", "segmentation_mask", "annotation", "label")
SPLIT_NAMES = {"validation": "val"}


class ImageColumn(EncodedSource):
    """The encoded images of one column, split after split."""

    def __init__(self, parts: Mapping[str, Any], column: str) -> None:
        image = _import_datasets().Image(decode=False)
        self.column = column
        self.parts: list[Any] = []
        self.rows: list[tuple[int, int]] = []
        self.names = []
        for split, part in parts.items():
            self.rows += [(len(self.parts), i) for i in range(len(part))]
            self.names += [f"{split}/{i:08d}" for i in range(len(part))]
            self.parts.append(part.select_columns([column]).cast_column(column, image))

    def _read_bytes(self, index: int) -> bytes:
        part, row = self.rows[index]
        cell = self.parts[part][row][self.column]
        if cell is None:
            return b""
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def fingerprint(self) -> str:
        """Return a hash of the column and the library's own fingerprints."""
        return hash_values("datasets", self.column, [part._fingerprint for part in self.parts])


def read(data: Any) -> DatasetFiles:
    dataset = _open(data)
    datasets = _import_datasets()
    if not isinstance(dataset, (Mapping, datasets.Dataset)):
        raise DataError(f"{_describe(data)}: a streamed data set has no random access. Load it without streaming=True.")
    parts = dict(dataset) if isinstance(dataset, Mapping) else {str(dataset.split or "all"): dataset}
    parts = {split if "val" in parts else SPLIT_NAMES.get(split, split): part for split, part in parts.items()}
    features = next(iter(parts.values())).features
    image_columns = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    mask_column = next((key for key in MASK_COLUMNS if key in image_columns), None)
    image_column = next((key for key in image_columns if key != mask_column), None)
    if image_column is None:
        raise DataError(f"{_describe(data)}: none of its columns ({', '.join(features)}) contains images.")
    class_column = next((key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
    labels = class_names = None
    if class_column is not None:
        numbers = [np.array([-1 if v is None else v for v in part[class_column]], np.int64) for part in parts.values()]
        labels, class_names = np.concatenate(numbers), list(features[class_column].names)
    splits, start = {}, 0
    for split, part in parts.items():
        splits[split] = np.arange(start, start := start + len(part))
    masks = {mask_column: LabelSource(ImageColumn(parts, mask_column))} if mask_column else {}
    splits = splits if len(splits) > 1 else {}
    return DatasetFiles(ImageColumn(parts, image_column), masks, splits, labels, class_names)


def _open(data: Any) -> Any:
    """Return a Dataset or a mapping of splits to Datasets."""
    if not isinstance(data, (str, Path)):
        return data
    if str(data).startswith(HUB_PREFIX):
        datasets = _import_datasets(str(data))
        name, _, config = str(data).removeprefix(HUB_PREFIX).partition(":")
        try:
            return datasets.load_dataset(name, config or None)
        except Exception as error:  # the library and the hub raise about thirty kinds of errors
            reason = (str(error) or repr(error)).splitlines()[0]
            raise DataError(f"{data}: cannot be loaded: {reason}") from error
    datasets = _import_datasets(Path(data).name)
    try:
        return datasets.load_from_disk(str(data))
    except Exception as error:
        raise DataError(f"{data}: cannot be loaded: {error}. Save it again with save_to_disk.") from error


def _import_datasets(name: str = "a Hugging Face data set") -> Any:
    return import_extra("datasets", "huggingface", f"reading {name}")


def _describe(data: Any) -> str:
    return str(data) if isinstance(data, (str, Path)) else type(data).__name__


READER = Reader(
    name="huggingface",
    title="Hugging Face datasets",
    url="https://huggingface.co/docs/datasets",
    expects="a folder written by save_to_disk, the name hf:OWNER/NAME or hf:OWNER/NAME:CONFIG,\n"
    "or in Python a Dataset or DatasetDict; with a column of images",
    splits="its own; validation is called val",
    masks=f"a second column of images named {', '.join(MASK_COLUMNS)}",
    labels="its first ClassLabel column",
    read=read,
    extra="huggingface",
)
