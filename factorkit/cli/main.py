"""``factorkit``: find the command, run it, print its result or its error.

Results go to standard output, everything else (progress, notes, errors) to standard error.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module

import tyro

from factorkit import __version__
from factorkit.cli.base import Command, RunCommand, explain_mistake, print_help
from factorkit.utils.errors import ConfigError, FactorkitError, did_you_mean, first_line, is_out_of_memory

MANUAL = """\
factorkit: segmentation, and cameras and scenes, learnt from unlabelled images by denoising alone

USAGE
    factorkit COMMAND [OPTIONS]
    factorkit COMMAND --help        what a command does, and its options with their defaults
    factorkit --version

COMMANDS
{commands}

EXAMPLES
    factorkit demo
    factorkit train segdiff --data photos/ --out runs/photos --preset fast64
    factorkit segment runs/photos holiday.jpg more_photos/ --out segmented
    factorkit app photos/
    factorkit generate runs/photos -n 16 --out generated
    factorkit recompose runs/photos garden.jpg --region 1 --from rose.jpg --out with_rose
    factorkit train nerfdiff --data lego/ --out runs/lego --preset fast
    factorkit render runs/lego --out orbit.gif
    factorkit evaluate runs/photos --images photos/ --masks masks/ --ignore 128 --num-fit-images 16 --baselines

OPTIONS OF EVERY COMMAND
    --json     print the result as one JSON object, the only line on standard output
    --debug    show the traceback of an error (also: FACTORKIT_DEBUG=1)

ENVIRONMENT
    FACTORKIT_CACHE        folder of decoded images (default: factorkit in the user's cache folder)
    FACTORKIT_REFERENCE    1 runs every operation as plain PyTorch
    FACTORKIT_TUNE         1 measures the best number of warps of each kernel once and stores it in the cache

EXIT STATUS
    0    success
    1    disk or memory full, a bug, or a demo that did not succeed
    2    usage or input error
    130  Ctrl-C; 143 SIGTERM; 138 SIGUSR1. A training has saved by then, and the same command resumes it.
"""

#: The module and the class of each command, in the order of the manual.
COMMANDS = {
    "demo": ("demo", "Demo"),
    "train": ("train", "TrainSegdiff"),
    "segment": ("segment", "Segment"),
    "app": ("app", "App"),
    "generate": ("generate", "Generate"),
    "interpolate": ("generate", "Interpolate"),
    "branches": ("generate", "Branches"),
    "recompose": ("generate", "Recompose"),
    "pose": ("scene", "Pose"),
    "reconstruct": ("scene", "Reconstruct"),
    "render": ("scene", "Render"),
    "sample": ("scene", "Sample"),
    "export": ("scene", "Export"),
    "view": ("view", "View"),
    "reproduce": ("reproduce", "Reproduce"),
    "evaluate": ("evaluate", "Evaluate"),
    "choose-regions": ("segment", "ChooseRegions"),
    "checkpoint": ("checkpoint", "Checkpoint"),
    "prepare": ("data", "Prepare"),
    "doctor": ("doctor", "Doctor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of this process) and return the exit code, see :data:`MANUAL`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        summaries = ((name, (inspect.getdoc(command_class(name)) or "").partition("\n")[0]) for name in COMMANDS)
        print(MANUAL.format(commands="\n".join(f"    {name:<15} {summary}" for name, summary in summaries)), end="")
        return 0
    if args[0] == "--version":
        print(f"factorkit {__version__}")
        return 0
    as_json = "--json" in args
    try:
        command = parse(args[0], args[1:])
        if command is not None:
            with notes_on_stderr():
                if several_processes() and not join_command(command):
                    return 0
                data, text = command.execute()
            if os.environ.get("RANK", "0") == "0":  # only one of the processes that torchrun started prints
                print(json.dumps(data) if as_json else text, flush=True)
            return command.exit_code(data)
        return 0
    except BrokenPipeError:  # a reader such as `| head` is gone; flushing at exit would raise again
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


def command_class(name: str) -> type[Command]:
    """Import the class of a command."""
    module, command = COMMANDS[name]
    return getattr(import_module(f"factorkit.cli.{module}"), command)


def parse(name: str, args: Sequence[str]) -> Command | None:
    """Parse the options of the command ``name``. If help is asked for, print it and return None.

    Raises:
        ConfigError: an unknown command, option or preset.
    """
    if name not in COMMANDS:
        near = did_you_mean(name, COMMANDS)
        raise ConfigError(f"{name!r} is not a command. {near}Commands: {', '.join(COMMANDS)}; see factorkit --help")
    command, prog, default = command_class(name), f"factorkit {name}", None
    show_help, show_advanced = bool({"-h", "--help"} & {*args}), "--help-advanced" in args
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            if name == "train":
                from factorkit.cli.train import training_options

                model, command, default = training_options(args, show_help or show_advanced)
                prog = f"{prog} {model}"
            if show_help or show_advanced:
                print_help(command, prog, default, advanced=show_advanced)
                return None
            return tyro.cli(command, prog=prog, args=args, default=default, add_help=False)
    except SystemExit:
        raise ConfigError(explain_mistake(command, prog, args, messages.getvalue())) from None


@contextlib.contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Send everything that is printed, by libraries too, to standard error, and each warning in one line."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        from tqdm import tqdm

        tqdm.write(f"warning: {message}", file=sys.stderr)  # above a progress bar, not in it

    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = show
        yield


def several_processes() -> bool:
    """Return whether torchrun started this process together with others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def join_command(command: Command) -> bool:
    """Return whether this process of several executes the command; if all do, connect them.

    Raises:
        ConfigError: the command runs in one process only.
    """
    if command.PROCESSES == "none":
        raise ConfigError("this command starts trainings one after another in one process; run it without torchrun")
    if command.PROCESSES == "all" and isinstance(command, RunCommand):
        join_processes(command)
    return command.PROCESSES == "all" or os.environ.get("RANK", "0") == "0"


def join_processes(command: RunCommand) -> None:
    """Join the processes that torchrun started, each on its own device, which the command then uses."""
    from factorkit.engine.config import resolve_device
    from factorkit.utils import distributed
    from factorkit.utils.distributed import join_processes

    device = distributed.local_device(resolve_device(command.device))
    join_processes(device)
    command.device = str(device)


def explain(error: BaseException) -> tuple[int | None, str]:
    """Return the exit code and the message of an error; no code for a bug, whose traceback is needed."""
    if isinstance(error, FactorkitError):
        return getattr(error, "exit_code", 2), str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if is_out_of_memory(error):
        advice = "In training lower --micro-batch-size (same result) or --batch-size; elsewhere ask for fewer images"
        return 1, f"out of memory. {advice}. {str(error).partition('.')[0]}".rstrip()
    if several_processes():
        from factorkit.utils import distributed

        if distributed.is_peer_lost(error):
            lost = "another process of this run ended or is unreachable, so this one cannot continue"
            return 1, f"{lost}; see the output of that process ({first_line(error)})"
    if isinstance(error, OSError):
        problem = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return 1, f"{problem}. Free some space, or write to another disk, and run the same command again"
        if isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)):
            return 2, f"{problem}. Check the path and its permissions"
        return 1, problem
    return None, f"{type(error).__name__}: {error}"
