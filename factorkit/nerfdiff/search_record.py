"""The searches for poses that were tried in a run folder, and the trainings of rejected ones, set aside in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from factorkit.engine.run_folder import CONFIG, read_object, read_settings, write_json
from factorkit.nerfdiff.epipolar_check import EPIPOLAR_CHECK, own_checks
from factorkit.nerfdiff.registered_views import LOCALISED, MODEL_FOLDER, SFM_FOLDER
from factorkit.nerfdiff.training_views import SEARCH_FILE
from factorkit.nerfdiff.verdict import log_lines
from factorkit.report.content import describe_check, judged_alarms
from factorkit.utils.errors import CheckpointError
from factorkit.utils.files import is_number, read_log

REJECTED_FOLDER = "rejected"  # in a run folder, for the trainings of rejected searches
#: cameras of structure from motion are where the photos were taken, be it on one side; those of the dictionary collapse
SPREAD_CHECKS = frozenset({"azimuth spread", "sectors in use"})
#: the checks that are neither are of masks and box, which another search would leave as they are
CAMERA_CHECKS = frozenset(
    {
        "degrees between similar views",
        "degrees from the mean direction",
        "unexplained variance",
        "duplication",
        "inverted cameras",
        "stray cameras",
        "held-out error",
        "held-out error over nearest view",
        "held-out error of freed cameras",
        "silhouette offset",
        EPIPOLAR_CHECK,
    }
)


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

    def is_better_than(self, other: Trial) -> bool:
        """Return whether this result shall be kept in place of another one that was rejected."""
        is_lower = self.cross is not None and other.cross is not None and self.cross < other.cross
        return not self.problem or is_lower

    def describe(self) -> str:
        """Return name, figure and outcome."""
        figure = "not measured" if self.cross is None else f"{self.cross:.3f} of the variance"
        outcome = f"rejected: {self.problem}" if self.problem else "not rejected"
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

    def find(self, search: str) -> Trial | None:
        """Return the trial of a search; None: it was not tried."""
        return next((trial for trial in self.trials if trial.search == search), None)

    def add(self, trial: Trial) -> SearchRecord:
        """Return the record with a trial, in place of an earlier one of the same search.

        Where its held-out error was not measured, that of the earlier one counts, and rejects it as before.
        """
        earlier = self.find(trial.search)
        if earlier is not None and trial.cross is None:
            trial = replace(trial, cross=earlier.cross, problem=trial.problem or earlier.problem)
        trials = {other.search: other for other in self.trials} | {trial.search: trial}
        return SearchRecord(tuple(trials.values()), self.next)

    def save(self, folder: Path) -> None:
        """Write the record into a run folder; raises CheckpointError if that fails."""
        write_json(folder / SEARCH_FILE, asdict(self))

    def store(self, folder: Path, kept: str, notes: tuple[str, ...] = ()) -> list[str]:
        """Save the record, and write it once into the log of the run, for its report; return it as sentences."""
        self.save(folder)
        lines = [*(f"Tried {trial.describe()}" for trial in self.trials), *notes]
        if len(self.trials) > 1:
            reason = ""
            if all(trial.problem for trial in self.trials):
                measured = sum(trial.cross is not None for trial in self.trials)
                ground = ("no held-out error was measured", "only one held-out error was measured")
                comparison = (*ground, "no search has a lower held-out error")[measured]
                reason = f", although alarms rejected it: {comparison}"
            lines.append(f'Kept search="{kept}"{reason}.')
        log_lines(folder, "search", lines)
        return lines


def load_record(folder: Path) -> SearchRecord:
    """Load the record of a run folder; an empty one if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not (folder / SEARCH_FILE).is_file():
        return SearchRecord()
    values = read_object(folder / SEARCH_FILE)
    try:
        trials = tuple(Trial(**trial) for trial in values["trials"])
        for trial in trials:
            if not (isinstance(trial.search, str) and isinstance(trial.problem, str) and is_number(trial.cross or 0.0)):
                raise TypeError(f"{trial} is no trial")
        if not isinstance(values["next"], str):
            raise TypeError(f"next={values['next']!r} is no search")
        return SearchRecord(trials, values["next"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / SEARCH_FILE} cannot be read: {error!r}. Restore it, or delete it") from error


def judge_run(folder: Path, search: str) -> Trial:
    """Return the trial of a finished run, by the newest checks of cameras that its training recorded.

    A later evaluation does not change it: the call that trained a run loads it.
    """
    alarms = judged_alarms(read_log(folder))[0] or {}
    names = CAMERA_CHECKS if search == "sfm" else CAMERA_CHECKS | SPREAD_CHECKS
    failed = [check for check in own_checks(alarms) if check.get("name") in names and check.get("status") == "failed"]
    cross = alarms.get("held_out_cross")
    problem = "; ".join(map(describe_check, failed))
    return Trial(search, None if cross is None else float(cross), problem)


def exchange(folder: Path, search: str, settings: dict[str, Any]) -> None:
    """Set the training of another search aside, and take up that of a search where it was set aside.

    The training of a rejected search moves into ``rejected/<its search>``; the folder is then of a run without a scene.
    What structure from motion found stays; a copy of its cameras follows its training, whose photos need them. A call
    that was interrupted is completed by the next one.

    Args:
        folder: of the run, which is locked.
        search: of the training that the folder is for.
        settings: of the run for a training from its start.
    """
    stored = read_settings(folder)
    if "scene" in stored and stored["search"] != search:
        target = folder / REJECTED_FOLDER / stored["search"]
        _move_training(folder, target)
        if stored["search"] == "sfm" and (folder / MODEL_FOLDER).is_dir():
            shutil.copytree(folder / MODEL_FOLDER, target / MODEL_FOLDER, dirs_exist_ok=True)
        shutil.copyfile(folder / CONFIG, target / CONFIG)
        write_json(folder / CONFIG, settings)
    source = folder / REJECTED_FOLDER / search
    if (source / CONFIG).is_file():
        _move_training(source, folder)
        (source / CONFIG).replace(folder / CONFIG)
        shutil.rmtree(source)


def _move_training(source: Path, target: Path) -> None:
    for path in list_training(source):
        moved = target / path.relative_to(source)
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)


def list_training(folder: Path) -> Iterator[Path]:
    """Yield what a training left in a run folder, but for its settings and what structure from motion found."""
    others = (CONFIG, SEARCH_FILE, REJECTED_FOLDER, "stages", SFM_FOLDER.name)
    for path in (*folder.iterdir(), *folder.glob("stages/*")):
        if path.name not in others and not path.name.startswith("."):
            yield path
    if (folder / LOCALISED).is_file():
        yield folder / LOCALISED
