"""The step as one piece of work for the device: what a CUDA graph asks of it, and the graph's own bookkeeping."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from factorkit.engine import step as engine_step
from factorkit.engine.cuda_graph import WARM_UP, GraphedWork
from factorkit.engine.step import Meter, MovingAverage
from factorkit.engine.trainer import Trainer
from factorkit.nn.autoencoder import Autoencoder
from factorkit.segdiff.autoencoder import AutoencoderConfig, AutoencoderTask
from factorkit.segdiff.baselines.supervised import SupervisedTask
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.latents import LatentSpace
from factorkit.segdiff.task import SegdiffTask
from tests.engine.host_reads import Watched

CPU = torch.device("cpu")


UNET = {"model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
UVIT = {"backbone": "uvit", "model_channels": 16, "depth": 3, "patch_size": 2}
LATENT = {"latent_channels": 4, "latent_factor": 4, "resolution": 64, "masks": "auto"}
LATENT_UVIT = {**LATENT, **UVIT, "masks": "network"}
AUTOENCODER, SUPERVISED = {"model": "autoencoder"}, {"model": "supervised"}
SHARED = {"norm_groups": 4, "batch_size": 4, "steps": 8, "log_every": 4, "gradient_clip": 1.0, "warmup_steps": 3}


def make_trainer(folder, device=CPU, model="segdiff", **changes) -> Trainer:
    """Return a tiny training of segdiff, in pixels or in latents, or of another model of images."""
    rng = np.random.default_rng(0)
    if model == "autoencoder":
        config = AutoencoderConfig(**{**SHARED, "resolution": 16, "model_channels": 8, "crop_size": 8, **changes})
    else:
        settings = {"masks": "network", "resolution": 16, **(UNET if "backbone" not in changes else {}), **SHARED}
        config = preset_config(None, **{**settings, **changes})
    config, size = config.resolved(), changes.get("resolution", 16)
    photos = rng.integers(0, 256, (12, size, size, 3), np.uint8)
    if model == "autoencoder":
        task = AutoencoderTask(config, photos, photos, device)
    elif model == "supervised":
        task = SupervisedTask(config, photos, rng.integers(0, 3, (12, size, size)), 3, device)
    elif config.latent_channels:
        latents = rng.normal(size=(12, 2, 4, 16, 16)).astype(np.float16)
        space = LatentSpace(Autoencoder(AutoencoderConfig(model_channels=8).sizes))
        task = SegdiffTask(config, latents, photos, device, space=space)
    else:
        task = SegdiffTask(config, photos, photos, device)
    return Trainer(task, config, folder, {}, device=device, progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_ema_decays": (0.5,)},
        {"form": "thesis", "micro_batch_size": 3},
        {"checkpoint_branches": True},
        *(UVIT, LATENT, LATENT_UVIT, AUTOENCODER, SUPERVISED),
    ],
)
@pytest.mark.slow
def test_training_step_uses_no_synchronising_operation(tmp_path, changes):
    trainer = make_trainer(tmp_path, **changes)
    trainer.task.images, trainer.task.capturable = torch.from_numpy(trainer.task.images), True  # as on a GPU
    take = trainer._training_step(Meter(CPU))
    take(0)
    before = [p.detach().clone() for p in trainer.state.model.parameters()]
    with Watched() as watched:
        take._work()
    assert watched.found == []
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.state.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [{}, UVIT, LATENT, LATENT_UVIT, AUTOENCODER, SUPERVISED],
    ids=["unet", "uvit", "latent", "latent uvit", "autoencoder", "supervised"],
)
def test_training_step_tensors_stay_in_place(tmp_path, changes):
    """A graph knows addresses: every tensor the step reads or updates must be the same one in every step."""
    trainer = make_trainer(tmp_path, **changes)
    meter = Meter(CPU)
    take = trainer._training_step(meter)

    def addresses():
        state = [v for s in trainer.state.optimizer.state.values() for v in s.values()]
        rates = [g["lr"] for g in trainer.state.optimizer.param_groups]
        own = [take.indices, take.step, take.finite, take.consecutive_skips, meter.sums, *meter.metrics.values()]
        tensors = [
            *own,
            *rates,
            *state,
            *trainer.state.model.state_dict().values(),
            *trainer.state.average.state_dict().values(),
        ]
        return [t.data_ptr() for t in tensors]

    take(0)
    first = addresses()
    generators = [id(d.generator) for d in take.draws]
    take(1), take.report_steps(), meter.read()
    take(2)
    assert addresses() == first and [id(d.generator) for d in take.draws] == generators
    assert float(trainer.state.optimizer.param_groups[0]["lr"]) == pytest.approx(trainer.config.learning_rate)
    assert int(take.step) == 2


def test_moving_average_masked_update_changes_nothing():
    model = torch.nn.BatchNorm1d(3)
    average = MovingAverage(model, 0.9, CPU)
    with torch.no_grad():
        model.weight.fill_(5.0)
    average.update(model.parameters(), model.buffers(), torch.tensor(False))
    assert average.n_averaged == 0 and (average.module.weight == 1).all()
    average.update(model.parameters(), model.buffers(), torch.tensor(True))
    assert average.n_averaged == 1 and (average.module.weight == 5).all()
    with torch.no_grad():
        model.weight.fill_(7.0)
    average.update(model.parameters(), model.buffers(), torch.tensor(True))
    torch.testing.assert_close(average.module.weight, torch.full((3,), 5 + 2 * 9 / 11))  # decay (1 + 1) / (10 + 1)


def test_training_step_changes_nothing_after_three_non_finite_steps(toy):
    """On a GPU the loop learns of them at the next line of the log only."""
    trainer = toy(steps=9, log_every=8, hook=lambda step, error: error * float("nan") if 2 <= step < 5 else error)
    take = trainer._training_step(Meter(CPU))
    for step in range(2):
        take(step)
    good = {name: value.clone() for name, value in trainer.state.tensors().items()}
    for step in range(2, 8):
        take(step)
    assert [(step, culprit is None) for step, culprit in take.report_steps()] == [(step, step < 2) for step in range(8)]
    assert [name for name, value in trainer.state.tensors().items() if not torch.equal(value, good[name])] == []


# --- the graph ---


class FakeGraph:
    def __init__(self):
        self.registered, self.replays = [], 0

    def register_generator_state(self, generator):
        self.registered.append(generator)

    def replay(self):
        self.replays += 1


def test_convolutions_of_a_training_on_a_gpu_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    engine_step.measure_convolutions(CPU)
    assert not torch.backends.cudnn.benchmark
    engine_step.measure_convolutions(torch.device("cuda", 0))
    assert torch.backends.cudnn.benchmark
    devices = []
    monkeypatch.setattr(engine_step, "measure_convolutions", devices.append)
    make_trainer(tmp_path)._training_step(Meter(CPU))
    assert devices == [CPU]


@pytest.fixture
def fake_cuda(monkeypatch):
    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

        def synchronize(self):
            fake.waits += 1

    @contextmanager
    def stream(new):
        old, fake.stream = fake.stream, new
        try:
            yield
        finally:
            fake.stream = old

    @contextmanager
    def graph(graph, pool, stream):
        """As torch does it: the stream stays current where the driver refuses to end the capture."""
        old, fake.stream = fake.stream, stream
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error during capture") from error
        fake.stream = old

    fake = SimpleNamespace(stream="main", states=[], ended=[], waits=0)
    generator = SimpleNamespace(graphsafe_set_state=fake.states.append)
    for name, value in {
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "default_generators": (generator,),
        "current_device": lambda: 0,
        "Stream": Stream,
        "stream": stream,
        "current_stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *at, name=name: fake.ended.append((name, *at)), raising=False)
    return fake


def test_graphed_work_warms_up_captures_once_and_replays(fake_cuda):
    calls, generator = [], torch.Generator()
    graphed = GraphedWork(lambda: calls.append(1), lambda: [generator], lambda: pytest.fail("no failure"), CPU)
    for _ in range(WARM_UP + 4):
        graphed()
    assert len(calls) == WARM_UP + 1  # the last of them under capture
    assert graphed.graph.replays == 4 and graphed.graph.registered == [generator]


def test_graphed_work_of_another_form_is_captured_again(fake_cuda):
    calls = []
    graphed = GraphedWork(lambda: calls.append(graphed.form), lambda: [], lambda: pytest.fail("no failure"), CPU)
    for form in ["blurred"] * (WARM_UP + 2) + ["sharp"] * (WARM_UP + 2):
        graphed(form)
    assert calls == ["blurred"] * (WARM_UP + 1) + ["sharp"] * (WARM_UP + 1)
    assert graphed.graph.replays == 2 and fake_cuda.waits == 1


def test_training_step_prepares_the_task_before_each_step(toy):
    trainer, calls = toy(log_every=3), []
    trainer.task.prepare = lambda step: (calls.append(step), step > 1)[1]
    take = trainer._training_step(Meter(CPU))
    plain = take.run
    take.run = lambda form: (calls.append(form), plain(form))
    for step in range(3):
        take(step)
    assert calls == [0, False, 1, False, 2, True] and len(trainer.task.seen) == 3


def test_graphed_work_failed_capture_continues_with_one_warning(fake_cuda):
    calls, resets = [], []

    def work():
        calls.append(len(calls))
        if len(calls) == WARM_UP + 1:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphed = GraphedWork(work, lambda: [], lambda: resets.append(len(calls)), CPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(WARM_UP + 3):
            graphed()
    assert len(calls) == WARM_UP + 4  # every call did its work, one of them twice
    assert resets == [WARM_UP + 1]
    assert [str(w.message).count("not permitted when stream is capturing)") for w in caught] == [1]
    assert fake_cuda.stream == "main"
    assert [type(state) for state in fake_cuda.states] == [torch.Generator]
    assert fake_cuda.ended == [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))]


@pytest.mark.slow
def test_training_step_failed_capture_leaves_no_trace(tmp_path, fake_cuda):
    """Under capture nothing is computed, but generators have been drawn from and half a gradient stands."""
    ends = []
    for graph in (False, True):
        trainer = make_trainer(tmp_path / str(graph))
        take = trainer._training_step(Meter(CPU))
        calls = []

        def work(take=take, model=trainer.state.model, calls=calls):
            calls.append(1)
            if len(calls) == WARM_UP + 1:
                take.draws[0].normal(5)
                model.eval()(torch.randn(1, 3, 16, 16), torch.tensor([3])).prediction.sum().backward()
                model.train()
                raise RuntimeError("operation not permitted when stream is capturing")
            take._work()

        if graph:
            take.run = GraphedWork(work, lambda: [], take._reset, CPU)
        for step in range(WARM_UP):
            take(step)
        with pytest.warns(UserWarning, match="could not be captured") if graph else nullcontext():
            take(WARM_UP)
        assert take.report_steps() == [(step, None) for step in range(WARM_UP + 1)]
        take(WARM_UP + 1)
        ends.append({k: v.clone() for k, v in trainer.state.tensors().items()})
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEPS = [
    {},
    {"form": "thesis", "micro_batch_size": 3, "dropout": 0.1},
    {"checkpoint_branches": True},
    {"checkpoint_branches": True, "dropout": 0.1},
    UVIT,
    LATENT,
    LATENT_UVIT,
    AUTOENCODER,
    SUPERVISED,
]


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("changes", STEPS)
def test_graphed_steps_equal_eager_steps(tmp_path, changes):
    device = torch.device("cuda", 0)
    ends = []
    for graph in (True, False):
        trainer = make_trainer(
            tmp_path / str(graph), device, cuda_graph=graph, precision="fp32", sample_every=0, **changes
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*could not be captured")
            trainer.run()
        ends.append(trainer.state.tensors())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("changes", STEPS)
@pytest.mark.parametrize("graph", [True, False])
def test_training_step_does_not_wait_for_the_gpu(tmp_path, changes, graph):
    device = torch.device("cuda", 0)
    trainer = make_trainer(tmp_path, device, cuda_graph=graph, log_every=50, **changes)
    take = trainer._training_step(Meter(device))
    for step in range(WARM_UP + 1):
        take(step)
    assert not graph or take.run.graph is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(WARM_UP + 1, WARM_UP + 4):
            take(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert take.report_steps() == [(step, None) for step in range(WARM_UP + 4)]


@pytest.mark.gpu
@NEEDS_GPU
def test_invalidated_capture_leaves_stream_generator_and_memory_usable():
    device, x = torch.device("cuda", 0), torch.zeros(4, device="cuda")

    def wait():
        x.copy_(torch.randn(4, device=device))
        x.sum().item()  # a capture does not survive it

    torch.manual_seed(0)
    failing = GraphedWork(wait, lambda: [], lambda: torch.manual_seed(1), device)
    stream = torch.cuda.current_stream()
    for _ in range(WARM_UP):
        failing()
    with pytest.warns(UserWarning, match="could not be captured"):
        failing()
    assert torch.cuda.current_stream() == stream and failing.graph is None
    torch.manual_seed(1)
    assert torch.equal(x, torch.randn(4, device=device))
    torch.cuda.empty_cache()
    working = GraphedWork(lambda: x.add_(torch.randn(4, device=device)), lambda: [], lambda: None, device)
    for _ in range(WARM_UP + 2):
        working()
    assert working.graph is not None and x.isfinite().all()
