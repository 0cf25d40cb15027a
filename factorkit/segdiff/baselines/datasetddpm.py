"""DatasetDDPM without labels (tables 2.3 to 2.5): k-means on the features of a plain DDPM's decoder.

Baranchuk et al. 2022 read, at three noise levels, five of the decoder's blocks; the dissertation clusters those
features where they train a classifier.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from factorkit.nn.unet import ResBlock
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.task import add_noise
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed

LEVELS = (50, 150, 250)  # noise levels of a schedule of 1000
BLOCKS = (5, 6, 7, 8, 12)  # of the 18 blocks of their decoder, the coarsest first
OF_BLOCKS = 18
FITTED = 20_000  # pixels the clusters are fitted on
PIECE = 16  # images of 32 pixels a side at once: a pixel of the widest model has some 5000 features


def chosen_blocks(run: SegdiffRun) -> list[ResBlock]:
    """The decoder's blocks at the places of :data:`BLOCKS`, in proportion to the depth of this one.

    Raises:
        ConfigError: the run is not a plain DDPM.
    """
    if run.config.regions != 1:
        raise ConfigError(f"features are read off a plain DDPM, regions=1; this run has regions={run.config.regions}")
    blocks = [block for level in run.model.decoder.levels for block in level.blocks]
    return [blocks[i] for i in sorted({len(blocks) * place // OF_BLOCKS for place in BLOCKS})]


@torch.no_grad()
def pixel_features(run: SegdiffRun, images: np.ndarray) -> Tensor:
    """Features [N, F, R, R] (fp32, CPU) of pictures uint8 [N, R, R, 3]: the chosen blocks at the chosen noise levels,
    interpolated to the picture's pixels."""
    blocks = chosen_blocks(run)
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, given, out: seen.append(out)) for block in blocks]
    size, found = images.shape[1:3], []
    try:
        for level in LEVELS:
            t = min(run.config.timesteps - 1, level * run.config.timesteps // 1000)
            x_t, times = add_noise(pixels_to_signed(torch.from_numpy(images)).to(run.device), t, run.schedule)
            seen.clear()
            run.model(x_t, times)
            found += [F.interpolate(f.float(), size, mode="bilinear", align_corners=False).cpu() for f in seen]
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(found, 1)


class DatasetDDPM:
    """Clusters of pixels by what a plain DDPM sees in them.

    Args:
        run: trained with ``regions=1``.
        images: uint8 [N, R, R, 3], unlabelled, the clusters are fitted on.
        regions: K clusters.
        seed: of the pixels taken and of k-means.

    Raises:
        ConfigError: another run than a plain DDPM, or scikit-learn is not installed.
    """

    def __init__(self, run: SegdiffRun, images: np.ndarray, regions: int = 3, seed: int = 0):
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ConfigError(f"{error}; install the extra: pip install 'factorkit[baselines]'") from error
        self.run, self.regions = run, regions
        chosen = np.random.default_rng(seed)
        each = max(1, FITTED // len(images))
        pixels = []
        for part in _pieces(images):
            rows = _rows(pixel_features(run, part))
            pixels += [rows[i][chosen.permutation(rows.shape[1])[:each]] for i in range(len(rows))]
        taken = np.concatenate(pixels)
        # blocks differ in scale, and the largest would decide alone
        self.mean, self.scale = taken.mean(0), taken.std(0) + 1e-6
        self.clusters = KMeans(regions, n_init=3, random_state=seed).fit((taken - self.mean) / self.scale)

    def segment(self, images: np.ndarray) -> np.ndarray:
        """The cluster of each pixel, int64 [N, R, R], of pictures uint8 [N, R, R, 3]."""
        found = []
        for part in _pieces(images):
            rows = _rows(pixel_features(self.run, part))
            labels = self.clusters.predict((rows.reshape(-1, rows.shape[2]) - self.mean) / self.scale)
            found.append(labels.reshape(-1, *images.shape[1:3]))
        return np.concatenate(found).astype(np.int64)


def _pieces(images: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, PIECE * 32**2 // (images.shape[1] * images.shape[2]))
    return (images[start : start + step] for start in range(0, len(images), step))


def _rows(features: Tensor) -> np.ndarray:
    """[N, F, R, R] as [N, pixels, F]."""
    return features.flatten(2).transpose(1, 2).contiguous().numpy()
