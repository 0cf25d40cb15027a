"""Figure 3.9: new views from noise."""

from __future__ import annotations

from factorkit.reproduce.scene_figures import figure, from_noise

EXPERIMENT = figure("fig3.9", "new views and their cameras out of noise", from_noise)
