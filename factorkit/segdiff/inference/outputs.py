"""What a segdiff run answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from factorkit.data.sources import FileSource, Source
from factorkit.segdiff import previews
from factorkit.segdiff.hierarchy import level_labels, level_masks
from factorkit.utils.atomic import replacing, save_image
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.jsonl import JsonLines, parse_line, read_lines


class Segmentation(NamedTuple):
    """Regions of real images, at their own sizes.

    Attributes:
        labels: the most probable region of each pixel, int64 [B, H, W]; a list of [H, W] where sizes differ.
        masks: its soft masks, fp32 [B, K, H, W], summing to 1 over K; a list of [K, H, W] where sizes differ.
        names: where each image came from.
        nesting: of a hierarchy, into how many regions each level splits; labels and masks are of the deepest level.
    """

    labels: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    names: list[str]
    nesting: tuple[int, ...] = ()

    def level(self, level: int) -> Segmentation:
        """The regions at one level of a hierarchy, 1 the coarsest. Raises ConfigError where there is no such level."""
        nesting = self.nesting or (len(self.masks[0]),)
        masks = [level_masks(masks, nesting, level) for masks in self.masks]
        labels = [level_labels(labels, nesting, level) for labels in self.labels]
        if isinstance(self.masks, Tensor):
            masks, labels = torch.stack(masks), torch.stack(labels)
        return Segmentation(labels, masks, self.names, nesting[:level])


class Frame(NamedTuple):
    """One step of the refinement from noise to image (fig. 2.10)."""

    t: int
    images: Tensor  # [n, 3, R, R] in [0, 1], the clean image as the model guesses it at level t
    masks: Tensor  # [n, K, R, R]


class Generation(NamedTuple):
    """Images drawn from noise, with the masks they were made through.

    Attributes:
        images: [n, 3, R, R] in [0, 1].
        masks: [n, K, R, R].
        labels: int64 [n, R, R].
        trajectory: every denoising step, noise first, where it was asked for.
        classes: what each image was asked to be of, None for anything; None where nothing was asked.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    trajectory: list[Frame] | None
    classes: list[str | None] | None = None


FORMATS = ("labels", "masks", "overlays", "coco")
DEFAULT_FORMATS = FORMATS[:3]
MANIFEST, ANNOTATIONS, SHEET = "segments.jsonl", "annotations.json", "contact_sheet.png"
SHARE = "segments.{}.jsonl"  # of a process beside the first, until it is done
RESULT_NAME = re.compile(r"_(labels|overlay|recomposed|estimate|(mask|branch)_\d+)\.png$|^contact_sheet\.png$")
BAND = 1 << 18  # pixels tinted at a time


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """The formats as a tuple. Raises ConfigError for none at all and for unknown ones."""
    formats = (formats,) if isinstance(formats, str) else tuple(formats)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        what = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError(f"formats: {what} cannot be written; choose among {', '.join(FORMATS)}")
    return formats


def without_results(source: Source, out: Path) -> Source:
    """The images of a source without what an earlier call wrote into ``out``.

    Raises:
        DataError: nothing is left.
    """
    if not isinstance(source, FileSource) or not out.exists():
        return source
    written = out.resolve()
    fresh = [
        i
        for i, file in enumerate(source.files)
        if not (RESULT_NAME.search(PurePosixPath(file).name) and written in source.path(i).resolve().parents)
    ]
    if not fresh:
        raise DataError(f"{out}: nothing but results of an earlier call to segment. Give the folder of photographs.")
    return source.subset(fresh)


def output_names(names: Sequence[str]) -> list[str]:
    """For each image the path its results begin with: its own without the suffix, made distinct where two are equal."""
    taken: set[str] = set()
    found = []
    for name in names:
        # a zip may name its members as it likes, the results stay below the output folder
        path = PurePosixPath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
        numbered = (f"{path}-{i}" for i in itertools.count(2))
        choices = itertools.chain((path.with_suffix("").as_posix(), path.as_posix()), numbered)
        chosen = next(choice for choice in choices if choice.casefold() not in taken)  # some disks fold case
        taken.add(chosen.casefold())
        found.append(chosen)
    return found


