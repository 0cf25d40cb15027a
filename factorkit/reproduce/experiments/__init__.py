"""The experiments: each module here lists its own in ``EXPERIMENTS``."""

from __future__ import annotations

import functools
import pkgutil
import re
from importlib import import_module

from factorkit.reproduce.experiment import Experiment
from factorkit.utils.errors import ConfigError, did_you_mean


@functools.cache
def list_experiments() -> dict[str, Experiment]:
    """Return every experiment by its name: tables and figures in the order of the dissertation."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    every: list[Experiment] = [experiment for module in modules for experiment in module.EXPERIMENTS]
    return {e.name: e for e in sorted(every, key=lambda e: ([int(n) for n in re.findall(r"\d+", e.name)], e.name))}


def find_experiment(name: str) -> Experiment:
    """Return the experiment with a name, or the one that draws the figure with that name.

    Raises:
        ConfigError: there is none.
    """
    known = list_experiments()
    drawn = {figure: experiment for experiment in known.values() for figure in experiment.figures}
    if name not in known and name not in drawn:
        near = did_you_mean(name, [*known, *drawn])
        raise ConfigError(f"{name!r} is not an experiment. {near}factorkit reproduce --list shows them all")
    return known.get(name) or drawn[name]
