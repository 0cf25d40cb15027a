"""``factorkit prepare``."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from factorkit.cli.base import Command, Flag, Result
from factorkit.utils.errors import ConfigError, format_count

if TYPE_CHECKING:
    from factorkit.data.layouts import Reader


@dataclass(kw_only=True)
class Prepare(Command):
    """Decode a data set once, so that a training on it starts without delay.

    Crops every image to its centred square, resizes it, and keeps all of them in the cache. A training with the same
    data, resolution and holdout uses them. Data that changed since are decoded again.

    Examples:
        factorkit prepare photos/ --resolution 64
        factorkit prepare CUB_200_2011/ --resolution 128 --holdout val
        factorkit prepare --list
    """

    data: Positional[Annotated[Path | None, arg(metavar="DATA", help_behavior_hint="")]] = None
    """Folder of images, .zip, .npz, .npy, or a data set in its published layout (see --list)."""
    resolution: int = 64
    """Pixels a side."""
    holdout: str = "auto"
    """Labelled images kept out of training: masked, none, a number, the name of an official split, or auto."""
    list: Flag = False
    """List the published data sets that are supported, with their expected files and where to get them."""

    def execute(self) -> Result:
        """Prepare the data set, or list the supported ones."""
        if self.list:
            return _list_layouts()
        if self.data is None:
            raise ConfigError("nothing to prepare: give a folder, or --list to see the supported data sets")
        from factorkit.segdiff.training_images import load_data

        dataset, prepared, _ = load_data(self.data, self.resolution, parse_holdout(self.holdout), None, progress=True)
        path = str(prepared.path) if prepared.path else None
        data = {
            "path": path,
            "images": len(prepared),
            "held_out": len(dataset.test_images or ()),
            "resolution": self.resolution,
            "skipped": dict(prepared.skipped),
            "layout": dataset.layout,
            "splits": {name: len(split.images) for name, split in dataset.splits.items()},
            "classes": len(dataset.class_names or ()),
            "notes": list(dataset.notes),
        }
        lines = []
        if dataset.layout:
            classes = f", {data['classes']} classes" if data["classes"] else ""
            official = [f"{name} {len(split.images)}" for name, split in dataset.splits.items() if "-" not in name]
            lines += [f"{dataset.layout}: {', '.join(official) or 'no official splits'}{classes}", *dataset.notes]
        lines += [
            f"{format_count(len(prepared), 'image')} of {self.resolution} px to train on, {data['held_out']} "
            "labelled held out",
            f"kept in {path}" if path else "used where they are: the array has this size already",
        ]
        return data, "\n".join(lines)


def parse_holdout(value: str | int) -> str | int:
    """Turn digits into a number: a parser of ``str | int`` takes everything as a string."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _list_layouts() -> Result:
    from factorkit.data.layouts import READERS

    fields = ("name", "title", "expects", "extra", "url", "splits", "masks", "labels")
    data = [{field: getattr(reader, field) for field in fields} for reader in READERS]
    return {"layouts": data}, "\n\n".join(map(_describe, READERS))


def _describe(reader: Reader) -> str:
    rows = [("published", reader.url), ("expects", reader.expects), ("splits", reader.splits)]
    rows += [("masks", reader.masks or "none"), ("classes", reader.labels or "none")]
    if reader.extra:
        rows.append(("needs", f"pip install 'factorkit[{reader.extra}]'"))
    lines = [f"  {name:<9}  {textwrap.indent(text, ' ' * 13).lstrip()}" for name, text in rows]
    return "\n".join([f"{reader.name}: {reader.title}", *lines])
