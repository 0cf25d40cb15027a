"""Find the files that a scene's camera file names: other separators, suffixes and cases, and frames without files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from factorkit.data.files import (
    IMAGE_SUFFIXES,
    describe_unread,
    escape_name,
    fold_name,
    format_examples,
    is_unread_image,
)
from factorkit.utils.errors import DataError, format_count

DEFAULT_SUFFIXES = (".png", ".jpg", ".jpeg")  # tried first for names without suffix, as Blender's files have them
MAX_MISSING_FRACTION = 0.5  # of the frames; beyond it the folder is the wrong one rather than incomplete


class FileFinder:
    """Find image files by the names in a camera file, listing each folder once.

    Args:
        root: the folder that names are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.renamed: list[str] = []
        self._listings: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str) -> Path | None:
        """Return the file of a name, else the only one that differs from it just in its suffix or case; or None.

        Raises:
            DataError: several files differ from the name only in their suffix or case.
        """
        path = self.root / name
        if "\\" in name and not path.is_file():
            name = name.replace("\\", "/")
            path = self.root / name
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            return path
        has_suffix = path.suffix.lower() in IMAGE_SUFFIXES
        if not has_suffix:
            candidates = (Path(f"{path}{suffix}") for suffix in DEFAULT_SUFFIXES)
            if found := next((candidate for candidate in candidates if candidate.is_file()), None):
                return found
        folder = self._find_folder(path.parent)
        if folder is None:
            return None
        files = self._list(folder)
        same_name = [file for file in files.get(fold_name(path.stem if has_suffix else path.name), [])]
        exact = [file for file in same_name if fold_name(file.name) == fold_name(path.name)] or same_name
        if len(exact) > 1:
            raise DataError(
                f"{escape_name(name)} is not in {folder}, and {format_examples([file.name for file in exact])} may all "
                "be it. Correct the name."
            )
        if exact and has_suffix:
            self.renamed.append(name)
        return exact[0] if exact else None

    def _find_folder(self, folder: Path) -> Path | None:
        """Return the folder, else the only one whose name differs in its case."""
        if folder.is_dir():
            return folder
        parent = None if folder.parent == folder else self._find_folder(folder.parent)
        if parent is None:
            return None
        same = [
            child for child in parent.iterdir() if child.is_dir() and fold_name(child.name) == fold_name(folder.name)
        ]
        return same[0] if len(same) == 1 else None

    def _list(self, folder: Path) -> dict[str, list[Path]]:
        if folder not in self._listings:
            listing: dict[str, list[Path]] = {}
            for file in sorted(folder.iterdir()):
                if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file():
                    listing.setdefault(fold_name(file.stem), []).append(file)
            self._listings[folder] = listing
        return self._listings[folder]

    def find_all(self, names: Sequence[str], where: str) -> dict[int, Path]:
        """Find the files of all names; names without a file are left out with one warning.

        Raises:
            DataError: more than half of the files are missing, or a name is ambiguous.
        """
        found = {i: path for i, name in enumerate(names) if (path := self.find(name)) is not None}
        missing = [name for i, name in enumerate(names) if i not in found]
        unread = [name for name in missing if is_unread_image(name) and (self.root / name).is_file()]
        if len(missing) > MAX_MISSING_FRACTION * len(names):
            if unread:
                raise DataError(f"{where}: {describe_unread(unread)}.")
            raise DataError(
                f"{where}: {len(missing)} of {format_count(len(names), 'image')} missing, the first is "
                f"{escape_name(missing[0])} (looked in {self.root}). Restore them, or remove their frames."
            )
        if missing:
            warnings.warn(
                f"{where}: left out {len(missing)} of {format_count(len(names), 'frame')} without an image file: "
                f"{format_examples(missing)}." + (f" Of these, {describe_unread(unread)}." if unread else ""),
                stacklevel=3,
            )
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on the names that do not match their files."""
        if not self.renamed:
            return ()
        return (
            f"{format_count(len(self.renamed), 'image')} found under another suffix or case: "
            f"{format_examples(self.renamed)}.",
        )
