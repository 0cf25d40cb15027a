"""A training that memory has no room for says what helps, and loses nothing."""

from __future__ import annotations

import pytest
import torch

from factorkit.engine.checkpoint import read_checkpoint
from factorkit.utils.errors import OutOfMemoryError
from tests.engine.trained import saved_steps

LAST = "checkpoints/step_00000006.safetensors"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
    ],
)
@pytest.mark.slow
def test_run_out_of_memory_gives_advice_and_resumes(toy, tmp_path, error):
    toy(folder="whole", checkpoint_every=2).run()

    def full(step, loss):
        if step == 3:
            raise error
        return loss

    with pytest.raises(
        OutOfMemoryError, match=r"stopped at step 3: out of memory on cpu with 4 images at once"
    ) as caught:
        toy(checkpoint_every=2, hook=full).run()
    assert "Its checkpoints are intact" in str(caught.value)
    toy(checkpoint_every=2).run()
    found, whole = (read_checkpoint(tmp_path / name / LAST)[0] for name in ("run", "whole"))
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in found)


def test_run_out_of_memory_in_a_preview_is_named(toy, tmp_path):
    trainer = toy(sample_every=3)

    def full(model, step, folder):
        raise MemoryError

    trainer.task.inspect = full
    with pytest.raises(
        OutOfMemoryError, match=r"out of memory on cpu drawing the sample grids of step 3\. sample_every=0"
    ):
        trainer.run()
    assert saved_steps(tmp_path / "run") == [3]


def test_run_other_runtime_errors_pass_through(toy):
    def raise_error(step, loss):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        toy(hook=raise_error).run()
    assert type(caught.value) is RuntimeError
