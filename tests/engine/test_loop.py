from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from factorkit.engine import checkpoint, loop
from factorkit.engine.checkpoint import read_checkpoint
from factorkit.engine.log import read_log
from factorkit.engine.meter import Meter
from factorkit.engine.step import StepLoss
from factorkit.errors import CheckpointError, ConfigError, FactorkitError


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The page is tested elsewhere and takes longer than the toy's training."""
    monkeypatch.setattr(loop, "write_report", lambda folder: None)


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step_*.safetensors"))
    return read_checkpoint(newest)[0]


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def events(folder: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["step"]) for e in read_log(folder)]


def kill_at(step: int, number: int):
    def hook(at, error):
        if at == step:
            os.kill(os.getpid(), number)
        return error

    return hook


def spoil(*steps: int):
    return lambda step, error: error * float("nan") if step in steps else error


# --- resuming ---


@pytest.mark.parametrize("cuts", [(1,), (4,), (2, 3, 5)])
def test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one(toy, tmp_path, cuts):
    toy(folder="whole", steps=7).run()
    for stop_at in (*cuts, None):
        trainer = toy(steps=7, stop_at=stop_at)
        trainer.run()
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "run")
    assert {name.split(".")[0] for name in whole} == {"model", "ema", "adam"}
    assert_identical(whole, parts)
    assert_identical(whole, trainer.state())


def test_the_seed_matters(toy):
    one, other = toy(folder="one", seed=0), toy(folder="other", seed=1)
    one.run(), other.run()
    assert not torch.equal(one.state()["model.1.weight"], other.state()["model.1.weight"])


def test_every_image_is_seen_once_an_epoch(toy):
    trainer = toy(steps=5)
    trainer.run()
    drawn = [i for _, indices in trainer.task.seen for i in indices]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_a_second_identical_call_trains_nothing(toy, tmp_path):
    first = toy().run()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = toy()
    second = again.run()
    assert again.task.seen == []
    assert_identical(first.state_dict(), second.state_dict())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_more_steps_go_on_and_fewer_are_refused(toy, tmp_path):
    toy(steps=3).run()
    longer = toy(steps=5)
    longer.run()
    assert [step for step, _ in longer.task.seen] == [3, 4]
    assert events(tmp_path / "run")[-1] == ("end", 5)
    with pytest.raises(ConfigError, match=r"has taken 5 steps already.*steps=4"):
        toy(steps=4).run()


def test_a_damaged_last_checkpoint_is_made_again(toy, tmp_path):
    toy(checkpoint_every=2).run()
    newest = tmp_path / "run/checkpoints/step_00000006.safetensors"
    whole = read_checkpoint(newest)[0]
    newest.write_bytes(newest.read_bytes()[:-9])
    again = toy(checkpoint_every=2)
    with pytest.warns(UserWarning, match="step_00000006.*Taking the previous one, step_00000004"):
        again.run()
    assert [step for step, _ in again.task.seen] == [4, 5]
    assert_identical(read_checkpoint(newest)[0], whole)


def test_checkpoints_of_another_model_are_refused(toy):
    toy(statistics=False).run()
    with pytest.raises(CheckpointError, match="are of another model"):
        toy(statistics=True).run()


def test_memory_layouts_survive_a_resume(toy):
    """Adam's moments lie as their weights do, or the fused kernel takes another path than in the unbroken run."""
    trainer = toy()
    weight = trainer.model[1].weight
    weight.data = weight.data.t().contiguous().t()
    trainer.run()
    trainer.restore()
    assert trainer.optimizer.state[weight]["exp_avg"].stride() == weight.stride() == (1, 16)


def test_checkpoints_are_written_and_kept_as_asked(toy, tmp_path):
    toy(steps=9, checkpoint_every=2, keep_checkpoints=3).run()
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.glob("step_*")) == [f"step_0000000{step}.safetensors" for step in (6, 8, 9)]
    assert read_checkpoint(folder / "step_00000008.safetensors")[1] == {"toy": 1, "step": 8}


