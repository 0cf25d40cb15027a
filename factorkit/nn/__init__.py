"""Blocks both models are made of: the layout of guided-diffusion's U-Net over factorkit's ops."""

from factorkit.nn.blocks import Attention, Downsample, Norm, ResBlock, Upsample
from factorkit.nn.embeddings import LabelEmbedding, TimeEmbedding, sinusoid
from factorkit.nn.unet import Decoder, Encoder, Middle

__all__ = [
    "Attention",
    "Decoder",
    "Downsample",
    "Encoder",
    "LabelEmbedding",
    "Middle",
    "Norm",
    "ResBlock",
    "TimeEmbedding",
    "Upsample",
    "sinusoid",
]
