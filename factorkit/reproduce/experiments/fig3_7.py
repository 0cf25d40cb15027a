"""Figure 3.7: cameras during the training."""

from __future__ import annotations

from factorkit.reproduce.scene_figures import evolution, figure

EXPERIMENT = figure("fig3.7", "cameras as the training goes on, from its own sheets", evolution)
