"""Previews in the background, as on rank 0 of several processes (test_distributed.py has two of them)."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch

from factorkit.utils.errors import DataError, FactorkitError
from factorkit.utils.files import read_log
from tests.engine.trained import assert_identical, final_state, saved_steps


@pytest.fixture
def make_background_trainer(toy):
    """As ``toy``, with ``inspect``, in a thread of its own."""

    def make(inspect, **changes):
        trainer = toy(**{"sample_every": 2, "keep_checkpoints": 1, **changes})
        trainer._previews.background = True
        trainer.task.inspect = inspect
        return trainer

    return make


def alarms(folder):
    return [(e["step"], e["failures"], e["error"]) for e in read_log(folder) if e["event"] == "alarms"]


def test_previews_background_preview_shows_the_step_it_started_at(toy, make_background_trainer, tmp_path):
    """The checkpoint of the step outlives newer ones until the preview shows whether it is worth keeping."""
    seen, may = {}, threading.Event()

    def make_fields(step):
        return {"failures": ["bad"] if step == 4 else [], "error": [0, 0, 0.1, 0, 0.3, 0, 0.2][step]}

    def at_once(model, step, folder):
        seen[step] = [x.clone() for x in model.state_dict().values()]
        return make_fields(step)

    def slow(model, step, folder):
        assert threading.current_thread() is not threading.main_thread() and not torch.is_grad_enabled()
        assert step != 2 or may.wait(10)
        for one, other in zip(model.state_dict().values(), seen[step], strict=True):
            assert torch.equal(one, other)
        return make_fields(step)

    def hook(step, error):
        if step == 3:  # the preview started after step 2 cannot end before this
            assert alarms(tmp_path / "run") == []
            assert 2 in saved_steps(tmp_path / "run")
            may.set()
        return error

    whole = toy(folder="whole", sample_every=2, keep_checkpoints=1)
    whole.task.inspect = at_once
    whole.run()
    make_background_trainer(slow, hook=hook, checkpoint_every=1).run()
    assert alarms(tmp_path / "run") == alarms(tmp_path / "whole") == [(2, [], 0.1), (4, ["bad"], 0.3), (6, [], 0.2)]
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "whole"))
    best = [json.loads((tmp_path / name / "checkpoints/best.json").read_text()) for name in ("run", "whole")]
    assert best == [{"step": 2, "error": 0.1}] * 2
    assert saved_steps(tmp_path / "run") == saved_steps(tmp_path / "whole") == [2, 6]


def test_previews_background_preview_keeps_the_autocast_cache(make_background_trainer):
    """A weight used twice in a step is cast once, whoever's autocast ends meanwhile."""
    begun, may, ended = threading.Event(), threading.Event(), threading.Event()

    def inspect(model, step, folder):
        begun.set()
        may.wait(10)
        model(torch.zeros(1, 8, 8))
        return {"failures": []}

    trainer = make_background_trainer(inspect, precision="bf16")
    trainer._previews.start(copy.deepcopy(trainer.state.model).eval(), 0)
    trainer._previews._thread.submit(ended.set)
    weight, x = torch.nn.Parameter(torch.randn(4, 4)), torch.randn(2, 4)
    assert begun.wait(10)
    with torch.autocast("cpu", torch.bfloat16):
        first = x @ weight
        may.set()
        assert ended.wait(10)
        second = x @ weight
    assert first.grad_fn.next_functions[1][0] is second.grad_fn.next_functions[1][0]
    assert trainer._previews.pop_finished(wait=True).error is None


def test_previews_background_error_ends_the_run(make_background_trainer, tmp_path):
    def raise_error(model, step, folder):
        raise DataError(f"no image at step {step}")

    with pytest.raises(DataError, match="no image at step 2"):
        make_background_trainer(raise_error, steps=50).run()
    assert saved_steps(tmp_path / "run") and alarms(tmp_path / "run") == []


def test_previews_background_alarm_stops_with_stop_on_failure(make_background_trainer, tmp_path):
    def bad(model, step, folder):
        return {"failures": ["collapsed"] if step == 4 else [], "error": 1.0}

    trainer = make_background_trainer(bad, stop_on_failure=True)
    pop = trainer._previews.pop_finished
    trainer._previews.pop_finished = lambda wait=False: pop(wait) if wait else None  # as if each took two steps
    with pytest.raises(FactorkitError, match="stopped at step 6 by the alarms of step 4: collapsed.* of step 2"):
        trainer.run()
    assert saved_steps(tmp_path / "run") == [2, 6]


def test_previews_interrupted_run_cancels_the_preview(make_background_trainer, tmp_path):
    begun, ended = threading.Event(), []

    def endless(model, step, folder):
        try:
            while True:
                begun.set()
                model(torch.zeros(1, 8, 8))
        except Exception as error:
            ended.append(type(error).__name__)
            raise

    def hook(step, error):
        if step == 3:
            assert begun.wait(10)
            raise KeyboardInterrupt  # as of a second Ctrl-C
        return error

    with pytest.raises(KeyboardInterrupt):
        make_background_trainer(endless, hook=hook).run()
    assert ended == ["PreviewCancelledError"] and saved_steps(tmp_path / "run") == [2]

    steps = []
    make_background_trainer(lambda model, step, folder: steps.append(step) or {"failures": [], "error": 0.5}).run()
    assert steps == [2, 4, 6] and [step for step, *_ in alarms(tmp_path / "run")] == [2, 4, 6]
    make_background_trainer(lambda *given: pytest.fail("drawn already")).run()
