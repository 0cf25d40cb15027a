"""What the values of masks mean: foreground, background, and what is not scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from factorkit.utils.errors import DataError, format_count

FULL_SCALES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
PET_TRIMAP = (1, 2, 3)  # foreground, background, border: Parkhi et al. 2012, the annotations' README
SOFT_MIDDLE, END_WIDTH = 128, 32  # of 255 in soft masks; JPEG moves values by up to about 30
MIN_SOFT_VALUES, MIN_END_SHARE = 8, 0.6  # soft masks: more values than these, this share of the pixels near the ends
MIN_EDGE_VALUES, MAX_EDGE_SHARE = 2, 0.4  # antialiased masks: grey values, and grey pixels for each white one
VOID_LABELS, VOID_LABEL_GAP = (255, 65535), 200  # labels of no class; other labels end below the gap
MAX_LISTED_VALUES = 6  # in messages


@dataclass(frozen=True)
class MaskValues:
    """What the values of masks mean.

    Attributes:
        foreground: values of the foreground; None: all above 0, or from the threshold on.
        threshold: least value of the foreground; None: no threshold.
        ignore: value that is not scored.
        summary: the values in the masks, in words.
        is_unusual: True if the decision is worth a line to the user.
    """

    foreground: tuple[int, ...] | None = None
    threshold: int | None = None
    ignore: int | None = None
    summary: str = ""
    is_unusual: bool = False

    def select(self, labels: np.ndarray) -> np.ndarray:
        """Return where labels are foreground, as a boolean array."""
        if self.foreground is not None:
            return np.isin(labels, self.foreground)
        return labels > 0 if self.threshold is None else labels >= self.threshold

    def __str__(self) -> str:
        foreground = "all above 0" if self.threshold is None else f"{self.threshold} and above"
        if self.foreground is not None:
            foreground = ", ".join(map(str, self.foreground))
        ignored = "" if self.ignore is None else f"; not scored = {self.ignore}"
        return (
            f"masks: {self.summary}; foreground = {foreground}{ignored}. If this is wrong, set --foreground, --ignore "
            "or --mask-threshold"
        )


def decide_mask_values(counts: Mapping[int, int], ignore: int | None = None) -> MaskValues:
    """Decide what the values of masks mean, from the number of pixels of each value in all masks.

    Two values with 0 are background and foreground. 1, 2, 3 are the trimap of Oxford-IIIT Pet (foreground, background,
    border), 0, 128, 255 that of matting (background, unknown, foreground). 255 beside small labels is the border that
    VOC and its followers do not score. Many grey values up to full scale, most pixels near one end, are soft or
    compressed masks, fewer with few pixels of them antialiased ones: foreground from the middle on. Full scale is 255,
    or that of 10, 12, 14 or 16 bits. Everything else counts as labels: foreground is all above 0.

    Args:
        counts: pixels by value.
        ignore: a value known not to be scored.

    Raises:
        DataError: values that allow more than one of these.
    """
    values = sorted(value for value, count in counts.items() if count and value != ignore)
    listed = (
        "{" + ", ".join(map(str, values[:MAX_LISTED_VALUES])) + (", ...}" if len(values) > MAX_LISTED_VALUES else "}")
    )
    summary = f"{format_count(len(values), 'value')} {listed}"
    top = values[-1] if values else 0
    if len(values) <= 1 or (len(values) == 2 and values[0] == 0):
        return MaskValues(ignore=ignore, summary=summary)
    if set(values) <= set(PET_TRIMAP) and 0 not in values:
        if set(values) == set(PET_TRIMAP) or ignore in PET_TRIMAP:
            ignored = PET_TRIMAP[2] if ignore is None else ignore
            return MaskValues((PET_TRIMAP[0],), None, ignored, f"{summary}, the trimap of Oxford-IIIT Pet", True)
        raise refuse_ambiguous(summary, "1 is foreground in a trimap, but 2 may as well be")
    full = next((scale for scale in FULL_SCALES if top <= scale), FULL_SCALES[0])
    step = (full + 1) // 256  # of a mask of more than 8 bits, for each of 8 bits
    middle, end = SOFT_MIDDLE * step, END_WIDTH * step
    if values[0] == 0 and top == full and len(values) == 3 and abs(values[1] - middle) <= step and ignore is None:
        return MaskValues((full,), None, values[1], f"{summary}, a trimap", True)
    total = sum(counts[value] for value in values)
    low = sum(counts[value] for value in values if value < end)
    high = sum(counts[value] for value in values if value > full - end)
    if len(values) > MIN_SOFT_VALUES and top > full - end and values[0] < end and top <= full:
        upper = [value for value in values if middle < value <= full - end]
        # Numbers of things reach any value, so beyond 8 bits most of what is not background must be white.
        is_soft = step == 1 or 2 * high > total - low
        if low + high >= MIN_END_SHARE * total and is_soft and (upper or values[-2] > middle):
            return MaskValues(None, middle, ignore, f"{summary}, soft or compressed", True)
    between = {value: counts[value] for value in values if end <= value <= full - end}
    is_edge = len(between) >= MIN_EDGE_VALUES and sum(between.values()) < MAX_EDGE_SHARE * high
    if is_edge and 0 in values and top == full:
        return MaskValues(None, middle, ignore, f"{summary}, antialiased", True)
    is_void = top == full and full in VOID_LABELS and len(values) > 2 and ignore is None and values[-2] < VOID_LABEL_GAP
    if is_void and 0 in values:
        if 2 * counts[full] > total - counts[0]:
            raise refuse_ambiguous(summary, f"{full} may be the foreground, or what is not scored")
        return MaskValues(None, None, full, f"{summary}, labels with a border", True)
    if len(values) > MIN_SOFT_VALUES and top == full:
        raise refuse_ambiguous(summary, "they may be a soft mask or the labels of many things")
    if 0 not in values:
        raise refuse_ambiguous(summary, "no value is 0, the background")
    return MaskValues(ignore=ignore, summary=f"{summary}, labels", is_unusual=True)


def refuse_ambiguous(summary: str, reason: str) -> DataError:
    """Return the error for values that allow more than one meaning."""
    return DataError(
        f"masks: {summary}: {reason}. Say which values are foreground (--foreground, foreground=), where it begins "
        "(--mask-threshold, mask_threshold=), or which value is not scored (--ignore, ignore=)."
    )
