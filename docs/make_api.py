"""Writes docs/api.md, the public functions and classes on one page, from their docstrings.

python docs/make_api.py            # a test says where the page is out of date, and runs its examples
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import factorkit
from factorkit import data, ops, rendering
from factorkit.metrics import pose, segmentation

PAGE = Path(__file__).with_name("api.md")
HEAD = """# The public functions and classes

Written by `python docs/make_api.py` from the docstrings; edit those. The examples build on each other from top to
bottom and are run by the tests, so they are tiny: trained for two steps, nothing in them is any good.

"""
SECTIONS = ("Args", "Attributes", "Returns", "Warns", "Raises", "Example")
RUNS = {
    factorkit.SegdiffRun: (
        "load",
        "segment",
        "segment_folder",
        "segment_video",
        "predictor",
        "generate",
        "recompose",
        "interpolate",
        "branches",
        "evaluate",
        "evaluate_zero_shot",
        "scores",
        "save",
    ),
    factorkit.NerfdiffRun: (
        "load",
        "poses",
        "views",
        "predict_pose",
        "reconstruct",
        "render",
        "render_path",
        "sample",
        "evaluate",
        "scores",
        "export",
        "save",
    ),
}
NAMES = {
    "Segmentation: `factorkit`": (factorkit, ("train_segdiff", "SegdiffRun", "choose_regions")),
    "Cameras and scenes: `factorkit`": (factorkit, ("train_nerfdiff", "NerfdiffRun")),
    "Loading, errors: `factorkit`": (
        factorkit,
        ("load", "FactorkitError", "ConfigError", "DataError", "CheckpointError"),
    ),
    "Volume rendering: `factorkit.rendering`": (
        rendering,
        ("render", *(name for name in rendering.__all__ if name != "render")),
    ),
    "Data: `factorkit.data`": (
        data,
        (
            "open_dataset",
            "open_source",
            "open_views",
            "load_labelled",
            "prepare",
            "read_classes",
            "make_procedural_dataset",
            "make_procedural_views",
            "draw_flowers",
            "Dataset",
            "Split",
            "LabelledImages",
            "PreparedImages",
            "Classes",
            "Views",
        ),
    ),
    "Scores of regions: `factorkit.metrics.segmentation`": (segmentation, ("scores", "fit_mapping", "evaluate_masks")),
    "Scores of cameras: `factorkit.metrics.pose`": (pose, ("pose_errors", "align", "mirrored")),
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, (module, names) in NAMES.items():
        parts.append(f"## {title}\n\n")
        for name in names:
            parts += entry(name, getattr(module, name))
    parts.append("## Operations: `factorkit.ops`\n\nEach is a `torch.library` op that runs on a CPU at least.\n\n")
    for name in ops.__all__:
        thing = getattr(ops, name)
        if callable(thing):
            said = (inspect.getdoc(thing) or "").partition("\n\n")[0]
            called = " ".join(signature(thing).split()).replace(", )", ")").replace("( ", "(")
            parts.append(f"- `{name}{called}`: {' '.join(prose(said).split())}\n")
    return "".join(parts)


def entry(name: str, thing: Any, level: int = 3) -> list[str]:
    """A heading, the signature, the docstring; and the public methods of a run."""
    made_elsewhere = isinstance(thing, type) and (thing in RUNS or issubclass(thing, Exception))
    called = "" if made_elsewhere else signature(thing)
    parts = [f"{'#' * level} {name}\n\n"]
    if called:
        parts.append(f"```\n{name}{called}\n```\n\n")
    parts.append(markdown(inspect.getdoc(thing) or "") + "\n\n")
    for method in RUNS.get(thing, ()) if isinstance(thing, type) else ():
        parts += entry(f"{name}.{method}", inspect.getattr_static(thing, method), level + 1)
    return parts


def signature(thing: Any) -> str:
    """As it is written, in lines that a page can hold; of a property its type."""
    if isinstance(thing, property):
        return f" -> {inspect.signature(thing.fget).return_annotation}"
    found = inspect.signature(getattr(thing, "__func__", thing))
    words, star = [], False
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
        star |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        words.append(written(parameter))
    returned = "" if isinstance(thing, type) else f" -> {found.return_annotation}"
    line = f"({', '.join(words)}){returned}"
    return line if len(line) <= 100 else "(\n" + "".join(f"    {word},\n" for word in words) + f"){returned}"


def written(parameter: inspect.Parameter) -> str:
    """`name: type = default`, the same in every version of Python."""
    kind = getattr(parameter.annotation, "__forward_arg__", parameter.annotation)
    name = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + parameter.name
    default = parameter.default
    if default is inspect.Parameter.empty:
        return f"{name}: {kind}"
    said = json.dumps(default) if isinstance(default, str) else repr(default)
    return f"{name}: {kind} = {'...' if '<' in said else said}"  # a default_factory has no words


def markdown(docstring: str) -> str:
    """A docstring's sections as lists, its examples as code."""
    lines, found, section = docstring.splitlines(), [], ""
    for line in lines:
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            found.append(f"**{section}**\n" if section != "Example" else "```python")
        elif section == "Example":
            found.append(line.removeprefix("    "))
        elif section and re.match(r" {4}\S", line):
            name, colon, rest = line.strip().partition(": ")
            named = section != "Returns" and colon and re.fullmatch(r"[\w*., ]+", name)
            found.append(f"- `{name}`: {prose(rest)}" if named else f"- {prose(line.strip())}")
        elif section and line.startswith("        "):
            found.append(f"  {prose(line.strip())}")
        else:
            section = section if not line else ""
            found.append(prose(line))
    text = "\n".join(found).rstrip()
    return text + "\n```" if "```python" in text else text


def prose(text: str) -> str:
    """Markdown of what Sphinx would read."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
