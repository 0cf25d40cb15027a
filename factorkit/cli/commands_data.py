"""What `factorkit prepare` does: decode a data set into the cache, or say which ones are known."""

from __future__ import annotations

import textwrap
from pathlib import Path

from factorkit.cli.flag_types import Result
from factorkit.data.layouts import READERS, Reader
from factorkit.segdiff.config import SegdiffConfig
from factorkit.segdiff.train import load_data

FIELDS = ("url", "splits", "masks", "labels")


def prepare(data: Path, resolution: int, holdout: str | int) -> Result:
    """Decode a data set into the cache, split as training will split it."""
    dataset, prepared, _ = load_data(data, SegdiffConfig(resolution=resolution, holdout=holdout), progress=True)
    held_out = len(dataset.test_images or ())
    where = str(prepared.path) if prepared.path else None
    splits = {name: len(split.images) for name, split in dataset.splits.items()}
    found = {
        "path": where,
        "images": len(prepared),
        "held_out": held_out,
        "resolution": resolution,
        "skipped": dict(prepared.skipped),
        "layout": dataset.layout,
        "splits": splits,
        "classes": len(dataset.class_names or ()),
        "notes": list(dataset.notes),
    }
    lines = []
    if dataset.layout:
        classes = f", {found['classes']} classes" if found["classes"] else ""
        shown = {name: count for name, count in splits.items() if "-" not in name}
        listed = ", ".join(f"{name} {count}" for name, count in shown.items()) or "no official splits"
        lines += [f"{dataset.layout}: {listed}{classes}", *dataset.notes]
    lines += [
        f"{len(prepared)} images of {resolution} px to train on, {held_out} labelled ones held out",
        f"kept in {where}" if where else "used where they are: the array has this size already",
    ]
    return found, "\n".join(lines)


def list_layouts() -> Result:
    """The data sets whose published layout is read where it lies."""
    found = [
        {"name": r.name, "title": r.title, "expects": r.expects, "extra": r.extra} | {f: getattr(r, f) for f in FIELDS}
        for r in READERS
    ]
    return {"layouts": found}, "\n\n".join(map(_described, READERS))


def _described(reader: Reader) -> str:
    rows = [("published", reader.url), ("expects", reader.expects), ("splits", reader.splits)]
    rows += [("masks", reader.masks or "none"), ("classes", reader.labels or "none")]
    if reader.extra:
        rows.append(("needs", f"pip install 'factorkit[{reader.extra}]'"))
    lines = [f"{reader.name}: {reader.title}"]
    for name, text in rows:
        body = textwrap.indent(text, " " * 13).lstrip()
        lines.append(f"  {name:<9}  {body}")
    return "\n".join(lines)
