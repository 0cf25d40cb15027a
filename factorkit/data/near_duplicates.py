"""`near_duplicates.txt`: which images of a set show the same thing, so that no such pair is parted by a split."""

from __future__ import annotations

import warnings

from factorkit.data.labelled import stem
from factorkit.data.source_base import Source, is_image, shown
from factorkit.errors import DataError

PAIRS_FILE = "near_duplicates.txt"


def parse_pairs(text: bytes, images: Source, where: str) -> list[tuple[str, str]]:
    """The pairs listed in a text, as the stems of these images.

    A line has two names, with or without the suffix of an image, and a tab between them where they hold spaces; what
    follows a `#` is a comment. A pair that names no image is left out.

    Args:
        text: in UTF-8.
        images: what the names are looked for in.
        where: what messages call the text.

    Warns:
        UserWarning: of names that are of no image.

    Raises:
        DataError: a line of more or fewer names, no text, or none of its names is of an image.
    """
    try:
        lines = text.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: no text in UTF-8: {error}. It lists two names a line.") from error
    stems = {stem(name) for name in images.names}
    names, strangers, pairs = 0, [], []
    for number, line in enumerate(lines, start=1):
        listed = line.split("#")[0].strip()
        words = [word.strip() for word in listed.split("\t") if word.strip()] if "\t" in listed else listed.split()
        if len(words) not in (0, 2):
            raise DataError(
                f"{where}, line {number}: expected two names (put a tab between them where they hold spaces), found "
                f"'{shown(line.strip())}'."
            )
        found = [word if word in stems or not is_image(word) else stem(word) for word in words]
        names += len(words)
        strangers += [word for word, key in zip(words, found, strict=True) if key not in stems]
        if words and stems.issuperset(found):
            pairs.append((found[0], found[1]))
    if strangers:
        said = (
            f"{where}: {len(strangers)} of its {names} names are of no image, the first is {shown(strangers[0])}; "
            f"images are named like {shown(images.names[0])}."
        )
        if len(strangers) == names:
            raise DataError(f"{said} Write the names as they are, or take the file out.")
        warnings.warn(f"{said} The twins of those that are misspelt may be trained on.", UserWarning, stacklevel=2)
    return pairs
