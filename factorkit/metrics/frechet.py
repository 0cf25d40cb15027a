"""How alike two sets of pictures are as distributions, without any learned network.

The Frechet distance of Heusel et al. 2017, but on responses of a network with fixed random weights in place of
Inception's: nothing is downloaded, and the figures are NOT FIDs. They rank sets of one kind of picture and one number
of images by colour and texture; between kinds, sizes or numbers they say nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.utils.errors import ConfigError, DataError

WIDTHS = (16, 32, 32)  # channels of the three convolutions
PIECE = 512  # images at once


def random_features(images: Tensor, seed: int = 0) -> Tensor:
    """Responses [N, 64] of float pictures [N, 3, H, W] in [0, 1]: three 3x3 convolutions with He-normal weights drawn
    from `seed`, ReLU behind each, stride 2 from the second on; of the last one's 32 channels the mean and the standard
    deviation over the picture.

    Raises:
        DataError: another shape, or a side below 9 pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 9:
        raise DataError(f"pictures of shape {tuple(images.shape)}: give [N, 3, H, W] with sides of 9 pixels or more")
    generator = torch.Generator().manual_seed(seed)
    weights, channels = [], 3
    for width in WIDTHS:
        weight = torch.randn(width, channels, 3, 3, generator=generator) * math.sqrt(2 / (9 * channels))
        weights.append(weight.to(images.device))
        channels = width
    found = []
    for part in images.split(PIECE):
        h = part.float() * 2 - 1
        for i, weight in enumerate(weights):
            h = F.conv2d(h, weight, stride=2 if i else 1).relu()
        h = h.flatten(2).double()
        found.append(torch.cat([h.mean(2), h.std(2, unbiased=False)], dim=1))
    return torch.cat(found)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances of features [N, F] and [M, F]; float64.

    Its estimate from few images is too large, the more so the fewer: compare equal numbers only.

    Raises:
        DataError: fewer than two rows, or different numbers of features.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise DataError(f"features {tuple(a.shape)} and {tuple(b.shape)}: give [N, F] and [M, F], N and M at least 2")
    a, b = a.double(), b.double()
    first, second = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()  # A B is similar to a symmetric one
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + first.trace() + second.trace() - 2 * mixed))


WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # of torch-fidelity's releases
FID_BATCH = 64  # images at once


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
        for part in images.split(FID_BATCH):
            metric.update(part.float().to(device), real=is_real)
    return float(metric.compute())
