"""The index of a JSON lines file."""

from __future__ import annotations

import pytest

from factorkit.utils import line_index
from factorkit.utils.files import JsonLines
from factorkit.utils.line_index import LineIndex


@pytest.mark.parametrize("merged_entries", [2, 4096])
def test_lines_of_a_key_come_in_the_order_of_the_file(tmp_path, monkeypatch, merged_entries):
    monkeypatch.setattr(line_index, "MERGED_ENTRIES", merged_entries)
    file, index = JsonLines(tmp_path / "lines.jsonl"), LineIndex(tmp_path / "lines.jsonl")
    for i in range(60):
        index.add(f"key {i % 7}", file.append({"i": i, "name": "ü" * i}), 100 - i % 7)
    assert [line["i"] for line in index.lines("key 3")] == list(range(3, 60, 7))
    assert index.lines("key 7") == [] and index.number("key 7") == 0
    assert index.number("key 3") == 97 and sorted(index.numbers()) == list(range(94, 101))
    assert [line["i"] for line in index.numbered_lines()] == [55, 54, 53, 59, 58, 57, 56]
    index.add("key 0", file.append({"i": 60}))
    assert index.number("key 0") == 0 and 56 not in [line["i"] for line in index.numbered_lines()]


def test_offset_after_the_line_of_another_process_is_right(tmp_path):
    first, second = (JsonLines(tmp_path / "lines.jsonl") for _ in range(2))
    index = LineIndex(tmp_path / "lines.jsonl")
    first.append({"process": 1})
    index.add("b", second.append({"process": 2}))
    index.add("a", first.append({"process": 1, "line": 2}))
    assert index.lines("b") == [{"process": 2}] and index.lines("a") == [{"process": 1, "line": 2}]


def test_lines_of_a_deleted_file_are_left_out(tmp_path):
    index, file = LineIndex(tmp_path / "lines.jsonl"), JsonLines(tmp_path / "lines.jsonl")
    index.add("a", file.append({}))
    (tmp_path / "lines.jsonl").unlink()
    assert index.lines("a") == []
