"""Figures 3.10 and 3.13: with noise, and without, the autoencoder."""

from __future__ import annotations

from factorkit.reproduce import views

EXPERIMENT = views.ablation(
    "fig3.13",
    "training with noise beside the autoencoder",
    {"noise": {"noise": True}, "no noise (autoencoder)": {"noise": False}},
    figures=("fig3.10",),
)
