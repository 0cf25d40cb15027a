"""Figure 3.11: how many candidate cameras."""

from __future__ import annotations

from factorkit.reproduce import views

EXPERIMENT = views.ablation(
    "fig3.11", "4, 8 and 12 candidate cameras", {f"{n} candidates": {"num_candidates": n} for n in (4, 8, 12)}
)
