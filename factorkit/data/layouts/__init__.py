"""The layouts in which data sets are published: one module each, and the list of them."""

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

#: In the order they are tried; each knows its own by the files that only it has.
READERS: tuple[Reader, ...] = (
    flowers102.READER,
    cub200.READER,
    celebamask.READER,
    ffhq.READER,
    imagenet.READER,
    voc2012.READER,
    davis2017.READER,
    shapes3d.READER,
    ecssd.READER,
    huggingface.READER,
    webdataset.READER,
)


def read_layout(data: Any) -> tuple[Reader, DatasetFiles] | None:
    """The data set behind a path or an object, and who read it; None where no reader knows it.

    Raises:
        DataError: it is known, but incomplete or damaged.
        ConfigError: an extra of the package is missing.
    """
    for reader in READERS:
        layout = reader.read(data)
        if layout is not None:
            return reader, layout
    return None


__all__ = ["LAYOUTS", "Layout", "Reader", "read_layout"]
