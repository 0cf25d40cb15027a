"""Layers that both models share: a U-Net in the layout of guided-diffusion, and a guided filter."""
