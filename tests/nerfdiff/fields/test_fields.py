from __future__ import annotations

import pytest
import torch

from factorkit.nerfdiff.fields.kinds import GridField, build_field
from factorkit.utils.errors import ConfigError


def filled(resolution: int, values: torch.Tensor) -> GridField:
    field = GridField(resolution)
    field.values.data = values
    return field


def test_grid_field_outside_the_box_is_empty():
    field = GridField(6)
    field.values.data.fill_(5.0)
    inside = torch.tensor([[0.0, 0, 0], [0.999, -0.999, 0.999]])
    outside = torch.tensor([[1.001, 0, 0], [0, -1.2, 0], [3.0, 3, 3]])
    assert (field(inside, inside)[0] > 10).all()
    assert (field(outside, outside)[0] == 0).all()


@pytest.mark.parametrize("resolution", [5, 8])
def test_grid_field_interpolates_between_vertices(resolution):
    position = torch.linspace(-1, 1, resolution)
    x, y, z = torch.meshgrid(position, position, position, indexing="ij")
    field = filled(resolution, torch.stack([x, 2 * y, z - x, y + 0.5], -1).contiguous())
    p = torch.rand(40, 3) * 2 - 1
    raw = field.raw(p, p) / GridField.RAW_SCALE
    orders = [p, p.flip(1)]  # which axis comes first is the table's affair
    expected = [torch.stack([q[:, 0], 2 * q[:, 1], q[:, 2] - q[:, 0], q[:, 1] + 0.5], -1) for q in orders]
    assert any(torch.allclose(raw, w, atol=1e-4) for w in expected)


def test_blurred_values_keep_constants_and_spread_a_point():
    field = filled(17, torch.ones(17, 17, 17, 4))
    field.coarseness = 0.5
    assert torch.allclose(field.blurred_values()[8, 8, 8], torch.ones(4), atol=1e-3)
    point = torch.zeros(17, 17, 17, 4)
    point[8, 8, 8, 1] = 1
    spread = filled(17, point)
    spread.coarseness = 0.5
    values = spread.blurred_values()
    assert values[..., 0].abs().max() == 0 and values[8, 8, 8, 1] == values.max() < 0.2
    assert torch.allclose(values, values.transpose(0, 2), atol=1e-7)
    assert torch.allclose(values, values.transpose(0, 1), atol=1e-7)
    spread.coarseness = 0.0
    assert spread.blurred_values() is spread.values


def test_resampled_grid_equals_the_field():
    coarse = GridField(6, seed=3)
    fine = coarse.resampled(11)
    p = torch.rand(100, 3) * 2 - 1
    assert torch.allclose(coarse.raw(p, p), fine.raw(p, p), atol=1e-5)


def test_grid_field_gradients_match_finite_differences():
    torch.manual_seed(0)
    field = GridField(4).double()
    field.coarseness = 0.6
    p = (torch.rand(7, 3, dtype=torch.float64) * 1.8 - 0.9).requires_grad_()

    def raw(p, values):
        field.values = torch.nn.Parameter(values) if not isinstance(values, torch.nn.Parameter) else values
        del field.values
        object.__setattr__(field, "values", values)
        return field.raw(p, p)

    values = torch.randn(4, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(raw, (p, values), eps=1e-6, atol=1e-4)


def test_total_variation_constant_is_zero_and_counts_every_axis():
    assert filled(5, torch.full((5, 5, 5, 4), 2.0)).total_variation() == 0
    for axis in range(3):
        values = torch.zeros(5, 5, 5, 4)
        values.transpose(0, axis)[0] = 1.0
        assert filled(5, values).total_variation().item() == pytest.approx(1 / 4)


def test_build_field_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="fog"):
        build_field("fog", 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grid", "hashgrid", "mlp", "siren"])
def test_build_field_every_kind_learns_a_ball(kind):
    torch.manual_seed(0)
    field = build_field(kind, 16, 0)
    rate = {"grid": 0.05, "hashgrid": 5e-3, "mlp": 3e-4, "siren": 3e-4}[kind]
    optimizer = torch.optim.Adam(field.parameters(), lr=rate)
    losses = []
    for _ in range(60):
        p = torch.rand(1024, 3) * 2 - 1
        inside = (p.norm(dim=1) < 0.6).float()
        sigma, color = field(p, torch.nn.functional.normalize(p, dim=1))
        loss = (1 - torch.exp(-sigma) - inside).square().mean() + (color - inside[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0], losses[::10]


@pytest.mark.parametrize("kind", ["hashgrid", "mlp", "siren"])
def test_build_field_same_seed_gives_the_same_field(kind):
    first = build_field(kind, 16, 5).state_dict()
    torch.rand(7)
    again, other = build_field(kind, 16, 5).state_dict(), build_field(kind, 16, 6).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_grid_field_ignores_directions_and_network_uses_them():
    p, a, b = torch.rand(20, 3), torch.randn(20, 3), torch.randn(20, 3)
    field = build_field("mlp", 1, 0)
    assert torch.equal(field(p, a)[0], field(p, b)[0]) and not torch.equal(field(p, a)[1], field(p, b)[1])
    assert torch.equal(GridField(4)(p, a)[1], GridField(4)(p, b)[1])
