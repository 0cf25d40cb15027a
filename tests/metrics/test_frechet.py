"""The Fréchet distance, precision and recall; the FID's network with made-up weights (the real ones are a download)."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import pytest
import torch

from factorkit.metrics.frechet import (
    WEIGHTS,
    Inception,
    compute_fid,
    frechet_distance,
    load_inception,
    precision_recall,
    random_features,
)
from factorkit.utils.errors import ConfigError, DataError


def cloud(count=50, features=5, seed=0):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whiten(x):
    """The same points with sample mean 0 and sample covariance exactly 1."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_common_axes_equals_closed_form():
    """Where the covariances commute, it is the sum over the axes of (m - m')^2 + (s - s')^2."""
    x, y = whiten(cloud(seed=1)), whiten(cloud(70, seed=2))
    s, r = torch.tensor([0.1, 1, 2, 3, 0.5]).double(), torch.tensor([1, 0.2, 2, 0.0, 4]).double()
    m = torch.tensor([0, 1, -2, 0, 0.3]).double()
    turn = torch.linalg.qr(cloud(5, seed=3))[0]
    expected = (m.square() + (s - r).square()).sum().item()
    assert frechet_distance(x * s @ turn, (y * r + m) @ turn) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance((y * r + m) @ turn, x * s @ turn) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_equal_sets_is_zero_even_with_few_rows():
    few = cloud(3, 8)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 2) == pytest.approx(32, rel=1e-6)
    assert frechet_distance(cloud(9, 1), 3 * cloud(9, 1)) > 0


def test_frechet_distance_noncommuting_covariances_equals_eigenvalue_form():
    """Tr (A B)^(1/2) from the eigenvalues of A B itself."""
    a, b = cloud(40, 3, 1) @ cloud(3, 3, 2), cloud(40, 3, 3) @ cloud(3, 3, 4)
    first, second = a.T.cov(), b.T.cov()
    mixed = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * mixed
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)


def test_random_features_rank_degradations_and_ignore_the_batch():
    generator = torch.Generator().manual_seed(0)
    real = torch.nn.functional.interpolate(torch.rand(400, 3, 4, 4, generator=generator), 16, mode="bilinear")
    noise = torch.rand(200, 3, 16, 16, generator=generator) - 0.5
    features = random_features(real)
    assert features.shape == (400, 64) and features.std(0).min() > 0
    torch.testing.assert_close(random_features(real[7:9]), features[7:9])
    assert torch.equal(random_features(real), features) and not torch.equal(random_features(real, 1), features)
    distances = [
        frechet_distance(features[:200], random_features((real[200:] + share * noise).clamp(0, 1)))
        for share in (0, 0.2, 0.5, 1)
    ]
    assert distances == sorted(distances) and distances[3] > 2 * distances[0]
    blurred = torch.nn.functional.avg_pool2d(real[200:], 5, 1, 2)
    assert frechet_distance(features[:200], random_features(blurred)) > 1.2 * distances[0]


def test_frechet_invalid_shapes_raise():
    with pytest.raises(DataError, match=r"\(2, 1, 16, 16\)"):
        random_features(torch.zeros(2, 1, 16, 16))
    with pytest.raises(DataError, match=r"\(1, 4\) and \(9, 4\)"):
        frechet_distance(cloud(1, 4), cloud(9, 4))


def test_precision_recall_of_two_halves_and_of_sets_apart():
    a, b = cloud(200, 3, 1), cloud(200, 3, 2)
    precision, recall = precision_recall(a, b)
    assert precision > 0.8 and recall > 0.8
    assert precision_recall(a, b + 50) == (0, 0)
    narrow = precision_recall(a, 0.2 * b)  # all within the real ones, which it does not reach
    assert narrow[0] > 0.9 and narrow[1] < 0.3
    with pytest.raises(DataError, match="at least 4"):
        precision_recall(a, b[:3])


def test_precision_recall_equals_a_loop():
    a, b = cloud(9, 2, 1), cloud(7, 2, 2)

    def share(points, centres):
        radii = [sorted((c - d).norm() for d in centres)[3] for c in centres]
        return sum(any((p - c).norm() <= r for c, r in zip(centres, radii, strict=True)) for p in points) / len(points)

    assert precision_recall(a, b) == pytest.approx((share(b, a), share(a, b)))


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
