"""Figure 3.8: new views from a path of cameras."""

from __future__ import annotations

from factorkit.reproduce.scene_figures import figure, trajectory

EXPERIMENT = figure("fig3.8", "new views along a circle", trajectory)
