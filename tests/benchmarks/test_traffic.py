"""The memory-traffic model: its counts for examples computed by hand, and the table of a preset."""

from __future__ import annotations

import pytest
import torch

from benchmarks.traffic import BIASES, Count, counted, size, step_traffic, table


def test_operations_count_arguments_and_outputs_but_not_views():
    with torch.device("meta"):
        x, w = torch.empty(2, 3, 8, 8), torch.empty(5, 3, 1, 1)
        with counted(launches=False) as count:
            y = torch.nn.functional.conv2d(x.transpose(2, 3), w)
            (y[:, :2] * 2.0).view(-1).add_(1.0)
    conv, rest = count.parts["convolutions and products"], count.parts["norms, skips, masks, sums"]
    assert (conv.moved, conv.flops) == (4 * (2 * 3 * 64 + 15 + 2 * 5 * 64), 2 * 2 * 5 * 64 * 3)
    assert (rest.moved, rest.flops) == (4 * 4 * (2 * 2 * 64), 0)


def test_bias_of_a_convolution_counts_three_passes_over_its_output():
    with torch.device("meta"):
        x, layer = torch.empty(2, 3, 8, 8), torch.nn.Conv2d(3, 5, 3, padding=1)
        with counted(launches=False) as count:
            layer(x).sum().backward()
    assert count.parts[BIASES].moved == 2 * (4 * 2 * 5 * 64) + 4  # the sum's gradient is one number, expanded


def test_expanded_tensors_count_once_also_in_lists():
    assert size([torch.empty(1, 4).expand(6, 4), [torch.empty(3, dtype=torch.bfloat16)], None, 7]) == 16 + 6
    assert size([torch.empty(0, 4)]) == 0


def test_a_copy_does_not_read_what_it_overwrites():
    with torch.device("meta"), Count(launches=False) as count:
        torch.empty(10).copy_(torch.empty(10))
    assert count.parts["norms, skips, masks, sums"].moved == 80


@pytest.mark.parametrize("changes", [{}, {"form": "regional"}, {"branch_norm": "masked_group"}])
def test_thesis_step_traffic(changes):
    """123.7 G multiply-adds a sample forward (the design's figure), twice that backward."""
    result = step_traffic("flowers64", 2, **changes)
    total = {kind: sum(part.moved for part in parts.values()) for kind, parts in result.items()}
    flops = {kind: sum(part.flops for part in parts.values()) for kind, parts in result.items()}
    assert total["least"] < total["fused"] < 0.75 * total["unfused"]
    assert flops["fused"] == flops["least"] <= flops["unfused"]
    if "form" not in changes:
        assert flops["unfused"] == pytest.approx(2 * 3 * 2 * 123.7e9, rel=0.02)
    lines = table(result).splitlines()
    assert len(lines) == 2 + 5 + 1 and lines[-1].startswith("| total | ")


def test_more_branches_cost_less_than_in_proportion():
    three, six = (step_traffic("flowers64", 2, regions=k)["fused"] for k in (3, 6))
    for kind in ("convolutions and products", "norms, skips, masks, sums"):
        assert 1.3 < six[kind].moved / three[kind].moved < 1.9
