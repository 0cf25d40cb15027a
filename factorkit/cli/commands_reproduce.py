"""What ``factorkit reproduce`` does; see :mod:`factorkit.cli.commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from factorkit.cli.flag_types import Result
from factorkit.cli.words import saying_what_is_saved
from factorkit.reproduce import experiments, reproduce
from factorkit.reproduce.table import citation_words


def run(name: str, data: Path | None, *, out: Path, **options: Any) -> Result:
    """An experiment; options are those of :func:`factorkit.reproduce.reproduce`."""
    with saying_what_is_saved(out):
        report = reproduce(name, data, out=out, **options)
    return {**report.data, "folder": str(report.folder)}, f"{report.text}\n\ntable  {report.folder / 'table.md'}"


def list_experiments() -> Result:
    """All of them, with what each needs and prints."""
    found, lines = [], []
    for experiment in experiments().values():
        cited = [citation_words(experiment, c) for c in experiment.citations]
        prints = [column.title for column in experiment.columns]
        found.append(
            {
                "name": experiment.name,
                "title": experiment.title,
                "figures": list(experiment.figures),
                "data": experiment.data,
                "duration": dict(experiment.duration),
                "prints": prints,
                "seeds": experiment.seeds,
                "citations": cited,
            }
        )
        also = f"  (draws {', '.join(experiment.figures)})" if experiment.figures else ""
        lines += [f"{experiment.name}  {experiment.title}{also}", f"    data    {experiment.data}"]
        lines += [f"    {scale:<6}  {words}" for scale, words in experiment.duration.items()]
        seeds = f"{experiment.seeds} seed{'s' * (experiment.seeds != 1)}"
        lines += [f"    prints  {', '.join([*prints, seeds])}" if prints else "    prints  pictures"]
        lines += [f"    cited   {words}" for words in cited] + [""]
    return {"experiments": found}, "\n".join(lines).rstrip()
