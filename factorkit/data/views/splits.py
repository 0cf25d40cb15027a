"""Which views are for training and which for testing: by lists, by folders, else every 8th. Test views never train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from factorkit.data.files import fold_name, format_examples
from factorkit.utils.errors import DataError, format_count

SPLITS = ("train", "val", "test")
# Folders of splits in the names of views.
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
LISTING_SUFFIXES = (".txt", "_list.txt", "_files.txt")


def split_every_eighth(count: int, split: str | None) -> list[int]:
    """Return the indices of a default split: every 8th view is for testing (Mildenhall et al. 2019)."""
    return [i for i in range(count) if split is None or (i % 8 == 0) == (split == "test")]


def select_split(names: Sequence[str], split: str | None) -> tuple[list[int], tuple[str, ...]]:
    """Return the views of a split by folders such as train/ and test/ in their names, else every 8th; and sentences."""
    of_views = [_folder_split(name) for name in names]
    held_out = [i for i, name in enumerate(of_views) if name in ("val", "test")]
    if split is None or not held_out or len(held_out) == len(names):
        return split_every_eighth(len(names), split), ()
    notes = ("The splits are those of the folders in the names of the views.",)
    if split == "train":
        return [i for i, name in enumerate(of_views) if name not in ("val", "test")], notes
    target = "test" if "test" in of_views else "val"
    return [i for i, name in enumerate(of_views) if name == target], notes


def _folder_split(name: str) -> str | None:
    folders = (SPLIT_NAMES.get(part.lower()) for part in normalize_name(name).split("/")[:-1])
    return next((folder for folder in folders if folder), None)


def select_listed(
    lists: Mapping[str, Iterable[str]], names: Sequence[str], split: str | None, where: str
) -> tuple[list[int], tuple[str, ...]]:
    """Return the views of a split by lists of names, all or some of "train", "val" and "test"; and sentences.

    The test split is the list of test, else of val, else what is not listed for training; the training split is its
    list, else what is not listed at all. Listed names may lack folders or suffix.

    Raises:
        DataError: names listed both for training and for val or test, or a list of which no name is a view.
    """
    if split is None:
        return list(range(len(names))), ()
    rows: dict[str, set[int]] = {}
    unknown: list[str] = []
    for key, texts in lists.items():
        rows[key], missing, count = find_rows(texts, names)
        unknown += missing
        if count and not rows[key]:
            raise DataError(
                f"{where}: none of the {format_count(count, 'name')} listed for {key} is a view, such as "
                f"{format_examples(missing, 1)}; the views have names like {format_examples(names, 1)}. "
                "Correct the list."
            )
    held_out = rows.get("val", set()) | rows.get("test", set())
    both = sorted(rows.get("train", set()) & held_out)
    if both:
        raise DataError(
            f"{where}: {format_count(len(both), 'frame')} listed for training and for val or test, the first is "
            f"{normalize_name(names[both[0]])}. Remove them from one of the lists."
        )
    everything = set(range(len(names)))
    if split == "train":
        selected = rows["train"] if "train" in rows else everything - held_out
    elif held_out:
        selected = rows["test" if "test" in rows else "val"]
    else:
        selected = everything - rows["train"]
    notes = [f"The files list only the splits {', '.join(lists)}."] if {"train", "test"} - lists.keys() else []
    if unknown:
        notes.append(f"{len(unknown)} names in the split lists match no frame: {format_examples(unknown)}.")
    return sorted(selected), tuple(notes)


def find_rows(listed: Iterable[str], names: Sequence[str]) -> tuple[set[int], list[str], int]:
    """Return the views of a list, its names that are no views, and their number."""
    forms = [[form(name) for name in names] for form in NAME_FORMS]
    counted = [(keys, Counter(keys)) for keys in forms]
    tables = [{key: i for i, key in enumerate(keys) if counts[key] == 1} for keys, counts in counted]
    rows, missing, count = set(), [], 0
    for text in listed:
        count += 1
        keys = zip(tables, (form(text) for form in NAME_FORMS), strict=True)
        row = next((table[key] for table, key in keys if key in table), None)
        if row is None:
            missing.append(text)
        else:
            rows.add(row)
    return rows, missing, count


def normalize_name(name: str) -> str:
    """Return one name for ./images/0.png, images//0.png and its form with backslashes."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def _without_suffix(name: str) -> str:
    return fold_name(PurePosixPath(normalize_name(name)).with_suffix("").as_posix())


def _last_part(name: str) -> str:
    return _without_suffix(name).rsplit("/", 1)[-1]


NAME_FORMS = (normalize_name, _without_suffix, _last_part)  # tried in this order


def read_listings(folders: Iterable[Path]) -> dict[str, list[str]]:
    """Return the names in train.txt, val.txt and test.txt (also train_list.txt ...) of the first folders with them.

    Raises:
        DataError: a file that cannot be read.
    """
    lists: dict[str, list[str]] = {}
    for folder in folders:
        for name in SPLITS:
            file = next((f for s in LISTING_SUFFIXES if (f := folder / f"{name}{s}").is_file()), None)
            if file is None or name in lists:
                continue
            try:
                lines = file.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{file}: cannot be read: {error}") from error
            lists[name] = [line.strip() for line in lines if line.strip()]
    return lists
