"""The textbook model of the benchmarks computes the same function as factorkit."""

from __future__ import annotations

import pytest
import torch

from benchmarks.textbook import Textbook
from factorkit.segdiff.config import preset_config

SMALL = {
    "masks": "network",
    "resolution": 16,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "norm_groups": 4,
    "steps": 1,
}


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    "changes", [{"form": "thesis"}, {}, {"form": "thesis", "branch_norm": "masked_group"}, {"regions": 1}]
)
def test_textbook_model_matches_the_model(changes, folded):
    torch.manual_seed(0)
    model = preset_config(None, **SMALL, **changes).resolved().build().double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    x, t, upstream = torch.randn(2, 3, 16, 16).double(), torch.tensor([3, 700]), torch.randn(2, 4, 16, 16).double()
    result = []
    for net in (model, Textbook(model, folded)):
        prediction, (masks, *_) = net(x, t)
        loss = (prediction * upstream[:, :3]).sum() + (masks[:, 0] * upstream[:, 3]).sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        result.append([prediction, masks, *grads])
    for ours, plain in zip(*result, strict=True):
        torch.testing.assert_close(plain, ours)
