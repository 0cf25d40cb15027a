"""factorkit: segmentation and 3D out of nothing but unlabelled pictures.

    run = factorkit.train_segdiff("photos/", out="runs/photos")     # the same call again resumes
    run = factorkit.load("runs/photos")
    run.segment(images);  run.generate(16);  run.evaluate(photos, masks)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorkit.errors import CheckpointError, ConfigError, DataError, FactorkitError

if TYPE_CHECKING:
    from factorkit.rendering import render
    from factorkit.segdiff.run import SegdiffRun
    from factorkit.segdiff.train import train_segdiff

try:
    __version__ = version("factorkit")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+unknown"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FactorkitError",
    "SegdiffRun",
    "load",
    "render",
    "train_segdiff",
]

# torch takes seconds to import, `factorkit --help` should not
_LAZY = {
    "train_segdiff": "factorkit.segdiff.train",
    "SegdiffRun": "factorkit.segdiff.run",
    "render": "factorkit.rendering",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'factorkit' has no attribute {name!r}")


def load(path: str | Path, *, device: str = "auto") -> SegdiffRun:
    """A trained run from its folder or from one ``.safetensors`` file; no settings to repeat.

    Raises:
        CheckpointError: nothing there, another model, or a damaged file (in a folder the previous checkpoint is taken).
    """
    from factorkit.segdiff.run import SegdiffRun

    return SegdiffRun.load(path, device=device)
