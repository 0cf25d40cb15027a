"""Reading of untrusted files: whatever is wrong with one is a ValueError, and no code in it is run."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: not JSON, not UTF-8, a number that is too long, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: as of :func:`parse_json`.
    """
    return parse_json(path.read_text(encoding="utf-8-sig"))


def read_arrays(path: Path, keys: Collection[str] = ()) -> np.ndarray | dict[str, np.ndarray]:
    """Read the array of a .npy file (memory-mapped) or the arrays of an .npz file by name (in memory).

    Args:
        path: the file.
        keys: if an .npz file has any of these arrays, only they are read.

    Raises:
        OSError: the file cannot be read.
        ValueError: another format, damaged, with pickled objects, or larger than the memory of this machine.
    """
    import numpy as np

    try:
        with open(path, "rb") as file:
            is_zip = file.read(2) == b"PK"
        if not is_zip:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as archive:
            names = [name for name in keys if name in archive.files] or archive.files
            sizes = {member.filename.removesuffix(".npy"): member.file_size for member in archive.zip.infolist()}
            size = sum(sizes[name] for name in names)
            if size > machine_memory():
                raise MemoryError(f"it unpacks to {size / 2**30:.0f} GiB, more memory than this machine has")
            return {name: archive[name] for name in names}
    except (OSError, ValueError):
        raise
    except MemoryError as error:
        raise ValueError(f"{error}. Save it as .npy, which is memory-mapped") from error
    except Exception as error:  # BadZipFile, zlib.error, EOFError, KeyError, SyntaxError of a header, ...
        raise ValueError(str(error) or type(error).__name__) from error


def machine_memory() -> int:
    """Return the memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**36
