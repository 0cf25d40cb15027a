"""The rule that no file of the user's, and no output for another input, is ever replaced."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest

from factorkit.utils.errors import WriteError
from factorkit.utils.output_record import (
    RECORD_NAME,
    OutputFilter,
    OutputRecord,
    check_file,
    is_output_folder,
    mark_output_folder,
    writing_file,
)


def write(folder, name, source, text="x", **options):
    with OutputRecord(folder, **options) as record, record.writing(name, source) as temporary:
        temporary.write_text(text)


def outputs_in(folder):
    output_filter = OutputFilter(folder)
    return {path.name for path in folder.iterdir() if output_filter.skips_file(str(folder), path.name)}


def test_writing_new_file_records_name_and_source(tmp_path):
    write(tmp_path / "out", "a.png", "photos/a.jpg")
    assert (tmp_path / "out" / "a.png").read_text() == "x"
    assert OutputRecord(tmp_path / "out").source_of("a.png") == "photos/a.jpg"
    assert outputs_in(tmp_path / "out") == {"a.png"}


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
    assert outputs_in(tmp_path) == set()


def test_overwrite_replaces_foreign_file(tmp_path):
    (tmp_path / "a.png").write_text("mine")
    write(tmp_path, "a.png", "A", "new", overwrite=True)
    assert (tmp_path / "a.png").read_text() == "new"


def test_failed_block_keeps_earlier_file(tmp_path):
    write(tmp_path, "a.png", "A", "first")
    with OutputRecord(tmp_path) as record, suppress(RuntimeError), record.writing("a.png", "A") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "a.png").read_text() == "first"


@pytest.mark.parametrize("appears", [False, True])
def test_kill_around_rename_leaves_file_replaceable(tmp_path, monkeypatch, appears):
    write(tmp_path, "a.png", "A", "first")
    replace = os.replace

    def kill(source, target):
        if str(target).endswith("a.png"):
            if appears:
                replace(source, target)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "a.png", "A", "second")
    monkeypatch.undo()
    assert (tmp_path / "a.png").read_text() == ("second" if appears else "first")
    write(tmp_path, "a.png", "A", "third")
    assert (tmp_path / "a.png").read_text() == "third"


def test_input_is_never_replaced_even_with_overwrite(tmp_path):
    (tmp_path / "in.mp4").write_text("mine")
    (tmp_path / "link.mp4").symlink_to("in.mp4")
    (tmp_path / "sub").mkdir()
    for name in ("in.mp4", "link.mp4", "sub/../in.mp4"):
        with pytest.raises(WriteError, match="one of the inputs"):
            check_file(tmp_path / name, "A", overwrite=True, inputs=[tmp_path / "in.mp4"])
    with pytest.raises(WriteError), writing_file(tmp_path / "in.mp4", "A", inputs=[tmp_path / "link.mp4"]):
        pass
    assert (tmp_path / "in.mp4").read_text() == "mine"


def test_single_file_leaves_its_folder_to_the_user(tmp_path):
    with writing_file(tmp_path / "new" / "scene.ply", "runs/a") as temporary:
        temporary.write_text("x")
    assert not is_output_folder(tmp_path / "new") and outputs_in(tmp_path / "new") == {"scene.ply"}


def test_files_of_one_input_appear_together(tmp_path):
    def fail(path):
        raise OSError(28, "No space left on device")

    with OutputRecord(tmp_path) as record:
        with pytest.raises(OSError, match="No space"):
            record.write({"a_1.png": lambda path: path.write_text("x"), "a_2.png": fail}, "A")
        assert not [path for path in tmp_path.iterdir() if path.name != RECORD_NAME]
        assert record.write({"b/1.png": lambda path: path.write_text("xyz")}, "A") == {"b/1.png": 3}
    assert outputs_in(tmp_path / "b") == {"1.png"}, "the record of a folder above counts as well"


def test_distinct_stem_for_other_input_is_numbered_and_stable(tmp_path):
    for ending in ("labels", "labels", "overlay"):
        with OutputRecord(tmp_path) as record:
            for source, expected in (("A/img.png", "img"), ("B/img.png", "img-2"), ("C/IMG.png", "IMG-3")):
                stem = record.distinct_stem(source[2:-4], source)
                assert stem == expected
                record.write({f"{stem}_{ending}.png": lambda path: path.write_text("x")}, source, stem=stem)


def test_distinct_stem_of_renamed_input_stays(tmp_path):
    with OutputRecord(tmp_path) as record:
        record.write({"img_labels.png": lambda path: path.write_text("x")}, "A/img.png", stem="img")
    for _ in range(2):
        with OutputRecord(tmp_path) as record:
            assert record.distinct_stem("img", "moved/img.png", lambda old: old == "A/img.png") == "img"
            record.check(["img_labels.png"], "moved/img.png")
            assert record.distinct_stem("img", "B/img.png") == "img-2"


def test_empty_folder_becomes_output_folder_others_do_not(tmp_path):
    write(tmp_path / "new", "a.png", "A")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("photo")
    write(tmp_path / "photos", "cat_labels.png", "cat.jpg")
    assert is_output_folder(tmp_path / "new") and not is_output_folder(tmp_path / "photos")
    assert outputs_in(tmp_path / "photos") == {"cat_labels.png"}
    mark_output_folder(tmp_path / "photos")
    assert not is_output_folder(tmp_path / "none")


def test_damaged_record_is_read_as_far_as_it_goes(tmp_path):
    write(tmp_path, "a.png", "A")
    with open(tmp_path / RECORD_NAME, "ab") as file:
        file.write(b'{"files": {"b.png": [1')
    assert outputs_in(tmp_path) == {"a.png"}
    write(tmp_path, "b.png", "B")
    assert outputs_in(tmp_path) == {"a.png", "b.png"}
