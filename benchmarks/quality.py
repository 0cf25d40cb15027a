"""IoU gained by each way of refining masks, on held-out photos at their own resolution.

    python -m benchmarks.quality RUN... --data PHOTOS

Every run (a folder of segdiff) segments the labelled images it was not trained on: with the default settings ("fast"),
with one change, with ``quality="best"``, and with each stored average of its weights (``extra_ema_decays=``) and the
mean masks of all of them. For each, one mapping from regions to foreground is fitted on the first images. Results go to
benchmarks/results/quality.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.recording import commit, machine, read_results, write_result

RESULTS = Path(__file__).with_name("results") / "quality.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data", help="as train_segdiff takes it; the photos the runs were trained on")
    args = parser.parse_args()
    for folder in args.runs:
        measure(folder, args.data)
    print(table(read_results(RESULTS)))


def measure(folder: Path, data: str) -> None:
    """Score one run, unless its result is stored already."""
    import torch

    import factorkit
    from factorkit.data.datasets import open_dataset
    from factorkit.data.masks import load_labelled
    from factorkit.metrics.segmentation import evaluate_masks

    torch.set_num_threads(1)
    run = factorkit.load(folder, device="cpu")
    key = f"{Path(data).name} {folder.name}"
    if key in read_results(RESULTS):
        return
    config = run.config
    dataset = open_dataset(data, holdout=config.holdout)
    own = min(dataset.test_images.read(0).size)
    split = load_labelled(dataset.test_images, dataset.test_masks, own, ignore_label=config.ignore)
    num_fit_images = max(1, min(config.num_fit_images, len(split) // 2))

    def iou(model=run, **options) -> float:
        return score(model.segment(split.images, **options).labels)

    def score(labels: torch.Tensor) -> float:
        return evaluate_masks(labels.numpy(), split.foreground, split.valid, config.num_leaf_regions, num_fit_images)[
            "iou"
        ]

    measured = {"bilinear": iou(upsample="bilinear"), "fast": iou(), "best": iou(quality="best"), "t = 0": iou(t=0)}
    others = {f"average {decay}": decay for decay in config.extra_ema_decays} | {"last weights": "last"}
    masks = [run.segment(split.images).masks]
    for name, weights in others.items():
        masks.append(factorkit.load(folder, device="cpu", weights=weights).segment(split.images).masks)
        measured[name] = score(masks[-1].argmax(1))
    if config.extra_ema_decays:
        measured["all averages"] = score(torch.stack(masks[:-1]).mean(0).argmax(1))
    record = {
        "iou": {name: round(value, 4) for name, value in measured.items()},
        "regions": config.regions,
        "resolution": config.resolution,
        "t": config.segment_t,
        "size": own,
        "scored": len(split) - num_fit_images,
        "step": run.step,
        "machine": machine(1),
        "commit": commit(),
    }
    write_result(RESULTS, key, record)
    print(key, record["iou"], flush=True)


def table(results: dict[str, dict]) -> str:
    """A line a run."""
    if not results:
        return "nothing measured yet"
    names = list(dict.fromkeys(name for record in results.values() for name in record["iou"]))
    lines = ["| run | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for key, record in results.items():
        figures = [f"{record['iou'][name]:.3f}".lstrip("0") if name in record["iou"] else "" for name in names]
        lines.append(f"| {key} | " + " | ".join(figures) + " |")
    gains = {name: [r["iou"][name] - r["iou"]["fast"] for r in results.values() if name in r["iou"]] for name in names}
    lines.append("| mean difference to fast | " + " | ".join(f"{np.mean(gains[name]):+.4f}" for name in names) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
