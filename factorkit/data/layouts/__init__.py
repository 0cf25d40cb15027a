"""Published data sets in their original layouts: one reader per module."""

from __future__ import annotations

from typing import Any

from factorkit.data.layouts import (
    celebamask,
    cub200,
    davis2017,
    ecssd,
    ffhq,
    flowers102,
    huggingface,
    imagenet,
    shapes3d,
    voc2012,
    webdataset,
)
from factorkit.data.layouts.base import DatasetFiles, Reader

# Tried in this order; each recognises its data set by files that no other data set has.
_MODULES = (
    flowers102,
    cub200,
    celebamask,
    ffhq,
    imagenet,
    voc2012,
    davis2017,
    shapes3d,
    ecssd,
    huggingface,
    webdataset,
)
READERS: tuple[Reader, ...] = tuple(module.READER for module in _MODULES)


def read_layout(data: Any) -> tuple[Reader, DatasetFiles] | None:
    """Recognise a published data set; return its reader and contents, or None if it is none of them.

    Raises:
        DataError: it is recognised, but incomplete or damaged.
        ConfigError: an extra of the package is missing.
    """
    for reader in READERS:
        files = reader.read(data)
        if files is not None:
            return reader, files
    return None


__all__ = ["READERS", "DatasetFiles", "Reader", "read_layout"]
