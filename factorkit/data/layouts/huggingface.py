"""Data sets of the Hugging Face library `datasets`: on the hub, saved to a folder, or in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from factorkit.data.layouts.base import DatasetFiles, LabelSource, Reader, import_extra
from factorkit.data.sources import EncodedSource, hash_values
from factorkit.utils.errors import DataError
from factorkit.utils.safe_reading import read_json

PREFIX = "hf:"
MASKS = ("mask", "masks", "segmentation", "segmentation_mask", "annotation", "label")
SPLIT_NAMES = {"validation": "val"}


class Column(EncodedSource):
    """The pictures of one column, split after split; encoded as they were stored, and decoded one by one."""

    def __init__(self, parts: Mapping[str, Any], key: str) -> None:
        image = import_extra("datasets", "huggingface", "reading this").Image(decode=False)
        self.key = key
        self.parts: list[Any] = []
        self.rows: list[tuple[int, int]] = []
        self.names = []
        for split, part in parts.items():
            self.rows += [(len(self.parts), i) for i in range(len(part))]
            self.names += [f"{split}/{i:08d}" for i in range(len(part))]
            self.parts.append(part.select_columns([key]).cast_column(key, image))

    def _bytes(self, index: int) -> bytes:
        part, row = self.rows[index]
        cell = self.parts[part][row][self.key]
        if cell is None:
            return b""
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def fingerprint(self) -> str:
        return hash_values("datasets", self.key, [part._fingerprint for part in self.parts])


def read(data: Any) -> DatasetFiles | None:
    found = _open(data)
    if found is None:
        return None
    datasets = import_extra("datasets", "huggingface", "reading this")
    if not isinstance(found, (Mapping, datasets.Dataset)):
        raise DataError(f"{_name(data)}: a stream, whose images have no places. Load it without streaming=True.")
    parts = dict(found) if isinstance(found, Mapping) else {str(found.split or "all"): found}
    parts = {split if "val" in parts else SPLIT_NAMES.get(split, split): part for split, part in parts.items()}
    features = next(iter(parts.values())).features
    pictures = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    masks = next((key for key in MASKS if key in pictures), None)
    images = next((key for key in pictures if key != masks), None)
    if images is None:
        raise DataError(f"{_name(data)}: none of its columns ({', '.join(features)}) holds images.")
    classes = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    labels = class_names = None
    if classes is not None:
        numbers = [np.array([-1 if v is None else v for v in part[classes]], np.int64) for part in parts.values()]
        labels, class_names = np.concatenate(numbers), list(features[classes].names)
    splits, first = {}, 0
    for split, part in parts.items():
        splits[split] = np.arange(first, first := first + len(part))
    by_name = {masks: LabelSource(Column(parts, masks))} if masks else {}
    return DatasetFiles(Column(parts, images), by_name, splits if len(splits) > 1 else {}, labels, class_names)


def _open(data: Any) -> Any:
    """A Dataset or a mapping of them by split; None where it is something else."""
    if type(data).__module__.partition(".")[0] == "datasets":
        return data
    if not isinstance(data, (str, Path)):
        return None
    if str(data).startswith(PREFIX):
        datasets = import_extra("datasets", "huggingface", f"reading {data}")
        name, _, part = str(data)[len(PREFIX) :].partition(":")
        try:
            return datasets.load_dataset(name, part or None)
        except Exception as error:  # the library and the hub raise some thirty kinds
            reason = (str(error) or repr(error)).splitlines()[0]
            raise DataError(f"{data}: cannot be loaded: {reason}") from error
    root = Path(data).expanduser()
    saved = (root / "dataset_dict.json").is_file() or (root / "state.json").is_file() and _is_arrow(root)
    if not saved:
        return None
    datasets = import_extra("datasets", "huggingface", f"reading {root.name}")
    try:
        return datasets.load_from_disk(str(root))
    except Exception as error:
        raise DataError(f"{root}: cannot be loaded: {error}. Save it again with save_to_disk.") from error


def _is_arrow(root: Path) -> bool:
    try:
        return "_data_files" in read_json(root / "state.json")
    except (OSError, ValueError):
        return False


def _name(data: Any) -> str:
    return str(data) if isinstance(data, (str, Path)) else type(data).__name__


READER = Reader(
    name="huggingface",
    title="Hugging Face datasets",
    url="https://huggingface.co/docs/datasets",
    expects="a folder written by save_to_disk, the name hf:OWNER/NAME or hf:OWNER/NAME:CONFIG,\n"
    "or in Python a Dataset or DatasetDict; with a column of images",
    splits="its own; validation is called val",
    masks=f"a second column of images named {', '.join(MASKS)}",
    labels="its first ClassLabel column",
    read=read,
    extra="huggingface",
)
