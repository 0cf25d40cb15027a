"""Distances between two sets of images as distributions: in random features, and FID where its weights are.

The Frechet distance of Heusel et al. 2017 on features of a network with fixed random weights needs no download, but it
is NOT the FID. It ranks sets of one kind and one number of images by colour and texture; across kinds, sizes or numbers
it says nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.images import images_to_pixels

#: names under which the file is released: by torch-fidelity and by pytorch-fid
WEIGHTS = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
SIDE = 299  # pixels of the network's input
Size = int | tuple[int, int]
Layer = tuple[int, Size]  # channels and kernel of a convolution
RANDOM_CHANNELS = (16, 32, 32)  # of the three convolutions
MIN_SIDE = 9  # of images, in pixels: three convolutions of which two halve
FEATURE_BATCH = 512  # images per forward pass
NEIGHBOURS = 3  # whose farthest bounds the ball of a point (Kynkäänniemi et al. 2019)
FID_BATCH = 64  # images per forward pass


class ConvNorm(nn.Module):
    """Convolution that keeps the size at stride 1, batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Size, stride: int = 1, padded: bool = True):
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, out_channels, h, w]."""
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side, their channels concatenated: sequences of layers, and one branch after a pooling.

    Args:
        in_channels: of the input.
        branches: name of each branch -> its layers, named name_1, name_2 ..., an only one name. A layer of two parts
            concatenates them, named name_Na and name_Nb.
        pool: channels of the 1x1 convolution after the pooling; 0: the block halves the size, the last layer of each
            branch has stride 2, and the pooled input is passed on.
        maximum: whether the pooling before the convolution is a maximum.
    """

    def __init__(
        self, in_channels: int, branches: dict[str, list[tuple[Layer, ...]]], pool: int = 0, maximum: bool = False
    ):
        super().__init__()
        self.paths: list[list[list[str]]] = []
        for name, layers in branches.items():
            channels, path = in_channels, []
            for i, layer in enumerate(layers, start=1):
                halve = not pool and i == len(layers)
                number = f"_{i}" if len(layers) > 1 else ""
                path.append([name + number + letter for letter in ("ab" if len(layer) > 1 else [""])])
                for part, (out_channels, kernel) in zip(path[-1], layer, strict=True):
                    self.add_module(part, ConvNorm(channels, out_channels, kernel, 1 + halve, padded=not halve))
                channels = layer[0][0]
            self.paths.append(path)
        self.halves, self.maximum = not pool, maximum
        if pool:
            self.branch_pool = ConvNorm(in_channels, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [B, C, h, w]."""
        outputs = []
        for path in self.paths:
            h = x
            for names in path:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            outputs.append(h)
        if self.halves:
            pooled = F.max_pool2d(x, 3, stride=2)
        elif self.maximum:
            pooled = self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))
        else:
            pooled = self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))
        return torch.cat([*outputs, pooled], 1)


def _fine(in_channels: int, pool: int) -> Block:
    branches: dict[str, list[tuple[Layer, ...]]] = {
        "branch1x1": [((64, 1),)],
        "branch5x5": [((48, 1),), ((64, 5),)],
        "branch3x3dbl": [((64, 1),), ((96, 3),), ((96, 3),)],
    }
    return Block(in_channels, branches, pool)


def _middle(c: int) -> Block:
    row, column = (1, 7), (7, 1)
    branches: dict[str, list[tuple[Layer, ...]]] = {
        "branch1x1": [((192, 1),)],
        "branch7x7": [((c, 1),), ((c, row),), ((192, column),)],
        "branch7x7dbl": [((c, 1),), ((c, column),), ((c, row),), ((c, column),), ((192, row),)],
    }
    return Block(768, branches, pool=192)


def _coarse(in_channels: int, maximum: bool) -> Block:
    cross = ((384, (1, 3)), (384, (3, 1)))
    branches: dict[str, list[tuple[Layer, ...]]] = {
        "branch1x1": [((320, 1),)],
        "branch3x3": [((384, 1),), cross],
        "branch3x3dbl": [((448, 1),), ((384, 3),), cross],
    }
    return Block(in_channels, branches, pool=192, maximum=maximum)


class Inception(nn.Module):
    """Features [B, 2048] of images."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.pool_1 = nn.MaxPool2d(3, stride=2)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.pool_2 = nn.MaxPool2d(3, stride=2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _fine(192, 32), _fine(256, 64), _fine(288, 64)
        self.Mixed_6a = Block(288, {"branch3x3": [((384, 3),)], "branch3x3dbl": [((64, 1),), ((96, 3),), ((96, 3),)]})
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(_middle, (128, 160, 160, 192))
        seven: list[tuple[Layer, ...]] = [((192, 1),), ((192, (1, 7)),), ((192, (7, 1)),), ((192, 3),)]
        self.Mixed_7a = Block(768, {"branch3x3": [((192, 1),), ((320, 3),)], "branch7x7x3": seven})
        self.Mixed_7b, self.Mixed_7c = _coarse(1280, maximum=False), _coarse(2048, maximum=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features of ``pixels``, uint8 [B, 3, H, W]."""
        x = (_resize(_resize(pixels.float(), 2), 3) - 128) / 128
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3))


def _resize(x: Tensor, dim: int) -> Tensor:
    """Resize one dimension to SIDE as TensorFlow 1 did: pixel i is at i (size / SIDE)."""
    size = x.shape[dim]
    position = torch.arange(SIDE, dtype=x.dtype, device=x.device) * (size / SIDE)
    low = position.long()
    share = (position - low).view([-1 if d == dim else 1 for d in range(x.dim())])
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp_max(size - 1)), share)


def find_weights() -> Path | None:
    """Return the local file of the weights, in ``checkpoints`` of torch's hub folder; None if there is none."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def load_inception() -> Inception:
    """Load the network from its local file. Downloads nothing.

    Raises:
        ConfigError: the file is missing or holds something else; the message names the file and its place.
    """
    path, folder = find_weights(), Path(torch.hub.get_dir()) / "checkpoints"
    if path is None:
        raise ConfigError(
            f"the FID needs the weights of Inception: download {WEIGHTS[0]} (release v0.2.0 of toshas/torch-fidelity "
            f"on GitHub) or {WEIGHTS[1]} (release fid_weights of mseitzer/pytorch-fid) and put it into {folder}. The "
            "distance in random features (factorkit.metrics.frechet) needs no weights, but is no FID"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            network = Inception()
        weights = {name: value for name, value in weights.items() if not name.startswith(("fc.", "AuxLogits."))}
        network.load_state_dict(weights, assign=True)
    except Exception as error:
        raise ConfigError(f"{path} does not hold Inception's weights of 2015; download it again: {error}") from error
    return network.eval().requires_grad_(False)


def random_features(images: Tensor, seed: int = 0) -> Tensor:
    """Compute features [N, 64] of float images [N, 3, H, W] in [0, 1] by a random network.

    Three 3x3 convolutions with He-normal weights drawn from `seed`, each followed by ReLU, stride 2 from the second on;
    then mean and standard deviation over the image of each of the 32 channels.

    Raises:
        DataError: another shape, or a side below 9 pixels.
    """
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIDE:
        raise DataError(
            f"images of shape {tuple(images.shape)}: give [N, 3, H, W] with sides of {MIN_SIDE} pixels or more"
        )
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
