"""DAVIS-2017: videos as folders of frames, with the objects of each frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from factorkit.data.files import list_image_names
from factorkit.data.layouts import base
from factorkit.data.sources import FileSource
from factorkit.utils.errors import DataError

SPLITS = ("train", "val", "test-dev")
RESOLUTIONS = ("480p", "Full-Resolution")  # the first that exists is read


def read(root: Path) -> base.DatasetFiles:
    resolution = next(r for r in RESOLUTIONS if (root / "JPEGImages" / r).exists())
    frames, sets = root / "JPEGImages" / resolution, root / "ImageSets" / "2017"
    names: list[str] = []
    videos: dict[str, np.ndarray] = {}
    splits = {}
    for split in SPLITS:
        path = sets / f"{split}.txt"
        if not path.is_file():
            continue
        start = len(names)
        for (video,) in base.read_table(path, columns=1):
            if not (frames / video).is_dir():
                raise DataError(f"{path} lists {video}, but {frames} has no such folder. Unpack the archive again.")
            video_names = [f"{video}/{name}" for name in list_image_names(frames / video)]
            videos[video] = np.arange(len(names), len(names) + len(video_names))
            names += video_names
        splits[split] = np.arange(start, len(names))
    if not names:
        raise DataError(f"{sets}: train.txt and val.txt list no frames. Unpack the archive again.")
    annotations = root / "Annotations" / resolution
    mask_files = FileSource(
        annotations, base.filter_existing(annotations, [base.replace_suffix(name, ".png") for name in names])
    )
    masks = {"objects": base.LabelSource(mask_files, ignore_label=255)} if len(mask_files) else {}
    notes = [f"read from {resolution}"]
    return base.DatasetFiles(FileSource(frames, names), masks, splits, videos=videos, notes=notes)


READER = base.Reader(
    name="davis-2017",
    title="DAVIS 2017, video object segmentation",
    url="https://davischallenge.org/davis2017/code.html",
    expects="JPEGImages/480p/bear/00000.jpg ... (or Full-Resolution)\nAnnotations/480p/bear/00000.png ...\n"
    "ImageSets/2017/train.txt, val.txt",
    splits="official: train 60 videos, val 30, test-dev 30",
    masks="objects (0 background, 1, 2, ... objects); videos: the frames of each video, in order",
    read=read,
)
