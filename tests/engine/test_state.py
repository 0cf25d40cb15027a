"""The state of a training: several moving averages, and checkpoints that a background thread writes."""

from __future__ import annotations

import threading

import pytest
import torch

from factorkit.engine import checkpoint
from factorkit.engine.checkpoint import read_checkpoint, write_checkpoint
from factorkit.engine.run_folder import read_weights, write_json
from factorkit.engine.state import BackgroundWorker
from factorkit.engine.step import Meter
from factorkit.utils.errors import CheckpointError, ConfigError
from tests.engine.trained import assert_identical, final_state, full_at, saved_steps

ALSO = {"ema_decay": 0.9, "extra_ema_decays": (0.3, 0.0)}


def test_averages_use_their_own_decays(toy):
    trainer = toy(steps=30, **ALSO)
    assert list(trainer.state.averages) == ["ema", "ema_0.3", "ema_0.0"]
    weights, take = trainer.state.model[1].weight, trainer._training_step(Meter(trainer.device))
    expected = {0.9: None, 0.3: None, 0.0: None}
    for n in range(6):
        take(n), take.report_steps()
        for decay, before in expected.items():
            kept = 0.0 if n == 0 else min(decay, (1 + n) / (10 + n))
            now = weights.detach().clone()
            expected[decay] = now if n == 0 else kept * before + (1 - kept) * now
    found = [average.module[1].weight.detach() for average in trainer.state.averages.values()]
    torch.testing.assert_close(found, list(expected.values()))
    assert not torch.equal(found[0], found[1]) and torch.equal(found[2], weights)


def test_averages_resumed_run_is_bit_identical(toy, tmp_path):
    toy(folder="whole", **ALSO).run()
    toy(stop_at=3, **ALSO).run(), toy(**ALSO).run()
    whole = final_state(tmp_path / "whole")
    assert {name.split(".module.")[0] for name in whole if "module" in name} == {"ema", "ema_0.3", "ema_0.0"}
    assert_identical(whole, final_state(tmp_path / "run"))
    toy(folder="alone").run()
    alone = final_state(tmp_path / "alone")
    assert_identical(alone, {name: value for name, value in whole.items() if name in alone})


def test_averages_changed_on_resume_start_there_or_are_dropped(toy, tmp_path):
    toy(stop_at=3, extra_ema_decays=(0.3,)).run()
    stood = toy(extra_ema_decays=(1.0,))
    assert stood.restore()
    torch.testing.assert_close(stood.state.averages["ema_1.0"].module[1].weight, stood.state.model[1].weight)
    toy(extra_ema_decays=(1.0,)).run()
    found = final_state(tmp_path / "run")
    assert found["ema_1.0.n_averaged"] == 3 and found["ema.n_averaged"] == 6 and "ema_0.3.n_averaged" not in found


def test_read_weights_selects_an_average_by_decay(tmp_path):
    def value(number):
        return torch.full((2,), float(number))

    names = ("model.w", "ema.module.w", "ema_0.999.module.w", "ema_0.5.module.w")
    tensors = {name: value(number) for number, name in enumerate(names, start=1)} | {"ema_0.5.n_averaged": value(0)}
    write_json(tmp_path / "run/config.json", {})
    meta = {"model": "toy", "step": 3, "ema_decay": 0.99, "extra_ema_decays": [0.999, 0.5]}
    file = write_checkpoint(tmp_path / "run/checkpoints/step_00000003.safetensors", tensors, meta)
    for path in (tmp_path / "run", file):
        for weights, number, decay in (("last", 1, 0.99), ("average", 2, 0.99), (0.99, 2, 0.99), (0.999, 3, 0.999)):
            found, settings = read_weights(path, "toy", weights)
            assert found.keys() == {"w"} and found["w"][0] == number and settings["ema_decay"] == decay
            assert settings["extra_ema_decays"] == ([] if isinstance(weights, float) else [0.999, 0.5])
    with pytest.raises(ConfigError, match=r"no average of decay 0.9: .* or weights=0.5 or 0.999$"):
        read_weights(file, "toy", 0.9)
    with pytest.raises(ConfigError, match=r"unknown; choose one of average, last, or a decay"):
        read_weights(file, "toy", "0.999")


@pytest.mark.parametrize(
    ("also", "says"), [((1.5,), "between 0 and 1"), ((0.9,), "differ from ema_decay=0.9"), ((0.5, 0.5), "each other")]
)
def test_extra_ema_decays_invalid_values_raise(toy, also, says):
    with pytest.raises(ConfigError, match=says):
        toy(extra_ema_decays=also)


def test_save_runs_in_background_with_the_state_of_its_step(toy, tmp_path, monkeypatch):
    toy(folder="whole", checkpoint_every=2, keep_checkpoints=9).run()
    write, may, stood = checkpoint.save_file, threading.Event(), []

    def slow(tensors, path, metadata):
        stood.append(may.wait(10))
        write(tensors, path, metadata)

    def hook(step, error):
        if step == 3:  # the write begun after step 2 cannot end before this
            stood.append(list((tmp_path / "run/checkpoints").glob("step_*")))
            may.set()
        return error

    monkeypatch.setattr(checkpoint, "save_file", slow)
    toy(checkpoint_every=2, keep_checkpoints=9, hook=hook).run()
    assert stood == [[], True, True, True]
    assert saved_steps(tmp_path / "run") == [2, 4, 6]
    for path in (tmp_path / "run/checkpoints").glob("step_*"):
        assert_identical(read_checkpoint(path)[0], read_checkpoint(tmp_path / "whole/checkpoints" / path.name)[0])


@pytest.mark.parametrize(("step", "reached"), [(2, 4), (6, 6)])
def test_save_failed_write_raises_at_the_next_or_at_the_end(toy, tmp_path, monkeypatch, step, reached):
    full_at(monkeypatch, step)
    trainer = toy(checkpoint_every=2)
    with pytest.raises(CheckpointError, match=f"step_0000000{reached}.*No space left"):
        trainer.run()
    assert trainer.step == reached
    assert saved_steps(tmp_path / "run") == list(range(2, step, 2))


def test_save_failed_write_followed_by_a_good_one_warns(toy, tmp_path, monkeypatch):
    full_at(monkeypatch, 2, last=2)
    with pytest.warns(UserWarning, match="step_00000002.*No space left.*step 4 was written"):
        toy(checkpoint_every=2, keep_checkpoints=9).run()
    assert saved_steps(tmp_path / "run") == [4, 6]


def test_save_failed_write_does_not_hide_the_error_of_the_run(toy, monkeypatch):
    full_at(monkeypatch, 2)

    def hook(step, error):
        if step == 3:
            raise ZeroDivisionError
        return error

    with pytest.warns(UserWarning, match="step_00000002.*No space left"), pytest.raises(ZeroDivisionError):
        toy(checkpoint_every=2, hook=hook).run()


def test_background_worker_runs_in_order_and_skips_after_a_failure():
    background, done = BackgroundWorker(), []
    for i in range(3):
        background.submit(lambda i=i: done.append(i))
    assert background.finish() is None and done == [0, 1, 2]
    background.submit(lambda: 1 / 0)
    background.submit(lambda: done.append(3))
    assert isinstance(background.finish(), ZeroDivisionError)
    background.submit(lambda: done.append(4))
    assert background.close() is None and done == [0, 1, 2, 4]
