"""Figures 3.4, 3.5: views that were not trained on, and their reconstructions."""

from __future__ import annotations

from factorkit.reproduce.scene_figures import figure, reconstructions

EXPERIMENT = figure("fig3.4", "reconstructions of unseen views", reconstructions, figures=("fig3.5",))
