"""The network of the FID, with made-up weights: the real ones are a download."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest
import torch

from factorkit.metrics.frechet import WEIGHTS, Inception, compute_fid, frechet_distance, load_inception
from factorkit.utils.errors import ConfigError, DataError


def make_up(name: str, shape: torch.Size) -> torch.Tensor:
    """Weights that are the same with every version of torch and numpy."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = torch.from_numpy(random.uniform(-1, 1, tuple(shape))).float()
    if "var" in name or name.endswith("bn.weight"):
        return 1 + 0.3 * values
    return values * (0.1 if len(shape) <= 1 else (6 / shape[1:].numel()) ** 0.5)


def make_pixels() -> torch.Tensor:
    count = torch.arange(3 * 32 * 32).view(3, 32, 32)
    return torch.stack([count * 7919 % 251, count // 13 % 256]).to(torch.uint8)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of weights in the format of the releases, which hold a classifier too."""
    folder = tmp_path_factory.mktemp("hub") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception().state_dict().items()}
    weights = {name: make_up(name, shape) for name, shape in shapes.items()}
    torch.save(weights | {"fc.weight": torch.zeros(1008, 8), "fc.bias": torch.zeros(1008)}, folder / WEIGHTS[1])
    return folder / WEIGHTS[1]


def test_inception_names_and_shapes_equal_the_released_weights():
    """The digest is of torch-fidelity's own network, which loads the released file."""
    with torch.device("meta"):
        state = Inception().state_dict()
    listing = "\n".join(sorted(f"{name} {tuple(value.shape)}" for name, value in state.items()))
    assert len(state) == 564
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == "5c5cb906421dd921"


@pytest.mark.slow
def test_inception_made_up_weights_has_the_features_of_torch_fidelity(weights_file, monkeypatch):
    """The expected features are those of torch-fidelity 0.4.0 with the same weights and pixels."""
    monkeypatch.setenv("TORCH_HOME", str(weights_file.parents[2]))
    network = load_inception()
    with torch.no_grad():
        features = network(make_pixels())
    expected = torch.tensor([[0.010956, 0.863529, 0.615001, 0.000000], [0.006453, 0.580990, 0.461882, 0.000000]])
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features[:, ::512], expected, rtol=1e-4, atol=1e-5)


def test_fid_is_the_frechet_distance_of_the_features_of_pixels(monkeypatch):
    class Means(torch.nn.Module):
        def forward(self, pixels):
            assert pixels.dtype == torch.uint8
            return pixels.float().mean((2, 3))

    monkeypatch.setattr("factorkit.metrics.frechet.load_inception", Means)
    pixels = torch.randint(0, 256, (2, 90, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    real, drawn = pixels.float() / 255
    expected = frechet_distance(*pixels.float().mean((3, 4)))
    assert expected > 0.1
    assert compute_fid(real, drawn) == pytest.approx(expected, rel=1e-6)


def test_fid_missing_weights_error_names_file_and_place(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    images = torch.rand(4, 3, 16, 16)
    with pytest.raises(ConfigError) as caught:
        compute_fid(images, images)
    message = str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints") in message and WEIGHTS[0] in message and "no FID" in message
    with pytest.raises(DataError, match="at least 2"):
        compute_fid(images[:1], images)


@pytest.mark.parametrize("content", [b"<html>", {"fc.bias": torch.zeros(1008)}])
def test_load_inception_other_file_raises(monkeypatch, tmp_path, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / WEIGHTS[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ConfigError, match="does not hold Inception's weights"):
        load_inception()
