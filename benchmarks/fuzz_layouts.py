"""Data sets of known truth in random layouts and mask conventions: is every one read right, or refused?

Set i of a seed is always the same. It has photos with one object each, and their masks, under folder names, endings,
suffixes and mask values drawn at random, in a folder or a zip, known conventions and unknown ones. Outcomes: `right`
(images, pairs, foreground and ignored pixels are the true ones), `refused` by a FactorkitError, `unlabelled` (the masks
were not read, but none was taken for a photo), `wrong` (anything else, in silence).
"""

from __future__ import annotations

import collections
import tempfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.recording import commit, machine, write_result
from factorkit.data import load_labelled, open_dataset
from factorkit.utils.errors import FactorkitError

RESULTS = Path(__file__).with_name("results") / "fuzz_layouts.json"
SIZE, COUNT = 48, 6  # pixels a side, photos of a set
MIN_AGREEMENT = 0.97  # share of scored pixels whose foreground must be the true one: edges of soft masks may differ
PAIRS = (
    "images:masks imgs:masks Images:Masks image:mask img_dir:ann_dir images:labels img:gt JPEGImages:SegmentationClass "
    "photos:segmentation : images:annotations/trimaps pictures:foo a:b :masks holiday:masks"
)
FOLDERS = tuple(tuple(pair.split(":")) for pair in PAIRS.split())
ENDINGS = ("{}", "{}", "{}_mask", "{}_seg", "{}_gt", "{}_segmentation", "{}-mask", "mask_{}", "{}.jpg", "{}_xyz")
JUNK = ("__MACOSX", ".ipynb_checkpoints", "@eaDir")


class Layout(NamedTuple):
    """One random data set; see the module's docstring."""

    top: str
    folders: tuple[str, str]
    ending: str
    suffix: str
    values: str
    junk: str
    is_zip: bool
    backslashes: bool
    decomposed: bool


def write_trimap(inside: np.ndarray) -> np.ndarray:
    """Oxford-IIIT Pet: 1 object, 2 background, 3 border."""
    image = Image.fromarray(inside.astype(np.uint8) * 255)
    inner, outer = (np.asarray(image.filter(f(3))) > 0 for f in (ImageFilter.MinFilter, ImageFilter.MaxFilter))
    return np.where(inner, 1, np.where(outer, 3, 2)).astype(np.uint8)


def write_voc(inside: np.ndarray) -> np.ndarray:
    """PASCAL VOC: the class, with a border of 255."""
    outer = np.asarray(Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(5))) > 0
    return np.where(inside, 15, np.where(outer, 255, 0)).astype(np.uint8)


def write_soft(inside: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(2)))


def write_noisy(inside: np.ndarray) -> np.ndarray:
    """A mask that was a JPEG once: up to 12 grey levels off along its edge."""
    edge = np.asarray(Image.fromarray(inside.astype(np.uint8) * 255).filter(ImageFilter.FIND_EDGES)) > 0
    noise = np.random.default_rng(int(inside.sum())).integers(0, 13, inside.shape) * edge
    return np.where(inside, 255 - noise, noise).astype(np.uint8)


VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "0/255": lambda inside: inside.astype(np.uint8) * 255,
    "0/1": lambda inside: inside.astype(np.uint8),
    "1 bit": lambda inside: inside,
    "trimap 1/2/3": write_trimap,
    "15 with border 255": write_voc,
    "soft": write_soft,
    "once JPEG": write_noisy,
}


def draw_layout(rng: np.random.Generator) -> Layout:
    is_zip = rng.random() < 0.3
    return Layout(
        str(rng.choice(["", "", "set", "my data/v2"])),
        FOLDERS[rng.integers(len(FOLDERS))],
        str(rng.choice(ENDINGS)),
        str(rng.choice([".jpg", ".JPG", ".png", ".jpeg"])),
        str(rng.choice(list(VALUES))),
        str(rng.choice(["", "", *JUNK])),
        bool(is_zip),
        bool(is_zip and rng.random() < 0.3),
        bool(rng.random() < 0.2),
    )


