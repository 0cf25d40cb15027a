"""The field of tiny-cuda-nn's parts, against a stand-in that holds it to what their documentation asks."""

from __future__ import annotations

import builtins
import copy
import sys
import types

import pytest
import torch
from torch import nn

from factorkit.nerfdiff.fields.kinds import build_field
from factorkit.utils.errors import ConfigError


class StandIn(nn.Module):
    """tinycudann.NetworkWithInputEncoding as its bindings document it: flat fp32 parameters, half answers, no empty
    batch; inputs of the hash grid and of spherical harmonics lie in [0, 1]."""

    def __init__(self, n_input_dims, n_output_dims, encoding_config, network_config, seed=1337):
        super().__init__()
        assert network_config["otype"] == "FullyFusedMLP" and network_config["n_neurons"] in (16, 32, 64, 128)
        assert network_config["n_hidden_layers"] >= 1 and 0 <= seed < 1 << 32
        parts = encoding_config.get("nested", [encoding_config])
        self.bounded = sum(part.get("n_dims_to_encode", 0 if len(parts) > 1 else n_input_dims) for part in parts)
        assert self.bounded == 3 and parts[0]["otype"] in ("HashGrid", "SphericalHarmonics")
        if parts[0]["otype"] == "HashGrid":
            finest = parts[0]["base_resolution"] * parts[0]["per_level_scale"] ** (parts[0]["n_levels"] - 1)
            self.finest = round(finest)
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        generator = torch.Generator().manual_seed(seed)
        self.params = nn.Parameter(torch.randn(n_input_dims * n_output_dims, generator=generator))

    def forward(self, x):
        assert x.dim() == 2 and x.shape[1] == self.n_input_dims and x.dtype == torch.float32 and len(x) > 0
        assert (x[:, : self.bounded] >= 0).all() and (x[:, : self.bounded] <= 1).all()
        return (x @ self.params.reshape(self.n_input_dims, self.n_output_dims)).half()


@pytest.fixture
def stand_in(monkeypatch):
    module = types.ModuleType("tinycudann")
    module.NetworkWithInputEncoding = StandIn
    monkeypatch.setitem(sys.modules, "tinycudann", module)


def test_tcnn_outputs_are_fp32_with_gradients_of_positions_and_parameters(stand_in):
    field = build_field("tcnn", 40, 3)
    assert field.geometry.finest == 40
    positions = (torch.rand(11, 3) * 1.8 - 0.9).requires_grad_()
    directions = torch.randn(11, 3)  # of any length
    sigma, color = field(positions, directions)
    assert sigma.shape == (11,) and color.shape == (11, 3) and sigma.dtype == color.dtype == torch.float32
    (sigma.sum() + color.sum()).backward()
    assert positions.grad.abs().sum() > 0
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in field.parameters())
    none = field(torch.zeros(0, 3), torch.zeros(0, 3))
    assert none[0].shape == (0,) and none[1].shape == (0, 3)


def test_tcnn_only_colour_depends_on_directions(stand_in):
    field, places = build_field("tcnn", 16, 3), torch.rand(9, 3)
    a, b = (field(places, torch.nn.functional.normalize(torch.randn(9, 3), dim=1)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    again, other = build_field("tcnn", 16, 3), build_field("tcnn", 16, 4)
    assert torch.equal(field.color.params, again.color.params)
    assert not torch.equal(field.color.params, other.color.params)
    stored = copy.deepcopy(field)
    stored.load_state_dict(other.state_dict())
    assert torch.equal(stored(places, places)[0], other(places, places)[0])


@pytest.mark.parametrize("reason", [ModuleNotFoundError("No module named 'tinycudann'"), OSError("no CUDA device")])
def test_tcnn_missing_names_the_package(monkeypatch, reason):
    plain = builtins.__import__

    def raise_import_error(name, *rest):
        if name == "tinycudann":
            raise reason
        return plain(name, *rest)

    monkeypatch.delitem(sys.modules, "tinycudann", raising=False)
    monkeypatch.setattr(builtins, "__import__", raise_import_error)
    with pytest.raises(ConfigError, match=f'field="tcnn" needs tiny-cuda-nn.*{reason}.*hashgrid'):
        build_field("tcnn", 16, 0)
