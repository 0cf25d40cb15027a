"""The files of a segmented folder: their names, the manifest of finished images, image files and COCO annotations."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.sources import FileSource, Source
from factorkit.segdiff import previews
from factorkit.utils.atomic import replacing, save_image
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.jsonl import JsonLines, parse_line, read_lines

FORMATS = ("labels", "masks", "overlays", "coco")
DEFAULT_FORMATS = FORMATS[:3]
MANIFEST, ANNOTATIONS, CONTACT_SHEET = "segments.jsonl", "annotations.json", "contact_sheet.png"
RANK_MANIFEST = "segments.{}.jsonl"  # of every process but the first, until the run is complete
RESULT_NAME = re.compile(r"_(labels|overlay|recomposed|estimate|(mask|branch)_\d+)\.png$|^contact_sheet\.png$")
PIXELS_PER_BAND = 1 << 18  # of an overlay at a time


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """Return the formats as a tuple; ConfigError for none at all and for unknown ones."""
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        names = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError(f"formats: {names} cannot be written; choose among {', '.join(FORMATS)}")
    return formats


def without_results(source: Source, out: Path) -> Source:
    """Return the images of a source except those that an earlier call wrote into ``out``; DataError if none is left."""
    if not isinstance(source, FileSource) or not out.exists():
        return source
    folder = out.resolve()
    inputs = [
        i
        for i, file in enumerate(source.files)
        if not (RESULT_NAME.search(PurePosixPath(file).name) and folder in source.path(i).resolve().parents)
    ]
    if not inputs:
        raise DataError(f"{out}: all images are results of an earlier call to segment. Give the folder of photos.")
    return source.subset(inputs)


def output_names(names: Sequence[str]) -> list[str]:
    """Return the path prefix of each image's results: its name without the suffix, made unique where two are equal."""
    used: set[str] = set()
    prefixes = []
    for name in names:
        # a zip may name its members arbitrarily; the results stay below the output folder
        path = PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
        numbered = (f"{path}-{i}" for i in itertools.count(2))
        candidates = itertools.chain((path.with_suffix("").as_posix(), path.as_posix()), numbered)
        prefix = next(c for c in candidates if c.casefold() not in used)  # some file systems ignore case
        used.add(prefix.casefold())
        prefixes.append(prefix)
    return prefixes


