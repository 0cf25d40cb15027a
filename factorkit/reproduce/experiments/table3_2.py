"""Table 3.2: the classifier's weight."""

from __future__ import annotations

from factorkit.reproduce import views

EXPERIMENT = views.ablation(
    "table3.2",
    "the weight of the camera classification",
    {f"lambda {w:g}": {"classification_weight": w} for w in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)},
    notes=(views.NOTE, "The dissertation's own table holds accuracy and PSNR on Car; its numbers are not known here."),
)
