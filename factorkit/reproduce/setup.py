"""What an experiment is run with, and where its runs and files lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from factorkit.utils.atomic import save_image


@dataclass(frozen=True)
class Setup:
    """One call of :func:`factorkit.reproduce.reproduce`.

    Attributes:
        name: of the experiment.
        data: what is trained on and scored; None for the procedural set of the package.
        scale: of :data:`factorkit.reproduce.experiment.SCALES`.
        out: the folder that experiments share: a training that two of them need lies there once.
        options: how the data are read, ``ignore`` and ``holdout``, where they were given.
        changes: settings of all trainings, over those of the scale.
        identity: what tells the data from others (:func:`factorkit.reproduce.cell_keys.identify`), as one word, for
            what is kept in memory.
        inputs: further data by name, such as ``video``.
    """

    name: str
    data: Path | None
    scale: str
    out: Path
    device: str = "auto"
    progress: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""
    inputs: Mapping[str, Path] = field(default_factory=dict)

    @property
    def data_name(self) -> str:
        """What to call the data in names of files."""
        return "procedural" if self.data is None else self.data.expanduser().resolve().name

    @property
    def folder(self) -> Path:
        """Of this experiment's cells, table and pictures."""
        return self.out / self.name

    def run_folder(self, label: str, seed: int) -> Path:
        """Where the training lies that a row of any experiment calls ``label``."""
        return self.out / "runs" / slug(f"{self.scale}-{self.data_name}-{label}-seed{seed}")

    def save(self, picture: Image.Image, name: str) -> str:
        """Write a picture into the experiment's folder; answers its name for the table."""
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        kind = Path(name).suffix
        if kind == ".jpg":
            picture = picture.convert("RGB")
        save_image(picture, self.folder / "pictures" / name)
        return f"pictures/{name}"


def slug(words: str) -> str:
    """Words as a file name."""
    return re.sub(r"[^\w.=+-]+", "_", words).strip("_")
