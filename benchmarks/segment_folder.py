"""Rate and memory of segmenting a folder of photos, and whether a second call skips finished work.

    python -m benchmarks.segment_folder                       # 10,000 generated photos of 96 x 72 pixels
    python -m benchmarks.segment_folder --count 2000 --width 640 --height 480

The photos are generated JPEGs and the model is untrained (preset fast32, three regions), because the cost does not
depend on the result. Rates are of the first and of the last tenth, in images a second and in milliseconds of
processor time an image, which other programs of a busy machine hardly change. One JSON object in
benchmarks/results/segment_folder.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.recording import commit, machine, write_result
from factorkit.segdiff.config import preset_config
from factorkit.segdiff.inference.documents import MANIFEST
from factorkit.segdiff.run import SegdiffRun

RESULTS = Path(__file__).with_name("results") / "segment_folder.json"
EVERY = 0.25  # seconds between looks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--height", type=int, default=72)
    parser.add_argument("--preset", default="fast32")
    parser.add_argument("--formats", nargs="+", default=["labels", "masks", "overlays", "coco"])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    config = preset_config(args.preset, regions=3, threads=1, device="cpu").resolved()
    run = SegdiffRun(config, config.build(), torch.device("cpu"), 0)
    with tempfile.TemporaryDirectory() as folder:
        photos, out = Path(folder, "photos"), Path(folder, "out")
        make_photos(photos, args.count, args.width, args.height)
        options = {"formats": args.formats, "workers": args.workers}
        with Watch(out) as watch:
            run.segment_folder(photos, out, **options)
        start = time.perf_counter()
        again = run.segment_folder(photos, out, **options)
        second = time.perf_counter() - start
    record = {
        **{k: getattr(args, k) for k in ("count", "width", "height", "preset", "formats", "workers")},
        **watch.summary(args.count),
        "second_call_s": round(second, 2),
        "already": again.already,
        "machine": machine(1),
        "cores": os.cpu_count(),
        "commit": commit(),
        "torch": torch.__version__,
    }
    write_result(RESULTS, f"{args.preset} {args.count} photos of {args.width}x{args.height}", record)
    for name, value in record.items():
        print(f"{name:<22} {value}")


def make_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Smooth random colours with a disc of another one, as JPEGs in folders of a thousand."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    for i in range(count):
        place = folder / f"{i // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))
        centre, radius = rng.uniform(0.3, 0.7, 2), rng.uniform(0.15, 0.3) * height
        pixels[(x - centre[0] * width) ** 2 + (y - centre[1] * height) ** 2 < radius**2] = rng.integers(0, 256, 3)
        Image.fromarray(pixels).save(place / f"{i:06d}.jpg", quality=90)


class Watch:
    """While it is entered: time, processor time, finished images and memory, every quarter of a second."""

    def __init__(self, out: Path):
        self.path = out / MANIFEST
        self.looks: list[tuple[float, float, int, int]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        done, at, last = 0, 0, False
        while not last:
            last = self._end.wait(EVERY)  # one more look after the end
            if self.path.exists():
                with open(self.path, "rb") as file:
                    file.seek(at)
                    text = file.read()
                done, at = done + text.count(b"\n"), at + len(text)
                self.looks.append((time.perf_counter(), time.process_time(), done, resident_bytes()))

    def summary(self, count: int) -> dict[str, object]:
        """Rates of the first and the last tenth, and how memory grew after the first tenth."""
        looks = np.array(self.looks)
        clock, work, done, memory = looks.T
        when = lambda values, number: float(np.interp(number, done, values))  # noqa: E731
        result: dict[str, object] = {"seconds": round(clock[-1] - clock[0], 1)}
        for name, low, high in (("first_tenth", 0, 0.1), ("last_tenth", 0.9, 1), ("all", 0, 1)):
            low, high = max(low * count, done[0]), high * count
            images = high - low
            result[f"{name}_per_second"] = round(images / (when(clock, high) - when(clock, low)), 2)
            result[f"{name}_cpu_ms"] = round(1e3 * (when(work, high) - when(work, low)) / images, 2)
        late = done >= 0.1 * count
        slope = np.polyfit(done[late], memory[late], 1)[0]
        result["memory_mb"] = {
            "after_first_tenth": round(when(memory, 0.1 * count) / 1e6, 1),
            "at_the_end": round(float(memory[-1]) / 1e6, 1),
            "most": round(float(memory.max()) / 1e6, 1),
            "slope_kb_per_1000": round(float(slope), 1),
        }
        return result


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
