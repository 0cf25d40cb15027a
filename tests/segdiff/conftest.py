from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import factorkit
from factorkit.data import draw_flowers
from factorkit.segdiff import settle
from factorkit.segdiff.autoencoder import SETTINGS
from factorkit.segdiff.backbones import make_backbone
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.network import FactorizedDenoiser
from factorkit.segdiff.run import SegdiffRun

TINY = {
    "regions": 3,
    "resolution": 16,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (8,),
    "num_heads": 2,
    "norm_groups": 4,
}
#: the same size as a transformer
TINY_UVIT = {"resolution": 16, "model_channels": 16, "depth": 5, "patch_size": 2, "num_heads": 2, "norm_groups": 4}


@pytest.fixture
def build_tiny():
    """build_tiny(dtype, **changes): a small network without zero weights, masks far from uniform, in eval mode."""

    def make(dtype=torch.float64, **changes) -> FactorizedDenoiser:
        torch.manual_seed(0)
        backbone = changes.pop("backbone", "unet")
        settings = {"regions": 3, "dropout": 0.0, **(TINY_UVIT if backbone == "uvit" else TINY), **changes}
        sizes = make_backbone(backbone, settings)
        others = {name: value for name, value in settings.items() if not hasattr(sizes, name)}
        return randomize_weights(FactorizedDenoiser(sizes, **others)).to(dtype).eval()

    return make


def randomize_weights(model: FactorizedDenoiser) -> FactorizedDenoiser:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        if model.regions > 1:
            model.masks.decoder.conv_out.weight.mul_(3)
        for buffer in model.buffers():  # Running averages differ from their initial values.
            buffer.add_(torch.rand_like(buffer) * 0.5)
    return model


@pytest.fixture
def make_random_run():
    """make_random_run(**changes): an untrained run in fp32, with weights as from `build_tiny`."""

    def make(**changes) -> SegdiffRun:
        torch.manual_seed(0)
        config = preset_config(
            "demo", **{**TINY, "masks": "network", "precision": "fp32", "device": "cpu", **changes}
        ).resolved()
        return SegdiffRun(config, randomize_weights(config.build()), torch.device("cpu"), 0)

    return make


@pytest.fixture(scope="session")
def latent_folder(tmp_path_factory):
    """The folder of a run with latent="auto" on 34 photos of 48 pixels, 4 times smaller; its autoencoder is moved."""
    folder = tmp_path_factory.mktemp("latent") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settle, "MANY_PIXELS", 48)
        for name, value in {"steps": 3, "model_channels": 8, "batch_size": 2, "crop_size": 16, "log_every": 1}.items():
            patch.setitem(SETTINGS, name, value)
        sizes = {"resolution": 48, "regions": 2, "masks": "network", "model_channels": 8, "channel_mult": (1, 2)}
        others = {"preset": "demo", "norm_groups": 4, "batch_size": 4, "steps": 2, "device": "cpu", "progress": False}
        factorkit.train_segdiff(draw_flowers(34, 48, seed=0)[0], out=folder, **sizes, **others)
    (folder.parent / "run_autoencoder").rename(folder.parent / "moved")
    return folder


@pytest.fixture
def load_latent_run(latent_folder, tmp_path):
    """load_latent_run(**changes): a copy of it, whose attributes may be changed."""

    def load(**changes) -> SegdiffRun:
        run = SegdiffRun.load(shutil.copytree(latent_folder, tmp_path / "copy"), device="cpu")
        vars(run).update(changes)
        return run

    return load


@pytest.fixture
def make_images():
    """make_images(count, seed): smooth random images, uint8 [count, 16, 16, 3]."""

    def make(count=2, seed=0) -> np.ndarray:
        small = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
        grown = [Image.fromarray(p).resize((16, 16), Image.Resampling.BICUBIC) for p in small]
        return np.stack([np.asarray(p) for p in grown])

    return make


@pytest.fixture
def make_batch():
    """make_batch(dtype, size, count): noisy images [count, 3, *size] and levels [count] across the schedule."""

    def make(dtype=torch.float64, size=(16, 16), count=2) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(1)
        levels = [30, 730, 210, 5, 999, 400, 31, 600]
        return torch.randn(count, 3, *size, dtype=dtype), torch.tensor(levels[:count])

    return make
