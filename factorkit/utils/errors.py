"""Errors that a user can fix: each message says what is wrong, where, and what to do."""

import difflib
import textwrap
from collections.abc import Iterable

_OUT_OF_MEMORY_TEXTS = ("not enough memory", "can't allocate memory", "CUDA out of memory", "std::bad_alloc")


class FactorkitError(Exception):
    """Base class of usage and input errors; the command line prints them without a traceback."""


class ConfigError(FactorkitError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(FactorkitError, ValueError):
    """Images, masks or archives that cannot be used."""


class CheckpointError(FactorkitError, RuntimeError):
    """A checkpoint or run folder that is damaged, of another run, or in the way."""


class WriteError(FactorkitError, RuntimeError):
    """Results that could not be written; results written before are intact."""

    exit_code = 1


class OutOfMemoryError(FactorkitError, MemoryError):
    """Work that does not fit into memory; the message names the settings that reduce it."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was exhausted: Python's, a GPU's, or torch's on the CPU (a plain RuntimeError)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(text in message for text in _OUT_OF_MEMORY_TEXTS)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question that suggests similar names, with a trailing space; empty if none is similar."""
    similar = difflib.get_close_matches(name, list(known), n=2)
    return f"Did you mean {' or '.join(similar)}? " if similar else ""


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural but for 1."""
    plural = f"{noun[:-1]}ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error) or repr(error)).splitlines()[0]


def first_mismatch(error: BaseException) -> str:
    """Return the first of what tensors and a module do not have in common, by the error of load_state_dict.

    Of other errors the first line.
    """
    head, *details = str(error).splitlines() or [""]
    if not head.startswith("Error(s) in loading state_dict") or not details:
        details = [first_line(error)]
    more = f", and {len(details) - 1} more" if len(details) > 1 else ""
    return textwrap.shorten(details[0], 200, placeholder=" ...") + more
