"""Errors a user can mend: each message says what was wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class FactorkitError(Exception):
    """Base of every error that stems from input, not from a bug; the command line prints it without a traceback."""


class ConfigError(FactorkitError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(FactorkitError, ValueError):
    """Images, masks or archives that cannot be used."""


class CheckpointError(FactorkitError, RuntimeError):
    """A checkpoint or run folder that is damaged, foreign, or in the way."""


class WriteError(FactorkitError, RuntimeError):
    """Results that could not be written; what was finished before stands."""

    exit_code = 1


class OutOfMemory(FactorkitError, MemoryError):
    """Work that does not fit into memory; the message names the settings that make it smaller."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is of the memory: Python's, torch's on a GPU, or torch's on a CPU, a mere RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question about a misspelt name, with a space behind it; nothing where none of the known ones is near."""
    near = difflib.get_close_matches(name, list(known), n=2)
    return f"Did you mean {' or '.join(near)}? " if near else ""


def first_line(error: BaseException) -> str:
    """What an error of torch or the system says before it goes into detail."""
    return (str(error) or repr(error)).splitlines()[0]


_NO_MEMORY = ("not enough memory", "can't allocate memory", "CUDA out of memory", "std::bad_alloc")