def fingerprint(model: torch.nn.Module, settings: Mapping[str, Any]) -> str:
    """A hash of everything a picture's masks depend on but the picture."""
    digest = hashlib.blake2b(json.dumps(dict(settings), sort_keys=True).encode(), digest_size=12)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Manifest:
    """What is finished in an output folder: one line a picture in segments.jsonl, written once its files are there.

    Args:
        out: the folder.
        key: :func:`fingerprint` of the model and the settings; lines of others do not count.
        source: the pictures.
        part: the number of the process: only the first one's lines are the manifest, which takes in the others' when
            they are done, and what killed ones left.
    """

    def __init__(self, out: Path, key: str, source: Source, part: int = 0):
        self.out, self.key, self.source = out, key, source
        self._whole = None if isinstance(source, FileSource) else source.fingerprint()
        self._lines: dict[str, int] = {}  # where each picture's last line begins: their text may be much
        self._done: dict[str, tuple[Any, dict[str, int], bool]] = {}
        self._failed: dict[str, Any] = {}
        for at, line in read_lines(out / MANIFEST):
            self._remember(at, line)
        self._file = JsonLines(out / (SHARE.format(part) if part else MANIFEST))
        if not part:
            self.take_in()

    def stamp(self, index: int) -> list[int] | str | None:
        """What says that a picture is still the same: bytes and time of change of a file, a hash of what else."""
        if self._whole is not None:
            return self._whole
        try:
            status = self.source.path(index).stat()
        except OSError:
            return None
        return [status.st_size, status.st_mtime_ns]

    def has(self, index: int, path: str, formats: Sequence[str], regions: int) -> bool:
        """Whether all files of a picture are there, as they were written."""
        known = self._done.get(self.source.names[index])
        if known is None or known[0] is None or known[0] != self.stamp(index):
            return False
        _, files, annotated = known
        if "coco" in formats and not annotated:
            return False
        try:
            sizes = {end: os.path.getsize(f"{self.out / path}_{end}") for end in endings(formats, regions)}
        except OSError:
            return False
        return all(files.get(end) == size for end, size in sizes.items())

    def failed(self, index: int) -> bool:
        """Whether the picture could not be segmented when it was last tried, and is still the same."""
        return self._failed.get(self.source.names[index], False) == self.stamp(index)

    def add(self, index: int, stamp: Any, record: Mapping[str, Any]) -> None:
        """Note that a picture's files are there, or ``{"skipped": reason}``. Raises OSError where the disk is full."""
        self._append({"name": self.source.names[index], "key": self.key, "stamp": stamp, **record})

    def take_in(self) -> None:
        """Add what other processes finished. Raises OSError where the disk is full."""
        for share in sorted(self.out.glob(SHARE.format("*"))):
            for _, line in read_lines(share):
                self._append(line)
            share.unlink()

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The finished pictures in the order of the source: index and line, read one by one."""
        with open(self.out / MANIFEST, "rb") as file:
            for index, name in enumerate(self.source.names):
                if name in self._lines:
                    file.seek(self._lines[name])
                    line = parse_line(file.readline())
                    if line is not None:
                        yield index, line

    def close(self) -> None:
        self._file.close()

    def _append(self, line: dict[str, Any]) -> None:
        at = os.path.getsize(self._file.path)
        self._file.append(line)
        self._remember(at, line)

    def _remember(self, at: int, line: dict[str, Any]) -> None:
        name, stamp = line.get("name"), line.get("stamp")
        if line.get("key") != self.key or not isinstance(name, str):
            return
        for known in (self._lines, self._done, self._failed):
            known.pop(name, None)
        if "skipped" in line:
            self._failed[name] = stamp
        else:
            self._lines[name] = at
            self._done[name] = (stamp, line["files"], line.get("annotations") is not None)


def endings(formats: Sequence[str], regions: int) -> list[str]:
    """What follows NAME_ in the files of one picture."""
    found = ["labels.png"] if "labels" in formats else []
    found += [f"mask_{k}.png" for k in range(regions)] if "masks" in formats else []
    return found + (["overlay.png"] if "overlays" in formats else [])


def write_picture(
    path: Path, picture: Image.Image, labels: np.ndarray, masks: np.ndarray | None, formats: Sequence[str]
) -> dict[str, int]:
    """Write the files of one picture, each whole or not at all; their bytes by what follows NAME_.

    Args:
        path: what their names begin with.
        labels: uint8 [H, W]; masks: uint8 [K, H, W], which only "masks" needs.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    files: dict[str, Image.Image] = {}
    if "labels" in formats:
        files["labels.png"] = previews.make_label_image(labels)
    if "masks" in formats:
        files |= {f"mask_{k}.png": Image.fromarray(mask) for k, mask in enumerate(masks)}
    if "overlays" in formats:
        files["overlay.png"] = _overlay(picture, labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for end, image in files.items():
        save_image(image, Path(f"{path}_{end}"), compress_level=6 if end == "labels.png" else 1)
        sizes[end] = os.path.getsize(f"{path}_{end}")
    return sizes


def _overlay(picture: Image.Image, labels: np.ndarray) -> Image.Image:
    """:func:`previews.overlay` band by band, for the floats of a huge picture fill the memory."""
    tinted = Image.new("RGB", picture.size)
    step = max(1, BAND // picture.width)
    for top in range(0, picture.height, step):
        below = min(top + step + 1, picture.height)  # a line is drawn where the next row differs
        band = previews.overlay_regions(np.asarray(picture.crop((0, top, picture.width, below))), labels[top:below])
        tinted.paste(Image.fromarray(band[:step]), (0, top))
    return tinted


def write_annotations(manifest: Manifest, regions: int) -> Path:
    """annotations.json in COCO's form of all finished pictures; category k + 1 is region k.

    Raises:
        OSError: the disk is full; what was there before stands.
    """
    path = manifest.out / ANNOTATIONS
    categories = [{"id": k + 1, "name": f"region {k}", "supercategory": "region"} for k in range(regions)]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'{{"categories": {json.dumps(categories)},\n"images": [')
        between = "\n"
        for index, line in manifest.records():
            image = {"id": index + 1, "file_name": line["name"], "width": line["width"], "height": line["height"]}
            file.write(between + json.dumps(image))
            between = ",\n"
        file.write('],\n"annotations": [')
        between, count = "\n", 0
        for index, line in manifest.records():
            for found in line["annotations"] or ():
                count += 1
                entry = {k: v for k, v in found.items() if k != "region"}
                entry |= {"id": count, "image_id": index + 1, "category_id": found["region"] + 1, "iscrowd": 0}
                file.write(between + json.dumps(entry))
                between = ",\n"
        file.write("]}\n")
    return path
