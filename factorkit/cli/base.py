"""What every command is made of: a dataclass of its options that does the work, its help pages, and suggestions.

torch takes seconds to import. Command modules therefore import everything that needs it inside their functions.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from factorkit.utils.errors import FactorkitError, did_you_mean

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
#: Our option, other names for it (of other trainers, and of earlier versions), and a hint. The first row fits whose
#: option the command has; a row without an option fits every command.
SYNONYMS: tuple[tuple[str, str, str], ...] = (
    (
        "steps",
        "epochs num-epochs max-epochs n-epochs num-train-epochs",
        "One step is one batch; an epoch is the number of images divided by --batch-size.",
    ),
    (
        "steps",
        "num-steps max-steps n-steps iters iterations num-iterations max-iterations max-iter n-iters total-steps niter "
        "num-train-steps max-train-steps train-steps total-kimg kimg num-inference-steps sampling-steps ddim-steps nfe",
        "",
    ),
    ("learning-rate", "lr base-lr init-lr", ""),
    ("warmup-steps", "warmup lr-warmup lr-warmup-steps num-warmup-steps warmup-iters", ""),
    ("batch-size", "batch bs train-batch-size per-device-train-batch-size total-batch-size n-batch", ""),
    (
        "micro-batch-size",
        "gradient-accumulation-steps grad-accum accumulate-grad-batches accumulate accum-steps batch-gpu microbatch",
        "It is the number of images in memory at once; gradients are accumulated over the rest of the batch.",
    ),
    ("gradient-clip", "grad-clip clip-grad clip-grad-norm max-grad-norm gradient-clip-val grad-norm", ""),
    ("resolution", "image-size img-size imgsize imagesize imgsz image-resolution img-resolution res size", ""),
    ("size", "resolution image-size img-size imgsz res", ""),
    ("workers", "num-workers n-workers dataloader-num-workers n-threads", ""),
    ("threads", "workers num-workers n-workers dataloader-num-workers n-threads", ""),
    ("out", "output output-dir outdir out-dir save-dir save-path logdir log-dir results-dir run-dir workspace", ""),
    ("data", "dataset data-dir datadir data-path data-root dataset-dir train-dir input inputs source images root", ""),
    ("images", "data input image-dir images-dir", ""),
    ("masks", "labels annotations mask-dir masks-dir ground-truth gt", ""),
    ("paths", "input inputs images image source data files path pictures", ""),
    ("run", "checkpoint ckpt ckpt-path weights model model-path model-dir load network run-dir pretrained", ""),
    ("", "resume resume-from resume-from-checkpoint continue", "The same command with the same --out resumes the run."),
    ("preset", "config cfg model-size arch architecture recipe", ""),
    ("device", "gpu gpus gpu-id gpu-ids cuda accelerator no-cuda cpu", ""),
    ("", "nproc n-gpus num-gpus nproc-per-node distributed ddp world-size", "Start several processes with torchrun."),
    ("precision", "amp fp16 bf16 mixed-precision use-fp16 half dtype", ""),
    ("seed-trials", "seeds heats num-seeds n-seeds trials restarts", ""),
    ("seeds", "num-seeds n-seeds seed seed-trials", ""),
    ("seed", "random-seed manual-seed", ""),
    ("ema-decay", "ema ema-rate ema-beta", ""),
    ("extra-ema-decays", "ema-also", ""),
    ("lr-decay-fraction", "decay lr-decay cooldown", ""),
    ("", "optimizer optim weight-decay wd momentum betas", "The optimiser is Adam without weight decay."),
    ("", "scheduler lr-scheduler", "The schedule is a linear warm-up and decay: --warmup-steps, --lr-decay-fraction."),
    ("", "wandb wandb-project use-wandb", "Use --tensorboard; log.jsonl and report.html are always written."),
    ("checkpoint-every", "save-every save-interval save-freq save-steps checkpoint-interval ckpt-every snap", ""),
    ("keep-checkpoints", "save-total-limit keep-last save-top-k", ""),
    ("keep", "keep-checkpoints keep-last", ""),
    ("log-every", "log-interval log-freq logging-steps print-freq", ""),
    ("sample-every", "sample-interval eval-every eval-interval eval-steps validate-every", ""),
    ("regions", "k num-regions n-regions num-classes num-clusters n-clusters num-slots num-segments clusters", ""),
    ("candidates", "k regions num-regions", ""),
    ("classes", "class class-name class-cond labels label cond", ""),
    ("guidance", "cfg cfg-scale guidance-scale guidance-strength", ""),
    ("count", "num-samples n-samples num-images n-images number batch-size samples num", ""),
    ("t", "timestep noise-level level noise t-start strength", ""),
    ("model-channels", "width channels base-channels num-channels dim c", ""),
    ("channel-mult", "multipliers dim-mults ch-mult channel-multipliers", ""),
    ("num-res-blocks", "blocks res-blocks layers-per-block", ""),
    ("attention-resolutions", "attention attn-resolutions", ""),
    ("num-heads", "heads attention-heads", ""),
    ("norm-groups", "groups num-groups", ""),
    ("random-flip", "mirror flip hflip horizontal-flip", ""),
    ("high-noise-fraction", "tail", ""),
    ("num-fit-images", "fit", ""),
    ("min-improvement", "least-fall", ""),
    ("num-candidates", "cameras n-cameras num-cameras", ""),
    ("candidate-type", "candidates", ""),
    ("balance-candidates", "balance", ""),
    ("elevation-range", "elevations", ""),
    ("num-azimuths", "azimuths", ""),
    ("num-elevations", "rings", ""),
    ("optimize-camera", "freedom optimize-poses refine-poses", ""),
    ("appearance-dim", "appearance", ""),
    ("search-grid-resolution", "search-field", ""),
    ("grid-resolution", "grid grid-size voxel-resolution", ""),
    ("samples-per-ray", "samples n-samples num-samples", ""),
    ("views-per-step", "views", ""),
    ("rays-per-view", "rays n-rays num-rays rays-per-batch", ""),
    ("tv-weight", "roughness tv-loss tv-loss-weight", ""),
    ("opacity-weight", "fog", ""),
    ("num-rendered-views", "rendered", ""),
    ("finetune-steps", "tuning-steps", ""),
    ("encoder-pooling", "pooling", ""),
    ("timestep-power", "t-power", ""),
    ("timesteps", "diffusion-steps num-timesteps num-diffusion-steps num-train-timesteps", ""),
    ("schedule", "noise-schedule beta-schedule", ""),
    ("prediction", "prediction-type parameterization parametrization objective predict", ""),
    ("ignore", "ignore-index ignore-label void", ""),
    ("holdout", "val-split test-split validation-split val-fraction holdout-size val-images", ""),
    ("frames", "n-frames num-frames", ""),
    ("path", "trajectory camera-path render-path", ""),
    ("kind", "format type export-format", ""),
    ("formats", "format output-format save", ""),
)


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


def print_help(command: type[Command], prog: str, defaults: Command | None, *, advanced: bool) -> None:
    """Print the help page of a command.

    Args:
        command: the class of the options.
        prog: the words of the command line before the options.
        defaults: an instance that holds other defaults than the class, as those of a preset.
        advanced: explain the advanced options instead of the basic ones.
    """
    hints, texts = get_type_hints(command, include_extras=True), _read_option_texts(command)
    fields = {field.name: field for field in dataclasses.fields(command)}
    hidden = {name for name, field in fields.items() if Suppress in _metadata(hints[name])}
    basic = [name for name in fields if name in command.BASIC or not command.BASIC]
    others = [name for name in fields if name not in basic and name not in hidden]
    page: list[tuple[str, Any, Any]] = []
    for name in sorted(others if advanced else basic, key=lambda name: _order(command, name)):
        default = getattr(defaults, name, fields[name].default)
        options: dict[str, Any] = {} if default in (dataclasses.MISSING, tyro.MISSING) else {"default": default}
        page.append((name, Annotated[hints[name], arg(help=texts.get(name, ""))], dataclasses.field(**options)))
    description = inspect.getdoc(command)
    if advanced:
        description = (
            "The advanced options. Most users keep the defaults." if others else "There are no advanced options."
        )
    view = dataclasses.make_dataclass(command.__name__, page, kw_only=True)
    with suppress(SystemExit):
        tyro.cli(view, prog=prog, args=["--help"], description=description)
    if others and not advanced:
        names = textwrap.fill(" ".join(_option(name) for name in others), 76, break_on_hyphens=False)
        print(f"\nADVANCED OPTIONS, explained by --help-advanced\n{textwrap.indent(names, '    ')}")


def explain_mistake(command: type[Command], prog: str, args: Sequence[str], message: str) -> str:
    """Return the message for a command line that tyro refused with ``message``."""
    hints = get_type_hints(command, include_extras=True)
    names = {name.strip("_").replace("_", "-"): hints[name] for name in hints if name not in ("RESUMABLE", "BASIC")}
    options = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    unknown = [option for option in options if option.removeprefix("--no-").removeprefix("--") not in names]
    if not unknown:
        return f"{_plain_text(message)}\nAll options: {prog} --help"
    lines = [f"{option} is not an option of {prog}. {_suggest(option, names)}".rstrip() for option in unknown]
    return "\n".join([*lines, f"All options: {prog} --help"])


def _suggest(option: str, names: Mapping[str, Any]) -> str:
    negation, word = ("no-", option[5:]) if option.startswith("--no-") else ("", option[2:])
    for name, synonyms, hint in SYNONYMS:
        if word in synonyms.split() and (not name or name in names):
            if not name:
                return hint
            if Positional in _metadata(names[name]):
                return f"{name.upper()} has no option name: write it as a plain argument."
            return f"Use --{negation}{name}. {hint}"
    return did_you_mean(option, [f"--{name}" for name, hint in names.items() if Positional not in _metadata(hint)])


def _option(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def _order(command: type[Command], name: str) -> int:
    return command.BASIC.index(name) if name in command.BASIC else len(command.BASIC)


def _metadata(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__metadata__", ())


def _read_option_texts(command: type[Command]) -> dict[str, str]:
    """Read the docstring below each field of a dataclass and its bases, as one line each."""
    texts = {}
    for parent in reversed(command.__mro__):
        body: list[ast.stmt] = []
        with suppress(OSError, TypeError):  # classes made at run time have no source
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
            body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name):
                texts[field.target.id] = " ".join(ast.literal_eval(text.value).split())
    return texts


def _plain_text(message: str) -> str:
    """Return tyro's message without colours, frame and rules, and with wrapped lines joined again."""
    lines: list[str] = []
    depth = None
    for line in re.sub(r"\x1b\[[\d;]*m", "", message).splitlines():
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


class TrainingInterruptedError(FactorkitError):
    """A training was stopped from outside. The message says what is saved."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def report_interruption(*folders: Path) -> Iterator[None]:
    """Turn the exceptions of Ctrl-C and SIGTERM, raised once a training has saved, into an error with a message.

    Args:
        folders: of the run, and of what is trained for it first.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        saved = "nothing was saved yet"
        if started := [folder for folder in folders if any(folder.rglob("step_*.safetensors"))]:
            saved = f"a checkpoint is saved in {started[0]}; the same command resumes from it"
        exit_code = int(stop.code or 0) if isinstance(stop, SystemExit) else 130
        raise TrainingInterruptedError(exit_code, f"stopped: {saved}") from None


def format_duration(seconds: float) -> str:
    """Format seconds in a readable unit."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
