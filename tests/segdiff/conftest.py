from __future__ import annotations

import pytest
import torch

from factorkit.segdiff.model import FactorizedUNet

TINY = {
    "regions": 3, "resolution": 16, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (8,), "heads": 2,
    "groups": 4,
}  # fmt: skip


@pytest.fixture
def tiny():
    """tiny(dtype, **changes): a small network with no weight left at zero, masks far from uniform, in eval mode."""

    def make(dtype=torch.float64, **changes) -> FactorizedUNet:
        torch.manual_seed(0)
        model = FactorizedUNet(**{**TINY, **changes})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
            if model.regions > 1:
                model.mask_generator.conv_out.weight.mul_(3)
            for buffer in model.buffers():  # running averages that are told apart from their initial values
                buffer.add_(torch.rand_like(buffer) * 0.5)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def batch():
    """batch(dtype, size, count): noisy images [count, 3, *size] and their levels [count], all over the schedule."""

    def make(dtype=torch.float64, size=(16, 16), count=2) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        levels = [30, 730, 210, 5, 999, 400, 31, 600]
        return torch.randn(count, 3, *size, dtype=dtype), torch.tensor(levels[:count])

    return make
