"""The rule that no file of the user's, and no output for another input, is ever replaced."""

from __future__ import annotations

import os

import pytest

from factorkit.utils.errors import WriteError
from factorkit.utils.output_record import (
    RECORD_NAME,
    OutputRecord,
    is_output_folder,
    mark_output_folder,
    read_record,
    recorded_files,
)


def write(folder, name, source, text="x", **options):
    with OutputRecord(folder, **options) as record, record.writing(name, source) as temporary:
        temporary.write_text(text)


def test_writing_new_file_records_name_and_source(tmp_path):
    write(tmp_path / "out", "a.png", "photos/a.jpg")
    assert (tmp_path / "out" / "a.png").read_text() == "x"
    assert read_record(tmp_path / "out")["a.png"]["source"] == "photos/a.jpg"
    assert recorded_files(tmp_path / "out") == {"a.png"}


def test_writing_again_for_same_input_replaces_file(tmp_path):
    write(tmp_path, "a.png", "A")
    write(tmp_path, "a.png", "A", "newer")
    assert (tmp_path / "a.png").read_text() == "newer"


@pytest.mark.parametrize("source", [None, "B"])
def test_writing_over_foreign_file_refuses_and_keeps_it(tmp_path, source):
    if source is None:
        (tmp_path / "a.png").write_text("mine")
    else:
        write(tmp_path, "a.png", source, "mine")
    with pytest.raises(WriteError, match=r"a\.png.*--overwrite"):
        write(tmp_path, "a.png", "A")
    assert (tmp_path / "a.png").read_text() == "mine"


def test_writing_over_file_edited_by_user_refuses(tmp_path):
    write(tmp_path, "a.png", "A")
    (tmp_path / "a.png").write_text("corrected by hand")
    with pytest.raises(WriteError, match="changed after factorkit wrote it"):
        write(tmp_path, "a.png", "A")
    assert recorded_files(tmp_path) == set()


def test_overwrite_replaces_foreign_file(tmp_path):
    (tmp_path / "a.png").write_text("mine")
    write(tmp_path, "a.png", "A", "new", overwrite=True)
    assert (tmp_path / "a.png").read_text() == "new"


def test_failed_block_keeps_earlier_file(tmp_path):
    write(tmp_path, "a.png", "A", "first")
    with OutputRecord(tmp_path) as record, pytest.raises(RuntimeError), record.writing("a.png", "A") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.png").read_text() == "first"


def test_kill_between_file_and_entry_leaves_file_replaceable(tmp_path):
    record = OutputRecord(tmp_path)
    with record.writing("a.png", "A") as temporary:
        temporary.write_text("first")
    record.close()
    lines = (tmp_path / RECORD_NAME).read_text().splitlines(keepends=True)
    (tmp_path / RECORD_NAME).write_text("".join(lines[:-1]))
    write(tmp_path, "a.png", "A", "again")
    assert (tmp_path / "a.png").read_text() == "again"


def test_older_user_file_under_name_of_unfinished_entry_is_kept(tmp_path):
    with OutputRecord(tmp_path) as record, pytest.raises(RuntimeError), record.writing("a.png", "A"):
        raise RuntimeError
    (tmp_path / "a.png").write_text("mine")
    os.utime(tmp_path / "a.png", (1, 1))
    with pytest.raises(WriteError):
        write(tmp_path, "a.png", "A")


def test_distinct_stem_for_other_input_is_numbered_and_stable(tmp_path):
    for _ in range(2):
        with OutputRecord(tmp_path) as record:
            for source, expected in (("A/img.png", "img"), ("B/img.png", "img-2"), ("C/img.png", "img-3")):
                stem = record.distinct_stem("img", ["_labels.png", "_overlay.png"], source)
                assert stem == expected
                with record.writing(f"{stem}_labels.png", source) as temporary:
                    temporary.write_text(source)


def test_distinct_stem_beside_user_file_refuses(tmp_path):
    (tmp_path / "cat_labels.png").write_text("mine")
    with OutputRecord(tmp_path) as record, pytest.raises(WriteError, match="cat_labels"):
        record.distinct_stem("cat", ["_labels.png"], "cat.jpg")


def test_empty_folder_becomes_output_folder_others_do_not(tmp_path):
    write(tmp_path / "new", "a.png", "A")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("photo")
    write(tmp_path / "photos", "cat_labels.png", "cat.jpg")
    assert is_output_folder(tmp_path / "new") and not is_output_folder(tmp_path / "photos")
    assert recorded_files(tmp_path / "photos") == {"cat_labels.png"}
    mark_output_folder(tmp_path / "photos")
    assert not is_output_folder(tmp_path / "none")


def test_damaged_record_is_read_as_far_as_it_goes(tmp_path):
    write(tmp_path, "a.png", "A")
    with open(tmp_path / RECORD_NAME, "ab") as file:
        file.write(b'{"file": "b.png", "sou')
    assert set(read_record(tmp_path)) == {"a.png"}
    write(tmp_path, "b.png", "B")
    assert set(read_record(tmp_path)) == {"a.png", "b.png"}
