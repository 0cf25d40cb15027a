"""Table 3.1: reconstruction beside supervised poses and NeRF--."""

from __future__ import annotations

from factorkit.reproduce import views
from factorkit.reproduce.experiment import Citation, Experiment, Row
from factorkit.reproduce.setup import Setup

THESIS = "dissertation, table 3.1"
ROWS = {
    "supervised": {"poses": "known"},
    "NeRF--": {"poses": "learned"},
    "ours, joint as in the thesis": views.JOINT,
    "ours, balanced search": {"search": "dictionary"},
}
#: PSNR, SSIM and LPIPS of supervised NeRF, NeRF-- and ours; None where it found no poses
CITED: dict[str, tuple[tuple[float, float, float] | None, ...]] = {
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


def cited() -> list[Citation]:
    """Ours is rendered from the encoder's poses in the dissertation, the others from their own."""
    found = []
    for scene, methods in CITED.items():
        for method, values in zip(("supervised", "NeRF--", "ours"), methods, strict=True):
            end = "_encoder" if method == "ours" else ""
            numbers = zip(("psnr", "ssim", "lpips"), values or (), strict=False)
            named = f"{method}, {scene}" + ("" if values else ": no poses found")
            found.append(Citation(named, THESIS, {key + end: value for key, value in numbers}))
    return found


def rows(setup: Setup) -> list[Row]:
    return [
        Row(name, lambda s, seed, setting=setting: views.score(s, views.train(s, seed, setting)))
        for name, setting in ROWS.items()
    ]


EXPERIMENT = Experiment(
    name="table3.1",
    title="reconstruction without poses, beside known and learned ones",
    data=views.DATA,
    duration=views.DURATION,
    columns=(*views.CAMERAS, *views.AT_TRUTH, *views.AT_ENCODER),
    rows=rows,
    citations=cited(),
    notes=(views.NOTE, "One scene a folder; give each its own OUT."),
)
