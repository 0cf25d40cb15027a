"""The files about all images of a segmented folder: the manifest, the overview, COCO JSON and the classes of YOLO.

The manifest is a JSON lines file with one line for each finished image; a killed run continues after its last line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from factorkit.data.archives import ZipSource
from factorkit.data.files import escape_name
from factorkit.data.sources import FileSource, Source
from factorkit.report.image_grid import Caption, draw_image_grid, overlay_regions, palette
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.outputs import YOLO_CLASSES, Outputs
from factorkit.utils.errors import WriteError
from factorkit.utils.files import JsonLines, read_lines
from factorkit.utils.line_index import LineIndex
from factorkit.utils.output_record import OutputRecord

MANIFEST = "segments.jsonl"
RANK_MANIFEST = "segments.{}.jsonl"  # of every process but the first, until the run is complete
OVERVIEW = "overview.png"
OVERVIEW_IMAGES = 32  # at most
OVERVIEW_CELL = 128  # pixels a side
ALL_IMAGES = "segment: all images"  # the source of these files in the record of the folder


def identify_inputs(source: Source) -> list[str]:
    """Return what identifies each image as an input: its path, or where there is none a hash and its name."""
    if isinstance(source, FileSource):
        root = os.path.realpath(source.root)
        return [os.path.join(root, file) for file in source.files]
    if isinstance(source, ZipSource):
        where = os.path.join(os.path.realpath(source.path), source.prefix)
    else:
        where = f"images {source.fingerprint()[:16]}"
    return [f"{where.rstrip('/')}/{name}" for name in source.names]


def fingerprint(model: SegdiffModel, settings: Mapping[str, Any]) -> str:
    """Hash everything that an image's masks depend on, except the image."""
    digest = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=12)
    for name, tensor in (model.state_dict() | model.space.tensors()).items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Manifest:
    """The finished images of an output folder: one line each in segments.jsonl, written after the image's files.

    Images of all calls are in it, each under its own path and with a number that stays.

    Args:
        key: :func:`fingerprint` of the model and the settings; images with another key are not finished.
        rank: of the process. Only rank 0 writes the manifest; it merges the others' lines when they are done, and what
            killed ones left.

    Raises:
        WriteError: the file is there but is not a manifest.
    """

    def __init__(self, out: Path, key: str, source: Source, rank: int = 0):
        self.out, self.key, self.source = out, key, source
        self.inputs = identify_inputs(source)
        self._source_hash = None if isinstance(source, FileSource) else source.fingerprint()
        self.changed_files: list[str] = []  # results that the user changed, among those that :meth:`has` met
        self._index = LineIndex(out / MANIFEST)  # by input, with its number in annotations.json
        for offset, line in read_lines(out / MANIFEST):
            if "key" not in line or "name" not in line:
                raise WriteError(f"{out / MANIFEST} exists and was not written by factorkit. Give another --out (out=)")
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

    def number_images(self) -> list[int]:
        """Return the number of each image in annotations.json, from 1 on: as in earlier calls, else its position.

        Where the position is another image's number, a new number.
        """
        numbers = [self._index.number(name) for name in self.inputs]
        used = set(self._index.numbers().tolist())
        new = itertools.count(max([len(numbers), *used]) + 1)
        return [n or (i if i not in used else next(new)) for i, n in enumerate(numbers, 1)]

    def is_moved(self, index: int, former: str) -> bool:
        """Return whether an image is the one that was at another path, which is gone; its line follows it then."""
        if not isinstance(self.source, FileSource) or os.path.lexists(former):
            return False
        line = self._find(former)
        if line is None or line.get("stamp") is None or line["stamp"] != self.stamp(index):
            return False
        line |= {"name": self.source.names[index], "source": self.inputs[index], "former": former}
        line.get("files", {}).pop("labelme.json", None)  # it refers to the former path
        self._append(line)
        return True

    def has(self, index: int, stem: str, outputs: Outputs, record: OutputRecord) -> bool:
        """Return whether all files of an image exist as they were written, or as the user changed them."""
        line = self._find(self.inputs[index])
        if line is None or "skipped" in line or line["key"] != self.key:
            return False
        if line.get("stamp") is None or line["stamp"] != self.stamp(index):
            return False
        if any(line.get(key) is None for _, key in outputs.documents()):
            return False
        if outputs.has_polygons and line.get("tolerance") != outputs.tolerance:
            return False
        for end, name in outputs.file_names(stem).items():
            try:
                size = os.path.getsize(self.out / name)
            except OSError:
                return False
            if end not in line["files"]:
                return False
            if size != line["files"][end]:
                if not record.has_changed(name):  # a later call wrote it, and was killed
                    return False
                self.changed_files.append(name)
        return True

    def has_other_depth(self, index: int) -> bool:
        """Return whether a finished image of a set of more than 8 bits was read with other depths than now."""
        depths = (self._find(self.inputs[index]) or {}).get("depths")
        return depths is not None and depths != self.source.depths.decide()

    def failed(self, index: int) -> bool:
        """Return whether the last attempt at the image failed and it has not changed since."""
        line = self._find(self.inputs[index])
        if line is None or "skipped" not in line:
            return False
        return bool(line["key"] == self.key and line.get("stamp") == self.stamp(index))

    def add(self, index: int, stamp: Any, record: Mapping[str, Any]) -> None:
        """Record that an image's files are written, or ``{"skipped": reason}``; OSError if the disk is full."""
        name, source = self.source.names[index], self.inputs[index]
        self._append({"name": name, "source": source, "key": self.key, "stamp": stamp, **record})

    def merge_ranks(self) -> None:
        """Add the lines of the other processes; OSError if the disk is full."""
        for path in sorted(self.out.glob(RANK_MANIFEST.format("*"))):
            for _, line in read_lines(path):
                self._append(line)
            path.unlink()

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield index and line of the finished images in the order of the source, read one by one."""
        for index, name in enumerate(self.inputs):
            line = self._find(name)
            if line is not None and "skipped" not in line:
                yield index, line

    def annotated_images(self, key: str) -> Iterator[dict[str, Any]]:
        """Return the lines of the images of all calls that have annotations under ``key``, by their numbers."""
        return (line for line in self._index.numbered_lines() if "skipped" not in line and line.get(key) is not None)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _find(self, source: str) -> dict[str, Any] | None:
        """Return the newest line of an input; None if there is none, or the image is at another path now."""
        lines = [line for line in self._index.lines(source) if source in (line.get("source"), line.get("former"))]
        return lines[-1] if lines and lines[-1].get("source") == source else None

    def _append(self, line: dict[str, Any]) -> None:
        self._remember(self._file.append(line), line)

    def _remember(self, offset: int, line: dict[str, Any]) -> None:
        if not isinstance(line.get("source"), str) or not isinstance(line.get("key"), str):
            return
        if isinstance(line.get("former"), str):
            self._index.add(line["former"], offset)
        self._index.add(line["source"], offset, line.get("image_id", 0))


def name_overview(record: OutputRecord, inputs: Sequence[str], command: str = "") -> tuple[str, str]:
    """Return the name of an overview and what it shows; one that shows other images keeps its name.

    Args:
        inputs: all images of a call; the overview shows the first ones.
        command: what is done with them, if not segmenting.
    """
    known, path = set(inputs), PurePosixPath(OVERVIEW)

    def is_outdated(former: str) -> bool:
        paths = former.removeprefix(command).split("\n")
        return former.startswith(command) and all(name in known or not os.path.lexists(name) for name in paths)

    shown = command + "\n".join(inputs[:OVERVIEW_IMAGES])
    return f"{record.distinct_stem(path.stem, shown, is_outdated)}{path.suffix}", shown


def draw_overview_row(image: Image.Image, masks: np.ndarray) -> list[np.ndarray]:
    """Scale an image, its regions and its masks (uint8 [K, H, W]) to a cell; small ones by whole factors."""
    longest = max(image.size)
    scale = OVERVIEW_CELL / longest if longest > OVERVIEW_CELL else OVERVIEW_CELL // longest
    width, height = (max(1, round(side * scale)) for side in image.size)

    def resize(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((width, height), Image.Resampling.BOX))

    small, small_masks = resize(image), np.stack([resize(Image.fromarray(mask)) for mask in masks])
    return [small, overlay_regions(small, small_masks.argmax(0)), *small_masks]


def draw_overview(rows: Mapping[int, list[np.ndarray]], names: Sequence[str], num_regions: int) -> Image.Image:
    """Draw rows of :func:`draw_overview_row`, by the number of their image, under the names of all images."""
    colors = palette(num_regions)
    columns: list[Caption] = ["image", "regions", *((f"mask {k}", colors[k]) for k in range(len(colors)))]
    order = sorted(rows)
    captions = [escape_name(PurePosixPath(names[i]).name)[-24:] for i in order]
    return draw_image_grid([rows[i] for i in order], columns, captions, cell=OVERVIEW_CELL)


def list_documents(outputs: Outputs) -> list[str]:
    """Return the names of the files that are written for all images together."""
    return [name for name, _ in outputs.documents()] + ([YOLO_CLASSES] if "yolo" in outputs.formats else [])


def write_documents(manifest: Manifest, record: OutputRecord, outputs: Outputs) -> dict[str, Path]:
    """Write them, and return the path of each by its name."""
    for name, key in outputs.documents():
        _write_coco(manifest, record, name, key)
    if "yolo" in outputs.formats:
        classes = "".join(f"region {k}\n" for k in range(outputs.num_regions))
        record.write({YOLO_CLASSES: lambda path: path.write_text(classes, encoding="utf-8")}, ALL_IMAGES)
    return {name: manifest.out / name for name in list_documents(outputs)}


def _write_coco(manifest: Manifest, record: OutputRecord, name: str, key: str) -> None:
    """Write the images of all calls that have annotations under ``key``; category k + 1 is region k."""
    num_regions = max((len(line["areas"]) for line in manifest.annotated_images(key)), default=0)
    categories = [{"id": k + 1, "name": f"region {k}", "supercategory": "region"} for k in range(num_regions)]
    info = {"description": "regions of images, segmented by factorkit", "version": "1.0", "contributor": "factorkit"}
    with record.writing(name, ALL_IMAGES) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n"categories": {json.dumps(categories)},\n')
        file.write('"images": [')
        separator, names = "\n", set()
        for line in manifest.annotated_images(key):
            # two images of one name, from different folders: the path of the second one
            image_name = line["source"] if line["name"] in names else line["name"]
            names.add(image_name)
            image = {"id": line["image_id"], "file_name": image_name, "width": line["width"], "height": line["height"]}
            file.write(separator + json.dumps(image))
            separator = ",\n"
        file.write('],\n"annotations": [')
        separator, count = "\n", 0
        for line in manifest.annotated_images(key):
            for annotation in line[key]:
                count += 1
                entry = {k: v for k, v in annotation.items() if k != "region"}
                entry |= {"id": count, "image_id": line["image_id"], "category_id": annotation["region"] + 1}
                file.write(separator + json.dumps({**entry, "iscrowd": 0}))
                separator = ",\n"
        file.write("]}\n")
