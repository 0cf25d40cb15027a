"""Files that appear whole or not at all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

UNFINISHED = ".unfinished-"  # how the names of temporary files begin
_counter = itertools.count()


@contextmanager
def replacing(path: Path, *, lasting: bool = False) -> Iterator[Path]:
    """A temporary path of the same suffix beside ``path``: what is written there takes the place of ``path`` when the
    block ends, and goes away when it fails, so that a full disk or a kill leaves what was there before.

    Args:
        lasting: wait for the disk, so that a machine which loses its power too leaves the one or the other.

    Raises:
        OSError: what the block raises, and a folder that cannot be written.
    """
    path = Path(path)
    # not made of the path's own name, which may be as long as names can be
    temporary = path.with_name(f"{UNFINISHED}{os.getpid()}-{next(_counter)}{path.suffix}")
    try:
        yield temporary
        if lasting:
            _sync(temporary)
        os.replace(temporary, path)
        if lasting:
            _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # some platforms open no folders; the rename is all they offer
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Save a picture whole or not at all; options are those of ``Image.save``. Raises OSError as that does."""
    with replacing(path) as temporary:
        image.save(temporary, **options)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder that nobody else writes to."""
    for leftover in Path(folder).glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            leftover.unlink()
