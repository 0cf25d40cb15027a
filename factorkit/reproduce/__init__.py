"""The tables and figures of the dissertation as commands.

Each is one file in ``experiments/`` with an :class:`~factorkit.reproduce.experiment.Experiment` named ``EXPERIMENT``;
what lies there is found by itself. The runner fills the cells of its table (a row and a seed), each a JSON that is not
run again, and writes ``table.md``, ``table.json`` and pictures.

    from factorkit.reproduce import reproduce
    print(reproduce("table2.1", "flowers/", out="runs/reproduce", seeds=3).text)
"""

from factorkit.reproduce.registry import experiments, find
from factorkit.reproduce.runner import reproduce

__all__ = ["experiments", "find", "reproduce"]
