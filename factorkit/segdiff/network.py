"""The factorized denoiser (thesis chapter 2): split the image into K soft regions, denoise each in its own branch.

    h_enc = Enc(x_t, t)      h_mid = Mid(h_enc, t)      m = softmax_K MaskGen(h_mid, h_enc, t)      (2.2 - 2.4)
    out_k = Dec(h_mid, h_enc * m_k, t)                  out = sum_k m_k out_k                       (2.6, 2.7)

``form="thesis"`` is exactly these lines. ``form="regional"`` adds what made the regions follow content at modest
budgets, each part an argument of its own (see the README for what is the thesis and what is ours).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from factorkit import ops
from factorkit.diffusion.denoiser import Denoised, Denoiser
from factorkit.nn.unet import LabelEmbedding
from factorkit.segdiff.backbones import Backbone
from factorkit.segdiff.masks.network import at_least_fp32
from factorkit.segdiff.masks.objects import ObjectMasks
from factorkit.segdiff.masks.proposal import Encoding, MaskProposer
from factorkit.segdiff.masks.spatial_mixture import SpatialMixture
from factorkit.utils.errors import ConfigError

DECODINGS = ("masked_skips", "concat", "masked_mid", "unshared")
MASKS = ("auto", "network", "mixture")


class Regions(NamedTuple):
    """The bottleneck.

    Attributes:
        masks: fp32 [B, K, H, W], summing to 1 over K.
        branches: [B, K, 3, H, W], the output of each branch; None if there is only one decoder.
        score: [B, 3, H, W] of a mixture (:class:`~factorkit.segdiff.masks.proposal.MaskProposal`), else None.
        levels: [B, L, 3, H, W], what each level of a hierarchy predicts by itself; else None.
    """

    masks: Tensor
    branches: Tensor | None
    score: Tensor | None = None
    levels: Tensor | None = None


class PixelSpace:
    """What a model denoises: the pixels of images, as they are.

    Attributes:
        clip: whether what is denoised lies in [-1, 1].
    """

    clip = True

    def encode(self, images: Tensor) -> Tensor:
        """Return what the model denoises, of images [B, 3, H, W] in [-1, 1]."""
        return images

    def decode(self, x: Tensor) -> Tensor:
        """Return the images in [-1, 1] of what the model denoises."""
        return x

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file has to hold of the space, by name."""
        return {}


class RegionTokens(nn.Module):
    """One vector per region, added to the time embedding of its branch: the region's mean of a LOCAL image feature.

    Local (5x5 pixels, no norm) on purpose: a feature that already knows the whole image does not reward grouping
    similar pixels.
    """

    def __init__(self, channels: int, hidden: int, embed: int):
        super().__init__()
        self.feature = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, hidden, 3, padding=1)
        )
        self.embed = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, embed), nn.SiLU(), nn.Linear(embed, embed))

    def forward(self, x_t: Tensor, masks: Tensor) -> Tensor:
        """Return the tokens [B, K, E]."""
        return self.embed(ops.region_pool(self.feature(x_t), masks))


