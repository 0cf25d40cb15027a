"""Files on disk: which are images, how they are listed and sorted, and how messages name them."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import os
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import features

from factorkit.utils.errors import DataError, format_count
from factorkit.utils.output_record import RECORD_NAME, OutputFilter, is_output_folder

HEIF_MODULE = next((name for name in ("pillow_heif", "pi_heif") if importlib.util.find_spec(name)), None)
HEIF_SUFFIXES = frozenset(".heic .heics .heif .hif".split())
OPTIONAL_SUFFIXES = {  # read where the installed Pillow can
    "avif": frozenset(".avif .avifs".split()),
    "jpg_2000": frozenset(".j2c .j2k .jp2 .jpf .jpx".split()),
    "webp": frozenset((".webp",)),
}
IMAGE_SUFFIXES = frozenset(
    ".apng .bmp .dib .gif .jfif .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .tga .tif .tiff".split()
).union(*(suffixes for name, suffixes in OPTIONAL_SUFFIXES.items() if features.check(name)))
if HEIF_MODULE is not None:
    IMAGE_SUFFIXES |= HEIF_SUFFIXES
VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .f4v .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
RAW_SUFFIXES = (
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .gpr .iiq .k25 .kdc .mdc .mef .mos .mrw .nef .nrw .orf .pef .ptx "
    ".raf .raw .rw2 .rwl .sr2 .srf .srw .x3f"
)
OTHER_SUFFIXES = (  # of editors, microscopes, telescopes, hospitals and games
    ".ai .bpg .cin .czi .dcm .dds .dpx .eps .exr .fit .fits .flif .hdr .icns .ico .jxl .jxr .kra .lif .nd2 .nii .nrrd "
    ".oib .ora .pcx .pdf .pfm .psb .psd .qoi .ras .sgi .svg .wdp .xcf .xpm"
)
# Images and videos that are not read: a warning names those that are left out
UNREAD_SUFFIXES = (
    HEIF_SUFFIXES.union(*OPTIONAL_SUFFIXES.values(), VIDEO_SUFFIXES, f"{RAW_SUFFIXES} {OTHER_SUFFIXES}".split())
    - IMAGE_SUFFIXES
)
SUFFIX_LIST = ", ".join(sorted(IMAGE_SUFFIXES))  # for messages
JUNK_FOLDERS = frozenset(("__MACOSX", "@eaDir"))  # of macOS archives and of Synology disks
MAX_EXAMPLES = 3  # names listed in a message


def is_image(name: str) -> bool:
    """Return whether a file of this name, relative to the user's folder or archive, is read as an image."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part in JUNK_FOLDERS for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def strip_suffix(name: str) -> str:
    """Return a name without its suffix but with its folders; images and masks are matched by it."""
    path = PurePosixPath(name)
    return path.with_suffix("").as_posix() if path.name else name


def fold_name(name: str) -> str:
    """Return a name as names are compared: composed Unicode (macOS decomposes), case folded, with forward slashes."""
    return unicodedata.normalize("NFC", name).casefold().replace("\\", "/")


def fold_stem(name: str) -> str:
    """Return a name's stem as names are compared."""
    return fold_name(strip_suffix(name))


def list_images(folder: Path) -> list[Path]:
    """List all image files below a folder; see `list_image_names`."""
    return [folder / name for name in list_image_names(folder)]


def list_image_names(folder: Path) -> list[str]:
    """List the relative paths of all image files below a folder, sorted.

    Links are followed; each folder is entered once. Broken links and what factorkit wrote are left out with a warning.

    Raises:
        DataError: a folder cannot be listed, or everything in it was written by factorkit.
    """
    refuse_output_folder(folder)

    def refuse(error: OSError) -> None:  # by default os.walk skips unreadable folders, and their images with them
        with wrap_os_errors(Path(error.filename), "so its images cannot be listed. Check its permissions."):
            raise error

    names: list[str] = []
    broken_links: list[str] = []
    unread: list[str] = []
    visited: set[str] = set()
    outputs = OutputFilter(folder)
    for current, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real_path = os.path.realpath(current)
        if real_path in visited:  # a loop of links
            folders.clear()
            continue
        visited.add(real_path)
        if outputs.skips_folder(current):
            folders.clear()
            continue
        folders.sort()
        prefix = Path(current).relative_to(folder).as_posix()
        for file in files:
            name = file if prefix == "." else f"{prefix}/{file}"
            if is_unread_image(name):
                unread.append(name)
            if is_image(name) and not outputs.skips_file(current, file):
                (names if os.path.isfile(os.path.join(current, file)) else broken_links).append(name)
    if unread:
        warnings.warn(f"{escape_name(str(folder))}: {describe_unread(unread)}", UserWarning, stacklevel=2)
    if broken_links:
        warnings.warn(
            f"{folder}: skipped {format_count(len(broken_links), 'link')} to missing images: "
            f"{format_examples(sorted(broken_links))}",
            UserWarning,
            stacklevel=2,
        )
    if not names and (text := outputs.describe()) is not None:
        raise DataError(f"{folder}: no images of yours in this folder or below it: {escape_name(text)}.")
    warn_about_outputs(folder, outputs)
    return sorted(names)


