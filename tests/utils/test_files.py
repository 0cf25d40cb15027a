"""Files and lines that are written whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from PIL import Image

from factorkit.engine.run_log import RunLog
from factorkit.utils import files
from factorkit.utils.files import (
    UNFINISHED,
    JsonLines,
    clear_unfinished,
    read_lines,
    read_log,
    replacing,
    save_image,
    timeline,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_replacing_failed_write_keeps_only_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_replacing_longest_file_name_works(tmp_path):
    save_image(Image.new("RGB", (2, 3)), tmp_path / ("x" * 251 + ".png"))
    assert Image.open(tmp_path / ("x" * 251 + ".png")).size == (2, 3)


def test_save_image_full_disk_keeps_the_old_image(tmp_path, monkeypatch):
    save_image(Image.new("RGB", (2, 3)), tmp_path / "a.png")

    def full(image, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_image(Image.new("RGB", (20, 30)), tmp_path / "a.png")
    assert names(tmp_path) == ["a.png"] and Image.open(tmp_path / "a.png").size == (2, 3)


def test_clear_unfinished_removes_files_of_killed_processes(tmp_path):
    (tmp_path / f"{UNFINISHED}1-2.png").write_bytes(b"half")
    (tmp_path / "mine.png").write_bytes(b"whole")
    clear_unfinished(tmp_path)
    assert names(tmp_path) == ["mine.png"]


# --- lines ---


class Disk:
    """A file on a disk with room for so many more bytes: it takes what fits, then refuses."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        taken = min(len(data), self.room)
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= taken
        return self.file.write(data[:taken])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 30])
def test_json_lines_partial_write_keeps_whole_lines(tmp_path, room):
    writer = JsonLines(tmp_path / "a.jsonl")
    writer.append({"n": 1})
    whole = (tmp_path / "a.jsonl").read_bytes()
    file, writer._file = writer._file, Disk(writer._file, room)
    with pytest.raises(OSError, match="No space left"):
        writer.append({"n": 2, "text": "x" * 100})
    assert (tmp_path / "a.jsonl").read_bytes() == whole
    writer._file = file
    writer.append({"n": 3})
    assert [line["n"] for _, line in read_lines(tmp_path / "a.jsonl")] == [1, 3]


def test_run_log_full_disk_keeps_earlier_events(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("step", n=1)
        log._lines._file = Disk(log._lines._file, 20)
        with pytest.raises(OSError, match="space"):
            log.event("step", n=2)
    with RunLog(tmp_path) as log:
        log.event("step", n=3)
    assert [event["n"] for event in read_log(tmp_path)] == [1, 3]


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
@pytest.mark.parametrize("left", [b"", b"half", b'{"n":2}'])
def test_json_lines_opening_drops_a_half_line_of_any_length(tmp_path, monkeypatch, block, left):
    monkeypatch.setattr(files, "_BLOCK_BYTES", block)
    path = tmp_path / "a.jsonl"
    for before in (b"", b'{"n": 1}\n'):
        path.write_bytes(before + left)
        JsonLines(path).close()
        assert path.read_bytes() == before


def test_read_lines_offsets_point_to_line_starts(tmp_path):
    writer = JsonLines(tmp_path / "a.jsonl")
    for text in ("plain", "ünï", "caf\udce9", "a\nb"):
        writer.append({"text": text})
    found = list(read_lines(tmp_path / "a.jsonl"))
    assert [line["text"] for _, line in found] == ["plain", "ünï", "caf\udce9", "a\nb"]
    content = (tmp_path / "a.jsonl").read_bytes()
    for at, line in found:
        assert json.loads(content[at : content.index(b"\n", at)]) == line
    assert list(read_lines(tmp_path / "none.jsonl")) == []


def test_timeline_repeated_step_keeps_the_later_line(tmp_path):
    with RunLog(tmp_path) as log:
        for step, loss in ((10, 1.0), (20, 2.0), (30, 3.0)):
            log.event("step", step=step, loss=loss)
        log.event("resume", step=15)
        for step, loss in ((20, 2.5), (30, 3.5)):
            log.event("step", step=step, loss=loss)
    steps = timeline(read_log(tmp_path), "step")
    assert [(e["step"], e["loss"]) for e in steps] == [(10, 1.0), (20, 2.5), (30, 3.5)]


def test_timeline_repeated_step_drops_all_later_lines():
    lines = [(10, 0), (20, 0), (30, 0), (40, 0), (20, 1)]
    log = [{"event": "step", "step": step, "run": run} for step, run in lines]
    assert [(e["step"], e["run"]) for e in timeline(log, "step")] == [(10, 0), (20, 1)]


@pytest.mark.parametrize("start", [".", "sub/..", "{}", "../run"])
def test_sibling_of_any_way_to_name_a_folder_is_beside_it(tmp_path, monkeypatch, start):
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert files.sibling(Path(start.format(folder)), "_masks").resolve() == tmp_path / "run_masks"
