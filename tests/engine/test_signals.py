from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from factorkit.engine import checkpoint
from factorkit.engine import trainer as ending
from factorkit.utils.files import read_log
from tests.engine.trained import assert_identical, events, final_state, kill_at, saved_steps


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(signal.SIGTERM, SystemExit), (signal.SIGUSR1, SystemExit), (signal.SIGINT, KeyboardInterrupt)],
)
def test_run_signal_saves_and_exits_and_resumes(toy, tmp_path, number, outcome):
    before = [signal.getsignal(s) for s in ending.STOP_SIGNALS]
    toy(folder="whole").run()
    with pytest.raises(outcome) as caught:
        toy(hook=kill_at(2, number)).run()
    if outcome is SystemExit:
        assert caught.value.code == 128 + number == {15: 143, 10: 138}[number]
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000003.safetensors"]
    assert events(tmp_path / "run")[-1] == ("signal", 3)
    assert number.name in read_log(tmp_path / "run")[-1]["message"]
    assert [signal.getsignal(s) for s in ending.STOP_SIGNALS] == before
    toy().run()
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_run_signal_in_the_last_step_is_honoured(toy, tmp_path):
    with pytest.raises(SystemExit):
        toy(hook=kill_at(5, signal.SIGTERM)).run()
    assert events(tmp_path / "run")[-1] == ("end", 6)


@pytest.fixture
def interruptible():
    """Python's own way with Ctrl-C, which a process that was started in the background does not have."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def test_run_second_interrupt_stops_at_once(toy, tmp_path, interruptible):
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


def test_run_second_sigterm_still_saves(toy, tmp_path):
    """A supervisor's, and torchrun's that hands its own on."""

    def hook(step, error):
        if step == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)  # two at once are one
        return error

    with pytest.raises(SystemExit):
        toy(hook=hook).run()
    assert saved_steps(tmp_path / "run") == [3]


def test_run_outside_the_main_thread_works(toy):
    trainer = toy()
    thread = threading.Thread(target=trainer.run)
    thread.start()
    thread.join()
    assert trainer.step == 6


def test_run_signal_waits_for_the_checkpoint(toy, tmp_path, monkeypatch):
    write = checkpoint.save_file

    def slow(tensors, path, metadata):
        time.sleep(0.3)
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    with pytest.raises(SystemExit):
        toy(hook=kill_at(2, signal.SIGTERM)).run()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000003.safetensors"]
