"""The cost model of many processes, compared with the traffic of DistributedDataParallel and with closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling import (
    BUCKET,
    Links,
    all_reduce_seconds,
    efficiency,
    exposed_seconds,
    sharded_volume,
    trained_parameters,
    volume,
)
from factorkit.segdiff.config import preset_config
from factorkit.utils import distributed

LINKS = Links(inside=200e9, network=25e9, host=10e9, latency=0.0, machine=8)


def test_all_reduce_sends_four_bytes_per_parameter():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sent = []

        def note(state, bucket):
            sent.append(bucket.buffer().nbytes)
            done = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        model = preset_config("demo", model_channels=16, masks="network").resolved().build()
        wrapped = distributed.data_parallel(model, micro_batches=1)
        wrapped.register_comm_hook(None, note)
        for _ in range(2):  # The first step of a static graph counts the participating parameters.
            sent.clear()
            x = torch.randn(2, 3, model.resolution, model.resolution)
            wrapped(x, torch.zeros(2, dtype=torch.int64)).prediction.square().mean().backward()
    finally:
        dist.destroy_process_group()
    assert sum(sent) == 4 * sum(p.numel() for p in model.parameters())


def test_preset_parameter_counts():
    parameters = list(preset_config("demo").resolved().build().parameters())
    assert trained_parameters("demo") == sum(p.numel() for p in parameters if p.requires_grad)
    assert trained_parameters("demo") < sum(p.numel() for p in parameters), "object masks are fixed in a run"
    assert trained_parameters("lego") > 1e6


def test_ring_time_matches_its_formula():
    assert volume(1000, 2) == 1000 and volume(1000, 1) == 0
    assert sharded_volume(1000, 2) == 1500 and sharded_volume(1000, 1) == 0
    assert all_reduce_seconds(8e9, 8, LINKS) == pytest.approx(volume(8e9, 8) / 200e9)
    assert all_reduce_seconds(8e9, 64, LINKS) == pytest.approx(volume(8e9, 64) / 25e9)  # The slowest link decides.
    slow = Links(200e9, 25e9, 10e9, 1e-5, 8)
    assert all_reduce_seconds(0, 64, slow) == pytest.approx(2 * 63 * 1e-5)


def test_backward_pass_hides_all_but_the_last_bucket():
    gradient = 40 * BUCKET + 1000
    last = all_reduce_seconds(1000, 64, LINKS)
    assert exposed_seconds(gradient, 100.0, 64, LINKS) == pytest.approx(last)
    whole = 40 * all_reduce_seconds(BUCKET, 64, LINKS) + last
    assert exposed_seconds(gradient, 0.0, 64, LINKS) == pytest.approx(whole)
    assert exposed_seconds(gradient, 1.0, 1, LINKS) == 0


def test_efficiency_falls_with_gpus_and_rises_with_the_step():
    values = [efficiency(10**8, 0.1, gpus, LINKS, 1000) for gpus in (1, 8, 64, 512)]
    assert values == sorted(values, reverse=True) and 0 < values[-1] < values[0] < 1
    assert efficiency(10**8, 10.0, 64, LINKS, 1000) > values[2]
    assert efficiency(10**8, 1.0, 1, LINKS, 10) == pytest.approx(1 / (1 + 16e8 / 10e9 / 10))  # the copy of the state
