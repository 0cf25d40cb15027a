"""Figure 3.6: the cameras that were found."""

from __future__ import annotations

from factorkit.reproduce.scene_figures import cameras, figure

EXPERIMENT = figure("fig3.6", "found cameras beside the true ones", cameras)
