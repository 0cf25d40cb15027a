"""Every op, forward and with its backward pass: ours, the PyTorch reference, the same compiled, and peers.

    pytest benchmarks/test_ops.py --benchmark-only
    pytest benchmarks/test_ops.py --benchmark-only -k "region_blend and not compiled"

Results and gradients of all are compared with the reference's in fp32 before anything is timed. Ours fails where it is
off, others are left out with their error as the reason. Region ops have the sizes of the preset's finest decoder level.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Measurement, out_of_memory_skips
from benchmarks.contenders import REGION_OPS, OpCase, Run, as_tuple, count_bytes, region_op
from benchmarks.rendering_cases import RENDERING_OPS, rendering_op
from factorkit.engine.config import resolve_precision
from factorkit.segdiff.config import SegdiffConfig

ALLOWED = {"bf16": 0.05, "fp32": 1e-3}  # greatest relative error of outputs and gradients against fp32
IMPLEMENTATIONS = ("ours", "reference", "compiled")
NOT_DIFFERENTIABLE = ("march_rays", "sample_pdf")
FORWARD_ONLY = ("two-pass",)  # implementations
PEERS = {"group_norm_silu": ["two-pass"]}
PEERS |= {"composite dense": ["nerfacc"], "composite packed": ["nerfacc"], "march_rays": ["grid_sample"]}
PEERS |= {"rasterize_gaussians": ["gsplat"], "rasterize_gaussians tenth": ["gsplat"]}
RAYS = {"cpu": 1024, "cuda": 131072}  # of 128 samples or points: 2^17 and 2^24
DIRECTIONS = ("forward", "both")


def implementations(names: tuple[str, ...]) -> list:
    return [pytest.param(op, way, id=f"{op}-{way}") for op in names for way in (*IMPLEMENTATIONS, *PEERS.get(op, []))]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "way"), implementations(REGION_OPS))
def test_region_op(
    op: str,
    way: str,
    direction: str,
    segdiff_config: SegdiffConfig,
    device: torch.device,
    measure: Measurement,
    request: pytest.FixtureRequest,
) -> None:
    config = segdiff_config
    precision = resolve_precision(config.precision, device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    case = out_of_memory_skips(lambda: region_op(op, config, config.batch_size, device, dtype))
    if device.type == "cuda" and way == "ours":
        case.moved = count_bytes(case)
    time_op(case, op, way, direction, ALLOWED[precision], measure, request)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("op", "way"), implementations(RENDERING_OPS))
def test_rendering_op(
    op: str, way: str, direction: str, device: torch.device, measure: Measurement, request: pytest.FixtureRequest
) -> None:
    if direction == "both" and op in NOT_DIFFERENTIABLE:
        pytest.skip(f"{op} has no gradient")
    rays = RAYS[device.type]
    case = out_of_memory_skips(lambda: rendering_op(op, rays, device))
    time_op(case, op, way, direction, ALLOWED["fp32"], measure, request, rays=rays)


def time_op(
    case: OpCase,
    op: str,
    way: str,
    direction: str,
    allowed: float,
    measure: Measurement,
    request: pytest.FixtureRequest,
    **info: object,
) -> None:
    """Check one implementation against the reference, then time it."""
    if way in FORWARD_ONLY and direction == "both":
        pytest.skip(f"{way} has no gradient")
    run = {"ours": case.ours, "reference": case.reference, **case.peers}.get(way)
    if run is None:
        run = torch.compile(case.reference, backend=request.config.getoption("--compiler"), dynamic=False)
    error = out_of_memory_skips(lambda: relative_error(case, run, way))
    if error > allowed and way == "ours":
        pytest.fail(f"{op} is off by {error:.1e}, allowed {allowed:.0e}: it is not timed")
    if error > allowed:
        pytest.skip(f"off by {error:.1e}, allowed {allowed:.0e}: not timed")
    if direction in case.moved:
        info["bytes"] = case.moved[direction]
    with torch.set_grad_enabled(direction == "both"):
        upstream = [torch.randn_like(x) for x in as_tuple(run(*case.inputs))]

    def forward() -> None:
        with torch.no_grad():
            run(*case.inputs)

    def both() -> None:
        torch.autograd.grad(as_tuple(run(*case.inputs)), case.differentiable(), upstream)

    measure(forward if direction == "forward" else both, f"{op} {direction}", error=float(f"{error:.2g}"), **info)


def relative_error(case: OpCase, run: Run, way: str) -> float:
    """Return the greatest relative error of outputs and gradients against the reference in fp32."""
    exact = [x.detach().float() if x.is_floating_point() else x for x in case.inputs]
    exact = [e.requires_grad_(x.requires_grad) for e, x in zip(exact, case.inputs, strict=True)]
    wanted = as_tuple(case.reference(*exact))
    try:
        results = as_tuple(run(*case.inputs))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    except RuntimeError as error:  # nerfacc compiles at its first call
        if way in ("ours", "reference") or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        pytest.skip(f"{way} fails: {error}")
    pairs = list(zip(results, wanted, strict=True))
    if wanted[0].requires_grad and way not in FORWARD_ONLY:
        upstream = [torch.randn_like(x) for x in wanted]
        cast = [u.to(x.dtype) for u, x in zip(upstream, results, strict=True)]
        gradients = torch.autograd.grad(results, case.differentiable(), cast)
        expected = torch.autograd.grad(wanted, [x for x in exact if x.requires_grad], upstream)
        pairs += zip(gradients, expected, strict=True)
    return max(distance(x.detach(), y.detach()) for x, y in pairs)


def distance(result: Tensor, wanted: Tensor) -> float:
    if len(result) != len(wanted):  # samples on the border of an occupied cell
        return abs(len(result) / max(1, len(wanted)) - 1)
    return float((result.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12))
