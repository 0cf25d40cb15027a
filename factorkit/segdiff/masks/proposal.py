"""The interface of what proposes the regions of an image; one implementation a file."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Encoding(NamedTuple):
    """What the U-Net computes before any mask.

    Attributes:
        embedding: the time embedding [B, E], with that of the class added.
        skips: features of the encoder, finest first.
        middle: features of the middle [B, C, h, w].
    """

    embedding: Tensor
    skips: list[Tensor]
    middle: Tensor


class MaskProposal(NamedTuple):
    """The proposed masks.

    Attributes:
        logits: fp32 [B, K, H, W]; the masks are their softmax over K.
        score: d log p(x_t) / d x_t, fp32 [B, 3, H, W], of a proposer that is a density model of the image; else None.
    """

    logits: Tensor
    score: Tensor | None = None


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context of full precision, also on devices that know no autocast, such as meta."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class MaskProposer(nn.Module):
    """Proposes K soft regions of noisy images; its parameters learn at ``mask_learning_rate``."""

    #: whether :meth:`forward` reads the encoding; without it, segmenting runs no part of the U-Net
    needs_encoding: ClassVar[bool]

    def forward(
        self, x_t: Tensor, encoding: Encoding | None = None, within: Tensor | None = None, t: Tensor | None = None
    ) -> MaskProposal:
        """Propose masks.

        Args:
            x_t: noisy images [B, 3, H, W] in [-1, 1].
            encoding: of x_t; required if ``needs_encoding``.
            within: [B, 1, H, W] in [0, 1], the region to split, in a level of a hierarchy; None: the whole image.
            t: time steps [B] of x_t, for a proposer that does not read them from the encoding.
        """
        raise NotImplementedError

    def segment(
        self,
        x_t: Tensor,
        encoding: Encoding | None = None,
        within: Tensor | None = None,
        t: Tensor | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Return the masks [B, K, H, W] of images to be segmented. Arguments as of :meth:`forward`.

        ``images`` [B, 3, H', W'] in [-1, 1] are those of latents x_t; masks that follow their pixels have their size.
        """
        return self(x_t, encoding, within, t).logits.softmax(1)

    def explain(self, x_t: Tensor, t: Tensor) -> Tensor | None:
        """Return the score [B, 3, H, W] of a mixture of colours over the masks of x_t; None if there is none."""
        return self(x_t, t=t).score

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn at ``mask_learning_rate``."""
        return list(self.parameters())
