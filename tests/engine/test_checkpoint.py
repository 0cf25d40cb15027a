from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from factorkit.engine import checkpoint
from factorkit.engine.checkpoint import Checkpoints, read_checkpoint, write_checkpoint
from factorkit.utils.errors import CheckpointError

META = {"model": "toy", "model_channels": 8, "note": "größe"}


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.arange(60.0).view(3, 4, 5).transpose(0, 2) * value,
        "model.half": torch.full((4, 4), value, dtype=torch.bfloat16),
        "ema.n_averaged": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }


def saved(folder: Path, *steps: int, keep: int = 9) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, tensors(step), META)
    return checkpoints


def steps_in(folder: Path) -> list[int]:
    return sorted(int(p.stem.split("_")[1]) for p in folder.glob("step_*"))


def test_checkpoint_round_trip_is_exact(tmp_path):
    path = write_checkpoint(tmp_path / "a" / "b.safetensors", tensors(), META)
    found, meta = read_checkpoint(path)
    assert meta == META and found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert [p.name for p in path.parent.iterdir()] == ["b.safetensors"]


def test_write_checkpoint_has_default_permissions(tmp_path):
    (tmp_path / "plain").touch()
    path = write_checkpoint(tmp_path / "a.safetensors", tensors(), META)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("engine.checkpoint.save_file", OSError(errno.ENOSPC, "No space left on device")),
        ("engine.checkpoint.save_file", SafetensorError("I/O error: No space left on device")),
        ("utils.files.os.fsync", OSError(errno.EIO, "Input/output error")),
        ("utils.files.os.replace", OSError(errno.EACCES, "Permission denied")),
    ],
)
def test_save_failed_write_keeps_the_previous_checkpoint(tmp_path, monkeypatch, target, error):
    checkpoints = saved(tmp_path, 1)
    before = checkpoints.paths()[0].read_bytes()

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(f"factorkit.{target}", fail)
    for step in (1, 2):
        with pytest.raises(CheckpointError, match=rf"could not write .*{step}\.safetensors: .*run the same command"):
            checkpoints.save(step, tensors(2), META)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001.safetensors"]
    assert checkpoints.paths()[0].read_bytes() == before


def test_save_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    def half(data, path, metadata):
        Path(path).write_bytes(b"x" * 100)
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(2, tensors(), META)
    assert steps_in(tmp_path) == [1]


def test_write_checkpoint_folder_that_cannot_be_created_raises(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="could not write"):
        write_checkpoint(tmp_path / "file" / "a.safetensors", tensors(), META)


def test_read_checkpoint_tensors_do_not_follow_the_file(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", tensors(), META)
    found, _ = read_checkpoint(path)
    with open(path, "r+b") as file:  # as `cp` and `rsync --inplace` write over a file
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    if how.startswith("truncated"):
        last = len(content) - 1
        kept = {"in the length": 4, "in the header": header // 2, "after the header": header, "by a byte": last}
        path.write_bytes(content[: kept[how.removeprefix("truncated ")]])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "foreign":
        save_file({"weight": torch.ones(3)}, path)
    elif how == "text":
        path.write_text("not a checkpoint at all")
    else:
        at = {"in the header": header // 2, "at the start": header, "at the end": len(content) - 1}
        flipped = bytearray(content)
        flipped[at[how.removeprefix("flipped ")]] ^= 0x10
        path.write_bytes(flipped)


DAMAGES = [
    "truncated in the length",
    "truncated in the header",
    "truncated after the header",
    "truncated by a byte",
    "empty",
    "foreign",
    "text",
    "flipped in the header",
    "flipped at the start",
    "flipped at the end",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_latest_damaged_checkpoint_warns_and_uses_the_previous(tmp_path, how):
    checkpoints = saved(tmp_path, 1, 2)
    newest = checkpoints.paths()[0]
    damage(newest, how)
    with pytest.raises(CheckpointError, match="step_00000002"):
        read_checkpoint(newest)
    with pytest.warns(UserWarning, match=r"step_00000002.*Using the previous one, step_00000001") as caught:
        found, meta = checkpoints.latest()
    assert len(caught) == 1
    assert meta["step"] == 1 and torch.equal(found["model.weight"], tensors(1)["model.weight"])


def test_read_checkpoint_any_flipped_bit_raises(tmp_path):
    path = write_checkpoint(tmp_path / "a.safetensors", {"w": torch.arange(4.0)}, {"step": 1})
    content = path.read_bytes()
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << (i % 8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_latest_all_damaged_raises_and_names_them(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for path in checkpoints.paths():
        damage(path, "truncated by a byte")
    with pytest.raises(CheckpointError, match=r"step_00000002.*step_00000001.*out="):
        checkpoints.latest()


def test_latest_empty_folder_returns_none(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").latest() is None
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "nowhere.safetensors")


def test_latest_whole_checkpoint_gives_no_warning(tmp_path):
    checkpoints = saved(tmp_path, 9, 10, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.latest()[1]["step"] == 11


def test_save_keeps_the_newest(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert steps_in(tmp_path) == [4, 5]
    saved(tmp_path, 99_999_999, 100_000_000, keep=2)  # one digit more than the name pads to
    assert steps_in(tmp_path) == [99_999_999, 100_000_000]


def test_save_deletes_damaged_later_checkpoints(tmp_path):
    checkpoints = saved(tmp_path, 1, 4, keep=1)
    damage(checkpoints.paths()[0], "empty")
    saved(tmp_path, 3, keep=1)
    assert steps_in(tmp_path) == [3]
    assert checkpoints.latest()[1]["step"] == 3


def test_save_removes_files_of_killed_saves(tmp_path):
    for name in (".unfinished-123-0.safetensors", ".tmpAb3xYz"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("mine")
    saved(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step_00000002.safetensors"]


def test_save_after_a_kill_during_a_write_leaves_no_other_files(tmp_path):
    """safetensors writes under a name of its own first; a new release might call it otherwise."""
    child = os.fork()
    if child == 0:  # dies in the write: the limit on the size of files sends SIGXFSZ
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            write_checkpoint(tmp_path / "step_00000001.safetensors", {"w": torch.zeros(50_000)}, META)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert list(tmp_path.iterdir()), "the write was to die halfway"
    saved(tmp_path, 2)
    assert steps_in(tmp_path) == [2]


def test_keep_best_outlives_newer_checkpoints(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, keep=1)
    assert checkpoints.best() is None
    checkpoints.keep_best(2, 0.3)
    saved(tmp_path, 3, keep=1).keep_best(3, 0.5)
    saved(tmp_path, 4, keep=1)
    assert steps_in(tmp_path) == [2, 4] and checkpoints.best() == (2, 0.3)
    checkpoints.keep_best(4, 0.3)  # as good, and further on
    saved(tmp_path, 5, keep=1)
    assert steps_in(tmp_path) == [4, 5] and checkpoints.best() == (4, 0.3)
    assert checkpoints.latest()[1]["step"] == 5


def test_best_missing_or_damaged_returns_none(tmp_path):
    checkpoints = saved(tmp_path, 1, 5)
    checkpoints.keep_best(5, 0.1)
    saved(tmp_path, 3)
    assert steps_in(tmp_path) == [1, 3] and checkpoints.best() is None
    checkpoints.keep_best(3, 0.2)
    (tmp_path / checkpoint.BEST).write_text("{")
    assert checkpoints.best() is None
    checkpoints.keep_best(3, 0.9)
    assert checkpoints.best() == (3, 0.9)
