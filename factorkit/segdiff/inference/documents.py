"""The files that describe all images of a segmented folder: COCO's JSON and YOLO's list of classes."""

from __future__ import annotations

import json
from pathlib import Path

from factorkit.segdiff.inference.manifest import Manifest
from factorkit.segdiff.inference.outputs import YOLO_CLASSES, Outputs
from factorkit.utils.output_record import OutputRecord

ALL_IMAGES = "segment: all images"  # the source of these files in the record of the folder


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
