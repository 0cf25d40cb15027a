"""Reading and writing files: atomic replacement, JSON, JSON lines, arrays; the log of a run, which is JSON lines.

Files that are read are not trusted: whatever is wrong with one is a ValueError, and no code in it is run.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

UNFINISHED = ".unfinished-"  # prefix of temporary files
LOG_NAME = "log.jsonl"  # the log in a run folder
_BLOCK_BYTES = 1 << 16  # read at once in search of the last newline
_counter = itertools.count()


def sibling(folder: Path, suffix: str) -> Path:
    """Return the folder beside ``folder`` whose name is longer by ``suffix``; "." and ".." stand for what they are."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    return named.with_name(named.name + suffix)


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block succeeds and is removed when it fails.

    The temporary path has the same suffix. A full disk or a kill leaves the old file intact.

    Args:
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
    """Save an image atomically; ``options`` and errors are those of ``Image.save``.

    PNG is compressed lightly by default: a sample grid took 3 times as long to write, for a file of 85% of the size.
    """
    with replacing(path) as temporary:
        image.save(temporary, **{"compress_level": 1, **options})


def clear_unfinished(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder that no other process writes to."""
    for leftover in Path(folder).glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            leftover.unlink()


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


class JsonLines:
    """Append JSON objects to ``path``.

    Opening removes a half-written last line, left by a killed process or a full disk. Each line reaches the operating
    system before :meth:`append` returns: a process killed afterwards loses nothing, and readers see whole lines.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        _drop_half_line(self.path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close())

    def append(self, record: dict[str, Any]) -> int:
        """Write one line, and return its offset in bytes.

        Raises:
            ValueError: the record contains NaN or an infinity, which JSON cannot express.
            OSError: the disk is full; earlier lines are intact.
        """
        try:
            rest = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError:  # a file name that is not UTF-8
            rest = json.dumps(record, allow_nan=False).encode() + b"\n"
        start, size = self._file.tell(), len(rest)
        try:
            while rest:  # a disk that fills up accepts a part first and refuses only the next part
                written = self._file.write(rest)
                if not written:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                rest = rest[written:]
        except OSError:
            self._file.truncate(start)  # otherwise the next line would be joined to this half
            raise
        return self._file.tell() - size  # another process may have appended a line before this one

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._file.close()


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the byte offset and the JSON object of each line, in order; nothing where there is no file.

    Other lines are skipped: the last one may be half written, by a process that was killed or is writing right now.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, "rb") as file:
        offset = 0
        for line in file:
            record = parse_line(line)
            if record is not None:
                yield offset, record
            offset += len(line)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it is something else."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _drop_half_line(path: Path) -> None:
    """Cut the file after its last newline."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        end = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - _BLOCK_BYTES)
            file.seek(start)
            newline = file.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            file.truncate(position)


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return every event in the log of a run folder, in order; an empty list where there is no log."""
    return [event for _, event in read_lines(Path(folder) / LOG_NAME)]


def timeline(log: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind that have a step, with rising steps.

    Where a step occurs again (a killed run repeated it, or a new seed trial began), the later line replaces all events
    from that step on: they belong to weights that are gone.
    """
    events: list[dict[str, Any]] = []
    for event in log:
        if event.get("event") != kind or not is_number(event.get("step")):
            continue
        while events and events[-1]["step"] >= event["step"]:
            events.pop()
        events.append(event)
    return events


def is_number(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a finite number; booleans are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