def is_unread_image(name: str) -> bool:
    """Return whether a file is an image of a format that is not read."""
    path = PurePosixPath(name)
    return path.suffix.lower() in UNREAD_SUFFIXES and is_image(path.with_suffix(".png").as_posix())


def describe_unread(names: Sequence[str]) -> str:
    """Say which images and videos are left out because their format is not read, and what to do."""
    by_suffix: dict[str, list[str]] = {}
    for name in sorted(names):
        by_suffix.setdefault(PurePosixPath(name).suffix.lower(), []).append(name)
    parts = [f"{len(of)} {suffix} ({format_examples(of, 1)})" for suffix, of in sorted(by_suffix.items())]
    suffixes, advice = frozenset(by_suffix), []
    if HEIF_SUFFIXES & suffixes:
        advice.append("pip install 'factorkit[heic]' reads .heic")
    if VIDEO_SUFFIXES & suffixes:
        advice.append("extract the frames of videos")
    if suffixes - HEIF_SUFFIXES - VIDEO_SUFFIXES:
        advice.append("convert the others to PNG or JPEG" if advice else "convert them to PNG or JPEG")
    left_out = f"left out {format_count(len(names), 'file')} of formats that are not read"
    return f"{left_out}: {', '.join(parts)}. To use them: {'; '.join(advice)}"


def refuse_output_folder(folder: Path) -> None:
    """Raise DataError if everything in the folder is factorkit's own output."""
    if is_output_folder(folder):
        raise DataError(
            f"{escape_name(str(folder))}: factorkit wrote this folder ({RECORD_NAME} in it), and results are not data. "
            f"Give a folder of your own images; to use these as data, copy them to another folder or delete "
            f"{RECORD_NAME}."
        )


def warn_about_outputs(where: Path, outputs: OutputFilter) -> None:
    """Say what a reader left out because factorkit wrote it."""
    if (text := outputs.describe()) is not None:
        warnings.warn(f"{escape_name(str(where))}: {escape_name(text)}", UserWarning, stacklevel=3)


def natural_sort_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key that orders numbers in names by value: 2 before 10."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    # Compares numbers by length, then digits: int() refuses numbers of thousands of digits.
    numbers = [part.lstrip("0") if part[0] in "0123456789" else None for part in parts]
    return [(1, 0, part) if n is None else (0, len(n), n) for part, n in zip(parts, numbers, strict=True)], name


def natural_order(names: Sequence[str]) -> list[int]:
    """Return the rows of names in natural order; files are listed with 10 before 2."""
    return sorted(range(len(names)), key=lambda i: natural_sort_key(names[i]))


def escape_name(name: str) -> str:
    """Return a name for a message: on one line, without control characters."""
    return name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode("ascii")


def format_examples(names: Sequence[str], limit: int = MAX_EXAMPLES) -> str:
    """Return the first few names for a message, separated by commas."""
    return ", ".join(map(escape_name, names[:limit])) + (", ..." if len(names) > limit else "")


@contextlib.contextmanager
def wrap_os_errors(path: Path, advice: str) -> Iterator[None]:
    """Convert OSError to a DataError that names the path, the cause and the advice."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO)
        raise DataError(f"{escape_name(str(path))}: {reason}, {advice}") from error


def stat_file(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time in ns, a cheap check whether a file has changed."""
    with wrap_os_errors(path, "although it was listed before. Try again."):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
