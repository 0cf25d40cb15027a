"""Segmentation of a folder of images into files: threads read ahead and write behind while the network runs."""

from __future__ import annotations

import errno
import os
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from factorkit.data.files import escape_name, format_examples
from factorkit.data.sources import FileSource, Source
from factorkit.engine.run_folder import locked
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.cutout_region import choose_cutout_region
from factorkit.segdiff.inference.documents import (
    ALL_IMAGES,
    OVERVIEW,
    OVERVIEW_IMAGES,
    Manifest,
    draw_overview,
    draw_overview_row,
    fingerprint,
    list_documents,
    name_overview,
    write_documents,
)
from factorkit.segdiff.inference.outputs import (
    Outputs,
    check_formats,
    check_tolerance,
    locate_image,
    make_image_files,
    output_names,
)
from factorkit.segdiff.inference.segment import (
    PreparedImage,
    describe_out_of_memory,
    hard_labels,
    is_unlike,
    predict_tiled,
    prepare_image,
    upsample_masks,
)
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError, DataError, WriteError, format_count, is_out_of_memory
from factorkit.utils.files import clear_unfinished
from factorkit.utils.images import unit_to_uint8
from factorkit.utils.output_record import OutputRecord

MAX_NAMES_IN_WARNING = 20  # skipped images; the result has all of them
MAX_WORKERS = 8
MAX_IMAGES_HELD = 16  # in memory between reading and writing,
MAX_PIXELS_HELD = 1 << 26  # fewer if they are large,
ASSUMED_PIXELS = 1 << 24  # as each is taken to be until the first ones are read


class FolderSegments(NamedTuple):
    """The result of segmenting a folder.

    Attributes:
        out: the folder of the files.
        segmented: number of images with results; ``already`` of them from earlier calls.
        already: number of images that needed no work.
        skipped: the name of each image that could not be segmented, and why.
        regions: K.
        areas: mean share of each region over all segmented images.
        overview: grid of the first images beside their regions; None if none of the first could be read.
        annotations: COCO's file with run lengths, if requested.
        polygons: COCO's file with polygons, if requested.
        cutout: which regions the cut-outs show, and why; None without them.
        unlike: images that look unlike the training set, so that their regions may mean nothing.
    """

    out: Path
    segmented: int
    already: int
    skipped: dict[str, str]
    regions: int
    areas: list[float]
    overview: Path | None
    annotations: Path | None
    polygons: Path | None = None
    cutout: str | None = None
    unlike: Sequence[str] = ()


def segment_folder(
    model: SegdiffModel,
    config: ResolvedSegdiffConfig,
    predict: Callable[[Tensor], Tensor],
    source: Source,
    out: Path,
    settings: dict[str, Any],
    formats: Sequence[str],
    workers: int | None,
    progress: bool,
    overwrite: bool,
    region: str | int = "auto",
    tolerance: float = 1.0,
    scores: Mapping[str, Any] | None = None,
) -> FolderSegments:
    """Segment a folder, see :meth:`factorkit.SegdiffRun.segment_folder`.

    Args:
        settings: checked t, size, upsample and quality.
        scores: of the run, for the region of cut-outs.
    """
    formats, tolerance = check_formats(formats), check_tolerance(tolerance)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: at least one thread has to read")
    key = fingerprint(model, settings)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; give another out=, a folder")
    choose = partial(choose_cutout_region, config, region, scores, source, predict)
    cutout = distributed.run_on_first(choose) if "cutout" in formats else None
    outputs = Outputs(formats, config.num_leaf_regions, cutout.region if cutout else (), tolerance)
    opened: list[tuple[Manifest, OutputRecord]] = []
    distributed.barrier()  # no process writes while another still lists the images
    try:
        with ExitStack() as stack:

            def open_folder(rank: int = 0) -> None:
                out.mkdir(parents=True, exist_ok=True)
                if not rank:
                    stack.enter_context(locked(out, "segmenting into"))
                inputs = map(source.path, range(len(source))) if isinstance(source, FileSource) else ()
                record = stack.enter_context(OutputRecord(out, overwrite=overwrite, inputs=inputs))
                record.open()
                opened.append((stack.enter_context(closing(Manifest(out, key, source, rank))), record))

            distributed.run_on_first(open_folder)
            if rank := distributed.rank():
                open_folder(rank)
            manifest, record = opened[0]
            threads = workers or min(MAX_WORKERS, os.cpu_count() or 1)
            judge = partial(is_unlike, model, settings["t"])
            job = _FolderJob(config, predict, judge, source, manifest, record, settings, outputs, threads, progress)
            return job.run()._replace(cutout=cutout.reason if cutout else None)
    except OSError as error:  # of the results; a source raises DataError for its own
        where = escape_name(str(error.filename or out))
        raise WriteError(
            f"{where}: cannot be written: {error.strerror or error}. Finished images in {out} are intact; free some "
            "space or correct the permissions (or give another out=) and run the same command again to continue"
        ) from error


