"""Masks by the network itself: m = softmax_K MaskGen(h_mid, h_enc, t) (thesis eq. 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from factorkit.nn.unet import Decoder
from factorkit.nn.uvit import TokenMaskHead
from factorkit.segdiff.masks.proposal import Encoding, MaskProposal, MaskProposer
from factorkit.utils import distributed


class NetworkMasks(MaskProposer):
    """The mask generator of the thesis, and what the regional form adds to its logits.

    Args:
        decoder: from the encoding to K logits.
        normalise: normalise the logits (:class:`RegionLogitNorm`).
        skips_left_out: how many of the finest skips the decoder does not read.
        upsample: how much its output is smaller than the image, per side.
    """

    needs_encoding = True

    def __init__(self, decoder: Decoder | TokenMaskHead, normalise: bool, skips_left_out: int = 0, upsample: int = 1):
        super().__init__()
        self.decoder, self.skips_left_out, self.upsample = decoder, skips_left_out, upsample
        # An exactly zero mask head is a saddle: equal branches send it no gradient.
        if normalise:
            decoder.conv_out.reset_parameters()
        else:
            nn.init.normal_(decoder.conv_out.weight, std=1e-3)
        assert decoder.conv_out.bias is not None
        nn.init.zeros_(decoder.conv_out.bias)
        self.norm = RegionLogitNorm(decoder.conv_out.out_channels) if normalise else None

    def forward(
        self, x_t: Tensor, encoding: Encoding | None = None, within: Tensor | None = None, t: Tensor | None = None
    ) -> MaskProposal:
        """Decode the encoding to masks; x_t and t are in it already."""
        assert encoding is not None
        skips = encoding.skips[self.skips_left_out :]
        logits = at_least_fp32(self.decoder(encoding.middle, skips, encoding.embedding))
        if self.upsample > 1:
            logits = F.interpolate(logits, scale_factor=float(self.upsample), mode="bilinear", align_corners=False)
        return MaskProposal(logits if self.norm is None else self.norm(logits, within))

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the decoder's parameters; the gain of the norm learns at the usual rate."""
        return list(self.decoder.parameters())


class RegionLogitNorm(nn.Module):
    """Normalise mask logits to zero mean and unit variance per region over the batch, times a learned gain.

    Without it the softmax saturates within the first hundred steps, after which no gradient moves it. All processes of
    a distributed run share the statistics; in evaluation, running averages are used.

    In a level of a hierarchy the statistics are those of the region that is split, image by image: over a batch,
    "which region is it" and "how noisy is it" would account for all the variance and split nothing.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, regions: int, gain: float = 1.5, momentum: float = 0.05, eps: float = 1e-5):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(regions))
        self.register_buffer("variance", torch.ones(regions))

    def forward(self, logits: Tensor, within: Tensor | None = None) -> Tensor:
        """Normalise logits [B, K, H, W]; ``within`` is [B, 1, H, W], the weights of the pixels that are split."""
        logits = logits - logits.mean(1, keepdim=True)
        if within is not None:
            weights = _interior_weights(within)
            mean = (logits * weights).sum((2, 3), keepdim=True)
            variance = ((logits - mean).square() * weights).sum((2, 3), keepdim=True)
            return (logits - mean) * (self.gain * torch.rsqrt(variance + self.eps))
        if self.training:
            moments = torch.stack([logits.mean((0, 2, 3)), logits.square().mean((0, 2, 3))])
            moments = distributed.average(moments)
            mean, variance = moments[0], (moments[1] - moments[0].square()).clamp_min(0)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        else:
            mean, variance = self.mean, self.variance
        scale = self.gain * torch.rsqrt(variance + self.eps)
        return (logits - mean[:, None, None]) * scale[:, None, None]


def _interior_weights(within: Tensor) -> Tensor:
    """Weights [B, 1, H, W], summing to 1 per image, of the pixels more than half in its region.

    Soft borders would be one more split that accounts for the variance; they count only where there is nothing else.
    """
    inside = within * (within > 0.5)
    weights = torch.where(inside.sum((2, 3), keepdim=True) > 1, inside, within)
    return weights / weights.sum((2, 3), keepdim=True).clamp_min(1e-3)


def at_least_fp32(x: Tensor) -> Tensor:
    """Promote half precision to fp32: softmax, blend and loss are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
