"""Training steps and ``segment``: ours, the textbook's in PyTorch, and that under torch.compile.

    pytest benchmarks/test_training.py --benchmark-only

reference  K decoders in a loop, each skip multiplied by its mask and concatenated (benchmarks/textbook.py)
folded     the same with all branches as one batch, channels last
compiled   folded, under torch.compile
ours       factorkit's step, eager
graph      factorkit's step as a CUDA graph (on a GPU)

All see the same images, weights, noise and precision. Predictions and gradients are compared with those of the
reference in fp32 before anything is timed. ``peak_bytes`` is the most a step holds beyond what lay there before it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from benchmarks.conftest import Measurement, out_of_memory_skips
from benchmarks.contenders import IMAGES, PRESETS, gradients, make_nerfdiff_step, make_step, make_task
from benchmarks.measure import peak_bytes
from benchmarks.test_ops import ALLOWED, distance
from factorkit.engine.config import autocast, resolve_precision
from factorkit.engine.cuda_graph import WARM_UP
from factorkit.segdiff.config import SegdiffConfig, preset_config
from factorkit.utils.memory import keep_freed_memory

WAYS = ("ours", "graph", "reference", "folded", "compiled")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["thesis", "regional"])
def test_segdiff_step(
    form: str, way: str, segdiff_config: SegdiffConfig, measure: Measurement, request: pytest.FixtureRequest
) -> None:
    device = measure.device
    if way == "graph" and device.type == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    config = with_form(segdiff_config, form, request.config.getoption("--preset") or PRESETS[device.type])

    def prepare() -> tuple:
        step, net = make_step(way, config, device, request.config.getoption("--compiler"))
        error = gradient_error(net, config, device)
        return step, error

    step, error = out_of_memory_skips(prepare)
    allowed = ALLOWED[resolve_precision(config.precision, device)]
    if error > allowed:
        message = f"{way} is off by {error:.1e}, allowed {allowed:.0e}: it is not timed"
        pytest.fail(message) if way in ("ours", "graph") else pytest.skip(message)
    out_of_memory_skips(step)  # whatever is made once
    peak = peak_bytes(step, device)
    with keep_freed_memory(device) if way == "ours" else nullcontext():  # as factorkit's training loop does
        warm_up(step, device)
        measure(step, f"segdiff step, {form}", images=config.batch_size, peak_bytes=peak, error=float(f"{error:.2g}"))


@pytest.mark.parametrize("factor", [0, 1, 2], ids=["plain DDPM", "K", "2K"])
def test_segdiff_step_by_regions(factor: int, segdiff_config: SegdiffConfig, measure: Measurement) -> None:
    regions = max(1, factor * segdiff_config.num_leaf_regions)
    config = preset_config(None, **{**segdiff_config.to_dict(), "regions": regions}).resolved()
    step, _ = out_of_memory_skips(lambda: make_step("graph", config, measure.device))
    out_of_memory_skips(lambda: warm_up(step, measure.device))
    measure(step, "segdiff step by regions", regions=regions, images=config.batch_size)


@pytest.mark.parametrize("way", ["ours", "graph"])
@pytest.mark.parametrize("stage", ["search", "fit", "distil", "joint"])
def test_nerfdiff_step(stage: str, way: str, measure: Measurement) -> None:
    if way == "graph" and measure.device.type == "cpu":
        pytest.skip("a CUDA graph needs a GPU")
    step = make_nerfdiff_step(stage, measure.device, cuda_graph=way == "graph")
    with keep_freed_memory(measure.device):
        warm_up(step, measure.device)
        measure(step, "nerfdiff step")


def test_segment(segdiff_config: SegdiffConfig, measure: Measurement) -> None:
    """Batches of images that lie on the device."""
    config, device = segdiff_config, measure.device
    model = make_task(config, device).model.eval()
    images = min(IMAGES, 4 * config.batch_size)
    x = torch.randn(images, config.resolution, config.resolution, 3, device=device).permute(0, 3, 1, 2)
    t = torch.full((images,), config.segment_t, device=device)

    @torch.no_grad()
    def segment() -> None:
        with autocast(config, device):
            model.segment(x, t)

    measure(segment, "segment", images=images)


def warm_up(step: Callable[[], None], device: torch.device) -> None:
    """Take the steps before a CUDA graph is captured, and the one that captures it."""
    for _ in range(WARM_UP + 1 if device.type == "cuda" else 1):
        step()


def with_form(config: SegdiffConfig, form: str, preset: str) -> SegdiffConfig:
    """Return the preset in a form, which decides settings that a resolved configuration has already."""
    return preset_config(preset, form=form, masks="network", batch_size=config.batch_size).resolved()


def gradient_error(net: torch.nn.Module, config: SegdiffConfig, device: torch.device) -> float:
    """Return the greater relative error of prediction and gradients against fp32; 1 if a gradient is lost."""
    fp32 = preset_config(None, **{**config.to_dict(), "precision": "fp32"}).resolved()
    wanted, expected = gradients(make_task(fp32, device).model, fp32, device)
    prediction, found = gradients(net, config, device)
    # Of a parameter with a small gradient: the error of all together does not show it.
    if any(y.norm() == 0 < x.norm() for x, y in zip(expected, found, strict=True)):
        return 1.0
    flat = [torch.cat([x.flatten() for x in parts]) for parts in (found, expected)]
    return max(distance(prediction, wanted), distance(*flat))
