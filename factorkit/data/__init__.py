"""Images, masks and data sets, from wherever they lie to arrays of one resolution."""

from factorkit.data.classes import Classes, read_classes
from factorkit.data.datasets import Dataset, Split, open_dataset, procedural_dataset
from factorkit.data.decode import BrokenImage, square, to_rgb
from factorkit.data.layouts import LAYOUTS
from factorkit.data.masks import Labelled, load_labelled
from factorkit.data.open_source import open_source
from factorkit.data.prepare import Prepared, prepare
from factorkit.data.procedural.flowers import flowers
from factorkit.data.procedural.rooms import rooms
from factorkit.data.procedural.scene import procedural_views
from factorkit.data.sources import Source
from factorkit.data.views.open import open_views
from factorkit.data.views.views import Views

__all__ = [
    "LAYOUTS",
    "BrokenImage",
    "Classes",
    "Dataset",
    "Labelled",
    "Prepared",
    "Source",
    "Split",
    "Views",
    "flowers",
    "load_labelled",
    "open_dataset",
    "open_source",
    "open_views",
    "prepare",
    "procedural_dataset",
    "procedural_views",
    "read_classes",
    "rooms",
    "square",
    "to_rgb",
]
