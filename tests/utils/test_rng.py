from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factorkit.utils.rng import BatchDraw, derived_seed, image_order, seed_device

CPU = torch.device("cpu")


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3))
def test_image_order_epoch_contains_every_image_once(size, batch, seed):
    steps = -(-3 * size // batch)
    drawn = torch.cat([image_order(seed, step * batch, batch, size) for step in range(steps)])
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 40), start=st.integers(0, 100), count=st.integers(1, 60), data=st.data())
def test_image_order_batch_size_does_not_change_it(size, start, count, data):
    cut = data.draw(st.integers(0, count))
    whole = image_order(5, start, count, size)
    parts = [image_order(5, start + low, n, size) for low, n in ((cut, count - cut), (0, cut)) if n]
    assert torch.equal(torch.cat(parts[::-1]), whole)


def test_image_order_differs_between_epochs_and_seeds():
    first, second = image_order(0, 0, 64, 64), image_order(0, 64, 64, 64)
    assert not torch.equal(first, second)
    assert not torch.equal(first, image_order(1, 0, 64, 64))
    assert not torch.equal(first, torch.arange(64))


def draws(rows: slice, seed: int = 3, seen: int = 64, batch: int = 32) -> list[torch.Tensor]:
    draw = BatchDraw(seed, seen, batch, rows, CPU)
    return [draw.normal(3, 5), draw.uniform(), draw.integers(10, 20), draw.normal(), draw.uniform()]


@pytest.mark.parametrize("size", [1, 7, 16, 32])
def test_batch_draw_rows_equal_rows_of_the_whole_batch(size):
    pieces = [draws(slice(low, min(low + size, 32))) for low in range(0, 32, size)]
    for whole, *parts in zip(draws(slice(0, 32)), *pieces, strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_batch_draw_shapes_and_ranges_are_as_documented():
    normal, uniform, integers, scalar, again = draws(slice(4, 9), batch=4000)
    assert normal.shape == (5, 3, 5) and uniform.shape == integers.shape == scalar.shape == (5,)
    normal, uniform, integers, scalar, again = draws(slice(0, 4000), batch=4000)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    assert set(integers.tolist()) == set(range(10, 20))
    assert not torch.equal(uniform, again)  # each call draws anew


def test_batch_draw_depends_on_seed_and_images_seen_only():
    torch.manual_seed(0)
    first = draws(slice(0, 8))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, draws(slice(0, 8)), strict=True))
    assert not torch.equal(first[0], draws(slice(0, 8), seed=4)[0])
    assert not torch.equal(first[0], draws(slice(0, 8), seen=96)[0])


def test_derived_seed_values_are_fixed():
    assert derived_seed("draw", 0, 128) == 2123177464143803515
    assert derived_seed("a", 12) != derived_seed("a1", 2)
    assert 0 <= derived_seed("x") < 2**63


def test_seed_device_on_a_cpu_seeds_what_dropout_draws_from():
    drawn = []
    for seed in (torch.manual_seed, lambda seed: seed_device(seed, torch.device("cpu"))):
        torch.rand(3)
        seed(11)
        drawn.append(torch.nn.functional.dropout(torch.ones(100)))
    assert torch.equal(*drawn)
