"""Tables 3.1 and 3.2, figures 3.10, 3.11 and 3.13: scores of cameras and renders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from factorkit.reproduce.experiment import Citation, Experiment, Row, Setup
from factorkit.reproduce.nerfdiff_runs import COLUMNS, DATA, DURATION, JOINT, NOTE, train_and_score

THESIS = "dissertation, table 3.1"
#: PSNR, SSIM and LPIPS of supervised NeRF, NeRF-- and ours; None where it found no poses
PUBLISHED: dict[str, tuple[tuple[float, float, float] | None, ...]] = {
    "Fern": ((22.22, 0.64, 0.47), (21.67, 0.61, 0.50), (17.02, 0.42, 0.55)),
    "Flower": ((25.25, 0.71, 0.36), (25.34, 0.71, 0.37), (22.42, 0.58, 0.43)),
    "Fortress": ((27.60, 0.73, 0.38), (26.20, 0.63, 0.49), (22.02, 0.50, 0.51)),
    "Horns": ((24.25, 0.68, 0.44), (22.53, 0.61, 0.50), (17.48, 0.43, 0.55)),
    "Leaves": ((18.81, 0.52, 0.47), (18.88, 0.53, 0.47), (14.44, 0.42, 0.60)),
    "Orchids": ((19.09, 0.51, 0.46), (16.73, 0.39, 0.55), (14.34, 0.40, 0.58)),
    "Room": ((27.77, 0.87, 0.40), (25.84, 0.84, 0.44), (22.36, 0.48, 0.49)),
    "Trex": ((23.19, 0.74, 0.41), (22.67, 0.72, 0.44), (19.96, 0.62, 0.51)),
    "Car": ((28.98, 0.95, 0.08), None, (26.43, 0.92, 0.08)),
    "Lego": ((25.44, 0.92, 0.09), None, (21.38, 0.86, 0.12)),
    "Drums": ((22.12, 0.89, 0.08), None, (18.65, 0.82, 0.16)),
}


def _cite() -> Iterator[Citation]:
    """Yield the published rows. Only ours is rendered from the poses that an encoder predicts."""
    for scene, methods in PUBLISHED.items():
        for method, values in zip(("supervised", "NeRF--", "ours"), methods, strict=True):
            suffix = "_encoder" if method == "ours" else ""
            numbers = zip(("psnr", "ssim", "lpips"), values or (), strict=False)
            row = f"{method}, {scene}" + ("" if values else ": no poses found")
            yield Citation(row, THESIS, {key + suffix: value for key, value in numbers})


def _table(name: str, title: str, settings: Mapping[str, Mapping[str, Any]], **options: Any) -> Experiment:
    """Make an experiment with one training for each row."""

    def rows(setup: Setup) -> list[Row]:
        return [Row(row, partial(train_and_score, setup, changes)) for row, changes in settings.items()]

    options = {"notes": (NOTE,), **options}
    return Experiment(name=name, title=title, data=DATA, duration=DURATION, columns=COLUMNS, rows=rows, **options)


EXPERIMENTS = (
    _table(
        "table3.1",
        "reconstruction without poses, beside known and learned ones",
        {
            "supervised": {"poses": "known"},
            "NeRF--": {"poses": "learned"},
            "ours, joint as in the thesis": JOINT,
            "ours, balanced search": {"search": "dictionary"},
        },
        citations=tuple(_cite()),
        notes=(NOTE, "One scene a folder; give each its own OUT."),
    ),
    _table(
        "table3.2",
        "the weight of the camera classification",
        {f"lambda {w:g}": {**JOINT, "classification_weight": w} for w in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)},
        notes=(NOTE, "The dissertation's own table has accuracy and PSNR on Car; its numbers are not known here."),
    ),
    _table(
        "fig3.11",
        "4, 8 and 12 candidate cameras",
        {f"{n} candidates": {**JOINT, "num_candidates": n} for n in (4, 8, 12)},
    ),
    _table(
        "fig3.13",
        "training with noise beside the autoencoder",
        {"noise": {**JOINT, "noise": True}, "no noise (autoencoder)": {**JOINT, "noise": False}},
        figures=("fig3.10",),
    ),
)
