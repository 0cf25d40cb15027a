"""Files and lines that are written whole or not at all, whatever the disk does."""

from __future__ import annotations

import errno
import json

import pytest
from PIL import Image

from factorkit.engine.log import RunLog
from factorkit.utils import jsonl as lines
from factorkit.utils.atomic import UNFINISHED, clear_unfinished, replacing, save_image
from factorkit.utils.jsonl import JsonLines, read_lines, read_log


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_names_may_be_as_long_as_names_can_be(tmp_path):
    save_image(Image.new("RGB", (2, 3)), tmp_path / ("x" * 251 + ".png"))
    assert Image.open(tmp_path / ("x" * 251 + ".png")).size == (2, 3)


def test_a_picture_cut_short_by_a_full_disk(tmp_path, monkeypatch):
    save_image(Image.new("RGB", (2, 3)), tmp_path / "a.png")

    def full(image, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_image(Image.new("RGB", (20, 30)), tmp_path / "a.png")
    assert names(tmp_path) == ["a.png"] and Image.open(tmp_path / "a.png").size == (2, 3)


def test_what_a_kill_left_is_cleared(tmp_path):
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
def test_a_disk_that_takes_half_a_line_keeps_whole_ones(tmp_path, room):
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


def test_a_log_on_a_full_disk_loses_no_earlier_event(tmp_path):
    with RunLog(tmp_path) as log:
        log.event("step", n=1)
        log._lines._file = Disk(log._lines._file, 20)
        with pytest.raises(OSError):
            log.event("step", n=2)
    with RunLog(tmp_path) as log:
        log.event("step", n=3)
    assert [event["n"] for event in read_log(tmp_path)] == [1, 3]


@pytest.mark.parametrize("block", [1, 3, 1 << 16])
@pytest.mark.parametrize("left", [b"", b"half", b'{"n":2}'])
def test_half_a_line_is_dropped_however_long(tmp_path, monkeypatch, block, left):
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block)
    path = tmp_path / "a.jsonl"
    for before in (b"", b'{"n": 1}\n'):
        path.write_bytes(before + left)
        JsonLines(path).close()
        assert path.read_bytes() == before


def test_each_line_is_found_again_where_it_begins(tmp_path):
    writer = JsonLines(tmp_path / "a.jsonl")
    for text in ("plain", "ünï", "caf\udce9", "a\nb"):
        writer.append({"text": text})
    found = list(read_lines(tmp_path / "a.jsonl"))
    assert [line["text"] for _, line in found] == ["plain", "ünï", "caf\udce9", "a\nb"]
    content = (tmp_path / "a.jsonl").read_bytes()
    for at, line in found:
        assert json.loads(content[at : content.index(b"\n", at)]) == line
    assert list(read_lines(tmp_path / "none.jsonl")) == []
