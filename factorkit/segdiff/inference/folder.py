"""Segmenting a folder of pictures into files: threads read ahead and write behind, the network runs between them."""

from __future__ import annotations

import errno
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from factorkit.data.sources import Source, escape_name
from factorkit.engine.run_folder import held
from factorkit.segdiff import previews
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import hard_labels
from factorkit.segdiff.inference.coco_rle import annotations
from factorkit.segdiff.inference.outputs import (
    SHEET,
    Manifest,
    check_formats,
    fingerprint,
    output_names,
    without_results,
    write_annotations,
    write_picture,
)
from factorkit.segdiff.inference.segment import Seen, no_room, own_pixels, see, small_masks
from factorkit.segdiff.network import FactorizedUNet
from factorkit.utils import distributed
from factorkit.utils.atomic import clear_unfinished, save_image
from factorkit.utils.errors import ConfigError, DataError, WriteError, is_out_of_memory
from factorkit.utils.images import unit_to_uint8

SHEET_IMAGES, SHEET_CELL = 32, 128  # on the contact sheet: at most so many pictures, of so many pixels
NAMED = 20  # pictures that are left out and named in a warning; the answer has them all
MOST_WORKERS = 8
AHEAD = 16  # pictures held in memory between reading and writing, of small ones;
PIXELS_AHEAD = 1 << 26  # of large ones fewer, so that together they have about so many pixels,
GUESSED = 1 << 24  # taken to have so many until they are known


class FolderSegments(NamedTuple):
    """What segmenting a folder came to.

    Attributes:
        out: where the files are.
        segmented: pictures whose results are there; ``already`` of them were there before.
        skipped: the name of each picture that could not be segmented, and why.
        regions: K.
        areas: mean share of each region, over all that are there.
        contact_sheet: the first pictures beside their regions, None where none of the first could be read.
        annotations: COCO's file, where it was asked for.
    """

    out: Path
    segmented: int
    already: int
    skipped: dict[str, str]
    regions: int
    areas: list[float]
    contact_sheet: Path | None
    annotations: Path | None


def segment_folder(
    model: FactorizedUNet,
    config: ResolvedSegdiffConfig,
    predict: Callable[[Tensor], Tensor],
    source: Source,
    out: Path,
    settings: dict[str, Any],
    formats: Sequence[str],
    workers: int | None,
    progress: bool,
) -> FolderSegments:
    """See :meth:`factorkit.SegdiffRun.segment_folder`; ``settings`` are t, size and upsample, all known to be good."""
    formats = check_formats(formats)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: at least one thread has to read")
    source, key = without_results(source, out), fingerprint(model, settings)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give another out=, a folder")
    opened: list[Manifest] = []
    distributed.barrier()  # nobody writes where another still looks for pictures
    try:
        with ExitStack() as stack:

            def begin() -> None:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(out, "segmenting into"))
                opened.append(stack.enter_context(closing(Manifest(out, key, source))))

            distributed.on_first(begin)
            if part := distributed.rank():
                opened.append(stack.enter_context(closing(Manifest(out, key, source, part))))
            return _Job(config, predict, source, opened[0], settings, formats, workers, progress).run()
    except OSError as error:  # a source reports its own as DataError, so this one is the results'
        where = escape_name(str(error.filename or out))
        raise WriteError(
            f"{where}: cannot be written: {error.strerror or error}. What is finished in {out} stands; free some space "
            "or mend the permissions (or give another out=) and run the same command again to go on"
        ) from error


class _Picture(NamedTuple):
    index: int
    stamp: Any  # of the file that was read
    seen: Seen | str | None  # what is wrong with it, where it cannot be read; None once it is handed on to be written


