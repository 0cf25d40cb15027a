"""``factorkit reproduce``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from factorkit.cli.base import Command, Device, Flag, OptionalInt, OptionalPath, Result, report_interruption
from factorkit.cli.data import parse_holdout
from factorkit.utils.errors import ConfigError


@dataclass(kw_only=True)
class Reproduce(Command):
    """Run a table or figure of the dissertation.

    OUT/NAME receives table.md, table.json, images/ and cells/ with one JSON for every row and seed. A finished cell is
    not run again, so the same command continues after an interruption. Trainings are stored in OUT/runs and shared by
    all experiments. Published numbers are listed beside ours, marked as cited.

    Examples:
        factorkit reproduce --list
        factorkit reproduce table2.1 --data flowers/ --seeds 5
        factorkit reproduce table2.6 --data CUB_200_2011/ --scale gpu --out runs/cub
        factorkit reproduce table2.6 --data flowers/ --backbone uvit --out runs/transformer
        factorkit reproduce table2.7 --data imagenet/ --voc VOCdevkit/
        factorkit reproduce fig3.11 --data lego/ --seeds 1
    """

    PROCESSES = "none"

    name: Positional[Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]] = None
    """Name of the table or figure, see --list."""
    list: Flag = False
    """List every table and figure with its data, duration, columns and the numbers of the dissertation."""
    data: OptionalPath = None
    """Data to train on and score, in any format that `factorkit train` reads. The default is procedural data."""
    voc: OptionalPath = None
    """For table2.7: folder of PASCAL VOC 2012, which is scored."""
    video: OptionalPath = None
    """For fig2.14: video or folder of frames to segment. The default is a pan over a training image."""
    scale: Literal["small", "gpu", "full"] = "small"
    """small: 32 pixels, for a CPU. gpu: 64 pixels and 128 channels. full: the settings of the dissertation."""
    out: Path = Path("runs/reproduce")
    """Folder of all experiments on one data set."""
    seeds: OptionalInt = None
    """Number of seeds, from 0 on. --list shows the default."""
    rows: tuple[str, ...] = ()
    """Names of the rows to run. The default is all."""
    ignore: OptionalInt = None
    """Mask value of pixels that are not scored."""
    holdout: Annotated[str | None, arg(metavar="STR", help_behavior_hint="")] = None
    """Labelled images kept out of training, see factorkit prepare --help."""
    backbone: Literal["unet", "uvit"] | None = None
    """Network of the models of chapter 2, at the scales small and gpu. The default is the U-Net. Give each
    backbone its own --out."""
    device: Device = "auto"
    """Where to train. auto uses a GPU if there is one."""

    def execute(self) -> Result:
        """Reproduce a table or figure, or list them."""
        if self.list:
            return _list_experiments()
        if self.name is None:
            raise ConfigError("nothing to reproduce: give a table or figure, or --list to see them all")
        from factorkit.reproduce import reproduce

        changes: dict[str, Any] = {} if self.backbone is None else {"backbone": self.backbone}
        with report_interruption(self.out):
            report = reproduce(
                self.name,
                self.data,
                voc=self.voc,
                video=self.video,
                scale=self.scale,
                out=self.out,
                seeds=self.seeds,
                rows=self.rows,
                device=self.device,
                ignore=self.ignore,
                holdout=None if self.holdout is None else parse_holdout(self.holdout),
                **changes,
            )
        table = report.folder / "table.md"
        return {**report.data, "folder": str(report.folder)}, f"{report.text}\n\ntable  {table}"


def _list_experiments() -> Result:
    from factorkit.reproduce import list_experiments
    from factorkit.reproduce.experiment import format_citation

    data, lines = [], []
    for experiment in list_experiments().values():
        citations = [format_citation(experiment, citation) for citation in experiment.citations]
        columns = [column.title for column in experiment.columns]
        data.append(
            {
                "name": experiment.name,
                "title": experiment.title,
                "figures": list(experiment.figures),
                "data": experiment.data,
                "duration": dict(experiment.duration),
                "prints": columns,
                "seeds": experiment.seeds,
                "citations": citations,
            }
        )
        figures = f"  (draws {', '.join(experiment.figures)})" if experiment.figures else ""
        lines += [f"{experiment.name}  {experiment.title}{figures}", f"    data    {experiment.data}"]
        lines += [f"    {scale:<6}  {duration}" for scale, duration in experiment.duration.items()]
        seeds = f"{experiment.seeds} seed{'s' * (experiment.seeds != 1)}"
        lines += [f"    prints  {', '.join([*columns, seeds])}" if columns else "    prints  images"]
        lines += [f"    cited   {citation}" for citation in citations] + [""]
    return {"experiments": data}, "\n".join(lines).rstrip()