def fingerprint(model: torch.nn.Module, settings: Mapping[str, Any]) -> str:
    """Hash everything that an image's masks depend on, except the image."""
    digest = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=12)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Manifest:
    """The finished images of an output folder: one line each in segments.jsonl, written after the image's files.

    Args:
        out: the folder.
        key: :func:`fingerprint` of the model and the settings; lines with another key are ignored.
        source: the images.
        rank: of the process. Only rank 0 writes the manifest; it merges the others' lines when they are done, and what
            killed ones left.
    """

    def __init__(self, out: Path, key: str, source: Source, rank: int = 0):
        self.out, self.key, self.source = out, key, source
        self._source_hash = None if isinstance(source, FileSource) else source.fingerprint()
        self._offsets: dict[str, int] = {}  # of each image's last line; the text itself may be large
        self._done: dict[str, tuple[Any, dict[str, int], bool]] = {}
        self._failed: dict[str, Any] = {}
        for offset, line in read_lines(out / MANIFEST):
            self._remember(offset, line)
        self._file = JsonLines(out / (RANK_MANIFEST.format(rank) if rank else MANIFEST))
        if not rank:
            self.merge_ranks()

    def stamp(self, index: int) -> list[int] | str | None:
        """Return a value that changes with the image: size and modification time of a file, else a hash."""
        if not isinstance(self.source, FileSource):
            return self._source_hash
        try:
            status = self.source.path(index).stat()
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns]

    def has(self, index: int, path: str, formats: Sequence[str], num_regions: int) -> bool:
        """Return whether all files of an image exist as they were written."""
        record = self._done.get(self.source.names[index])
        if record is None or record[0] is None or record[0] != self.stamp(index):
            return False
        _, sizes, annotated = record
        if "coco" in formats and not annotated:
            return False
        try:
            found = {end: os.path.getsize(f"{self.out / path}_{end}") for end in file_endings(formats, num_regions)}
        except OSError:
            return False
        return all(sizes.get(end) == size for end, size in found.items())

    def failed(self, index: int) -> bool:
        """Return whether the last attempt at the image failed and it has not changed since."""
        return self._failed.get(self.source.names[index], False) == self.stamp(index)

    def add(self, index: int, stamp: Any, record: Mapping[str, Any]) -> None:
        """Record that an image's files are written, or ``{"skipped": reason}``; OSError if the disk is full."""
        self._append({"name": self.source.names[index], "key": self.key, "stamp": stamp, **record})

    def merge_ranks(self) -> None:
        """Add the lines of the other processes; OSError if the disk is full."""
        for path in sorted(self.out.glob(RANK_MANIFEST.format("*"))):
            for _, line in read_lines(path):
                self._append(line)
            path.unlink()

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield index and line of the finished images in the order of the source, read one by one."""
        with open(self.out / MANIFEST, "rb") as file:
            for index, name in enumerate(self.source.names):
                if name in self._offsets:
                    file.seek(self._offsets[name])
                    line = parse_line(file.readline())
                    if line is not None:
                        yield index, line

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        offset = os.path.getsize(self._file.path)
        self._file.append(line)
        self._remember(offset, line)

    def _remember(self, offset: int, line: dict[str, Any]) -> None:
        name, stamp = line.get("name"), line.get("stamp")
        if line.get("key") != self.key or not isinstance(name, str):
            return
        for table in (self._offsets, self._done, self._failed):
            table.pop(name, None)
        if "skipped" in line:
            self._failed[name] = stamp
        else:
            self._offsets[name] = offset
            self._done[name] = (stamp, line["files"], line.get("annotations") is not None)


def file_endings(formats: Sequence[str], num_regions: int) -> list[str]:
    """Return what follows NAME_ in the files of one image."""
    endings = ["labels.png"] if "labels" in formats else []
    endings += [f"mask_{k}.png" for k in range(num_regions)] if "masks" in formats else []
    return endings + (["overlay.png"] if "overlays" in formats else [])


def write_image_files(
    prefix: Path, image: Image.Image, labels: np.ndarray, masks: np.ndarray | None, formats: Sequence[str]
) -> dict[str, int]:
    """Write the files of one image, each atomically, and return their sizes in bytes by ending.

    Args:
        prefix: start of the paths.
        image: the input.
        labels: uint8 [H, W].
        masks: uint8 [K, H, W]; only needed for "masks".
        formats: which files.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    files: dict[str, Image.Image] = {}
    if "labels" in formats:
        files["labels.png"] = previews.make_label_image(labels)
    if "masks" in formats and masks is not None:
        files |= {f"mask_{k}.png": Image.fromarray(mask) for k, mask in enumerate(masks)}
    if "overlays" in formats:
        files["overlay.png"] = _draw_overlay(image, labels)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for end, result in files.items():
        save_image(result, Path(f"{prefix}_{end}"), compress_level=6 if end == "labels.png" else 1)
        sizes[end] = os.path.getsize(f"{prefix}_{end}")
    return sizes


def _draw_overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Draw the overlay in bands of rows, because the floats of a huge image fill the memory."""
    overlay = Image.new("RGB", image.size)
    step = max(1, PIXELS_PER_BAND // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step + 1, image.height)  # a border is drawn where the next row differs
        band = previews.overlay_regions(np.asarray(image.crop((0, top, image.width, bottom))), labels[top:bottom])
        overlay.paste(Image.fromarray(band[:step]), (0, top))
    return overlay


def write_annotations(manifest: Manifest, num_regions: int) -> Path:
    """Write annotations.json of all finished images in the COCO format, atomically; category k + 1 is region k."""
    path = manifest.out / ANNOTATIONS
    categories = [{"id": k + 1, "name": f"region {k}", "supercategory": "region"} for k in range(num_regions)]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"categories": {json.dumps(categories)},\n"images": [')
        separator = "\n"
        for index, line in manifest.records():
            image = {"id": index + 1, "file_name": line["name"], "width": line["width"], "height": line["height"]}
            file.write(separator + json.dumps(image))
            separator = ",\n"
        file.write('],\n"annotations": [')
        separator, count = "\n", 0
        for index, line in manifest.records():
            for annotation in line["annotations"] or ():
                count += 1
                entry = {k: v for k, v in annotation.items() if k != "region"}
                entry |= {"id": count, "image_id": index + 1, "category_id": annotation["region"] + 1, "iscrowd": 0}
                file.write(separator + json.dumps(entry))
                separator = ",\n"
        file.write("]}\n")
    return path
