"""The ablations of the thesis' section 3.4.5, small: the same training with one setting changed, from several seeds."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from factorkit.data.views import Views
from factorkit.engine.folder import write_json
from factorkit.errors import ConfigError
from factorkit.nerfdiff.config import preset_config
from factorkit.nerfdiff.train import train_nerfdiff

#: what each figure or table changes
EXPERIMENTS: dict[str, list[dict[str, Any]]] = {
    "fig3.11": [{"cameras": n} for n in (4, 8, 12)],
    "table3.2": [{"classification_weight": w} for w in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)],
    "fig3.13": [{"noise": True}, {"noise": False}],
}
SCORES = ("rotation_median_deg", "under_10_deg", "psnr", "encoder_rotation_median_deg", "psnr_encoder")


def reproduce(
    name: str, training: Views, held_out: Views, out: Path, seeds: int = 3, preset: str = "fast",
    progress: bool = True, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train encoder and field together once for every setting and seed, and score each on held-out views.

    Args:
        name: of :data:`EXPERIMENTS`.
        training, held_out: views with true poses, which the training does not see.
        out: a folder of run folders; finished runs in it are not trained again.
        seeds: from 0 on.
        changes: further settings of all runs.

    Returns:
        The scores of every run, {"experiment", "rows": [{"setting", "seed", scores...}]}, also in ``out/NAME.json``.

    Raises:
        ConfigError: an unknown experiment, or no seeds.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(f"{name!r} is no experiment; choose one of {', '.join(EXPERIMENTS)}")
    if seeds < 1:
        raise ConfigError(f"seeds={seeds}: at least one seed has to be trained")
    rows, given = [], {"search": "joint", "resolution": max(training.size), **changes}
    usual = preset_config(preset, **given)
    for setting in EXPERIMENTS[name]:
        words = " ".join(f"{key}={value}" for key, value in setting.items())
        # what all experiments vary around is trained once for all of them
        departs = any(getattr(usual, key) != value for key, value in setting.items())
        for seed in range(seeds):
            folder = out / "runs" / f"{words if departs else 'usual'} seed={seed}"
            run = train_nerfdiff(training, out=folder, preset=preset, progress=progress, seed=seed, **(given | setting))
            scores = run.evaluate(held_out)
            rows.append({"setting": words, "seed": seed, **{key: scores[key] for key in SCORES}})
            write_json(out / f"{name}.json", {"experiment": name, "rows": rows})
    return {"experiment": name, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """A line a setting: the median over seeds of every score, and what each seed's cameras came to."""
    lines = [f"{found['experiment']:<28}" + "".join(f"{key.removesuffix('_deg'):>26}" for key in SCORES)]
    for setting in dict.fromkeys(row["setting"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["setting"] == setting]
        middle = "".join(f"{statistics.median(row[key] for row in rows):26.2f}" for key in SCORES)
        lines.append(f"{setting:<28}{middle}   " + " ".join(f"{row['under_10_deg']:.2f}" for row in rows))
    return "\n".join(lines + ["medians over seeds; at the end each seed's share of cameras under 10 degrees"])
