"""Masks of objects: a network trained on noised images, and in a clean image a mixture of colours with its prior.

The network is distilled from a spatial mixture with a cue for objects (:mod:`factorkit.segdiff.masks.distil`). It
serves at every noise level, so that generation, editing and the branches use the same regions. In a clean image its
answer, together with place and cue and corrected by the shapes of the set, is the prior of a mixture that finds the
exact border.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nn.unet import ResBlock, TimeEmbedding
from factorkit.segdiff.masks.proposal import Encoding, MaskProposal, MaskProposer, without_autocast
from factorkit.segdiff.masks.saliency import saliency_cue
from factorkit.segdiff.masks.shape import ShapeDenoiser
from factorkit.segdiff.masks.smoothness import smooth_masks
from factorkit.segdiff.masks.spatial_mixture import SpatialMixture, fit_mixture, share_uniformly
from factorkit.segdiff.masks.typical import TypicalImages, measure_appearance
from factorkit.utils.images import signed_to_lab

GRID_SIDE = 16  # cells along the short side of what the network sees
LOGITS_SIDE = 2 * GRID_SIDE
COARSE_SIDE = 64  # pixels along the short side that suffice for the cells of shapes
MAX_PATCH = 4  # pixels along a side of a cell
CHANNELS, EMBED, NORM_GROUPS = (32, 64, 96), 128, 8  # of the network's levels, at 16, 8 and 4 cells
LAB_SCALE, LAB_OFFSET = (50.0, 30.0, 30.0), (1.0, 0.0, 0.0)  # bring Lab colours to about [-1, 1]
MIN_VARIANCE = 0.01  # of a region's colours in this scale; .02 costs .01 IoU on validation horses
EM_ROUNDS = 3
CUE_SIDE = 64  # pixels of the copies of images that the cue measures, as square as the mixture's prior
FIRST_WEIGHTS = 0.5, 0.5  # exponents of the network, and of place and cue, in the prior of the first EM
SHAPE_WEIGHT, NETWORK_WEIGHT = 1.0, 0.25  # exponents in the prior of the last EM
MIN_PROBABILITY = 1e-4  # of a region in a product of masks


class ObjectMasks(MaskProposer):
    """Region 0 is the object. The parameters are trained in stages of their own and fixed in the run.

    Args:
        regions: K.
        resolution, channels: side and channels of what the network sees: the training images, or their latents.
    """

    needs_encoding = False
    cue_weight: Tensor

    def __init__(self, regions: int, resolution: int, channels: int = 3):
        super().__init__()
        self.mixture = SpatialMixture(regions, object_first=True)
        self.register_buffer("cue_weight", torch.ones(()))
        self.network = MaskNetwork(regions, resolution, channels)
        self.shape = ShapeDenoiser(regions)
        self.typical = TypicalImages()

    def forward(
        self, x_t: Tensor, encoding: Encoding | None = None, within: Tensor | None = None, t: Tensor | None = None
    ) -> MaskProposal:
        """Propose the network's masks of images at time steps t [B]."""
        assert t is not None
        with without_autocast(x_t.device):
            return MaskProposal(self.network(x_t, t))

    def segment(
        self,
        x_t: Tensor,
        encoding: Encoding | None = None,
        within: Tensor | None = None,
        t: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Return masks [B, K, H, W]: those of :meth:`forward`, aligned with the image's borders if all t are 0."""
        assert t is not None
        with without_autocast(x_t.device):
            masks = self.network(x_t, t).softmax(1)
            if t.any():
                return masks
            images = (x_t if images is None else images).float()
            return self.align_with_colors(images, resize(masks, *images.shape[2:]))

    def align_with_colors(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return masks [B, K, H, W] of clean images [B, 3, H, W]: EM whose prior are the network's and their shapes."""
        factor = max(1, min(images.shape[2:]) // COARSE_SIDE)
        small = [resize(x, x.shape[2] // factor, x.shape[3] // factor) for x in (images, masks)]
        shape = resize(self.shape(self.align_coarsely(*small)), *masks.shape[2:])
        prior = pool_masks((SHAPE_WEIGHT, shape), (NETWORK_WEIGHT, masks))
        return fit_colors(scale_lab(images), prior, smooth=True)

    def align_coarsely(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return masks of EM whose prior are the network's masks, place and cue; the shapes are not used."""
        cue = self.cue_weight * measure_cue(images)
        weights, priors = FIRST_WEIGHTS, (masks, self.mixture.cued_prior(cue))
        return fit_colors(scale_lab(images), pool_masks(*zip(weights, priors, strict=True)))

    def measure_doubts(self, x0: Tensor, masks: Tensor) -> Tensor:
        """Return two figures [B, 2] that are high for images unlike the training set.

        They are the mean share of a pixel that the network's masks of clean images or latents x0 [B, C, h, w] place in
        other regions than ``masks`` [B, K, H, W] of :meth:`segment`, and the mean entropy of the former in nats.
        """
        logits = self.network(x0, torch.zeros(len(x0), dtype=torch.int64, device=x0.device))
        logs = resize(logits, *masks.shape[2:]).log_softmax(1)
        difference = (logs.exp() - masks).abs().sum(1).mean((1, 2)) / 2
        return torch.stack([difference, -(logs.exp() * logs).sum(1).mean((1, 2))], 1)

    def find_unlike(self, images: Tensor, x0: Tensor, masks: Tensor) -> Tensor:
        """Return which images [B, 3, H, W] are unlike the training set, bool [B]; x0, masks: see measure_doubts."""
        return self.typical.find_unlike(self.measure_doubts(x0, masks), measure_appearance(scale_lab(images)))

    def explain(self, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Return the score of a mixture of colours whose prior are the masks of :meth:`forward`."""
        return fit_mixture(x_t.float(), share_uniformly(self(x_t, t=t).logits.softmax(1)), EM_ROUNDS).score

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return none: the branches' training does not change the masks."""
        return []


def measured_side(resolution: int, side: int) -> int:
    """Return the side in pixels at which photos of ``resolution`` pixels are measured if a network sees ``side``.

    Masks are learned at LOGITS_SIDE. More pixels than the network sees would take a latent run longer than training.
    """
    return min(resolution, max(LOGITS_SIDE, side))


def measure_cue(images: Tensor) -> Tensor:
    """Return the cue [B, H, W] of clean images [B, 3, H, W], measured on small square copies."""
    side = min(CUE_SIDE, *images.shape[2:])
    cue = saliency_cue(resize(images, side, side)).to(images.device)
    return resize(cue[:, None], *images.shape[2:])[:, 0]


def fit_colors(colors: Tensor, prior: Tensor, smooth: bool = False) -> Tensor:
    """Return the masks [B, K, H, W] of a mixture of the colours of each image, one Gaussian a region.

    Args:
        colors: of :func:`scale_lab`, [B, 3, H, W].
        prior: of the regions [B, K, H, W].
        smooth: neighbours of like colours agree after every round.
    """
    refine = partial(smooth_masks, colors=colors) if smooth else None
    masks = fit_mixture(colors, share_uniformly(prior), EM_ROUNDS, refine, MIN_VARIANCE).logits.softmax(1)
    return masks if refine is None else refine(masks)


def pool_masks(*weighted: tuple[float, Tensor]) -> Tensor:
    """Return the normalised product of masks [B, K, H, W], each to the power of its weight."""
    logs = [weight * masks.clamp_min(MIN_PROBABILITY).log() for weight, masks in weighted]
    return torch.stack(logs).sum(0).softmax(1)


def scale_lab(images: Tensor) -> Tensor:
    """Convert images in [-1, 1] to Lab colours of about that range, same shape."""
    lab = signed_to_lab(images)
    scale, offset = (lab.new_tensor(values)[:, None, None] for values in (LAB_SCALE, LAB_OFFSET))
    return lab / scale - offset


class MaskNetwork(nn.Module):
    """A small U-Net over patches of the noised image: K logits at 2 x 2 per patch, at every noise level.

    Args:
        regions: K.
        resolution, channels: of the training images, or their latents; other sizes are resized first.
    """

    def __init__(self, regions: int, resolution: int, channels: int = 3):
        super().__init__()
        self.patch = min(MAX_PATCH, max(1, resolution // GRID_SIDE))
        first, *others = CHANNELS
        pairs = [(first, first), *zip(CHANNELS, others, strict=False)]

        def block(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, out_channels, EMBED, norm_groups=NORM_GROUPS)

        self.time = TimeEmbedding(EMBED // 4)
        self.conv_in = nn.Conv2d(channels * self.patch**2 + 2, first, 3, padding=1)
        self.down = nn.ModuleList(block(a, b) for a, b in pairs)
        self.middle = block(CHANNELS[-1], CHANNELS[-1])
        self.project = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs[1:])
        self.up = nn.ModuleList(block(a, a) for a, _ in pairs[1:])
        self.norm_out = nn.GroupNorm(NORM_GROUPS, first)
        self.conv_out = nn.Conv2d(first, 4 * regions, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(cast(Tensor, self.conv_out.bias))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return fp32 logits [B, K, H, W] of images or latents [B, C, H, W] of any size at time steps [B]."""
        return resize(self.coarse_logits(x_t, t), *x_t.shape[2:])

    def coarse_logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return fp32 logits [B, K, h, w] with LOGITS_SIDE cells along the short side. Arguments as of forward."""
        height, width = x_t.shape[2:]
        # The levels halve the cells twice.
        rows, columns = (max(1, round(GRID_SIDE * side / min(height, width) / 4)) * 4 for side in (height, width))
        x_t = resize(x_t.float(), rows * self.patch, columns * self.patch)
        embedding = self.time(t)
        cells = F.pixel_unshuffle(x_t, self.patch)
        place = [torch.linspace(-1, 1, side, device=x_t.device, dtype=x_t.dtype) for side in cells.shape[2:]]
        grid = torch.stack(torch.meshgrid(*place, indexing="ij")).expand(len(x_t), -1, -1, -1)
        h = self.conv_in(torch.cat([cells, grid], 1))
        skips = []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i else h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for i in reversed(range(len(self.up))):
            h = self.up[i](skips[i] + F.interpolate(self.project[i](h), scale_factor=2.0), embedding)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), 2)


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize [B, C, h, w]: averaged over areas where it becomes smaller, bilinear otherwise."""
    if x.shape[2:] == (height, width):
        return x
    if height <= x.shape[2] and width <= x.shape[3]:
        return F.adaptive_avg_pool2d(x, (height, width))
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
