"""What the page of ``factorkit app`` does: open or train a run, and turn photos into overlays, cut-outs and masks."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from factorkit.data.datasets import open_dataset
from factorkit.data.files import escape_name, format_examples
from factorkit.data.sources import FileSource, Source
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.run_folder import CONFIG
from factorkit.segdiff.inference.outputs import output_names
from factorkit.segdiff.presets import PRESETS
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.train import estimate, train_segdiff
from factorkit.utils.errors import DataError, format_count

LARGE, SMALL = "fast64", "fast32"  # presets of the quick training, for photos of any size and for small ones
SIZED_PHOTOS = 16  # whose sizes decide between them


class PhotoRegions(NamedTuple):
    """The files of segmented photos.

    Attributes:
        overlays: one for each photo that can be read, in their order.
        cutouts: of the same photos.
        files: cut-outs and masks.
        archive: a zip of these files.
        summary: what was segmented, which region the cut-outs show and why, and what was skipped.
    """

    overlays: list[Path]
    cutouts: list[Path]
    files: list[Path]
    archive: Path
    summary: str


def segment_photos(run: SegdiffRun, photos: Sequence[str | Path], out: Path, region: str = "auto") -> PhotoRegions:
    """Segment photo files into ``out``, a new folder; photos of one name get distinct files.

    Raises:
        ConfigError: there is no such region.
        DataError: no photos, or none that can be read.
    """
    if not photos:
        raise DataError("no photos yet: drop some on the page first")
    paths = [Path(photo).absolute() for photo in photos]
    source = FileSource(Path("/"), [path.relative_to("/").as_posix() for path in paths], [path.name for path in paths])
    segments = run.segment_folder(source, out, formats=("overlays", "masks", "cutout"), region=region, progress=False)
    names = sorted((path.name for path in out.iterdir()), key=len)
    stems = [stem for stem in output_names(source.names) if f"{stem}_overlay.png" in names]
    cutouts = [out / next(name for name in names if name.startswith(f"{stem}_cutout_")) for stem in stems]
    files = cutouts + [out / f"{stem}_mask_{k}.png" for stem in stems for k in range(segments.regions)]
    with zipfile.ZipFile(out / "regions.zip", "w") as archive:
        for path in files:
            archive.write(path, path.name)
    lines = [f"{format_count(segments.segmented, 'photo')} segmented. Cut-outs: {segments.cutout}."]
    lines += [f"Skipped: {escape_name(name)}: {reason}" for name, reason in segments.skipped.items()]
    if segments.unlike:
        lines.append(f"Unlike the training set, check the regions: {format_examples(segments.unlike)}")
    return PhotoRegions(
        [out / f"{stem}_overlay.png" for stem in stems], cutouts, files, out / "regions.zip", "\n".join(lines)
    )


def load_or_train(path: Path, out: Path, device: str = "auto") -> SegdiffRun:
    """Load the run at ``path``; if it holds photos, train a quick run on them first, or resume or reuse it.

    Args:
        path: a run folder, a .safetensors file, or photos as :func:`~factorkit.train_segdiff` reads them.
        out: folder of the quick run.
        device: where to compute.

    Raises:
        CheckpointError: a damaged run, or ``out`` holds other files or the run of other photos.
        DataError: no photos.
    """
    if path.suffix == ".safetensors" or (path / CONFIG).exists():
        return SegdiffRun.load(path, device=device)
    photos = open_dataset(path).train
    preset, quick = choose_preset(photos), dict[str, Any](masks="auto", steps=1, device=device)
    many = format_count(len(photos), "photo")
    if Checkpoints(out / "checkpoints").paths():
        print(f"{many} of {path}: using the run in {out}", file=sys.stderr)
    else:
        minutes = max(1, round(estimate(path, preset=preset, **quick)["seconds"] / 60))
        print(
            f"{many} of {path}: finding their regions first, about {format_count(minutes, 'minute')} ({preset}); the "
            f"run is kept in {out} and used again",
            file=sys.stderr,
        )
    return train_segdiff(path, out=out, preset=preset, **quick)


def choose_preset(photos: Source) -> str:
    """Return the preset of a quick training: the large one, unless most photos are smaller than its resolution."""
    sides = []
    for i in np.unique(np.linspace(0, len(photos) - 1, SIZED_PHOTOS).round().astype(int)):
        try:
            sides.append(min(photos.decode(int(i)).size))
        except DataError:  # the training names it
            continue
    return SMALL if sides and np.median(sides) < PRESETS[LARGE]["resolution"] else LARGE
