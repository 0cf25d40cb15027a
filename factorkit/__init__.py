"""factorkit: segmentation and 3D scenes from unlabelled images alone.

run = factorkit.train_segdiff("photos/", out="runs/photos")     # the same call again resumes
run = factorkit.load("runs/photos")
run.segment(images);  run.generate(16);  run.evaluate(photos, masks)

run = factorkit.train_nerfdiff("lego/", out="runs/lego", preset="fast")
run.predict_pose(images);  run.render_path("orbit");  run.sample(4);  run.evaluate(views)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factorkit.utils.errors import CheckpointError, ConfigError, DataError, FactorkitError

if TYPE_CHECKING:
    from factorkit.nerfdiff.run import NerfdiffRun
    from factorkit.nerfdiff.splat_scene import SplatScene
    from factorkit.object_masks import train_nerfdiff
    from factorkit.rendering.render import render
    from factorkit.segdiff.autoencoder import AutoencoderRun, train_autoencoder
    from factorkit.segdiff.choose_regions import choose_regions
    from factorkit.segdiff.run import SegdiffRun
    from factorkit.segdiff.train import train_segdiff

try:
    __version__ = version("factorkit")
except PackageNotFoundError:  # a source tree on PYTHONPATH
    __version__ = "0+unknown"

__all__ = [
    "AutoencoderRun",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FactorkitError",
    "NerfdiffRun",
    "SegdiffRun",
    "choose_regions",
    "load",
    "render",
    "train_autoencoder",
    "train_nerfdiff",
    "train_segdiff",
]

# torch takes seconds to import, `factorkit --help` should not
_LAZY = {
    "train_segdiff": "factorkit.segdiff.train",
    "SegdiffRun": "factorkit.segdiff.run",
    "train_autoencoder": "factorkit.segdiff.autoencoder",
    "AutoencoderRun": "factorkit.segdiff.autoencoder",
    "choose_regions": "factorkit.segdiff.choose_regions",
    "train_nerfdiff": "factorkit.object_masks",
    "NerfdiffRun": "factorkit.nerfdiff.run",
    "render": "factorkit.rendering",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'factorkit' has no attribute {name!r}")


def load(
    path: str | Path, *, device: str = "auto", weights: str | float = "average"
) -> SegdiffRun | NerfdiffRun | AutoencoderRun | SplatScene:
    """Load a trained run with its settings from its folder or from one ``.safetensors`` file, or a splat file.

    Args:
        path: of the folder or the file; a ``.ply`` or ``.spz`` of Gaussians is a
            :class:`~factorkit.nerfdiff.splat_scene.SplatScene`, which renders.
        device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        weights: the moving ``"average"``; from a folder also the decay of another average
            (``extra_ema_decays=``), or ``"last"`` for the weights of the last step.

    Raises:
        ConfigError: the run does not have these weights.
        CheckpointError: no run, or a damaged file. In a folder the previous checkpoint replaces a damaged one.
        DataError: a ``.ply`` or ``.spz`` that is damaged or holds no Gaussians.

    Example:
        >>> type(factorkit.load("runs/flowers")).__name__, type(factorkit.load("runs/scene")).__name__
        ('SegdiffRun', 'NerfdiffRun')
    """
    from factorkit.engine.run_folder import model_name
    from factorkit.nerfdiff.export import SPLAT_SUFFIXES
    from factorkit.nerfdiff.run import NerfdiffRun
    from factorkit.nerfdiff.splat_scene import SplatScene
    from factorkit.segdiff.autoencoder import AutoencoderRun
    from factorkit.segdiff.run import SegdiffRun

    if Path(path).suffix.lower() in SPLAT_SUFFIXES:
        if weights != "average":
            raise ConfigError(f"weights={weights!r}: {path} is a splat file, which has no other weights")
        return SplatScene(path, device=device)
    kinds: dict[str | None, Any] = {kind.MODEL: kind for kind in (NerfdiffRun, AutoencoderRun)}
    return kinds.get(model_name(Path(path)), SegdiffRun).load(path, device=device, weights=weights)