def write_set(layout: Layout, root: Path, rng: np.random.Generator) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a data set; return its path and the true foreground of each photo by its stem."""
    truth, folder = {}, root / "data"
    for i in range(COUNT):
        x, y, side = rng.integers(4, 16), rng.integers(4, 16), rng.integers(14, 26)
        inside = np.zeros((SIZE, SIZE), bool)
        inside[y : y + side, x : x + side] = True
        photo = rng.integers(0, 90, (SIZE, SIZE, 3)) + np.where(inside[..., None], (160, 20, 90), (10, 120, 40))
        stem = f"caf\u00e9 {i:02}"
        truth[stem] = inside
        mask_stem = layout.ending.format(stem)
        if layout.decomposed:
            mask_stem = unicodedata.normalize("NFD", mask_stem)
        image_path = folder / layout.top / layout.folders[0] / f"{stem}{layout.suffix}"
        mask_path = folder / layout.top / layout.folders[1] / f"{mask_stem}.png"
        if unicodedata.normalize("NFC", str(mask_path)) == str(image_path):
            mask_path = mask_path.with_suffix(".bmp")
        for path, pixels in ((image_path, photo.astype(np.uint8)), (mask_path, VALUES[layout.values](inside))):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        if layout.junk:
            copy = folder / layout.junk / image_path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(image_path.read_bytes())
    if not layout.is_zip:
        return folder, truth
    archive_path = root / "data.zip"
    with zipfile.ZipFile(archive_path, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            name = path.relative_to(folder).as_posix()
            if path.is_file():
                info = zipfile.ZipInfo("x")
                info.filename = name.replace("/", "\\") if layout.backslashes else name
                archive.writestr(info, path.read_bytes())
    return archive_path, truth


def judge_set(path: Path, truth: dict[str, np.ndarray]) -> tuple[str, str]:
    """Return the outcome of reading a data set, and why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            dataset = open_dataset(path, holdout="none")
            if len(dataset.train) != COUNT:
                return "wrong", f"{len(dataset.train)} training images of {COUNT} photos: {dataset.train.names[:4]}"
            if dataset.test_images is None:
                return "unlabelled", ""
            labelled = load_labelled(dataset.test_images, dataset.test_masks, SIZE)
        except FactorkitError as error:
            return "refused", str(error)
    if len(labelled) != COUNT:
        return "wrong", f"{len(labelled)} labelled images"
    for name, foreground, valid in zip(labelled.names, labelled.foreground, labelled.valid, strict=True):
        inside = truth[unicodedata.normalize("NFC", Path(name).stem)]
        agreement = (foreground == inside)[valid].mean() if valid.any() else 0.0
        if agreement < MIN_AGREEMENT or valid.mean() < 0.5:
            return "wrong", f"{name}: foreground agrees on {agreement:.2f} of {valid.mean():.2f} scored pixels"
    return "right", ""


def fuzz_layouts(count: int, seed: int) -> int:
    """Read `count` random sets, print and store the outcomes; return 1 if any was read wrong, else 0."""
    outcomes: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            layout = draw_layout(rng)
            path, truth = write_set(layout, Path(place, str(number)), rng)
            outcome, reason = judge_set(path, truth)
            outcomes[outcome] += 1
            if outcome == "wrong":
                print(f"set {number}: {layout}\n  {reason}", flush=True)
    record = {name: outcomes[name] for name in ("right", "refused", "unlabelled", "wrong")}
    print(", ".join(f"{number} {name}" for name, number in record.items()), f"of {count} sets")
    write_result(RESULTS, f"{count} sets, seed {seed}", record | {"machine": machine(threads=1), "commit": commit()})
    return int(outcomes["wrong"] > 0)
