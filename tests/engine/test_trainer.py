from __future__ import annotations

import pytest
import torch

from factorkit.engine.checkpoint import read_checkpoint
from factorkit.engine.step import Meter, StepLoss
from factorkit.utils.errors import CheckpointError, ConfigError, FactorkitError
from factorkit.utils.files import read_log
from tests.engine.trained import assert_identical, events, final_state

# --- resuming ---


@pytest.mark.parametrize("cuts", [(1,), (4,), (2, 3, 5)])
def test_run_resumed_is_bit_identical(toy, tmp_path, cuts):
    toy(folder="whole", steps=7).run()
    for stop_at in (*cuts, None):
        trainer = toy(steps=7, stop_at=stop_at)
        trainer.run()
    whole, parts = final_state(tmp_path / "whole"), final_state(tmp_path / "run")
    assert {name.split(".")[0] for name in whole} == {"model", "ema", "adam"}
    assert_identical(whole, parts)
    assert_identical(whole, trainer.state.tensors())


def test_run_other_seed_gives_other_weights(toy):
    one, other = toy(folder="one", seed=0), toy(folder="other", seed=1)
    one.run(), other.run()
    assert not torch.equal(one.state.tensors()["model.1.weight"], other.state.tensors()["model.1.weight"])


def test_run_sees_every_image_once_per_epoch(toy):
    trainer = toy(steps=5)
    trainer.run()
    drawn = [i for _, indices in trainer.task.seen for i in indices]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))


def test_run_again_trains_nothing(toy, tmp_path):
    first = toy().run()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = toy()
    second = again.run()
    assert again.task.seen == []
    assert_identical(first.state_dict(), second.state_dict())
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_run_more_steps_continue_and_fewer_raise(toy, tmp_path):
    toy(steps=3).run()
    longer = toy(steps=5)
    longer.run()
    assert [step for step, _ in longer.task.seen] == [3, 4]
    assert events(tmp_path / "run")[-1] == ("end", 5)
    with pytest.raises(ConfigError, match=r"has 5 steps already.*steps=4"):
        toy(steps=4).run()


def test_run_damaged_last_checkpoint_is_trained_again(toy, tmp_path):
    toy(checkpoint_every=2).run()
    newest = tmp_path / "run/checkpoints/step_00000006.safetensors"
    whole = read_checkpoint(newest)[0]
    newest.write_bytes(newest.read_bytes()[:-9])
    again = toy(checkpoint_every=2)
    with pytest.warns(UserWarning, match="step_00000006.*Using the previous one, step_00000004"):
        again.run()
    assert [step for step, _ in again.task.seen] == [4, 5]
    assert_identical(read_checkpoint(newest)[0], whole)


def test_run_checkpoint_of_another_model_raises(toy):
    toy(statistics=False).run()
    with pytest.raises(CheckpointError, match="belong to another model"):
        toy(statistics=True).run()


def test_restore_keeps_memory_layouts(toy):
    """Adam's moments lie as their weights do, or the fused kernel takes another path than in the unbroken run."""
    trainer = toy()
    weight = trainer.state.model[1].weight
    weight.data = weight.data.t().contiguous().t()
    trainer.run()
    trainer.restore()
    assert trainer.state.optimizer.state[weight]["exp_avg"].stride() == weight.stride() == (1, 16)


def test_run_writes_and_keeps_checkpoints_as_configured(toy, tmp_path):
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


def test_run_keeps_the_best_checkpoint_without_alarms(toy, tmp_path, monkeypatch):
    whole = toy(folder="whole", checkpoint_every=1, keep_checkpoints=9)
    whole.run()
    errors = {1: 0.5, 2: 0.2, 3: 0.3, 4: None, 5: None, 6: None}
    alarmed(toy(sample_every=1, checkpoint_every=6, keep_checkpoints=1), monkeypatch, errors).run()
    folder = tmp_path / "run/checkpoints"
    assert sorted(p.name for p in folder.glob("step_*")) == [f"step_0000000{step}.safetensors" for step in (2, 6)]
    best = "step_00000002.safetensors"
    assert_identical(read_checkpoint(folder / best)[0], read_checkpoint(tmp_path / "whole/checkpoints" / best)[0])


def test_run_alarm_stops_only_with_stop_on_failure(toy, tmp_path, monkeypatch):
    errors, settings = {2: 0.2, 4: None, 6: None}, {"sample_every": 2, "checkpoint_every": 1, "keep_checkpoints": 1}
    with pytest.raises(FactorkitError, match="stopped at step 4: toy: it failed.*the best of them is of step 2"):
        alarmed(toy(**settings, stop_on_failure=True), monkeypatch, errors).run()
    assert events(tmp_path / "run")[-1] == ("alarms", 4), "what it stopped for is in the log"
    alarmed(toy(**settings), monkeypatch, errors).run()
    assert events(tmp_path / "run")[-1] == ("end", 6)
    failing = toy(folder="other", **settings, stop_on_failure=True)
    with pytest.raises(FactorkitError, match="all of them had alarms"):
        alarmed(failing, monkeypatch, dict.fromkeys(errors)).run()


