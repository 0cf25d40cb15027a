"""The Frechet inception distance (Heusel et al. 2017), by torchmetrics, with weights that have to be there already."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from factorkit.errors import ConfigError, DataError

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's releases
PIECE = 64  # images at once


def weights_path() -> Path:
    """Where the Inception weights are looked for: among torch's own downloads."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def inception_distance(real: Tensor, generated: Tensor, device: str | torch.device = "cpu") -> float:
    """FID of two sets of pictures [N, 3, H, W] in [0, 1]. Nothing is downloaded.

    Raises:
        ConfigError: torch-fidelity or its Inception weights are missing; the message says which file goes where.
        DataError: fewer than two pictures on either side.
    """
    if min(len(real), len(generated)) < 2:
        raise DataError(f"{len(real)} and {len(generated)} pictures: a distance needs at least 2 of each")
    path = weights_path()
    missing = ""
    if not path.is_file():
        missing = f"its weights are not there: put {WEIGHTS} (a release of torch-fidelity) at {path}"
    try:
        import torch_fidelity  # noqa: F401
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        missing = f"{error}: pip install 'factorkit[fid]'" + (f", and {missing}" if missing else "")
    if missing:
        raise ConfigError(
            f"FID cannot be computed, {missing}. Without it there is the distance in random features "
            "(factorkit.metrics.frechet), which is no FID"
        )
    metric = FrechetInceptionDistance(normalize=True, feature_extractor_weights_path=str(path)).to(device)
    for images, is_real in ((real, True), (generated, False)):
        for part in images.split(PIECE):
            metric.update(part.float().to(device), real=is_real)
    return float(metric.compute())
