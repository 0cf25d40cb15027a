"""docs/api.md: up to date, whole, and its examples run."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import factorkit

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(maker):
    assert (DOCS / "api.md").read_text(encoding="utf-8") == maker.page(), "run python docs/make_api.py"


def test_every_public_name_is_on_it(maker):
    page = maker.page()
    for module in (factorkit, maker.rendering):
        for name in module.__all__:
            assert re.search(rf"^###+ {name}$", page, re.MULTILINE), name
    for name in maker.ops.__all__:
        if callable(getattr(maker.ops, name)):
            assert f"- `{name}" in page, name


def test_docstrings_name_every_argument_of_the_runs(maker):
    for kind, methods in maker.RUNS.items():
        public = {name for name in vars(kind) if name.islower() and not name.startswith("_")}
        assert public - set(methods) <= {"samples"}, "a public method that is not on the page"
        for name in methods:
            method = inspect.getattr_static(kind, name)
            if isinstance(method, property):
                continue
            method = getattr(method, "__func__", method)
            missing = [
                p
                for p in inspect.signature(method).parameters
                if p not in ("self", "cls") and not re.search(rf"\b{p}\b", inspect.getdoc(method))
            ]
            assert not missing and "Raises" in inspect.getdoc(method), (kind.__name__, name, missing)


def test_examples_run(maker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    examples = doctest.DocTestParser().get_doctest(maker.page().replace("```", ""), {}, "api.md", None, 0)
    assert len(examples.examples) > 30
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert result.failed == 0, "".join(said)
