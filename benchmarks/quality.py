"""What each way of sharpening masks gains: IoU on held-out photographs, at their own pixels.

    python -m benchmarks.quality RUN... --data PHOTOS

Every run (a folder of segdiff) is asked for the regions of the labelled pictures it was not trained on: as it is by
default, with one thing changed, and with ``quality="best"``. One mapping from regions to foreground is fitted on the
first pictures for each. Results go to benchmarks/results/quality.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.recording import commit, machine, read_results, write_result

RESULTS = Path(__file__).with_name("results") / "quality.json"
LOOKS = {
    "fast": {}, "draws": {"draws": 4}, "mirror": {"mirror": True}, "levels": {"levels": (1 / 3, 1.0, 2.0)},
    "mirror, draws": {"mirror": True, "draws": 4},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data", help="as train_segdiff takes it; the photographs the runs were trained on")
    args = parser.parse_args()
    for folder in args.runs:
        measure(folder, args.data)
    print(table(read_results(RESULTS)))


def measure(folder: Path, data: str) -> None:
    """Score one run, unless its result stands already."""
    import torch

    import factorkit
    from factorkit.data.datasets import open_dataset
    from factorkit.data.labelled import load_labelled
    from factorkit.metrics.segmentation import evaluate_masks
    from factorkit.segdiff import quality

    torch.set_num_threads(1)
    run = factorkit.load(folder, device="cpu")
    key = f"{Path(data).name} {folder.name}"
    if key in read_results(RESULTS):
        return
    config = run.config
    dataset = open_dataset(data, holdout=config.holdout)
    own = min(dataset.test_images.read(0).size)
    known = load_labelled(dataset.test_images, dataset.test_masks, own, ignore=config.ignore)
    fit = max(1, min(config.fit, len(known) // 2))

    def iou(asked=run, **options) -> float:
        labels = asked.segment(known.images, **options).labels.numpy()
        return evaluate_masks(labels, known.foreground, known.valid, config.leaves, fit)["iou"]

    found = {"bilinear": iou(upsample="bilinear")}
    for name, looks in named_looks(quality):
        quality.QUALITIES["measured"] = looks
        found[name] = iou(quality="measured")
    found["best"] = iou(quality="best")
    found["last weights"] = iou(factorkit.load(folder, device="cpu", weights="last"))
    record = {
        "iou": {name: round(value, 4) for name, value in found.items()}, "regions": config.regions,
        "resolution": config.resolution, "size": own, "scored": len(known) - fit, "step": run.step,
        "machine": machine(1), "commit": commit(),
    }  # fmt: skip
    write_result(RESULTS, key, record)
    print(key, record["iou"], flush=True)


def named_looks(quality) -> Iterator[tuple]:
    for name, changes in LOOKS.items():
        yield name, quality.Quality(**changes)


def table(results: dict[str, dict]) -> str:
    """A line a run."""
    if not results:
        return "nothing measured yet"
    names = list(next(iter(results.values()))["iou"])
    lines = ["| run | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, record in results.items():
        lines.append(f"| {key} | " + " | ".join(f"{record['iou'][name]:.3f}".lstrip("0") for name in names) + " |")
    gains = {name: np.mean([r["iou"][name] - r["iou"]["fast"] for r in results.values()]) for name in names}
    lines.append("| mean difference to fast | " + " | ".join(f"{gains[name]:+.4f}" for name in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