class _Job:
    def __init__(
        self,
        config: ResolvedSegdiffConfig,
        predict: Callable[[Tensor], Tensor],
        source: Source,
        manifest: Manifest,
        settings: dict[str, Any],
        formats: tuple[str, ...],
        workers: int | None,
        progress: bool,
    ):
        self.config, self.predict, self.source, self.manifest = config, predict, source, manifest
        self.size, self.upsample = settings["size"], settings["upsample"]
        self.formats, self.progress = formats, progress
        self.workers = workers or min(MOST_WORKERS, os.cpu_count() or 1)
        self.out, self.sheet = manifest.out, manifest.out / SHEET
        self.paths = output_names(source.names)
        self.skipped: dict[str, str] = {}
        self.rows: dict[int, list[np.ndarray]] = {}
        self.held_pixels = deque([GUESSED], maxlen=AHEAD)

    def run(self) -> FolderSegments:
        count = len(self.source)
        todo, sheet_due = distributed.on_first(self._plan)
        for rows, skipped in distributed.everyones(lambda: self._share(todo)):
            self.rows |= rows
            self.skipped |= skipped
        self.skipped = {name: self.skipped[name] for name in self.source.names if name in self.skipped}
        self._report(count)
        return distributed.on_first(lambda: self._complete(count - len(todo), sheet_due))

    def _plan(self) -> tuple[list[int], bool]:
        """The pictures to be segmented, and whether the sheet is to be drawn."""
        count, regions = len(self.source), self.config.num_leaf_regions
        done = [self.manifest.has(i, self.paths[i], self.formats, regions) for i in range(count)]
        first = range(min(SHEET_IMAGES, count))
        sheet_due = not self.sheet.exists() or any(not done[i] and not self.manifest.failed(i) for i in first)
        if sheet_due:
            done[: len(first)] = [False] * len(first)  # a handful is segmented again, for the sheet shows them all
        todo = [i for i in range(count) if not done[i]]
        for folder in {(self.out / self.paths[i]).parent for i in todo} | {self.out}:
            clear_unfinished(folder)
        return todo, sheet_due

    def _share(self, todo: Sequence[int]) -> tuple[dict[int, list[np.ndarray]], dict[str, str]]:
        """Segment what is this process's of the pictures; rows for the sheet, and what was left out."""
        mine, before = todo[distributed.rank() :: distributed.world_size()], len(self.source) - len(todo)
        silent = not self.progress or distributed.rank() > 0
        with tqdm(total=before + len(mine), initial=before, desc="segmenting", unit="image", disable=silent) as bar:
            for _ in self._segment(mine):
                bar.update()
        return self.rows, self.skipped

    def _complete(self, already: int, sheet_due: bool) -> FolderSegments:
        """What is left to do when all pictures are done."""
        self.manifest.take_in()
        if sheet_due and self.rows:
            self._write_sheet()
        regions = self.config.num_leaf_regions
        annotated = write_annotations(self.manifest, regions) if "coco" in self.formats else None
        areas = [line["areas"] for _, line in self.manifest.records()]
        return FolderSegments(
            self.out,
            len(self.source) - len(self.skipped),
            already,
            self.skipped,
            regions,
            np.mean(areas, 0).tolist(),
            self.sheet if self.sheet.exists() else None,
            annotated,
        )

    def _segment(self, todo: Sequence[int]) -> Iterator[int]:
        """Read, segment, write; gives each picture once its line is in the manifest, or once it is left out."""
        readers = ThreadPoolExecutor(self.workers, initializer=_alone)
        writers = ThreadPoolExecutor(self.workers, initializer=_alone)
        try:
            batch: list[_Picture] = []
            writing: deque[tuple[_Picture, Future]] = deque()
            for picture in self._ahead(readers, todo):
                batch.append(picture)
                if len(batch) >= self._room():
                    yield from self._segment_batch(batch, writers, writing)
                    batch = []
            yield from self._segment_batch(batch, writers, writing)
            while writing:
                yield self._finish(*writing.popleft())
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)

    def _segment_batch(
        self, batch: list[_Picture], writers: ThreadPoolExecutor, writing: deque[tuple[_Picture, Future]]
    ) -> Iterator[int]:
        """Those of one size go through the network together; gives the pictures that were finished meanwhile."""
        groups: dict[Any, list[_Picture]] = {}
        for picture in batch:
            if isinstance(picture.seen, str):
                self._skip(picture, picture.seen)
                yield picture.index
            else:
                groups.setdefault(picture.seen.small.shape, []).append(picture)
        for group in groups.values():
            for picture, masks in zip(group, self._masks(group), strict=True):
                if masks is None:
                    yield picture.index
                    continue
                while writing and (len(writing) >= self._room() or writing[0][1].done()):
                    yield self._finish(*writing.popleft())
                writing.append((picture._replace(seen=None), writers.submit(self._write, picture, masks)))

    def _masks(self, group: list[_Picture]) -> list[Tensor | None]:
        """What the network says of pictures of one size; None for one that memory has no room for, which is skipped."""
        small = np.stack([picture.seen.small for picture in group])
        try:
            return list(small_masks(self.predict, small, self.config))
        except Exception as error:
            if len(group) > 1 and is_out_of_memory(error):
                return [self._masks([picture])[0] for picture in group]
            self._give_up(group[0], error)
            return [None]

    def _room(self) -> int:
        """How many pictures may wait for a reader or a writer, by how large the last ones were."""
        return max(1, min(AHEAD, PIXELS_AHEAD // max(self.held_pixels)))

    def _ahead(self, readers: ThreadPoolExecutor, todo: Iterable[int]) -> Iterator[_Picture]:
        """The pictures in order, or what is wrong with them, while the next ones are read already."""
        waiting: deque[Any] = deque()
        todo = iter(todo)
        while True:
            while len(waiting) < self._room() and (index := next(todo, None)) is not None:
                waiting.append((index, self.manifest.stamp(index), readers.submit(self._read, index)))
            if not waiting:
                return
            index, stamp, future = waiting.popleft()
            seen = future.result()
            if isinstance(seen, Seen):
                self.held_pixels.append(seen.picture.width * seen.picture.height)
            yield _Picture(index, stamp, seen)

    def _read(self, index: int) -> Seen | str:
        try:
            return see(self.source.read(index), self.config, self.size, self.upsample)
        except (DataError, MemoryError, OSError) as error:
            return str(error).removeprefix(f"{self.source.names[index]}: ") or type(error).__name__

    def _write(self, picture: _Picture, masks: Tensor) -> dict[str, Any]:
        """A picture's files, and what the manifest says of it."""
        index, seen = picture.index, picture.seen
        width, height = seen.picture.size
        pictured = index < SHEET_IMAGES
        soft = np.empty((len(masks), height, width), np.uint8) if "masks" in self.formats or pictured else None
        labels = np.empty((height, width), np.uint8)
        for rows, band in own_pixels(masks, seen):
            labels[rows] = hard_labels(band, self.config.nesting).byte().numpy()
            if soft is not None:
                soft[:, rows] = unit_to_uint8(band)
        files = write_picture(self.out / self.paths[index], seen.picture, labels, soft, self.formats)
        if pictured:
            self.rows[index] = _sheet_row(seen.picture, soft)
        areas = np.bincount(labels.ravel(), minlength=len(masks)) / labels.size
        found = annotations(labels, len(masks)) if "coco" in self.formats else None
        return {"width": width, "height": height, "areas": areas.tolist(), "files": files, "annotations": found}

    def _finish(self, picture: _Picture, future: Future) -> int:
        try:
            record = future.result()
        except Exception as error:
            self._give_up(picture, error)
        else:
            self.manifest.add(picture.index, picture.stamp, record)
        return picture.index

    def _give_up(self, picture: _Picture, error: Exception) -> None:
        """Leave out a picture for what is its own fault: its size, or a name too long to add to."""
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            self._skip(picture, "its name is too long to name results after it; shorten it")
        elif is_out_of_memory(error):
            known = isinstance(picture.seen, Seen)
            self._skip(picture, no_room(picture.seen.picture, self.size) if known else "out of memory; scale it down")
        else:
            raise error

    def _skip(self, picture: _Picture, reason: str) -> None:
        self.skipped[self.source.names[picture.index]] = reason
        self.manifest.add(picture.index, picture.stamp, {"skipped": reason})

    def _report(self, count: int) -> None:
        if not self.skipped:
            return
        named = "; ".join(
            f"{escape_name(n)} ({escape_name(reason)})" for n, reason in list(self.skipped.items())[:NAMED]
        )
        if len(self.skipped) == count:
            raise DataError(f"none of {count} images could be segmented: {named}. Check the files.")
        if distributed.rank():
            return
        more = f"; and {len(self.skipped) - NAMED} more" if len(self.skipped) > NAMED else ""
        warnings.warn(
            f"{len(self.skipped)} of {count} images could not be segmented and were left out: {named}{more}",
            stacklevel=5,
        )

    def _write_sheet(self) -> None:
        order = sorted(self.rows)
        colors = previews.palette(self.config.num_leaf_regions)
        columns = ["image", "regions", *((f"mask {k}", colors[k]) for k in range(len(colors)))]
        captions = [escape_name(PurePosixPath(self.source.names[i]).name)[-24:] for i in order]
        rows = [self.rows[i] for i in order]
        save_image(previews.draw_image_grid(rows, columns, captions, cell=SHEET_CELL), self.sheet)


def _alone() -> None:
    """A thread among several that read or write computes alone, or all of them would fight for the cores."""
    torch.set_num_threads(1)


def _sheet_row(picture: Image.Image, masks: np.ndarray) -> list[np.ndarray]:
    """A picture, its regions and its masks (uint8 [K, H, W]) at the size of the sheet's cells; small ones grow by whole
    factors."""
    longest = max(picture.size)
    scale = SHEET_CELL / longest if longest > SHEET_CELL else SHEET_CELL // longest
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    resize = lambda image: np.asarray(image.resize(size, Image.Resampling.BOX))  # noqa: E731
    image, small = resize(picture), np.stack([resize(Image.fromarray(mask)) for mask in masks])
    return [image, previews.overlay_regions(image, small.argmax(0)), *small]
