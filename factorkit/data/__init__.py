"""Images, masks and data sets, from wherever they lie to arrays of one resolution."""

from factorkit.data.classes import Classes, read_classes
from factorkit.data.datasets import Dataset, Split, open_dataset, procedural_dataset
from factorkit.data.images import BrokenImage, square, to_rgb
from factorkit.data.labelled import Labelled, load_labelled
from factorkit.data.layouts import LAYOUTS
from factorkit.data.prepare import Prepared, prepare
from factorkit.data.procedural import flowers
from factorkit.data.procedural_nested import rooms
from factorkit.data.procedural_scene import procedural_views
from factorkit.data.sources import Source, open_source
from factorkit.data.views import Views
from factorkit.data.views_open import open_views

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
