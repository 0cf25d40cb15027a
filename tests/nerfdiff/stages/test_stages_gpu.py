"""Every stage of a short nerfdiff training on a GPU."""

from __future__ import annotations

import math

import pytest
import torch

from factorkit.nerfdiff.train import train_nerfdiff


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("field", ["grid", "hashgrid"])
def test_stages_on_a_gpu_end_with_finite_scores(tmp_path, scene_views, tiny, field):
    run = train_nerfdiff(scene_views, out=tmp_path, **{**tiny, "device": "cuda", "field": field})
    scores = run.evaluate(scene_views)
    assert next(run.model.parameters()).is_cuda and math.isfinite(scores["psnr"]), scores