class FactorizedDenoiser(Denoiser):
    """The factorized denoiser around any backbone. What it denoises is images here, in pixels or in its ``space``.

    Args:
        backbone: encoder, middle and decoders.
        regions: K. 1 is the plain DDPM: no masks, one unmasked decoder.
        decoding: how the branches see the masks (table 2.6): ``"masked_skips"`` (the model), ``"concat"`` (masks as
            extra channels of one decoder), ``"masked_mid"`` (h_mid masked instead of the skips), ``"unshared"``
            (K decoders).
        branch_norm: norm of the branch decoder, ``"group"`` (thesis), ``"masked_group"`` or ``"pixel"``.
        region_tokens: add the region tokens to the time embedding of the branches.
        normalised_logits: normalise the mask logits (:class:`~factorkit.segdiff.masks.network.RegionLogitNorm`).
        half_resolution_masks: predict the logits at half the resolution; they are upsampled bilinearly.
        checkpoint_branches: in training, run the branches one after another and again in the backward pass. The memory
            of their activations is then that of one branch, for any K.
        masks: what proposes them: the ``"network"`` itself, a spatial ``"mixture"`` model, or ``"auto"``, a network of
            its own that stages before the training have trained to find objects.
        classes: number of classes the model is conditioned on; 0 is none.

    Raises:
        ConfigError: sizes that cannot be built, or parts that do not go together.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        regions: int,
        decoding: str = "masked_skips",
        branch_norm: str = "group",
        region_tokens: bool = False,
        normalised_logits: bool = False,
        half_resolution_masks: bool = False,
        checkpoint_branches: bool = False,
        masks: str = "network",
        classes: int = 0,
    ):
        super().__init__()
        check_architecture(
            backbone,
            regions=regions,
            decoding=decoding,
            branch_norm=branch_norm,
            region_tokens=region_tokens,
            half_resolution_masks=half_resolution_masks,
            masks=masks,
            normalised_logits=normalised_logits,
        )
        self.backbone, self.regions, self.resolution, self.decoding = backbone, regions, backbone.resolution, decoding
        self.checkpoint_branches = checkpoint_branches
        self.space = PixelSpace()
        self.time, self.encoder, self.middle = (
            backbone.build_time(),
            backbone.build_encoder(),
            backbone.build_middle(),
        )
        self.labels = LabelEmbedding(classes, backbone.embed) if classes else None
        self.masks: MaskProposer | None = None
        self.tokens: RegionTokens | None = None
        if regions == 1:
            self.decoder: nn.Module = backbone.build_decoder(backbone.image_channels)
            return
        if masks == "auto":
            self.masks = ObjectMasks(regions, self.resolution, backbone.image_channels).requires_grad_(False)
        elif masks == "mixture":
            self.masks = SpatialMixture(regions)
        else:
            self.masks = backbone.build_masks(regions, normalised_logits, half_resolution_masks)
        extra = regions if decoding == "concat" else 0
        decoders = [
            backbone.build_decoder(backbone.image_channels, extra, branch_norm)
            for _ in range(regions if decoding == "unshared" else 1)
        ]
        self.decoder = nn.ModuleList(decoders) if decoding == "unshared" else decoders[0]
        if region_tokens:
            self.tokens = RegionTokens(backbone.image_channels, backbone.region_channels, backbone.embed)

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, within: Tensor | None = None) -> Denoised:
        """Denoise; the bottleneck is :class:`Regions`. For ``regions=1`` the mask is one everywhere.

        Args:
            x_t: noisy images [B, C, H, W].
            t: time steps int64 [B].
            cond: labels int64 [B], -1 where there is none; None: no labels.
            within: [B, 1, H, W] in [0, 1], the part of the image to split, in a level of a hierarchy. Logits are
                normalised and region tokens pooled within it.
        """
        encoding = self._encode(x_t, t, cond)
        if self.masks is None:
            prediction = at_least_fp32(self.decoder(encoding.middle, encoding.skips, encoding.embedding))
            return Denoised(prediction, Regions(torch.ones_like(prediction[:, :1]), prediction[:, None]))
        logits, score = self.masks(x_t, encoding, within, t)
        if score is not None:
            # The score alone trains the prior: the branches' gradient misleads it (IoU on horses .65 instead of .67).
            logits = logits.detach()
        masks = logits.softmax(1)
        if self.decoding == "concat":
            prediction = at_least_fp32(self._decode_concatenated(encoding, masks))
            return Denoised(prediction, Regions(masks, None, score))
        branches = self._decode(x_t, encoding, masks, within)
        masks, prediction = ops.region_blend(logits, branches)
        return Denoised(prediction, Regions(masks, branches.unflatten(0, masks.shape[:2]), score))

    def segment(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        within: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Return the masks alone, [B, K, H, W]; the decoders are never run. Arguments as of :meth:`forward`.

        ``images``: as of :meth:`MaskProposer.segment`.
        """
        if self.masks is None:
            return torch.ones_like(x_t[:, :1])
        encoding = self._encode(x_t, t, cond) if self.masks.needs_encoding else None
        return self.masks.segment(x_t, encoding, within, t, images)

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn at ``mask_learning_rate``; none for ``regions=1``."""
        return [] if self.masks is None else self.masks.mask_parameters()

    def _encode(self, x_t: Tensor, t: Tensor, cond: Tensor | None) -> Encoding:
        embedding = self.time(t)
        if self.labels is not None:
            labels = torch.full_like(t, -1) if cond is None else cond
            embedding = embedding + self.labels(labels).to(embedding.dtype)
        skips = self.encoder(x_t, embedding)
        return Encoding(embedding, skips, self.middle(skips[-1], embedding))

    def _decode(self, x_t: Tensor, encoding: Encoding, masks: Tensor, within: Tensor | None) -> Tensor:
        """Run the K branches: [B*K, C, H, W] with the branch index fastest."""
        regions = self.regions
        pyramid = self.backbone.mask_pyramid(masks)
        embeddings = encoding.embedding[:, None].expand(-1, regions, -1)
        if self.tokens is not None:
            pooled = masks if within is None else masks * within
            embeddings = embeddings + self.tokens(x_t, pooled).to(embeddings.dtype)
        one_by_one = self.checkpoint_branches and self.training and torch.is_grad_enabled()
        if self.decoding != "unshared" and not one_by_one:
            return self._run_decoder(self.decoder, encoding, embeddings.flatten(0, 1), pyramid)
        branches = []
        for k in range(regions):
            decoder = cast(nn.ModuleList, self.decoder)[k] if self.decoding == "unshared" else self.decoder
            arguments = (decoder, encoding, embeddings[:, k], [m[:, k : k + 1] for m in pyramid])
            if one_by_one:
                options = recomputation_options(self.backbone.dropout, x_t.is_cuda)
                branch = checkpoint(self._run_decoder, *arguments, use_reentrant=False, **options)
            else:
                branch = self._run_decoder(*arguments)
            branches.append(branch)
        return torch.stack(branches, dim=1).flatten(0, 1)

    def _run_decoder(
        self, decoder: nn.Module, encoding: Encoding, embeddings: Tensor, pyramid: Sequence[Tensor]
    ) -> Tensor:
        h = encoding.middle
        if self.decoding == "masked_mid":
            h = (h[:, None] * pyramid[-1][:, :, None].to(h.dtype)).flatten(0, 1)
            pyramid = [torch.ones_like(m) for m in pyramid]
        return decoder(h, encoding.skips, embeddings, pyramid)

    def _decode_concatenated(self, encoding: Encoding, masks: Tensor) -> Tensor:
        """Run one decoder with the masks as K more channels of h_mid and of every skip (eq. 2.5)."""
        by_size = {m.shape[-1]: m for m in self.backbone.mask_pyramid(masks)}

        def widen(feature: Tensor) -> Tensor:
            return torch.cat([feature, by_size[feature.shape[-1]].to(feature.dtype)], dim=1)

        return self.decoder(widen(encoding.middle), [widen(skip) for skip in encoding.skips], encoding.embedding)


def recomputation_options(dropout: float, on_cuda: bool) -> dict[str, Any]:
    """Return options of ``checkpoint`` with which dropout is the same in the second forward pass as in the first.

    The random state can be saved on the CPU only, not in a CUDA graph; there the outputs of dropout are kept.
    """
    if not (dropout and on_cuda):
        return {"preserve_rng_state": dropout > 0}
    keep_dropout = partial(create_selective_checkpoint_contexts, [torch.ops.aten.native_dropout.default])
    return {"preserve_rng_state": False, "context_fn": keep_dropout}


def check_architecture(
    backbone: Backbone,
    *,
    regions: int,
    decoding: str,
    branch_norm: str,
    region_tokens: bool,
    half_resolution_masks: bool,
    masks: str,
    normalised_logits: bool,
    latent_factor: int = 1,
) -> None:
    """Raise ConfigError where the parts of a factorized denoiser cannot work together.

    ``latent_factor`` is that of the photos' sides to the network's, as errors name the photos'.
    """
    if regions < 1:
        raise ConfigError(f"regions={regions} must be at least 1; regions=1 is the plain DDPM")
    if decoding not in DECODINGS:
        raise ConfigError(f"decoding={decoding!r} is unknown; choose one of {', '.join(DECODINGS)}")
    if masks not in MASKS:
        raise ConfigError(f"masks={masks!r} is unknown; choose one of {', '.join(MASKS)}")
    if masks != "network" and (normalised_logits or half_resolution_masks):
        raise ConfigError(
            f"masks={masks!r} has no mask generator whose logits could be normalised or at half resolution; "
            "leave normalised_logits= and half_resolution_masks= out"
        )
    backbone.check(regions, half_resolution_masks, latent_factor)
    if regions > 1 and decoding in ("concat", "masked_mid") and (branch_norm == "masked_group"):
        raise ConfigError(f"decoding={decoding!r} has no masked skips to normalise by area; use branch_norm='group'")
    if decoding == "concat" and region_tokens:
        raise ConfigError("decoding='concat' has one branch and so no region tokens; use region_tokens=False")


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters of a model."""
    return sum(math.prod(p.shape) for p in model.parameters())
