"""Files from anywhere, read so that whatever is wrong with one is a ValueError, and no code in it is ever run."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: no JSON, not UTF-8, a number too long, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """What a JSON file says. Raises OSError where it cannot be read, else as :func:`parse_json`."""
    return parse_json(path.read_text(encoding="utf-8"))


def read_arrays(path: Path, keys: Collection[str] = ()) -> np.ndarray | dict[str, np.ndarray]:
    """The array of a .npy, mapped from the disk, or the arrays of an .npz by name, in memory; of one that holds any of
    ``keys``, only those.

    Raises:
        OSError: the file cannot be read.
        ValueError: neither of them, damaged, holding objects (which would be pickled), or arrays larger than this
            machine's memory.
    """
    import numpy as np

    try:
        with open(path, "rb") as file:
            packed = file.read(2) == b"PK"
        if not packed:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as loaded:
            wanted = [name for name in keys if name in loaded.files] or loaded.files
            sizes = {member.filename.removesuffix(".npy"): member.file_size for member in loaded.zip.infolist()}
            size = sum(sizes[name] for name in wanted)
            if size > memory():
                raise MemoryError(f"it unpacks to {size / 2**30:.0f} GiB, more memory than this machine has")
            return {name: loaded[name] for name in wanted}
    except (OSError, ValueError):
        raise
    except MemoryError as error:
        raise ValueError(f"{error}. As .npy it would be read where it lies") from error
    except Exception as error:  # BadZipFile, zlib.error, EOFError, KeyError, SyntaxError of a header, ...
        raise ValueError(str(error) or type(error).__name__) from error


def memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**36