def alarmed(trainer, monkeypatch, errors: dict[int, float | None]):
    """The trainer, inspected at these steps with these errors; a failure is named where there is none."""

    def inspect(model, step, folder):
        return {"failures": ["toy: it failed"]} if errors[step] is None else {"failures": [], "error": errors[step]}

    monkeypatch.setattr(trainer.task, "inspect", inspect)
    return trainer


def test_the_best_checkpoint_without_a_failure_survives(toy, tmp_path, monkeypatch):
    whole = toy(folder="whole", checkpoint_every=1, keep_checkpoints=9)
    whole.run()
    errors = {1: 0.5, 2: 0.2, 3: 0.3, 4: None, 5: None, 6: None}
    alarmed(toy(sample_every=1, checkpoint_every=6, keep_checkpoints=1), monkeypatch, errors).run()
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.glob("step_*")) == [f"step_0000000{step}.safetensors" for step in (2, 6)]
    best = "step_00000002.safetensors"
    assert_identical(read_checkpoint(folder / best)[0], read_checkpoint(tmp_path / "whole/checkpoints" / best)[0])


def test_a_failure_stops_the_run_only_where_asked(toy, tmp_path, monkeypatch):
    errors, settings = {2: 0.2, 4: None, 6: None}, {"sample_every": 2, "checkpoint_every": 1, "keep_checkpoints": 1}
    with pytest.raises(FactorkitError, match="stopped at step 4: toy: it failed.*the best of them is of step 2"):
        alarmed(toy(**settings, stop_on_failure=True), monkeypatch, errors).run()
    assert events(tmp_path / "run")[-1] == ("alarms", 4), "what it stopped for is in the log"
    alarmed(toy(**settings), monkeypatch, errors).run()
    assert events(tmp_path / "run")[-1] == ("end", 6)
    with pytest.raises(FactorkitError, match="none of them was free of alarms"):
        failing = toy(folder="other", **settings, stop_on_failure=True)
        alarmed(failing, monkeypatch, dict.fromkeys(errors)).run()


# --- signals ---


