"""Which regions a cut-out shows: those of the foreground by labels, else the one that is the object by a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from factorkit.data.sources import Source
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.inference.segment import level_labels, predict_tiled, prepare_image
from factorkit.utils.errors import ConfigError, DataError, format_count

MAX_IMAGES = 16  # that the rule looks at
MIN_AREA = 0.02  # of all pixels; a smaller region is not taken for the object


class CutoutRegion(NamedTuple):
    """The regions of the cut-outs, together one object, and a line that says why these."""

    region: tuple[int, ...]
    reason: str


def choose_cutout_region(
    config: ResolvedSegdiffConfig,
    region: str | int,
    scores: Mapping[str, Any] | None,
    source: Source,
    predict: Callable[[Tensor], Tensor],
) -> CutoutRegion:
    """Return the regions that the cut-outs show.

    Args:
        config: of the run.
        region: a number from 0 to K-1, or "auto": the foreground of the run's scores; without labels region 0 of a run
            with masks="auto", which is the object by construction; else the region that touches the border of the
            first images least, relative to its area.
        scores: of the run, if it has any.
        source: the images.
        predict: maps images [N, 3, h, w] in [-1, 1] to masks [N, K, h, w].

    Raises:
        ConfigError: there is no such region.
    """
    count = config.num_leaf_regions
    check_region(region, count)
    if region != "auto":
        return CutoutRegion((int(region),), f"region {int(region)}")
    mapping = (scores or {}).get("mapping") or []
    if all(isinstance(k, int) for k in mapping):
        level = (scores or {}).get("level", len(config.nesting))
        foreground = tuple(k for k in range(count) if level_labels(np.array(k), config.nesting, level) in mapping)
        if 0 < len(foreground) < count:
            return CutoutRegion(foreground, f"{_name(foreground)}, the foreground of the run's scores.json")
    if config.masks == "auto":
        return CutoutRegion((0,), 'region 0, the object of a run with masks="auto"')
    return _find_inner_region(config, source, predict)


def check_region(region: str | int, count: int) -> None:
    """Raise ConfigError unless ``region`` is "auto" or one of ``count`` regions."""
    if region != "auto" and not (str(region).isdecimal() and int(region) < count):
        raise ConfigError(f'region={region!r}: this run has regions 0 to {count - 1}; give one of them, or "auto"')


def _find_inner_region(
    config: ResolvedSegdiffConfig, source: Source, predict: Callable[[Tensor], Tensor]
) -> CutoutRegion:
    border, area, seen = np.zeros(config.num_leaf_regions), np.zeros(config.num_leaf_regions), 0
    for index in range(len(source)):
        if seen == MAX_IMAGES:
            break
        try:
            small = prepare_image(source.read(index), config, config.resolution, "bilinear").small
        except (DataError, MemoryError, OSError):
            continue  # segmenting reports it
        masks = predict_tiled(predict, small[None], config)[0].numpy()
        edge = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]], 1)
        border, area, seen = border + edge.mean(1), area + masks.mean((1, 2)), seen + 1
    if not seen:
        return CutoutRegion((0,), "region 0, since no image can be read")
    touch = np.where(area / seen >= MIN_AREA, border / area.clip(1e-9), math.inf)
    region = (int(touch.argmin()),)
    reason = f"it touches the border of {format_count(seen, 'image')} least for its area"
    return CutoutRegion(region, f"{_name(region)}, since {reason}; --region (region=) chooses another")


def _name(region: tuple[int, ...]) -> str:
    return f"region{'s' * (len(region) > 1)} {' and '.join(map(str, region))}"
