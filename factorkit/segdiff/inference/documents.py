"""The files that describe all images of a segmented folder: its overview, COCO JSON and YOLO class list."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from factorkit.data.files import escape_name
from factorkit.report.image_grid import Caption, draw_image_grid, overlay_regions, palette
from factorkit.segdiff.inference.manifest import Manifest
from factorkit.segdiff.inference.outputs import YOLO_CLASSES, Outputs
from factorkit.utils.output_record import OutputRecord

OVERVIEW = "overview.png"
OVERVIEW_IMAGES = 32  # at most
OVERVIEW_CELL = 128  # pixels a side
ALL_IMAGES = "segment: all images"  # the source of these files in the record of the folder


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
