"""``factorkit``: finds the command, runs it, tells its result and a user's mistakes.

Results go to standard output, everything else (progress, notes, errors) to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from factorkit import __version__
from factorkit.cli.flag_types import Command
from factorkit.cli.flags import COMMANDS
from factorkit.utils.errors import ConfigError, FactorkitError, did_you_mean, first_line, is_out_of_memory

MANUAL = """\
factorkit: segmentation, and cameras and scenes, from unlabelled pictures, learnt by denoising alone

USAGE
    factorkit COMMAND [OPTIONS]
    factorkit COMMAND --help        what a command does, and every option with its default
    factorkit --version

COMMANDS
{commands}

EXAMPLES
    factorkit demo
    factorkit train segdiff --data photos/ --out runs/photos --preset fast64
    factorkit segment runs/photos holiday.jpg more_photos/ --out segmented
    factorkit generate runs/photos -n 16 --out generated
    factorkit recompose runs/photos garden.jpg --region 1 --from rose.jpg --out with_rose
    factorkit train nerfdiff --data lego/ --out runs/lego --preset fast
    factorkit render runs/lego --out orbit.gif
    factorkit evaluate runs/photos --images photos/ --masks masks/ --ignore 128 --num-fit-images 16 --baselines

EVERY COMMAND TAKES
    --json     print the result as one JSON object, the only line on standard output
    --debug    on an error, show where in the code it arose (also: FACTORKIT_DEBUG=1)

ENVIRONMENT
    FACTORKIT_CACHE        where decoded images are kept (without: factorkit in the user's cache folder)
    FACTORKIT_CLIP         the video, or folder of frames, that `reproduce fig2.14` shows
    FACTORKIT_REFERENCE    1 runs every operation as plain PyTorch
    FACTORKIT_TUNE         1 measures each kernel's number of warps on this GPU, once, and keeps it in the cache folder
    FACTORKIT_VOC          PASCAL VOC 2012, on which `reproduce table2.7` scores

EXIT STATUS
    0    done
    2    something to be mended in the command or in the files it names
    1    disk or memory full, or a bug
    130  Ctrl-C; 143 SIGTERM; 138 SIGUSR1. A training has saved by then, and the same command goes on from there.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without: the process's own); answers the exit code, see :data:`MANUAL`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        manuals = ((name, inspect.getdoc(command) or "") for name, command in COMMANDS.items())
        listed = (f"    {name:<15} {manual.splitlines()[0]}" for name, manual in manuals)
        print(MANUAL.format(commands="\n".join(listed)), end="")
        return 0
    if args[0] == "--version":
        print(f"factorkit {__version__}")
        return 0
    as_json = "--json" in args
    try:
        command = parse(args[0], args[1:])
        if command is not None:
            with notes_on_stderr():
                data, text = command.run_command()
            if os.environ.get("RANK", "0") == "0":  # of the processes torchrun starts, one speaks
                print(json.dumps(data) if as_json else text, flush=True)
        return 0
    except BrokenPipeError:  # a pipe like `| head` has read enough; nothing more may be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        code, message = explain(error)
        if as_json:
            print(json.dumps({"error": message}), flush=True)
        if code is None:
            raise
        if "--debug" in args or os.environ.get("FACTORKIT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        if several_processes():
            from factorkit.utils.distributed import exit_immediately

            exit_immediately(code)
        return code


def parse(name: str, args: Sequence[str]) -> Command | None:
    """The command ``name`` with its flags; None when help was asked for, which is printed then.

    Raises:
        ConfigError: no such command, flags it does not take, or a preset there is not.
    """
    if name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS)
        raise ConfigError(f"{name!r} is no command. {meant}There are {', '.join(COMMANDS)}; see factorkit --help")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return COMMANDS[name].parse(f"factorkit {name}", args)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ConfigError(_unframed(said.getvalue())) from None


def _unframed(text: str) -> str:
    """tyro's message as plain lines: without colours, frame and rules, and with wrapped lines joined again."""
    lines: list[str] = []
    depth = None
    for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines():
        inside = line.strip("│").rstrip()
        if line.startswith(("╭", "╰")) or not inside.strip(" ─-"):
            depth = None
            continue
        before, depth = depth, len(inside) - len(inside.lstrip())
        if depth == before:
            lines[-1] += " " + inside.strip()
        else:
            lines.append(" " * depth + inside.strip())
    return "\n ".join(lines).strip()


@contextlib.contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Whatever is printed meanwhile, by libraries too, goes to standard error, and warnings in one line each."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        print(f"warning: {message}", file=sys.stderr)

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = show
        yield


def several_processes() -> bool:
    """Whether torchrun started this process beside others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of one of several processes whose fellow is gone or was never reached."""
    if not several_processes():
        return False
    from factorkit.utils import distributed

    return distributed.is_peer_lost(error)


def explain(error: BaseException) -> tuple[int | None, str]:
    """Exit code and words for an error; no code for a bug, whose traceback has to be seen."""
    if isinstance(error, FactorkitError):
        return getattr(error, "exit_code", 2), str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if is_out_of_memory(error):
        cure = "In training lower --micro-batch-size (same result) or --batch-size; elsewhere ask for fewer images"
        return 1, f"out of memory. {cure}. {str(error).partition('.')[0]}".rstrip()
    if is_lost(error):
        lost = "another process of this run is gone or out of reach, so this one cannot go on"
        return 1, f"{lost}; what became of it is said there ({first_line(error)})"
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return 1, f"{what}. Free some space, or write to another disk, and run the same command again"
        if isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)):
            return 2, f"{what}. Check the path and its permissions"
        return 1, what
    return None, f"{type(error).__name__}: {error}"
