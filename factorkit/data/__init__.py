"""Images, masks and data sets: reading them from disk, and preparing them as arrays of one resolution."""

from factorkit.data.classes import Classes, read_classes
from factorkit.data.datasets import Dataset, Split, make_procedural_dataset, open_dataset
from factorkit.data.decode import ImageDecodeError, crop_square, to_rgb
from factorkit.data.layouts import READERS
from factorkit.data.masks import LabelledImages, load_labelled
from factorkit.data.open import open_source
from factorkit.data.prepare import PreparedImages, prepare
from factorkit.data.procedural.flowers import draw_flowers
from factorkit.data.procedural.rooms import draw_rooms
from factorkit.data.procedural.scene import make_procedural_views
from factorkit.data.sources import Source
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views

__all__ = [
    "READERS",
    "Classes",
    "Dataset",
    "ImageDecodeError",
    "LabelledImages",
    "PreparedImages",
    "Source",
    "Split",
    "Views",
    "crop_square",
    "draw_flowers",
    "draw_rooms",
    "load_labelled",
    "make_procedural_dataset",
    "make_procedural_views",
    "open_dataset",
    "open_source",
    "open_views",
    "prepare",
    "read_classes",
    "to_rgb",
]
