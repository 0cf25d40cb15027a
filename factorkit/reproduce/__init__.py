"""The tables and figures of the dissertation as commands.

The modules in ``experiments/`` describe them as :class:`~factorkit.reproduce.experiment.Experiment`. The runner
computes the cells of a table (a row and a seed), stores each as a JSON file that is not computed again, and writes
``table.md``, ``table.json`` and images.

    from factorkit.reproduce import reproduce
    print(reproduce("table2.1", "flowers/", out="runs/reproduce", seeds=3).text)
"""

from factorkit.reproduce.experiments import find_experiment, list_experiments
from factorkit.reproduce.runner import reproduce

__all__ = ["find_experiment", "list_experiments", "reproduce"]
