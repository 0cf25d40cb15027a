"""The factorized U-Net (thesis chapter 2): split the picture into K soft regions, denoise each in its own branch.

    h_enc = Enc(x_t, t)      h_mid = Mid(h_enc, t)      m = softmax_K MaskGen(h_mid, h_enc, t)      (2.2 - 2.4)
    out_k = Dec(h_mid, h_enc * m_k, t)                  out = sum_k m_k out_k                       (2.6, 2.7)

``form="thesis"`` is these lines. ``form="regional"`` adds what made the regions follow content at modest budgets, each
part an argument of its own (see the README for what is the thesis and what is ours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from factorkit import ops
from factorkit.diffusion.denoiser import Denoised, Denoiser
from factorkit.nn.unet import Decoder, Encoder, LabelEmbedding, Middle, TimeEmbedding
from factorkit.segdiff.masks.mixture import Contest, RegionCompetition
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError

DECODINGS = ("masked_skips", "concat", "masked_mid", "unshared")
MASKS = ("network", "mixture")


class Regions(NamedTuple):
    """The bottleneck: masks [B, K, H, W] (fp32, sum to 1 over K) and, if any, the branches [B, K, 3, H, W], the score
    [B, 3, H, W] of the colours that the regions competed by, and what each level of a hierarchy predicts by itself,
    [B, L, 3, H, W]."""

    masks: Tensor
    branches: Tensor | None
    score: Tensor | None = None
    levels: Tensor | None = None


class RegionLogitNorm(nn.Module):
    """Mask logits of zero mean and unit variance for each region over the batch, times a learned gain.

    Keeps the softmax from saturating within the first hundred steps, after which no gradient moves it. Statistics are
    shared by all processes of a distributed run; in evaluation running averages are used.

    Within a region of the level above they are those of that region in the picture at hand: over a batch, "which region
    is it" and "how noisy is it" have all the variance that is asked for and split nothing.
    """

    def __init__(self, regions: int, gain: float = 1.5, momentum: float = 0.05, eps: float = 1e-5):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(regions))
        self.register_buffer("variance", torch.ones(regions))

    def forward(self, logits: Tensor, within: Tensor | None = None) -> Tensor:
        """logits [B, K, H, W]; same shape out. within: weights of the pixels [B, 1, H, W], those of the region of each
        picture that is split; None: all of it is."""
        logits = logits - logits.mean(1, keepdim=True)
        if within is not None:
            weights = _inside(within)
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


def _inside(within: Tensor) -> Tensor:
    """Weights [B, 1, H, W] that sum to 1 over each picture, of pixels more than half in its region. "Soft rim or
    inside" is one more split that has the variance; only where there is nothing else the rim counts."""
    inside = within * (within > 0.5)
    weights = torch.where(inside.sum((2, 3), keepdim=True) > 1, inside, within)
    return weights / weights.sum((2, 3), keepdim=True).clamp_min(1e-3)


class RegionTokens(nn.Module):
    """One vector a region, added to its branch's time embedding: the mean over the region of a LOCAL image feature.

    Local (5x5 pixels, no norm) on purpose: a feature that already knows the whole image gives no reward for grouping
    like with like.
    """

    def __init__(self, channels: int, model_channels: int, embed: int):
        super().__init__()
        hidden = 2 * model_channels
        self.feature = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, hidden, 3, padding=1)
        )
        self.embed = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, embed), nn.SiLU(), nn.Linear(embed, embed))

    def forward(self, x_t: Tensor, masks: Tensor) -> Tensor:
        """[B, K, E]."""
        return self.embed(ops.region_pool(self.feature(x_t), masks))


