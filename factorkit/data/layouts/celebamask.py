"""CelebAMask-HQ: faces with masks of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.data.layouts.base import (
    FETCH_AGAIN,
    DatasetFiles,
    Reader,
    find_root,
    labels_to_image,
    read_table,
    require_files,
    take_first_channel,
)
from factorkit.data.sources import FileSource, Source, hash_values, stat_file, wrap_os_errors
from factorkit.utils.errors import DataError

PARTS = (
    "skin",
    "nose",
    "eye_g",
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "ear_r",
    "neck_l",
    "neck",
    "cloth",
)
#: Labels of the three segments of the dissertation's table 2.3; the rest of the parts is background.
SKIN, HAIR = 1, 2
FACE = frozenset(PARTS[: PARTS.index("hair")]) | {"neck"}
PER_FOLDER = 2000
VAL_FROM, TEST_FROM = 162771, 182638  # of the authors' script, in the numbers of CelebA
MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"


class PartMasks(Source):
    """The parts of each face painted over one another in the authors' order, as the labels `label_of` gives them."""

    def __init__(self, root: Path, numbers: Sequence[int], label_of: dict[str, int]) -> None:
        self.root, self.numbers, self.label_of = root, list(numbers), label_of
        self.names = [f"{number}.png" for number in self.numbers]

    def decode(self, index: int) -> Image.Image:
        number = self.numbers[index]
        painted = None
        for part in PARTS:
            path = self.root / str(number // PER_FOLDER) / f"{number:05d}_{part}.png"
            if not path.is_file():
                continue  # the authors keep no file of a part that is not to be seen
            file = FileSource(path.parent, [path.name])
            try:
                here = take_first_channel(np.asarray(file.decode(0))) > 0
            except OSError as error:
                raise DataError(f"{path}: cannot be decoded: {error}. {FETCH_AGAIN}") from error
            painted = np.zeros(here.shape, np.uint8) if painted is None else painted
            if here.shape != painted.shape:
                raise DataError(
                    f"{path}: {here.shape[::-1]} pixels, the other parts have {painted.shape[::-1]}. {FETCH_AGAIN}"
                )
            painted[here] = self.label_of.get(part, 0)
        if painted is None:
            raise DataError(f"{self.root}: no part of face {number} is there. Unpack the authors' archive again.")
        return labels_to_image(painted)

    def fingerprint(self) -> str:
        with wrap_os_errors(self.root, "so the masks cannot be listed. Mend its permissions."):
            folders = sorted(path for path in self.root.iterdir() if path.is_dir())
        return hash_values("parts", str(self.root), self.numbers, self.label_of, [stat_file(path) for path in folders])


def read(data: Any) -> DatasetFiles | None:
    root = find_root(data, ("", "CelebAMask-HQ"), required=("CelebA-HQ-img", "CelebAMask-HQ-mask-anno"))
    if root is None:
        return None
    stems = sorted(int(path.stem) for path in (root / "CelebA-HQ-img").glob("*.jpg") if path.stem.isdecimal())
    names = [f"{number}.jpg" for number in stems]
    if not names:
        raise DataError(f"{root / 'CelebA-HQ-img'}: none of 0.jpg to 29999.jpg is here. Unpack the archive again.")
    require_files(root / "CelebA-HQ-img", names, "images")
    anno = root / "CelebAMask-HQ-mask-anno"
    three = dict.fromkeys(FACE, SKIN) | {"hair": HAIR}
    masks = {
        "segments": PartMasks(anno, stems, three),
        "parts": PartMasks(anno, stems, {part: i for i, part in enumerate(PARTS, start=1)}),
    }
    splits, notes = {}, []
    if (root / MAPPING).is_file():
        splits = _splits(root / MAPPING, stems)
    else:
        notes = [f"without {MAPPING} beside the images there are no official splits"]
    return DatasetFiles(FileSource(root / "CelebA-HQ-img", names), masks, splits, notes=notes)


def _splits(path: Path, stems: Sequence[int]) -> dict[str, np.ndarray]:
    try:
        origin = {int(words[0]): int(words[1]) for words in read_table(path, columns=3)[1:]}
        numbers = np.array([origin[number] for number in stems])
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not one line 'idx orig_idx orig_file' for each image: {error}. {FETCH_AGAIN}"
        ) from error
    test, val = numbers >= TEST_FROM, (numbers >= VAL_FROM) & (numbers < TEST_FROM)
    found = {"train": ~(test | val), "val": val, "test": test}
    return {split: np.flatnonzero(here) for split, here in found.items()}


READER = Reader(
    name="celebamask-hq",
    title="CelebAMask-HQ",
    url="https://github.com/switchablenorms/CelebAMask-HQ",
    expects="CelebA-HQ-img/0.jpg ... 29999.jpg\nCelebAMask-HQ-mask-anno/0/00000_skin.png ... (folders 0 to 14)\n"
    + MAPPING,
    splits="the authors': train 24183, val 2993, test 2824, by each image's number in CelebA",
    masks="segments (1 skin: face, its parts and neck; 2 hair; 0 the rest; the default); parts (1 to 18)",
    read=read,
)
