"""DatasetDDPM without labels (tables 2.3 to 2.5): k-means on the features of a plain DDPM's decoder.

Baranchuk et al. 2022 train a classifier on five decoder blocks at three noise levels; the thesis clusters those
features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nn.unet import ResBlock
from factorkit.nn.uvit import TransformerBlock
from factorkit.segdiff.inference.segment import add_noise
from factorkit.segdiff.run import SegdiffRun
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import pixels_to_signed

NOISE_LEVELS = (50, 150, 250)  # of a schedule of 1000
BLOCKS = (5, 6, 7, 8, 12)  # of the PAPER_BLOCKS blocks of their decoder, the coarsest first
PAPER_BLOCKS = 18
FIT_PIXELS = 20_000  # that the clusters are fitted on
BATCH_OF_32_PX = 16  # images of 32 pixels a side per batch: a pixel of the widest model has some 5000 features


def select_blocks(run: SegdiffRun) -> list[nn.Module]:
    """Return the decoder's blocks at the relative depths of :data:`BLOCKS`.

    Raises:
        ConfigError: the run is not a plain DDPM.
    """
    if run.config.regions != 1:
        raise ConfigError(f"features need a plain DDPM, regions=1; this run has regions={run.config.regions}")
    assert isinstance(run.model.decoder, nn.Module)
    blocks = [part for part in run.model.decoder.modules() if isinstance(part, (ResBlock, TransformerBlock))]
    return [blocks[i] for i in sorted({len(blocks) * place // PAPER_BLOCKS for place in BLOCKS})]


@torch.no_grad()
def pixel_features(run: SegdiffRun, images: np.ndarray) -> Tensor:
    """Compute features [N, F, R, R] (fp32, CPU) of images uint8 [N, R, R, 3].

    They are the outputs of the selected blocks at each noise level, interpolated to the image's pixels.
    """
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in select_blocks(run)]
    height, width = images.shape[1:3]
    features = []
    try:
        for level in NOISE_LEVELS:
            t = min(run.config.timesteps - 1, level * run.config.timesteps // 1000)
            x = run.model.space.encode(pixels_to_signed(torch.from_numpy(images)).to(run.device))
            x_t, times = add_noise(x, t, run.schedule)
            outputs.clear()
            run.model(x_t, times)
            for out in outputs:
                resized = F.interpolate(out.float(), (height, width), mode="bilinear", align_corners=False)
                features.append(resized.cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(features, 1)


class DatasetDDPM:
    """Clusters of pixels by the features of a plain DDPM.

    Args:
        run: trained with ``regions=1``.
        images: uint8 [N, R, R, 3], unlabelled, that the clusters are fitted on.
        num_regions: K clusters.
        seed: of the sampled pixels and of k-means.

    Raises:
        ConfigError: another run than a plain DDPM, or scikit-learn is not installed.
    """

    def __init__(self, run: SegdiffRun, images: np.ndarray, num_regions: int = 3, seed: int = 0):
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ConfigError(f"{error}; install the extra: pip install 'factorkit[baselines]'") from error
        self.run, self.num_regions = run, num_regions
        rng = np.random.default_rng(seed)
        per_image = max(1, FIT_PIXELS // len(images))
        sampled = []
        for batch in _batches(images):
            pixels = _flatten(pixel_features(run, batch))
            sampled += [pixels[i][rng.permutation(pixels.shape[1])[:per_image]] for i in range(len(pixels))]
        fit_pixels = np.concatenate(sampled)
        # standardised, because the block with the largest scale would dominate
        self.mean, self.scale = fit_pixels.mean(0), fit_pixels.std(0) + 1e-6
        self.clusters = KMeans(num_regions, n_init=3, random_state=seed).fit((fit_pixels - self.mean) / self.scale)

    def segment(self, images: np.ndarray) -> np.ndarray:
        """Return the cluster of each pixel, int64 [N, R, R], of images uint8 [N, R, R, 3]."""
        parts = []
        for batch in _batches(images):
            pixels = _flatten(pixel_features(self.run, batch))
            labels = self.clusters.predict((pixels.reshape(-1, pixels.shape[2]) - self.mean) / self.scale)
            parts.append(labels.reshape(-1, *images.shape[1:3]))
        return np.concatenate(parts).astype(np.int64)


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    size = max(1, BATCH_OF_32_PX * 32**2 // (images.shape[1] * images.shape[2]))
    return (images[start : start + size] for start in range(0, len(images), size))


def _flatten(features: Tensor) -> np.ndarray:
    """Reshape [N, F, R, R] to [N, pixels, F]."""
    return features.flatten(2).transpose(1, 2).contiguous().numpy()
