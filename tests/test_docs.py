"""The documentation site: it builds without a warning, its API pages are complete, and their examples run."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import factorkit
from factorkit import ops, rendering

ROOT = Path(__file__).resolve().parents[1]
# In the order of their examples, which build on each other.
PAGES = ("segmentation", "nerfdiff", "loading", "settings", "rendering", "data", "metrics", "ops")


def documented() -> dict[str, Any]:
    """Return the objects of the API pages by their dotted names."""
    text = "".join((ROOT / f"docs/api/{page}.md").read_text(encoding="utf-8") for page in PAGES)
    return {name: resolve(name) for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


def resolve(name: str) -> Any:
    """Return the object behind a dotted name."""
    words = name.split(".")
    value: Any = __import__(words[0])
    for index, word in enumerate(words[1:], 2):
        if not hasattr(value, word):
            __import__(".".join(words[:index]))
        value = getattr(value, word)
    return value


def public_members(value: Any) -> dict[str, Any]:
    """Return the public methods and properties of a class, in the order of the source."""
    if not isinstance(value, type):
        return {}
    return {
        name: getattr(member, "__func__", member)
        for kind in reversed(value.__mro__)
        if kind.__module__.startswith("factorkit")
        for name, member in vars(kind).items()
        if not name.startswith("_") and (callable(getattr(member, "__func__", member)) or isinstance(member, property))
    }


def test_api_pages_list_every_public_name():
    names = documented()
    expected = {f"factorkit.{name}" for name in factorkit.__all__}
    expected |= {f"factorkit.rendering.{name}" for name in rendering.__all__ if name != "render"}
    expected |= {f"factorkit.ops.{name}" for name in ops.__all__ if inspect.isroutine(getattr(ops, name))}
    assert not expected - set(names)


@pytest.mark.parametrize("kind", [factorkit.SegdiffRun, factorkit.NerfdiffRun])
def test_docstrings_of_runs_describe_every_argument(kind):
    for name, method in public_members(kind).items():
        text = inspect.getdoc(method)
        assert text, name
        if isinstance(method, property) or name == "samples":
            continue
        arguments = [word for word in inspect.signature(method).parameters if word not in ("self", "cls")]
        assert not [word for word in arguments if not re.search(rf"\b{word}\b", text)], name
        assert "Raises" in text, name


@pytest.mark.slow
def test_examples_of_the_api_pages_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    texts = []
    for value in documented().values():
        texts += [
            inspect.getdoc(value) or "",
            *(inspect.getdoc(member) or "" for member in public_members(value).values()),
        ]
    examples = doctest.DocTestParser().get_doctest("\n\n".join(texts), {}, "docs/api", None, 0)
    assert len(examples.examples) > 30
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=output.append)
    assert result.failed == 0, "".join(output)


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the docs extra: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site/api/segmentation/index.html").read_text(encoding="utf-8")
    assert "train_segdiff" in page
    assert ":func:" not in page
