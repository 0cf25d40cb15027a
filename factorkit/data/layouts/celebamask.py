"""CelebAMask-HQ: faces with masks of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from factorkit.data.files import stat_file, wrap_os_errors
from factorkit.data.layouts import base
from factorkit.data.sources import FileSource, Source, hash_values
from factorkit.utils.errors import DataError

PARTS = tuple(
    "skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip hair hat ear_r neck_l neck cloth".split()
)
# The three segments of the dissertation's table 2.3: all other parts are background.
SKIN, HAIR = 1, 2
SKIN_PARTS = frozenset(PARTS[: PARTS.index("hair")]) | {"neck"}
FACES_PER_FOLDER = 2000
VAL_START, TEST_START = 162771, 182638  # image numbers in CelebA, from the authors' script
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"


class PartMasks(Source):
    """The masks of a face's parts, painted over one another in the authors' order with the labels `label_of`."""

    def __init__(self, root: Path, numbers: Sequence[int], label_of: dict[str, int]) -> None:
        self.root, self.numbers, self.label_of = root, list(numbers), label_of
        self.names = [f"{number}.png" for number in self.numbers]

    def decode(self, index: int) -> Image.Image:
        """Return the labels of a face as an image."""
        number = self.numbers[index]
        labels = None
        for part in PARTS:
            path = self.root / str(number // FACES_PER_FOLDER) / f"{number:05d}_{part}.png"
            if not path.is_file():
                continue  # there is no file for a part that is not visible
            try:
                mask = base.take_first_channel(np.asarray(FileSource(path.parent, [path.name]).decode(0))) > 0
            except OSError as error:
                raise DataError(f"{path}: cannot be decoded: {error}. {base.FETCH_AGAIN}") from error
            labels = np.zeros(mask.shape, np.uint8) if labels is None else labels
            if mask.shape != labels.shape:
                raise DataError(
                    f"{path}: {mask.shape[::-1]} pixels, but other parts have {labels.shape[::-1]}. {base.FETCH_AGAIN}"
                )
            labels[mask] = self.label_of.get(part, 0)
        if labels is None:
            raise DataError(f"{self.root}: no masks for face {number}. Unpack the authors' archive again.")
        return base.labels_to_image(labels)

    def fingerprint(self) -> str:
        """Return a hash of the faces, the labels, and the folders' times."""
        with wrap_os_errors(self.root, "so the masks cannot be listed. Check its permissions."):
            folders = sorted(path for path in self.root.iterdir() if path.is_dir())
        return hash_values("parts", str(self.root), self.numbers, self.label_of, [stat_file(path) for path in folders])


def read(root: Path) -> base.DatasetFiles:
    images = root / "CelebA-HQ-img"
    numbers = sorted(int(path.stem) for path in images.glob("*.jpg") if path.stem.isdecimal())
    names = [f"{number}.jpg" for number in numbers]
    if not names:
        raise DataError(f"{images}: none of 0.jpg to 29999.jpg exists. Unpack the authors' archive again.")
    base.require_files(images, names, "images")
    annotations = root / "CelebAMask-HQ-mask-anno"
    masks = {
        "segments": PartMasks(annotations, numbers, dict.fromkeys(SKIN_PARTS, SKIN) | {"hair": HAIR}),
        "parts": PartMasks(annotations, numbers, {part: i for i, part in enumerate(PARTS, start=1)}),
    }
    if (root / MAPPING).is_file():
        return base.DatasetFiles(FileSource(images, names), masks, _read_splits(root / MAPPING, numbers))
    notes = [f"there are no official splits, because {MAPPING} is missing"]
    return base.DatasetFiles(FileSource(images, names), masks, notes=notes)


def _read_splits(path: Path, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    try:
        celeba_number = {int(row[0]): int(row[1]) for row in base.read_table(path, columns=3)[1:]}
        origin = np.array([celeba_number[number] for number in numbers])
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: expected one line 'idx orig_idx orig_file' for each image: {error}. {base.FETCH_AGAIN}"
        ) from error
    is_test, is_val = origin >= TEST_START, (origin >= VAL_START) & (origin < TEST_START)
    members = {"train": ~(is_test | is_val), "val": is_val, "test": is_test}
    return {split: np.flatnonzero(is_member) for split, is_member in members.items()}


READER = base.Reader(
    name="celebamask-hq",
    title="CelebAMask-HQ",
    url="https://github.com/switchablenorms/CelebAMask-HQ",
    expects="CelebA-HQ-img/0.jpg ... 29999.jpg\nCelebAMask-HQ-mask-anno/0/00000_skin.png ... (folders 0 to 14)\n"
    + MAPPING,
    splits="official: train 24183, val 2993, test 2824, by the number of the image in CelebA",
    masks="segments (1 skin: face, its parts and neck; 2 hair; 0 the rest; default); parts (1 to 18)",
    read=read,
)