class _Item(NamedTuple):
    """An image on its way: prepared, or the reason why it cannot be read, or None after it is handed to a writer."""

    number: int  # in the source
    stamp: Any  # of the file that was read
    prepared: PreparedImage | str | None


@dataclass
class _FolderJob:
    config: ResolvedSegdiffConfig
    predict: Callable[[Tensor], Tensor]
    judge: Callable[[np.ndarray, Tensor], bool]
    source: Source
    manifest: Manifest
    record: OutputRecord
    settings: dict[str, Any]
    outputs: Outputs
    workers: int
    progress: bool

    def __post_init__(self) -> None:
        self.out, self.overview_name, self.overview_source = self.manifest.out, OVERVIEW, ""
        self.stems: list[str] = []  # of each image's files, distinct from those of other images in the folder
        self.numbers: list[int] = []  # of each image in annotations.json
        self.skipped: dict[str, str] = {}
        self.overview_rows: dict[int, list[np.ndarray]] = {}
        self.recent_pixels = deque([ASSUMED_PIXELS], maxlen=MAX_IMAGES_HELD)

    def run(self) -> FolderSegments:
        todo, overview_due, self.stems, self.numbers = distributed.run_on_first(self._plan)
        for rows, skipped in distributed.gather_results(lambda: self._process_share(todo)):
            self.overview_rows |= rows
            self.skipped |= skipped
        self.skipped = {name: self.skipped[name] for name in self.source.names if name in self.skipped}
        self._report_skipped()
        return distributed.run_on_first(lambda: self._complete(len(self.source) - len(todo), overview_due))

    def _plan(self) -> tuple[list[int], bool, list[str], list[int]]:
        """Return the images to segment, whether the overview is due, and stem and number of each image.

        Raises:
            WriteError: a file is there that must not be replaced.
        """
        count = len(self.source)
        self.overview_name, self.overview_source = name_overview(self.record, self.manifest.inputs)
        stems = [
            self.record.distinct_stem(stem, name, partial(self.manifest.is_moved, i))
            for i, (stem, name) in enumerate(zip(output_names(self.source.names), self.manifest.inputs, strict=True))
        ]
        numbers = self.manifest.number_images()
        done = [self.manifest.has(i, stems[i], self.outputs, self.record) for i in range(count)]
        if not all(done):  # another image may change the depth of all
            done = [is_done and not self.manifest.has_other_depth(i) for i, is_done in enumerate(done)]
        first = range(min(OVERVIEW_IMAGES, count))
        is_shown = self.record.source_of(self.overview_name) == self.overview_source and self.overview.exists()
        overview_due = not is_shown or any(not done[i] and not self.manifest.failed(i) for i in first)
        todo = [i for i in range(count) if not done[i] or (overview_due and i in first)]
        for i in (i for i in todo if not done[i]):
            self.record.check(self.outputs.file_names(stems[i]).values(), self.manifest.inputs[i])
        self.record.check(list_documents(self.outputs), ALL_IMAGES)
        if overview_due:
            self.record.check([self.overview_name], self.overview_source)
        if changed := self.manifest.changed_files:
            examples = format_examples(changed)
            warnings.warn(
                f"{self.out}: kept {format_count(len(changed), 'result')} changed by hand: {examples}", stacklevel=7
            )
        names = (name for i in todo for name in (stems[i], *self.outputs.file_names(stems[i]).values()))
        for folder in {(self.out / name).parent for name in names} | {self.out}:
            clear_unfinished(folder)
        return todo, overview_due, stems, numbers

    @property
    def overview(self) -> Path:
        return self.out / self.overview_name

    def _process_share(self, todo: Sequence[int]) -> tuple[dict[int, list[np.ndarray]], dict[str, str]]:
        """Segment this process's share of the images; return rows of the overview and skipped images."""
        share, already = todo[distributed.rank() :: distributed.world_size()], len(self.source) - len(todo)
        silent = not self.progress or distributed.rank() > 0
        with tqdm(total=already + len(share), initial=already, desc="segmenting", unit="image", disable=silent) as bar:
            for _ in self._segment(share):
                bar.update()
        return self.overview_rows, self.skipped

    def _complete(self, already: int, overview_due: bool) -> FolderSegments:
        """Write what needs all images: the whole manifest, overview and annotations."""
        self.manifest.merge_ranks()
        if overview_due and self.overview_rows:
            grid = draw_overview(self.overview_rows, self.source.names, self.config.num_leaf_regions)
            self.record.write({self.overview_name: grid.save}, self.overview_source, stem=self.overview.stem)
        documents = write_documents(self.manifest, self.record, self.outputs)
        annotations, polygons = documents.get("annotations.json"), documents.get("polygons.json")
        areas, unlike = array("d"), []
        for index, line in self.manifest.records():
            areas.extend(line["areas"])
            unlike += [self.source.names[index]] if line.get("unlike") else []
        overview, segmented = self.overview if self.overview.exists() else None, len(self.source) - len(self.skipped)
        means = np.reshape(areas, (-1, self.config.num_leaf_regions)).mean(0).tolist()
        counts = segmented, already, self.skipped, self.config.num_leaf_regions
        return FolderSegments(self.out, *counts, means, overview, annotations, polygons, unlike=unlike)

    def _segment(self, todo: Sequence[int]) -> Iterator[int]:
        """Read, segment, write; yield each image once it is in the manifest or skipped."""
        # Threads of torch would multiply: several readers and writers share the cores.
        readers = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        writers = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            batch: list[_Item] = []
            writing: deque[tuple[_Item, Future]] = deque()
            for item in self._read_ahead(readers, todo):
                batch.append(item)
                if len(batch) >= self._queue_size():
                    yield from self._segment_batch(batch, writers, writing)
                    batch = []
            yield from self._segment_batch(batch, writers, writing)
            while writing:
                yield self._finish(*writing.popleft())
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)

    def _read_ahead(self, readers: ThreadPoolExecutor, todo: Iterable[int]) -> Iterator[_Item]:
        """Yield the images in order while the next ones are being read."""
        waiting: deque[tuple[int, Any, Future]] = deque()
        todo = iter(todo)
        while True:
            while len(waiting) < self._queue_size() and (index := next(todo, None)) is not None:
                waiting.append((index, self.manifest.stamp(index), readers.submit(self._read, index)))
            if not waiting:
                return
            index, stamp, future = waiting.popleft()
            prepared = future.result()
            if isinstance(prepared, PreparedImage):
                self.recent_pixels.append(prepared.image.width * prepared.image.height)
            yield _Item(index, stamp, prepared)

    def _queue_size(self) -> int:
        """Return how many images may wait for a reader or a writer, from the sizes of the last ones."""
        return max(1, min(MAX_IMAGES_HELD, MAX_PIXELS_HELD // max(self.recent_pixels)))

    def _read(self, index: int) -> PreparedImage | str:
        try:
            return prepare_image(self.source.read(index), self.config, self.settings["size"], self.settings["upsample"])
        except (DataError, MemoryError, OSError) as error:
            return str(error).removeprefix(f"{self.source.names[index]}: ") or type(error).__name__

    def _segment_batch(
        self, batch: list[_Item], writers: ThreadPoolExecutor, writing: deque[tuple[_Item, Future]]
    ) -> Iterator[int]:
        """Run images of one size through the network together; yield those that were finished meanwhile."""
        groups: dict[Any, list[tuple[_Item, PreparedImage]]] = {}
        for item in batch:
            if isinstance(item.prepared, PreparedImage):
                groups.setdefault(item.prepared.small.shape, []).append((item, item.prepared))
            else:
                self._skip(item, str(item.prepared))
                yield item.number
        for group in groups.values():
            for (item, prepared), masks in zip(group, self._predict(group), strict=True):
                if masks is None:
                    yield item.number
                    continue
                while writing and (len(writing) >= self._queue_size() or writing[0][1].done()):
                    yield self._finish(*writing.popleft())
                future = writers.submit(self._write, item.number, prepared, masks)
                writing.append((item._replace(prepared=None), future))

    def _predict(self, group: list[tuple[_Item, PreparedImage]]) -> list[Tensor | None]:
        """Predict masks of images of one size; an image that does not fit into memory is skipped and gives None."""
        small = np.stack([prepared.small for _, prepared in group])
        try:
            return list(predict_tiled(self.predict, small, self.config))
        except Exception as error:
            if len(group) > 1 and is_out_of_memory(error):
                return [self._predict([pair])[0] for pair in group]
            self._skip_or_raise(group[0][0], error)
            return [None]

    def _write(self, index: int, prepared: PreparedImage, masks: Tensor) -> dict[str, Any]:
        """Write an image's files and return its record for the manifest."""
        width, height = prepared.image.size
        in_overview = index < OVERVIEW_IMAGES
        soft = np.empty((len(masks), height, width), np.uint8) if self.outputs.needs_masks or in_overview else None
        labels = np.empty((height, width), np.uint8)
        for rows, band in upsample_masks(masks, prepared):
            labels[rows] = hard_labels(band, self.config.nesting).byte().numpy()
            if soft is not None:
                soft[:, rows] = unit_to_uint8(band)
        stem = self.stems[index]
        names = self.outputs.file_names(stem)
        image_path = locate_image(self.source, index, (self.out / names.get("labelme.json", stem)).parent)
        files, record = make_image_files(names, prepared.image, labels, soft, self.outputs, image_path)
        sizes = self.record.write(files, self.manifest.inputs[index], stem=stem) if files else {}
        if in_overview and soft is not None:
            self.overview_rows[index] = draw_overview_row(prepared.image, soft)
        written = {end: sizes[name] for end, name in names.items()}
        unlike = {"unlike": True} if self.judge(prepared.small, masks) else {}
        return record | {"image_id": self.numbers[index], "files": written} | unlike

    def _finish(self, item: _Item, future: Future) -> int:
        try:
            record = future.result()
        except Exception as error:
            self._skip_or_raise(item, error)
        else:
            depths = self.source.depths
            depth = {"depths": depths.decide()} if depths.is_decided else {}
            self.manifest.add(item.number, item.stamp, record | depth)
        return item.number

    def _skip_or_raise(self, item: _Item, error: Exception) -> None:
        """Skip an image if the error is specific to it: its size, or a name too long to extend."""
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            self._skip(item, "its name is too long to name results after it; shorten it")
        elif is_out_of_memory(error) and isinstance(item.prepared, PreparedImage):
            self._skip(item, describe_out_of_memory(item.prepared.image, self.settings["size"]))
        elif is_out_of_memory(error):
            self._skip(item, "out of memory; scale it down")
        else:
            raise error

    def _skip(self, item: _Item, reason: str) -> None:
        self.skipped[self.source.names[item.number]] = reason
        self.manifest.add(item.number, item.stamp, {"image_id": self.numbers[item.number], "skipped": reason})

    def _report_skipped(self) -> None:
        if not self.skipped:
            return
        count, total = len(self.skipped), len(self.source)
        named = list(self.skipped.items())[:MAX_NAMES_IN_WARNING]
        reasons = "; ".join(f"{escape_name(name)} ({escape_name(reason)})" for name, reason in named)
        if count == total:
            raise DataError(f"none of {format_count(total, 'image')} could be segmented: {reasons}. Check the files.")
        if distributed.rank():
            return
        more = f"; and {count - len(named)} more" if count > len(named) else ""
        message = f"{count} of {format_count(total, 'image')} could not be segmented: {reasons}{more}"
        warnings.warn(message, stacklevel=5)
