"""All experiments, found as files."""

from __future__ import annotations

import functools
import pkgutil
from importlib import import_module

from factorkit.reproduce import experiments as shelf
from factorkit.reproduce.experiment import Experiment
from factorkit.utils.errors import ConfigError, did_you_mean


@functools.cache
def experiments() -> dict[str, Experiment]:
    """Every experiment by its name, tables and figures in the order of the dissertation."""
    modules = (import_module(f"{shelf.__name__}.{found.name}") for found in pkgutil.iter_modules(shelf.__path__))
    known = [module.EXPERIMENT for module in modules]
    return {e.name: e for e in sorted(known, key=lambda e: (_number(e.name), e.name))}


def find(name: str) -> Experiment:
    """The experiment of a name, or the one that draws the figure of that name.

    Raises:
        ConfigError: there is none.
    """
    known = experiments()
    drawn = {figure: e for e in known.values() for figure in e.figures}
    if name not in known and name not in drawn:
        meant = did_you_mean(name, [*known, *drawn])
        raise ConfigError(f"{name!r} is no experiment. {meant}factorkit reproduce --list shows them all")
    return known.get(name) or drawn[name]


def _number(name: str) -> list[int]:
    chapter, _, number = name.lstrip("abcdefghijklmnopqrstuvwxyz").partition(".")
    return [int(part) if part.isdigit() else 0 for part in (chapter, number)]
