"""Numbers, disks and files that fail a training."""

from __future__ import annotations

import errno
import os
import random
import signal
import warnings

import pytest
import torch

from factorkit.engine import checkpoint
from factorkit.engine.checkpoint import Checkpoints, read_checkpoint
from factorkit.utils.errors import CheckpointError, FactorkitError
from factorkit.utils.files import read_log
from tests.engine.trained import assert_identical, events, final_state, full_at, kill_at, make_nan_losses, saved_steps

# --- losses and gradients that are not finite ---


def test_run_non_finite_step_changes_nothing(toy, tmp_path):
    toy(stop_at=3).run()
    before = final_state(tmp_path / "run")
    toy(stop_at=4, hook=make_nan_losses(3)).run()
    assert_identical(final_state(tmp_path / "run"), before)  # batch statistics, averages and moments too
    skips = [e for e in read_log(tmp_path / "run") if e["event"] == "skip"]
    assert [e["step"] for e in skips] == [3] and "not finite" in skips[0]["message"]


def test_run_infinite_gradient_is_skipped(toy, tmp_path):
    toy(hook=lambda step, error: error * 1e38 * 1e38 if step == 1 else error, steps=3).run()
    assert ("skip", 1) in events(tmp_path / "run")
    assert all(t.isfinite().all() for t in final_state(tmp_path / "run").values())


def test_run_three_consecutive_non_finite_steps_stop_it(toy, tmp_path):
    trainer = toy(steps=9, checkpoint_every=2, hook=make_nan_losses(4, 5, 6, 7))
    why = r"3 consecutive steps .*in step 6 the loss of image \d.*checkpoints; try a lower learning_"
    with pytest.raises(FactorkitError, match=why):
        trainer.run()
    found = final_state(tmp_path / "run")
    assert all(t.isfinite().all() for t in found.values())
    assert found["ema.n_averaged"] == 4
    assert [e for e in events(tmp_path / "run") if e[0] == "skip"] == [("skip", 4), ("skip", 5), ("skip", 6)]


def test_run_finite_step_resets_the_count(toy, tmp_path):
    toy(steps=9, hook=make_nan_losses(0, 1, 3, 4, 6, 7)).run()
    found = final_state(tmp_path / "run")
    assert found["ema.n_averaged"] == 3 and found["adam.step.1.weight"] == 3


def test_run_non_finite_image_or_parameter_is_named(toy, tmp_path):
    toy(stop_at=1, statistics=False).run()
    trainer = toy(stop_at=2, statistics=False)
    trainer.state.model[5].weight.register_hook(lambda gradient: gradient * float("nan"))
    trainer.run()
    trainer = toy(micro_batch_size=1, statistics=False)  # from the third step on, image 7 cannot be learnt from
    trainer.task.images[7] = float("inf")
    trainer.run()
    messages = {e["step"]: e["message"] for e in read_log(tmp_path / "run") if e["event"] == "skip"}
    seen = {step for step, indices in trainer.task.seen if 7 in indices}
    assert messages.keys() == {1, *seen} and seen
    assert messages[1] == "the gradient of 5.weight was not finite in step 1; the step was skipped"
    assert {messages[step] for step in seen} == {
        f"the loss of image 7 was not finite in step {step}; the step was skipped" for step in seen
    }
    assert all(t.isfinite().all() for t in final_state(tmp_path / "run").values())


# --- a full disk ---


def test_run_full_disk_at_a_checkpoint_stops_and_resumes(toy, tmp_path, monkeypatch):
    toy(folder="whole", checkpoint_every=2).run()
    write = checkpoint.save_file
    full_at(monkeypatch, 4)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(CheckpointError, match=r"step_00000006.*No space left.*free some space"):
        toy(checkpoint_every=2).run()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002.safetensors"]
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(checkpoint, "save_file", write)
    toy(checkpoint_every=2).run()
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


def test_run_full_disk_at_a_preview_raises_and_loses_no_step(toy, tmp_path, monkeypatch):
    trainer = toy(sample_every=2, checkpoint_every=2)

    def full(model, step, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.task, "inspect", full)
    with pytest.raises(CheckpointError, match=r"stopped at step 2: .*No space left.*run the same command again"):
        trainer.run()
    assert saved_steps(tmp_path / "run") == [2]


def test_run_failed_report_does_not_hide_the_exit_code(toy):
    def refuse(folder):
        raise CheckpointError("could not write report.html")

    with pytest.warns(UserWarning, match=r"report\.html"), pytest.raises(SystemExit) as caught:
        toy(hook=kill_at(2, signal.SIGTERM), report=refuse).run()
    assert caught.value.code == 143


def test_run_file_size_limit_stops_and_resumes(toy, tmp_path):
    """A limit on the size of files, as a full disk or a quota is one: in a process of its own, which it is put on."""
    toy(steps=6, stop_at=2).run()
    child = os.fork()
    if child == 0:
        import resource

        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails then, instead of killing
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            toy(checkpoint_every=3).run()
        except CheckpointError as error:
            status = 0 if "step_00000006" in str(error) and "free some space" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert saved_steps(tmp_path / "run") == [2]
    toy().run()
    toy(folder="whole").run()
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))


# --- damage ---


@pytest.fixture
def run_with_two_checkpoints(toy, tmp_path):
    """The checkpoints of a run, of steps 2 and 4; the state in the first; the second file and its content."""
    toy(stop_at=4, checkpoint_every=2).run()
    checkpoints = Checkpoints(tmp_path / "run/checkpoints")
    newest, older = checkpoints.paths()
    return checkpoints, read_checkpoint(older)[0], newest, newest.read_bytes()


def assert_taken(checkpoints: Checkpoints, older: dict[str, torch.Tensor]) -> None:
    with pytest.warns(UserWarning, match="step_00000004.*Using the previous one, step_00000002"):
        tensors, meta = checkpoints.latest()
    assert meta["step"] == 2
    assert_identical(tensors, older)


def test_restore_truncated_at_100_places_uses_the_previous(run_with_two_checkpoints):
    checkpoints, older, newest, content = run_with_two_checkpoints
    for i in range(100):
        newest.write_bytes(content[: i * len(content) // 100])
        assert_taken(checkpoints, older)


@pytest.mark.slow
def test_restore_bit_flipped_at_100_places_uses_the_previous(run_with_two_checkpoints):
    checkpoints, older, newest, content = run_with_two_checkpoints
    chance = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for i in range(100):
        at = chance.randrange(header) if i < 50 else chance.randrange(header, len(content))
        flipped = bytearray(content)
        flipped[at] ^= 1 << chance.randrange(8)
        newest.write_bytes(flipped)
        assert_taken(checkpoints, older)
    newest.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest()[1]["step"] == 4
