"""What search="auto" tried in a run folder, with the figure of each search; and the change from one to the next."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factorkit.engine.run_folder import CONFIG, read_object, read_settings, write_json
from factorkit.engine.run_log import RunLog
from factorkit.nerfdiff.registered_views import SFM_FOLDER
from factorkit.nerfdiff.verdict import MASK_FAILURES, write_report
from factorkit.report.content import judged_alarms
from factorkit.utils.files import read_log

FILE = "search.json"
REJECTED_FOLDER = "rejected"  # in a run folder, for the trainings of rejected searches


@dataclass(frozen=True)
class Trial:
    """One search that was tried.

    Attributes:
        search: its name.
        cross: the held-out error, as a share of the views' variance; None: not measured.
        problem: why its poses were rejected; "": they were not.
    """

    search: str
    cross: float | None = None
    problem: str = ""

    def describe(self) -> str:
        """Return name, figure and outcome."""
        figure = "not measured" if self.cross is None else f"{self.cross:.3f} of the variance"
        outcome = f"rejected: {self.problem}" if self.problem else "no alarm went off"
        return f'search="{self.search}": held-out error {figure}; {outcome.rstrip(".")}.'


@dataclass(frozen=True)
class SearchRecord:
    """The searches that were tried in a run folder.

    Attributes:
        trials: in their order.
        next: the search that takes the place of the rejected one in the folder; "": none.
    """

    trials: tuple[Trial, ...] = ()
    next: str = ""

    def has(self, search: str) -> bool:
        """Return whether a search was tried."""
        return any(trial.search == search for trial in self.trials)

    def add(self, trial: Trial) -> SearchRecord:
        """Return the record with a trial in place of an earlier one of the same search."""
        return SearchRecord((*(t for t in self.trials if t.search != trial.search), trial), self.next)

    def save(self, folder: Path) -> None:
        """Write the record into a run folder; raises CheckpointError if that fails."""
        write_json(folder / FILE, asdict(self))

    def store(self, folder: Path, notes: tuple[str, ...] = ()) -> list[str]:
        """Save the record, and write it once into the log of the run, for its report; return it as sentences."""
        self.save(folder)
        lines = [*(f"Tried {trial.describe()}" for trial in self.trials), *notes]
        logged = [event.get("lines") for event in read_log(folder) if event.get("event") == "search"]
        if lines not in logged[-1:]:
            with RunLog(folder) as log:
                log.event("search", lines=lines)
            write_report(folder)
        return lines


def load_record(folder: Path) -> SearchRecord:
    """Load the record of a run folder; an empty one if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not (folder / FILE).is_file():
        return SearchRecord()
    values = read_object(folder / FILE)
    return SearchRecord(tuple(Trial(**trial) for trial in values["trials"]), values["next"])


def judge_run(folder: Path, search: str) -> Trial:
    """Return the trial of a finished run, by its newest alarms; those of its masks say nothing about the search."""
    alarms, failures = judged_alarms(read_log(folder))
    failures = [failure for failure in failures if failure not in (alarms or {}).get(MASK_FAILURES, ())]
    cross = (alarms or {}).get("held_out_cross")
    return Trial(search, None if cross is None else float(cross), "; ".join(failures))


def set_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Move the training of a rejected search into ``rejected/<search>``; the folder is then of a run without a scene.

    A call that was interrupted is completed by the next one. What structure from motion left stays.

    Args:
        folder: of the run, which is locked.
        settings: of the run for the next search.
    """
    search = read_settings(folder)["search"]
    target = folder / REJECTED_FOLDER / search
    (target / "stages").mkdir(parents=True, exist_ok=True)
    parts = [path for path in folder.iterdir() if path.name not in (CONFIG, FILE, REJECTED_FOLDER, "stages")]
    parts += [path for path in (folder / "stages").iterdir() if path.name != SFM_FOLDER.name]
    for path in parts:
        if not path.name.startswith("."):
            path.rename(target / path.relative_to(folder))
    shutil.copyfile(folder / CONFIG, target / CONFIG)
    write_json(folder / CONFIG, settings)
