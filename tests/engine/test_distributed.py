from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import factorkit
from factorkit.engine.checkpoint import Checkpoints
from factorkit.nerfdiff.registered_views import load_localised
from factorkit.utils import distributed
from factorkit.utils.distributed import agree_on_name, join_processes
from factorkit.utils.errors import ConfigError
from factorkit.utils.files import read_log
from tests.engine.trained import run_script

pytestmark = pytest.mark.timeout(900)  # the first test waits for the runs of all


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return run_script(Path(__file__).with_name("processes.py"), tmp_path_factory.mktemp("distributed"), timeout=900)


def lines(folder: Path) -> dict[str, list[dict]]:
    """What each stage of a run logged of its steps."""
    logs = {str(path.parent.relative_to(folder)): read_log(path.parent) for path in folder.rglob("log.jsonl")}
    return {stage: [event for event in log if event["event"] == "step"] for stage, log in logs.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Checkpoints(folder / "checkpoints").latest()[0]


def assert_close(one: str, other: str, runs: Path) -> None:
    expected, found = weights(runs / one), weights(runs / other)
    assert expected.keys() == found.keys()
    for name in expected:
        # Adam divides by the gradient's size: of a gradient that is only rounding, it makes a whole step
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=5e-4, msg=name)


def assert_same_losses(alone: dict[str, list[dict]], together: dict[str, list[dict]], stages: int) -> None:
    assert alone.keys() == together.keys() and len(alone) == stages
    for stage, expected in alone.items():
        assert [line["step"] for line in together[stage]] == list(range(1, len(expected) + 1))  # one process writes
        for one, other in zip(expected, together[stage], strict=True):
            for key in one.keys() - {"event", "time", "step", "seconds", "seconds_left", "images_per_second"}:
                found, wanted = (np.array(line[key], float) for line in (other, one))  # an empty quarter's None is NaN
                close = {"rtol": 1e-4, "atol": 1e-6, "err_msg": f"{key} at step {one['step']} of {stage}"}
                np.testing.assert_allclose(found, wanted, **close)


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("regional", 2),
        ("regional", 4),
        ("thesis", 2),
        ("dictionary", 2),
        ("dictionary", 4),
        ("joint", 2),
        ("clipped", 2),
        ("learned", 2),
        ("objects", 2),
        ("latents", 2),
    ],
)
@pytest.mark.slow
def test_distributed_losses_equal_those_of_one_process(runs, name, world):
    """The thesis' form in pieces too: it has no statistics over the batch. Two are in shards (processes.py)."""
    stages = {"dictionary": 7, "learned": 4, "joint": 3, "objects": 3, "latents": 3}.get(name, 1)
    assert_same_losses(lines(runs / f"{name}_1"), lines(runs / f"{name}_{world}"), stages)
    assert_close(f"{name}_1", f"{name}_{world}", runs)


@pytest.mark.slow
def test_distributed_autoencoder_of_a_latent_run_equals_that_of_one_process(runs):
    folders = [f"latents_{world}_autoencoder" for world in (1, 2)]
    assert_same_losses(*(lines(runs / folder) for folder in folders), 1)
    assert_close(*folders, runs)


@pytest.mark.slow
def test_distributed_processes_of_a_latent_run_have_the_same_weights(runs):
    first, second = ((runs / f"latents_2_rank_{rank}").read_text().splitlines() for rank in range(2))
    trainings = ["latents_2_autoencoder", "mixture", "mixture", "distil", "latents_2"]  # one is read for the next stage
    assert [line.split(":")[0] for line in first] == trainings and first == second


@pytest.mark.slow
def test_distributed_signal_to_one_process_stops_all(runs):
    assert [p.name for p in (runs / "stopped/checkpoints").iterdir()] == ["step_00000003.safetensors"]
    assert [e["step"] for e in read_log(runs / "stopped") if e["event"] == "signal"] == [3]


@pytest.mark.slow
def test_distributed_no_process_waits_for_a_preview(runs):
    """That of step 2 ended after the other process had begun its fourth step (processes.py). What follows from grids
    is the same as alone."""
    alone, together = ([e for e in read_log(runs / f"aside_{n}") if e["event"] in ("step", "alarms")] for n in (1, 2))
    order = [(e["event"], e["step"]) for e in together]
    assert order.index(("alarms", 2)) > order.index(("step", 3))
    alarms = [
        [(e["step"], e["failures"], e["error"]) for e in log if e["event"] == "alarms"] for log in (alone, together)
    ]
    # at the end the drawn images are checked too, and the alarms are written once more
    assert alarms[0] == alarms[1] and [step for step, *_ in alarms[0]] == [2, 4, 6, 6]
    weighed = [[e["weighed"] for e in log if e["event"] == "alarms"] for log in (alone, together)]
    assert weighed[1] == pytest.approx(weighed[0], rel=1e-6) and len(set(weighed[0])) == 3
    assert order[-1] == ("alarms", 6)
    left = [sorted(p.name for p in (runs / f"aside_{n}/checkpoints").iterdir()) for n in (1, 2)]
    assert left[0] == left[1] == ["best.json", "step_00000002.safetensors", "step_00000006.safetensors"]
    assert (runs / "aside_1/checkpoints/best.json").read_text() == (runs / "aside_2/checkpoints/best.json").read_text()