# --- the step ---


@pytest.mark.parametrize("micro", [1, 3, 4, 100])
def test_run_micro_batches_give_the_same_weights(toy, micro):
    common = {"statistics": False, "precision": "fp32", "steps": 3, "batch_size": 8}
    whole, parts = toy(folder="whole", **common), toy(micro_batch_size=micro, **common)
    whole.run(), parts.run()
    assert max(len(indices) for _, indices in parts.task.seen) == min(micro, 8)
    for name, value in whole.state.tensors().items():
        torch.testing.assert_close(parts.state.tensors()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_training_step_scales_learning_rates_by_group(toy):
    rates = []
    trainer = toy(steps=4, warmup_steps=2, lr_decay_fraction=0.5)
    trainer.state.optimizer.register_step_pre_hook(
        lambda opt, *_: rates.append([float(g["lr"]) for g in opt.param_groups])
    )
    trainer.run()
    slow, rest = zip(*rates, strict=True)
    assert slow == pytest.approx([0.0025, 0.005, 0.005, 0.0025]) and rest == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_training_step_clips_the_gradient_norm(toy):
    norms = []

    def note(optimizer, *_):
        grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())

    for folder, clip in (("free", None), ("clipped", 1e-3)):
        trainer = toy(folder=folder, steps=1, gradient_clip=clip)
        trainer.state.optimizer.register_step_pre_hook(note)
        trainer.run()
    assert norms[0] > 0.01 and norms[1] == pytest.approx(1e-3, rel=1e-2)


def test_moving_average_warms_up_by_its_formula(toy):
    trainer = toy(steps=30, ema_decay=0.3)  # reached when (1 + n) / (10 + n) > 0.3, at n = 3
    weights, expected = trainer.state.model[1].weight, None
    take = trainer._training_step(Meter(trainer.device))
    for n in range(6):
        take(n)
        assert take.report_steps() == [(n, None)]
        decay = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))
        expected = weights.detach().clone() if n == 0 else decay * expected + (1 - decay) * weights.detach()
        torch.testing.assert_close(trainer.state.average.module[1].weight.detach(), expected)


def test_run_precision_is_as_configured(toy):
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found = []
        trainer = toy(folder=precision, steps=1, precision=precision)
        trainer.state.model[1].register_forward_hook(
            lambda module, inputs, output, found=found: found.append(output.dtype)
        )
        trainer.run()
        assert found[0] == dtype and trainer.state.model[1].weight.dtype == torch.float32


# --- log, previews, clock ---


def test_run_log_has_all_events(toy, tmp_path, capsys):
    trainer = toy(steps=5, log_every=2, sample_every=2, stop_at=3)
    trainer.run()
    assert events(tmp_path / "run") == [("start", 0), ("step", 2), ("alarms", 2), ("step", 3), ("alarms", 3)]
    toy(steps=5, log_every=2, sample_every=2).run()
    assert events(tmp_path / "run")[5:] == [
        ("resume", 3),
        ("step", 4),
        ("alarms", 4),
        ("step", 5),
        ("alarms", 5),
        ("end", 5),
    ]
    line = read_log(tmp_path / "run")[1]
    assert line["images"] == 8 and line["lr"] == 0.01 and len(line["spread"]) == 2
    assert line["seconds_left"] == pytest.approx(1 * 4 / line["images_per_second"])  # to step 3, where it stops
    said = capsys.readouterr()
    assert "step 4: toy" in said.err and said.out == ""


def test_run_killed_before_the_end_event_logs_it_on_resume(toy, tmp_path):
    toy().run()
    log = tmp_path / "run/log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"end"' not in line))
    toy().run()
    assert events(tmp_path / "run")[-1] == ("end", 6)


def test_run_progress_bar_starts_at_the_resumed_step(toy, capsys):
    toy(stop_at=4).run()
    toy(progress=True).run()
    said = capsys.readouterr().err
    assert "4/6" in said and "6/6" in said and "0/6" not in said and "loss" in said


def test_meter_computes_the_loss_by_quarters():
    meter = Meter(torch.device("cpu"))
    for loss, level, watch in (([1.0, 2.0, 4.0], [0.0, 0.2, 0.75], [1.0, 0.0]), ([8.0], [0.999], [5.0, 4.0])):
        loss = torch.tensor(loss, requires_grad=True)
        meter.add(StepLoss(loss, loss, torch.tensor(level), {"areas": torch.tensor(watch)}))
    line = meter.read()
    assert line["loss_by_quarter"] == [1.5, None, None, 6.0]
    assert line["loss"] == 15 / 4
    assert line["areas"] == [2.0, 1.0]  # of four images, not of two pieces
    assert meter.read()["loss_by_quarter"] == [None] * 4  # reading starts afresh


def test_meter_paused_time_is_excluded(monkeypatch):
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
