"""What the flags of all commands are made of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

#: What a command found, as JSON-able data and as text for a person.
Result = tuple[dict[str, Any], str]

OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
#: Given or not, on a command; a setting of a training has its --no- beside it.
Flag = FlagCreatePairsOff[bool]
OptionalInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]


@dataclass(kw_only=True)
class Command:
    """What every command takes."""

    json: Flag = False
    """Print the result as one JSON object, the only line on standard output."""
    debug: Flag = False
    """On an error, show where in the code it arose."""

    def run_command(self) -> Result:
        """Do the work."""
        raise NotImplementedError

    @classmethod
    def parse(cls, prog: str, args: Sequence[str]) -> Command:
        """The command with these flags. Raises SystemExit, as parsers do, after help and for mistakes."""
        return read_flags(cls, cls, prog, args)


def read_flags(kind: Any, manual: type, prog: str, args: Sequence[str], **options: Any) -> Any:
    """``kind`` with the flags of a command line, its page taken from ``manual``."""
    # a description of our own: tyro would take the examples for a section of the docstring, and leave them out
    options |= {"prog": prog, "args": args, "description": inspect.getdoc(manual)}
    return tyro.cli(kind, **options)


@dataclass(kw_only=True)
class RunCommand(Command):
    """What every command on a trained run takes."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """A run folder, or one .safetensors file."""
    device: Annotated[str, arg(metavar="auto|cpu|cuda|cuda:N")] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