@pytest.mark.slow
def test_distributed_localised_views_are_those_of_one_process(runs):
    alone, together = (load_localised(runs / f"registered_{n}") for n in (1, 2))
    assert alone.names == together.names == ("8", "9") and alone.others == together.others == ()
    torch.testing.assert_close(together.poses, alone.poses, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_distributed_failed_preview_ends_all_processes(runs):
    said = (runs / "stderr.txt").read_text()
    assert "DataError: no image at step 2" in said and "FactorkitError: process 0 ended this run" in said


@pytest.mark.slow
def test_distributed_lost_process_restart_gives_the_same_result(runs):
    resumed = [e["step"] for e in read_log(runs / "restarted") if e["event"] == "resume"]
    assert resumed and set(resumed) <= {2, 3}  # of the checkpoint that was written, or being written, as it died
    expected, found = weights(runs / "unbroken"), weights(runs / "restarted")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.parametrize(("name", "steps"), [("grown", [2]), ("resharded", [1, 2])])
@pytest.mark.slow
def test_distributed_resume_with_other_numbers_of_processes_and_shards(runs, name, steps):
    resumed = [e["step"] for e in read_log(runs / name) if e["event"] == "resume"]
    assert resumed == steps
    assert_close("regional_1", name, runs)


@pytest.mark.slow
def test_distributed_non_finite_step_is_skipped_in_all_processes(runs):
    skipped = [[e["message"] for e in read_log(runs / f"aside_{n}") if e["event"] == "skip"] for n in (1, 2)]
    assert skipped[0] == skipped[1] and "the loss of image" in skipped[0][0] and len(skipped[0]) == 1
    assert_close("aside_1", "aside_2", runs)


def test_check_batch_indivisible_batch_raises(toy, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="batch_size=4 .* 3 processes.* batch_size=3 or 6"):
        toy(batch_size=4)
    with pytest.raises(ConfigError, match="such as batch_size=3 "):
        toy(batch_size=2)
    monkeypatch.setattr(
        "factorkit.segdiff.training_images.prepare", lambda *given, **options: pytest.fail("prepared already")
    )
    with pytest.raises(ConfigError, match="batch_size=16 .* 3 processes"):
        factorkit.train_segdiff(out="runs", preset="demo", device="cpu")


def test_join_processes_single_process_does_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    cpu = torch.device("cpu")
    join_processes(cpu)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(distributed.average(values), values)
    assert distributed.maximum(15) == 15
    distributed.barrier()


def test_local_device_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert distributed.local_device(torch.device("cuda")) == torch.device("cuda", 2)
    assert distributed.local_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert distributed.local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="'cuda:1' is one GPU, but 4 processes"):
        distributed.local_device(torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 3 of 4 on this machine, but torch finds 2"):
        distributed.local_device(torch.device("cuda"))


@pytest.mark.parametrize("backends", ["gloo", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.slow
def test_leave_processes_after_an_error_does_not_wait_for_nccl(backends, fails):
    """NCCL's farewell waits for processes that wait for the one which failed."""
    script = f"""
import torch.distributed as dist
from factorkit.utils import distributed
import atexit
atexit.register(lambda: print("others"))
atexit.register(distributed.leave_processes)
dist.is_initialized, dist.get_backend_config = lambda: True, lambda: {backends!r}
dist.destroy_process_group = lambda: print("farewell")
if {fails}:
    raise ValueError("a bug")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    at_once = fails and "nccl" in backends
    assert done.stdout.split() == ([] if at_once else ["farewell", "others"])
    assert done.returncode == int(fails) and ("ValueError: a bug" in done.stderr) == fails


def test_agree_on_name_ignores_words_of_earlier_starts():
    """One store and three meetings; in the second, one process is late and another is gone before it is answered."""
    store = torch.distributed.HashStore()

    def together(world: int) -> set[str]:
        with ThreadPoolExecutor(world) as threads:
            return set(threads.map(lambda rank: agree_on_name(store, rank, world), range(world)))

    (first,) = together(3)
    store.set("factorkit/hello/1", "of one that died")
    with ThreadPoolExecutor(3) as threads:
        early = [threads.submit(agree_on_name, store, rank, 3) for rank in (0, 2)]
        time.sleep(0.2)
        assert not early[0].done()
        late = threads.submit(agree_on_name, store, 1, 3)
        (second,) = {future.result(10) for future in (*early, late)}
    (third,) = together(2)
    assert len({first, second, third}) == 3
