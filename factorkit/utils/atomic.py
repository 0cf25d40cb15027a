"""Files that are written completely or not at all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

UNFINISHED = ".unfinished-"  # prefix of temporary files
_counter = itertools.count()


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds and is removed when it fails.

    The temporary path has the same suffix. A full disk or a kill leaves the old file intact.

    Args:
        path: the file to write.
        durable: wait for the disk, so that even a power failure leaves the old file or the new one.

    Raises:
        OSError: the folder cannot be written; errors of the block pass through.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def temporary_path(path: Path) -> Path:
    """Return a new path beside ``path``, with its suffix."""
    # not derived from the name of the file, which may already have the maximum length
    return path.with_name(f"{UNFINISHED}{os.getpid()}-{next(_counter)}{path.suffix}")


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():  # some platforms cannot open folders
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Save an image atomically; ``options`` and errors are those of ``Image.save``."""
    with replacing(path) as temporary:
        image.save(temporary, **options)


def clear_unfinished(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder that no other process writes to."""
    for leftover in Path(folder).glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            leftover.unlink()
