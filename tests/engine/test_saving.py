"""Checkpoints are written in the background."""

from __future__ import annotations

import threading

import pytest

from factorkit.engine import checkpoint
from factorkit.engine.checkpoint import read_checkpoint
from factorkit.utils.background_worker import BackgroundWorker
from factorkit.utils.errors import CheckpointError
from tests.engine.trained import assert_identical, full_at, saved_steps


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
