"""Distances between two sets of images as distributions: in random features, and FID where its weights are.

The Frechet distance of Heusel et al. 2017 on features of a network with fixed random weights needs no download, but it
is NOT the FID. It ranks sets of one kind and one number of images by colour and texture; across kinds, sizes or numbers
it says nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.metrics.inception import load_inception
from factorkit.utils.errors import DataError, format_count
from factorkit.utils.images import images_to_pixels

RANDOM_CHANNELS = (16, 32, 32)  # of the three convolutions
FEATURE_BATCH = 512  # images per forward pass
NEIGHBOURS = 3  # whose farthest bounds the ball of a point (Kynkäänniemi et al. 2019)
FID_BATCH = 64  # images per forward pass


def random_features(images: Tensor, seed: int = 0) -> Tensor:
    """Compute features [N, 64] of float images [N, 3, H, W] in [0, 1] by a random network.

    Three 3x3 convolutions with He-normal weights drawn from `seed`, each followed by ReLU, stride 2 from the second on;
    then mean and standard deviation over the image of each of the 32 channels.

    Raises:
        DataError: another shape, or a side below 9 pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 9:
        raise DataError(f"images of shape {tuple(images.shape)}: give [N, 3, H, W] with sides of 9 pixels or more")
    generator = torch.Generator().manual_seed(seed)
    weights, in_channels = [], 3
    for out_channels in RANDOM_CHANNELS:
        weight = torch.randn(out_channels, in_channels, 3, 3, generator=generator) * math.sqrt(2 / (9 * in_channels))
        weights.append(weight.to(images.device))
        in_channels = out_channels
    features = []
    for batch in images.split(FEATURE_BATCH):
        h = batch.float() * 2 - 1
        for i, weight in enumerate(weights):
            h = F.conv2d(h, weight, stride=2 if i else 1).relu()
        h = h.flatten(2).double()
        features.append(torch.cat([h.mean(2), h.std(2, unbiased=False)], dim=1))
    return torch.cat(features)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)), with A and B the covariances of the features.

    The estimate is biased upwards, the more so the fewer images: compare equal numbers only.

    Args:
        a: features [N, F], N at least 2.
        b: features [M, F], M at least 2.

    Raises:
        DataError: fewer than two rows, or different numbers of features.
    """
    if min(len(a), len(b)) < 2 or a.shape[1:] != b.shape[1:]:
        raise DataError(f"features {tuple(a.shape)} and {tuple(b.shape)}: give [N, F] and [M, F], N and M at least 2")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()  # A B is similar to a symmetric matrix
    means = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(means + cov_a.trace() + cov_b.trace() - 2 * cross))


def precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Compute precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), in [0, 1].

    Precision is the share of generated points within the ball of some real point, up to its third nearest neighbour
    among the real; recall the share of real points within such balls of generated ones. Both fall with few points.

    Args:
        real: features [N, F], N at least 4.
        generated: features [M, F], M at least 4.

    Raises:
        DataError: fewer rows.
    """
    if min(len(real), len(generated)) <= NEIGHBOURS:
        raise DataError(f"{len(real)} and {len(generated)} points: precision and recall need at least {NEIGHBOURS + 1}")

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = torch.cdist(centres, centres).kthvalue(NEIGHBOURS + 1, dim=1).values  # the first is the point itself
        return float((torch.cdist(points, centres) <= radii).any(1).double().mean())

    return covered(generated, real), covered(real, generated)


def compute_fid(real: Tensor, generated: Tensor, device: str | torch.device = "cpu") -> float:
    """Compute the FID of two sets of images [N, 3, H, W] in [0, 1] by Inception's features. Downloads nothing.

    Raises:
        ConfigError: Inception's weights are missing; the message names the file and its place.
        DataError: fewer than two images on either side.
    """
    if min(len(real), len(generated)) < 2:
        raise DataError(f"{len(real)} and {format_count(len(generated), 'image')}: the FID needs at least 2 of each")
    network = load_inception().to(device)

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        pixels = torch.from_numpy(images_to_pixels(images)).movedim(-1, 1)
        return torch.cat([network(batch.to(device)).cpu() for batch in pixels.split(FID_BATCH)])

    return frechet_distance(features(real), features(generated))
