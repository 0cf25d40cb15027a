"""The files of one segmented image: their formats, names and content."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from factorkit.data.sources import FileSource, Source
from factorkit.report.image_grid import make_label_image, overlay_regions
from factorkit.segdiff.inference.annotations import make_annotations, make_labelme, make_polygon_annotations, make_yolo
from factorkit.segdiff.inference.polygons import trace_polygons
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import unit_to_uint8

FORMATS = ("labels", "grey-labels", "masks", "overlays", "cutout", "coco", "coco-polygons", "labelme", "yolo")
DEFAULT_FORMATS = ("labels", "masks", "overlays")
#: COCO's files of a folder, and the key of an image's annotations in the manifest
DOCUMENTS = {"coco": ("annotations.json", "annotations"), "coco-polygons": ("polygons.json", "polygons")}
POLYGON_FORMATS = ("coco-polygons", "labelme", "yolo")
YOLO_FOLDER, YOLO_CLASSES, LABELME_FOLDER = "yolo/labels", "yolo/classes.txt", "labelme"
PIXELS_PER_BAND = 1 << 18  # of an overlay at a time
CLEAR_SHARE = 0.1  # a mask up to this is transparent in a cut-out, and opaque from 1 less this on: no haze


@dataclass(frozen=True)
class Outputs:
    """What is written for each image of a folder.

    Attributes:
        formats: among FORMATS.
        num_regions: K.
        region: what the cut-outs show, one region or several together; empty without the format.
        tolerance: of :func:`~factorkit.segdiff.inference.polygons.trace_polygons`, in pixels.
    """

    formats: tuple[str, ...]
    num_regions: int
    region: tuple[int, ...] = ()
    tolerance: float = 1.0

    @property
    def needs_masks(self) -> bool:
        """Whether soft masks are needed beside the labels."""
        return "masks" in self.formats or "cutout" in self.formats

    @property
    def has_polygons(self) -> bool:
        """Whether a format depends on the tolerance."""
        return any(name in POLYGON_FORMATS for name in self.formats)

    def documents(self) -> list[tuple[str, str]]:
        """Return the name of each COCO file, and the key of its annotations in the manifest."""
        return [DOCUMENTS[name] for name in self.formats if name in DOCUMENTS]

    def file_names(self, stem: str) -> dict[str, str]:
        """Return the files of an image in the output folder, by what the manifest calls them."""
        endings = {
            "labels": ["labels.png"],
            "grey-labels": ["labels_grey.png"],
            "masks": [f"mask_{k}.png" for k in range(self.num_regions)],
            "overlays": ["overlay.png"],
            "cutout": [f"cutout_{'+'.join(map(str, self.region))}.png"],
        }
        names = {end: f"{stem}_{end}" for name in self.formats for end in endings.get(name, ())}
        if "labelme" in self.formats:
            names["labelme.json"] = f"{LABELME_FOLDER}/{stem}.json"
        if "yolo" in self.formats:
            names["yolo.txt"] = f"{YOLO_FOLDER}/{stem}.txt"
        return names


def check_formats(formats: Sequence[str]) -> tuple[str, ...]:
    """Return the formats as a tuple; ConfigError for none at all and for unknown ones."""
    formats = (formats,) if isinstance(formats, str) else tuple(dict.fromkeys(formats))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        names = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError(f"formats: {names} cannot be written; choose among {', '.join(FORMATS)}")
    return formats


def check_tolerance(tolerance: float) -> float:
    """Return the tolerance of polygons in pixels; ConfigError if it is negative or not a number."""
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"tolerance={tolerance}: give pixels, at least 0 (0 keeps every corner)")
    return float(tolerance)


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


class ImageFiles(NamedTuple):
    """What saves each file of one image, by name, and what the manifest says of the image."""

    files: dict[str, Callable[[Path], Any]]
    record: dict[str, Any]


def make_image_files(
    names: dict[str, str],
    image: Image.Image,
    labels: np.ndarray,
    masks: np.ndarray | None,
    outputs: Outputs,
    image_path: str,
) -> ImageFiles:
    """Make the files of one image.

    Args:
        names: of :meth:`Outputs.file_names`.
        image: RGB.
        labels: uint8 [H, W].
        masks: uint8 [K, H, W]; only needed for masks and cut-outs.
        outputs: what is written.
        image_path: of the image from labelme's file.
    """
    count = outputs.num_regions
    images: dict[str, Image.Image] = {}
    if "labels.png" in names:
        images["labels.png"] = make_label_image(labels)
    if "labels_grey.png" in names:
        images["labels_grey.png"] = Image.fromarray(labels)
    if "overlay.png" in names:
        images["overlay.png"] = _draw_overlay(image, labels)
    if masks is not None:
        images |= {f"mask_{k}.png": Image.fromarray(mask) for k, mask in enumerate(masks) if f"mask_{k}.png" in names}
        images |= {end: cut_out(image, masks, outputs.region) for end in names if end.startswith("cutout_")}
    files: dict[str, Callable[[Path], Any]] = {
        names[end]: partial(result.save, compress_level=6 if end.startswith("labels") else 1)
        for end, result in images.items()
    }
    areas = np.bincount(labels.ravel(), minlength=count) / labels.size
    record = {"width": image.width, "height": image.height, "areas": areas.tolist()}
    record["annotations"] = make_annotations(labels, count) if "coco" in outputs.formats else None
    if outputs.has_polygons:
        polygons = [trace_polygons(labels == k, outputs.tolerance) for k in range(count)]
        record["tolerance"] = outputs.tolerance
        if "coco-polygons" in outputs.formats:
            record["polygons"] = make_polygon_annotations(labels, polygons)
        if "labelme.json" in names:
            files[names["labelme.json"]] = partial(_write_text, make_labelme(polygons, image.size, image_path))
        if "yolo.txt" in names:
            files[names["yolo.txt"]] = partial(_write_text, make_yolo(polygons, image.size))
    return ImageFiles(files, record)


def cut_out(image: Image.Image, masks: np.ndarray, region: Sequence[int]) -> Image.Image:
    """Return an RGBA image: ``image`` where regions of ``masks``, uint8 [K, H, W], are, transparent black elsewhere."""
    share = masks[list(region)].sum(0, dtype=np.float32) / 255
    alpha = unit_to_uint8(((share - CLEAR_SHARE) / (1 - 2 * CLEAR_SHARE)).clip(0, 1))
    pixels = np.dstack([np.asarray(image), alpha])
    pixels[alpha == 0] = 0
    return Image.fromarray(pixels)


def locate_image(source: Source, index: int, folder: Path) -> str:
    """Return the path of an image from ``folder``; the name of one that is not a file of its own."""
    if isinstance(source, FileSource):
        path = os.path.relpath(os.path.realpath(source.path(index)), os.path.realpath(folder))
        return path.replace(os.sep, "/")
    return source.names[index]


def _write_text(text: str, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _draw_overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Draw the overlay in bands of rows, because the floats of a huge image fill the memory."""
    overlay = Image.new("RGB", image.size)
    step = max(1, PIXELS_PER_BAND // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step + 1, image.height)  # a border is drawn where the next row differs
        band = overlay_regions(np.asarray(image.crop((0, top, image.width, bottom))), labels[top:bottom])
        overlay.paste(Image.fromarray(band[:step]), (0, top))
    return overlay
