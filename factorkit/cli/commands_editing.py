"""What the commands do that take pictures apart and put them together again; alike :mod:`factorkit.cli.commands`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from factorkit.cli.commands import open_inputs
from factorkit.cli.flag_types import Result
from factorkit.cli.words import load_run
from factorkit.data.open import open_source
from factorkit.data.sources import Source
from factorkit.segdiff import previews
from factorkit.segdiff.editing import grids as edit_sheets
from factorkit.segdiff.inference.outputs import output_names
from factorkit.utils.atomic import save_image
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels, unit_to_uint8


def interpolate(run: Path, a: Path, b: Path, out: Path, device: str, **options: Any) -> Result:
    """Pictures between pictures; options are those of ``SegdiffRun.interpolate``."""
    way = load_run(run, device, "segdiff").interpolate(open_source(a), open_source(b), **options)
    out.mkdir(parents=True, exist_ok=True)
    images, labels = images_to_pixels(way.images), way.labels.numpy()
    for i, j in np.ndindex(labels.shape[:2]):
        path = out / f"pair_{i:04d}_{j:02d}"
        save_image(Image.fromarray(images[i, j]), Path(f"{path}.png"))
        save_image(previews.make_label_image(labels[i, j]), Path(f"{path}_labels.png"))
    regions = None if way.masks.shape[2] == 1 else labels
    sheet = edit_sheets.interpolation_sheet(
        images_to_pixels(way.a), images_to_pixels(way.b), images, regions, way.shares.tolist()
    )
    return _told(sheet, out, pairs=len(images), frames=images.shape[1])


def branches(run: Path, paths: Sequence[Path], out: Path, t: int | None, device: str) -> Result:
    """What each branch makes of pictures."""
    source, model = _open(paths, out, "branches RUN PICTURES... --out DIR"), load_run(run, device, "segdiff")
    apart = model.branches(source, t=t)
    images, masks, each = images_to_pixels(apart.images), apart.masks.numpy(), images_to_pixels(apart.branches)
    for n, name in enumerate(output_names(source.names)):
        path = _place(out, name)
        save_image(Image.fromarray(images[n]), Path(f"{path}_estimate.png"))
        for k, painted in enumerate(each[n]):
            save_image(
                Image.fromarray(np.dstack([painted, unit_to_uint8(masks[n, k])])), Path(f"{path}_branch_{k}.png")
            )
    sheet = edit_sheets.branches_sheet(images_to_pixels(apart.noisy), images, masks, each)
    return _told(sheet, out, pictures=len(images), regions=masks.shape[1], areas=masks.mean((0, 2, 3)).tolist())


def recompose(
    run: Path, paths: Sequence[Path], region: int, from_: Path | None, out: Path, device: str, **options: Any
) -> Result:
    """Edited pictures; options are those of ``SegdiffRun.recompose``."""
    source = _open(paths, out, "recompose RUN PICTURES... --region K --out DIR")
    model = load_run(run, device, "segdiff")
    brought = None if from_ is None else open_source(from_)
    edited = model.recompose(source, region, from_=brought, **options)
    images, labels, kept = images_to_pixels(edited.images), edited.labels.numpy(), edited.kept.numpy()
    names = output_names(source.names)
    if len(names) < len(images):  # one picture, edited with each of the others
        names = [f"{names[0]}_{n:04d}" for n in range(len(images))]
    for n, name in enumerate(names):
        path = _place(out, name)
        save_image(Image.fromarray(images[n]), Path(f"{path}_recomposed.png"))
        save_image(previews.make_label_image(labels[n]), Path(f"{path}_labels.png"))
    sources = None if edited.sources is None else images_to_pixels(edited.sources)
    sheet = edit_sheets.recomposition_sheet(images_to_pixels(edited.originals), sources, kept, images, labels)
    return _told(sheet, out, pictures=len(images), region=region, kept=kept.mean((1, 2)).tolist())


def _open(paths: Sequence[Path], out: Path, form: str) -> Source:
    if not paths:
        raise ConfigError(f"no pictures are named. The form is: factorkit {form}")
    return open_inputs(paths, out)


def _place(out: Path, name: str) -> Path:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _told(sheet: Image.Image, out: Path, **found: Any) -> Result:
    save_image(sheet, out / "contact_sheet.png")
    found |= {"out": str(out), "contact_sheet": str(out / "contact_sheet.png")}
    count = found.get("pairs", found.get("pictures"))
    return found, f"{count} done: {out}\ncontact sheet: {found['contact_sheet']}"