class FactorizedUNet(Denoiser):
    """The factorized U-Net.

    Args:
        regions: K. 1 is the plain DDPM: no mask generator, one unmasked decoder.
        resolution: pixels a side; divisible by 2^(levels-1).
        model_channels, channel_mult, num_res_blocks, attention_resolutions, num_heads, norm_groups, dropout: of the
            U-Net (:class:`factorkit.nn.unet.Encoder`).
        decoding: how the branches see the masks (table 2.6): ``"masked_skips"`` (the model), ``"concat"`` (masks as
            extra channels of one decoder), ``"masked_mid"`` (h_mid masked instead of the skips), ``"unshared"``
            (K decoders).
        branch_norm: norm of the branch decoder, ``"group"`` (thesis), ``"masked_group"`` or ``"pixel"``.
        region_tokens: add the region tokens to the branches' time embedding.
        normalised_logits: :class:`RegionLogitNorm` before the softmax.
        half_resolution_masks: the mask generator stops at half the resolution; its logits are upsampled bilinearly.
        checkpoint_branches: in training, run the branches one after another and once more in the backward pass: the
            memory of their activations is then that of one branch, whatever K.
        masks: what proposes them, the ``"network"`` (a decoder of its own) or a ``"mixture"`` of the regions
            (:class:`~factorkit.segdiff.masks.mixture.RegionCompetition`).
        channels: of the image.
        classes: how many the model can be told of, by labels added to the time embedding; 0 is none.

    Raises:
        ConfigError: a resolution that cannot be halved often enough, or parts that do not go together.
    """

    def __init__(
        self,
        *,
        regions: int,
        resolution: int,
        model_channels: int,
        channel_mult: Sequence[int],
        num_res_blocks: int,
        attention_resolutions: Sequence[int] = (16, 8),
        num_heads: int = 4,
        norm_groups: int = 32,
        dropout: float = 0.0,
        decoding: str = "masked_skips",
        branch_norm: str = "group",
        region_tokens: bool = False,
        normalised_logits: bool = False,
        half_resolution_masks: bool = False,
        checkpoint_branches: bool = False,
        masks: str = "network",
        channels: int = 3,
        classes: int = 0,
    ):
        super().__init__()
        check_architecture(
            regions,
            resolution,
            channel_mult,
            decoding,
            branch_norm,
            region_tokens,
            half_resolution_masks,
            masks,
            normalised_logits,
        )
        embed = 4 * model_channels
        common = {"num_heads": num_heads, "norm_groups": norm_groups, "dropout": dropout}
        self.regions, self.resolution, self.decoding, self.dropout = regions, resolution, decoding, dropout
        self.checkpoint_branches = checkpoint_branches
        self.levels, self.num_res_blocks, self.half_resolution_masks = (
            len(channel_mult),
            num_res_blocks,
            half_resolution_masks,
        )
        self.time = TimeEmbedding(model_channels)
        self.encoder = Encoder(
            channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, resolution, embed, **common
        )
        skips, mid = self.encoder.skip_channels, self.encoder.out_channels
        self.middle = Middle(mid, embed, **common)

        def decoder(out: int, extra: int = 0, norm: str = "group", cut: int = 0) -> Decoder:
            below = skips[cut * (num_res_blocks + 1) :]
            return Decoder(
                mid + extra,
                [c + extra for c in below],
                model_channels,
                channel_mult[cut:],
                num_res_blocks,
                attention_resolutions,
                resolution >> cut,
                embed,
                out,
                norm=norm,
                **common,
            )

        self.labels = LabelEmbedding(classes, embed) if classes else None
        if regions == 1:
            self.decoder = decoder(channels)
            return
        self.competition = RegionCompetition(regions) if masks == "mixture" else None
        if self.competition is None:
            self.mask_generator = decoder(regions, cut=int(half_resolution_masks))
            # An exactly zero mask head is a saddle: equal branches send it no gradient.
            if normalised_logits:
                self.mask_generator.conv_out.reset_parameters()
            else:
                nn.init.normal_(self.mask_generator.conv_out.weight, std=1e-3)
            nn.init.zeros_(self.mask_generator.conv_out.bias)
        self.logit_norm = RegionLogitNorm(regions) if normalised_logits else None
        if decoding == "unshared":
            self.decoder = nn.ModuleList(decoder(channels, norm=branch_norm) for _ in range(regions))
        elif decoding == "concat":
            self.decoder = decoder(channels, extra=regions, norm=branch_norm)
        else:
            self.decoder = decoder(channels, norm=branch_norm)
        self.tokens = RegionTokens(channels, model_channels, embed) if region_tokens else None

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, within: Tensor | None = None) -> Denoised:
        """Prediction [B, C, H, W] and :class:`Regions`; for ``regions=1`` the mask is one everywhere.

        cond: labels int64 [B], -1 where there is none; None is no label for all.
        within: [B, 1, H, W] in [0, 1], the part of the picture that is to be split, of a level of a hierarchy; logits
            are normalised and region tokens taken within it.
        """
        embedding, skips, h = self._encode(x_t, t, cond)
        if self.regions == 1:
            prediction = at_least_fp32(self.decoder(h, skips, embedding))
            return Denoised(prediction, Regions(torch.ones_like(prediction[:, :1]), prediction[:, None]))
        contest = self._contest(x_t, h, skips, embedding, within)
        masks = contest.logits.softmax(1)
        if self.decoding == "concat":
            prediction = at_least_fp32(self._concat_decode(h, skips, embedding, masks))
            return Denoised(prediction, Regions(masks, None, contest.score))
        branches = self._decode(x_t, h, skips, embedding, masks, within)
        masks, prediction = ops.region_blend(contest.logits, branches)
        return Denoised(prediction, Regions(masks, branches.unflatten(0, masks.shape[:2]), contest.score))

    def segment(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, within: Tensor | None = None) -> Tensor:
        """The masks alone, [B, K, H, W]: encoder, middle and mask generator, or the competition of the regions without
        any of them; the decoders are never run."""
        if self.regions == 1:
            return torch.ones_like(x_t[:, :1])
        if self.competition is not None:
            return self.competition(x_t).logits.softmax(1)
        embedding, skips, h = self._encode(x_t, t, cond)
        return self._logits(h, skips, embedding, within).softmax(1)

    def mask_parameters(self) -> list[nn.Parameter]:
        """What the masks alone are made by; nothing for ``regions=1``."""
        if self.regions == 1:
            return []
        return list((self.mask_generator if self.competition is None else self.competition).parameters())

    def _encode(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        embedding = self.time(t)
        if self.labels is not None:
            labels = torch.full_like(t, -1) if cond is None else cond
            embedding = embedding + self.labels(labels).to(embedding.dtype)
        skips = self.encoder(x_t, embedding)
        return embedding, skips, self.middle(skips[-1], embedding)

    def _contest(
        self, x_t: Tensor, h: Tensor, skips: list[Tensor], embedding: Tensor, within: Tensor | None
    ) -> Contest:
        if self.competition is not None:
            contest = self.competition(x_t)
            # The places learn by the score alone: the branches' gradient leads them astray (horses .65 instead of .67)
            return contest._replace(logits=contest.logits.detach())
        return Contest(self._logits(h, skips, embedding, within), None)

    def _logits(self, h: Tensor, skips: list[Tensor], embedding: Tensor, within: Tensor | None = None) -> Tensor:
        cut = int(self.half_resolution_masks)
        logits = at_least_fp32(self.mask_generator(h, skips[cut * (self.num_res_blocks + 1) :], embedding))
        if cut:
            logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        return logits if self.logit_norm is None else self.logit_norm(logits, within)

    def _decode(
        self, x_t: Tensor, h: Tensor, skips: list[Tensor], embedding: Tensor, masks: Tensor, within: Tensor | None
    ) -> Tensor:
        """The K branches, [B*K, C, H, W] with the branch index fastest."""
        regions = self.regions
        pyramid = ops.mask_pyramid(masks, self.levels - 1)
        per_branch = embedding[:, None].expand(-1, regions, -1)
        if self.tokens is not None:
            pooled = masks if within is None else masks * within
            per_branch = per_branch + self.tokens(x_t, pooled).to(embedding.dtype)
        one_by_one = self.checkpoint_branches and self.training and torch.is_grad_enabled()
        if self.decoding == "unshared" or one_by_one:
            outs = [self._branch(k, h, skips, per_branch[:, k], pyramid, one_by_one) for k in range(regions)]
            return torch.stack(outs, dim=1).flatten(0, 1)
        return self._branches(self.decoder, h, skips, per_branch.flatten(0, 1), pyramid)

    def _branch(self, k: int, h: Tensor, skips: list[Tensor], embedding: Tensor, pyramid, recompute: bool) -> Tensor:
        """Branch k alone, [B, C, H, W]."""
        decoder = self.decoder[k] if self.decoding == "unshared" else self.decoder
        given = (decoder, h, skips, embedding, [m[:, k : k + 1] for m in pyramid])
        if not recompute:
            return self._branches(*given)
        # reading the state of the generators, which only dropout needs, is not possible in a CUDA graph
        return checkpoint(self._branches, *given, use_reentrant=False, preserve_rng_state=self.dropout > 0)

    def _branches(self, decoder: Decoder, h: Tensor, skips: list[Tensor], embedding: Tensor, pyramid) -> Tensor:
        if self.decoding == "masked_mid":
            h = (h[:, None] * pyramid[-1][:, :, None].to(h.dtype)).flatten(0, 1)
            pyramid = [torch.ones_like(m) for m in pyramid]
        return decoder(h, skips, embedding, pyramid)

    def _concat_decode(self, h: Tensor, skips: list[Tensor], embedding: Tensor, masks: Tensor) -> Tensor:
        """Eq. 2.5: one decoder, the masks as K more channels of h_mid and of every skip."""
        by_size = {m.shape[-1]: m for m in ops.mask_pyramid(masks, self.levels - 1)}
        widen = lambda f: torch.cat([f, by_size[f.shape[-1]].to(f.dtype)], dim=1)  # noqa: E731
        return self.decoder(widen(h), [widen(s) for s in skips], embedding)


def check_architecture(
    regions: int,
    resolution: int,
    channel_mult: Sequence[int],
    decoding: str,
    branch_norm: str,
    region_tokens: bool,
    half_resolution_masks: bool,
    masks: str = "network",
    normalised_logits: bool = False,
) -> None:
    """Raise ConfigError where the parts of a factorized U-Net cannot work together."""
    if regions < 1:
        raise ConfigError(f"regions={regions}: a picture has at least one region; regions=1 is the plain DDPM")
    if decoding not in DECODINGS:
        raise ConfigError(f"decoding={decoding!r} is unknown; choose one of {', '.join(DECODINGS)}")
    if masks not in MASKS:
        raise ConfigError(f"masks={masks!r} is unknown; choose one of {', '.join(MASKS)}")
    if masks == "mixture" and (normalised_logits or half_resolution_masks):
        raise ConfigError(
            "masks='mixture' has no mask generator whose logits could be normalised or at half resolution; "
            "leave normalised_logits= and half_resolution_masks= out"
        )
    halvings = len(channel_mult) - 1
    if resolution < 1 or resolution % 2**halvings:
        near = max(1, round(resolution / 2**halvings)) * 2**halvings
        raise ConfigError(
            f"resolution={resolution} cannot be halved {halvings} times, as a U-Net of {len(channel_mult)} levels must; "
            f"the nearest valid one is resolution={near}, or give channel_mult fewer numbers"
        )
    if regions > 1 and half_resolution_masks and len(channel_mult) < 2:
        raise ConfigError("half-resolution masks need a U-Net of at least two levels; give channel_mult more numbers")
    if regions > 1 and decoding in ("concat", "masked_mid") and (branch_norm == "masked_group"):
        raise ConfigError(
            f"decoding={decoding!r} has no masked skips whose area a masked norm could take out; "
            "use branch_norm='group'"
        )
    if decoding == "concat" and region_tokens:
        raise ConfigError("decoding='concat' has a single branch, so no region tokens; use region_tokens=False")


def at_least_fp32(x: Tensor) -> Tensor:
    """Softmax, blend and loss are never in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def parameter_count(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(math.prod(p.shape) for p in model.parameters())
