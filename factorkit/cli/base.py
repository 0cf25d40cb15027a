"""What every command is made of: a dataclass of its options that does the work.

torch takes seconds to import. Command modules therefore import everything that needs it inside their functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

#: The result of a command: data for JSON, and text for a terminal.
Result = tuple[dict[str, Any], str]

# Which processes of torchrun execute a command: all, the first, or none since it runs trainings one after another.
Processes = Literal["all", "first", "none"]
Flag = FlagCreatePairsOff[bool]  # an option without a --no- form
OptionalInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
OptionalName = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
NoiseLevel = Annotated[int | None, arg(aliases=["-t"], metavar="INT", help_behavior_hint="")]
Device = Annotated[str, arg(metavar="auto|cpu|cuda|cuda:N")]
Paths = Positional[Annotated[tuple[Path, ...], arg(metavar="PATHS...", help_behavior_hint="(required)")]]


@dataclass(kw_only=True)
class Command:
    """Options that every command has."""

    json: Flag = False
    """Print the result as one JSON object, the only line on standard output."""
    debug: Flag = False
    """Show the traceback of an error."""

    BASIC: ClassVar[tuple[str, ...]] = ()  # the options that --help explains; empty for all of them
    PROCESSES: ClassVar[Processes] = "first"

    def execute(self) -> Result:
        """Do the work of the command."""
        raise NotImplementedError

    def exit_code(self, data: dict[str, Any]) -> int:
        """Return the exit code of a command that has finished with this result."""
        return 0


@dataclass(kw_only=True)
class RunCommand(Command):
    """Options of every command that uses a trained run."""

    PROCESSES: ClassVar[Processes] = "all"

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """The run folder, or one .safetensors file."""
    device: Device = "auto"
    """Where to compute. auto uses a GPU if there is one."""


@dataclass(kw_only=True)
class OutputCommand(RunCommand):
    """Options of every command that writes results of a run."""

    overwrite: Flag = False
    """Also replace files that this command did not write for the same input, or that were changed since. Inputs are
    never replaced."""