@pytest.mark.parametrize(
    ("number", "outcome"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_ends_and_can_be_resumed(toy, tmp_path, number, outcome):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    toy(folder="whole").run()
    with pytest.raises(outcome) as caught:
        toy(hook=kill_at(2, number)).run()
    if outcome is SystemExit:
        assert caught.value.code == 143
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000003.safetensors"]
    assert events(tmp_path / "run")[-1] == ("signal", 3)
    assert number.name in read_log(tmp_path / "run")[-1]["message"]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    toy().run()
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_a_signal_in_the_last_step_is_not_lost(toy, tmp_path):
    with pytest.raises(SystemExit):
        toy(hook=kill_at(5, signal.SIGTERM)).run()
    assert events(tmp_path / "run")[-1] == ("end", 6)


@pytest.fixture
def interruptible():
    """Python's own way with Ctrl-C, which a process that was started in the background does not have."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def test_a_second_interrupt_does_not_wait(toy, tmp_path, interruptible):
    def hook(step, error):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # two at once are one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            raise AssertionError("the second Ctrl-C was to interrupt")
        return error

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy(hook=hook, checkpoint_every=2).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002.safetensors"]


def test_training_works_outside_the_main_thread(toy):
    trainer = toy()
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert trainer.step == 6


# --- gradients that are not finite ---


def test_a_step_that_is_not_finite_changes_nothing(toy, tmp_path):
    toy(stop_at=3).run()
    before = final_state(tmp_path / "run")
    toy(stop_at=4, hook=spoil(3)).run()
    assert_identical(final_state(tmp_path / "run"), before)  # batch statistics, averages and moments too
    skips = [e for e in read_log(tmp_path / "run") if e["event"] == "skip"]
    assert [e["step"] for e in skips] == [3] and "not finite" in skips[0]["message"]


def test_infinite_gradients_are_skipped_too(toy, tmp_path):
    toy(hook=lambda step, error: error * 1e38 * 1e38 if step == 1 else error, steps=3).run()
    assert ("skip", 1) in events(tmp_path / "run")
    assert all(t.isfinite().all() for t in final_state(tmp_path / "run").values())


def test_three_in_a_row_stop_the_run_with_the_last_good_checkpoint(toy, tmp_path):
    trainer = toy(steps=9, checkpoint_every=2, hook=spoil(4, 5, 6, 7))
    with pytest.raises(FactorkitError, match=r"3 steps in a row \(last: step 6\).*checkpoints; try a lower learning_"):
        trainer.run()
    found = final_state(tmp_path / "run")
    assert all(t.isfinite().all() for t in found.values())
    assert found["ema.n_averaged"] == 4
    assert [e for e in events(tmp_path / "run") if e[0] == "skip"] == [("skip", 4), ("skip", 5), ("skip", 6)]


def test_one_good_step_between_resets_the_count(toy, tmp_path):
    toy(steps=9, hook=spoil(0, 1, 3, 4, 6, 7)).run()
    found = final_state(tmp_path / "run")
    assert found["ema.n_averaged"] == 3 and found["adam.step.1.weight"] == 3


# --- the step ---


@pytest.mark.parametrize("micro", [1, 3, 4, 100])
def test_micro_batches_change_memory_only(toy, micro):
    common = {"statistics": False, "precision": "fp32", "steps": 3, "batch_size": 8}
    whole, parts = toy(folder="whole", **common), toy(micro_batch_size=micro, **common)
    whole.run(), parts.run()
    assert max(len(indices) for _, indices in parts.task.seen) == min(micro, 8)
    for name, value in whole.state().items():
        torch.testing.assert_close(parts.state()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_the_learning_rate_reaches_adam_scaled_by_group(toy):
    rates = []
    trainer = toy(steps=4, warmup_steps=2, decay=0.5)
    trainer.optimizer.register_step_pre_hook(lambda opt, *_: rates.append([float(g["lr"]) for g in opt.param_groups]))
    trainer.run()
    slow, rest = zip(*rates, strict=True)
    assert slow == pytest.approx([0.0025, 0.005, 0.005, 0.0025]) and rest == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_the_gradient_is_clipped_to_its_norm(toy):
    norms = []

    def note(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    for folder, clip in (("free", None), ("clipped", 1e-3)):
        trainer = toy(folder=folder, steps=1, gradient_clip=clip)
        trainer.optimizer.register_step_pre_hook(note)
        trainer.run()
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_the_average_warms_up_by_its_formula(toy):
    trainer = toy(steps=30, ema=0.3)  # reached when (1 + n) / (10 + n) > 0.3, at n = 3
    weights, expected = trainer.model[1].weight, None
    take = trainer._training_step(Meter(trainer.device))
    for n in range(6):
        take(n)
        assert take.skipped() == [(n, False)]
        decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))
        expected = weights.detach().clone() if n == 0 else decay * expected + (1 - decay) * weights.detach()
        torch.testing.assert_close(trainer.average.module[1].weight.detach(), expected)


def test_precision_is_as_asked(toy):
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found = []
        trainer = toy(folder=precision, steps=1, precision=precision)
        trainer.model[1].register_forward_hook(lambda module, inputs, output, found=found: found.append(output.dtype))
        trainer.run()
        assert found[0] == dtype and trainer.model[1].weight.dtype == torch.float32


# --- log, sheets, clock ---


def test_the_log_of_a_run(toy, tmp_path, capsys):
    trainer = toy(steps=5, log_every=2, sample_every=2, stop_at=3)
    trainer.run()
    assert events(tmp_path / "run") == [("start", 0), ("step", 2), ("alarms", 2), ("step", 3), ("alarms", 3)]
    toy(steps=5, log_every=2, sample_every=2).run()
    assert events(tmp_path / "run")[5:] == [
        ("resume", 3), ("step", 4), ("alarms", 4), ("step", 5), ("alarms", 5), ("end", 5),
    ]  # fmt: skip
    line = read_log(tmp_path / "run")[1]
    assert line["images"] == 8 and line["lr"] == 0.01 and len(line["spread"]) == 2
    assert line["seconds_left"] == pytest.approx(1 * 4 / line["images_per_second"])  # to step 3, where it stops
    said = capsys.readouterr()
    assert "step 4: toy" in said.err and said.out == ""


def test_a_kill_between_the_last_save_and_the_log_does_not_leave_the_run_unfinished(toy, tmp_path):
    toy().run()
    log = tmp_path / "run/log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"end"' not in line))
    toy().run()
    assert events(tmp_path / "run")[-1] == ("end", 6)


def test_the_bar_counts_from_where_the_run_stands(toy, capsys):
    toy(stop_at=4).run()
    toy(progress=True).run()
    said = capsys.readouterr().err
    assert "4/6" in said and "6/6" in said and "0/6" not in said and "loss" in said


def test_the_loss_by_quarters():
    meter = Meter(torch.device("cpu"))
    for loss, level, watch in (
        ([1.0, 2.0, 4.0], [0.0, 0.2, 0.75], [1.0, 0.0]),
        ([8.0], [0.999], [5.0, 4.0]),
    ):
        loss = torch.tensor(loss, requires_grad=True)
        meter.add(StepLoss(loss, loss, torch.tensor(level), {"areas": torch.tensor(watch)}))
    line = meter.read()
    assert line["loss_by_quarter"] == [1.5, None, None, 6.0]
    assert line["loss"] == 15 / 4
    assert line["areas"] == [2.0, 1.0]  # of four images, not of two pieces
    assert meter.read()["loss_by_quarter"] == [None] * 4  # reading starts afresh


def test_time_spent_on_sheets_and_checkpoints_is_no_training_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    meter = Meter(torch.device("cpu"))

    def train(seconds):
        now[0] += seconds
        meter.add(StepLoss(torch.ones(10), torch.ones(10), torch.zeros(10), {}))

    train(2.0)
    with meter.paused():
        now[0] += 50.0
    train(3.0)
    line = meter.read()
    assert line["seconds"] == pytest.approx(5.0) and line["images_per_second"] == pytest.approx(4.0)
    with meter.paused():  # after a reading, as the loop does it
        now[0] += 70.0
    train(1.0)
    assert meter.read()["seconds"] == pytest.approx(1.0)


# --- a full disk ---


def test_a_disk_that_fills_at_a_checkpoint_stops_the_run_and_can_be_resumed(toy, tmp_path, monkeypatch):
    toy(folder="whole", checkpoint_every=2).run()
    write = checkpoint.save_file

    def full(tensors, path, metadata):
        if "00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CheckpointError, match=r"step_00000004.*No space left.*free some space"):
        toy(checkpoint_every=2).run()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(checkpoint, "save_file", write)
    toy(checkpoint_every=2).run()
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_a_disk_that_fills_at_a_sheet_is_told_without_a_traceback(toy, monkeypatch):
    trainer = toy(sample_every=2)

    def full(model, step, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.task, "inspect", full)
    with pytest.raises(CheckpointError, match=r"stopped at step 2: .*No space left.*run the same command again"):
        trainer.run()


def test_a_report_that_cannot_be_written_does_not_hide_how_the_run_ended(toy, monkeypatch):
    def refuse(folder):
        raise CheckpointError("could not write report.html")

    monkeypatch.setattr(loop, "write_report", refuse)
    with pytest.warns(UserWarning, match=r"report\.html"), pytest.raises(SystemExit) as caught:
        toy(hook=kill_at(2, signal.SIGTERM)).run()
    assert caught.value.code == 143
