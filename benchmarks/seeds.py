"""Which label-free figure picks a good seed? Each against IoU on held-out photos, over seeds.

    python -m benchmarks.seeds competition --data PHOTOS --regions 3 --seeds 8 --stops 40 60 120
    python -m benchmarks.seeds runs RUN... --data PHOTOS

The first trains competitions of regions (``masks="competition"``) without a U-Net and looks at each after so many
steps; the second takes finished segdiff runs that differ in their seeds. Asked are: the noise a competition cannot
explain ("error"), or the training's own loss; the eta gap; the masks' entropy; and the edge alignment, the mean step
of colour where hard masks meet over the mean step anywhere. Results go to benchmarks/results/seeds.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.recording import commit, machine, read_results, write_result

RESULTS = Path(__file__).with_name("results") / "seeds.json"
MORE_IS_BETTER = ("eta_gap", "edge")
LAST = 10  # lines of a run's log whose loss is averaged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("mixture", "runs"))
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--data", help="as train_segdiff takes it")
    parser.add_argument("--regions", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--stops", type=int, nargs="+", default=[40, 60, 120], help="the last is the training's length")
    parser.add_argument("--mirror", action="store_true")
    args = parser.parse_args()
    if args.what is not None:
        import torch

        torch.set_num_threads(1)
        result = competitions(args) if args.what == "mixture" else finished(args)
        for name, rows in result.items():
            record = {"rows": rows, "judged": judged(rows), "machine": machine(1), "commit": commit()}
            write_result(RESULTS, f"{Path(args.data).name} {name}", record)
    for key, record in read_results(RESULTS).items():
        ious = " ".join(f"{row['iou']:.3f}".lstrip("0") for row in record["rows"])
        print(f"{key}: IoU {ious}")
        for name, figure in record["judged"].items():
            print(f"    {name:<8} rank correlation {figure['spearman']:+.2f}, picks {figure['picks']:.3f}")


def competitions(args: argparse.Namespace) -> dict[str, list[dict]]:
    import torch

    from factorkit.data.masks import load_labelled
    from factorkit.engine.trainer import Trainer
    from factorkit.segdiff.choose_regions import SETTINGS, MixtureTask
    from factorkit.segdiff.config import preset_config
    from factorkit.segdiff.masks.spatial_mixture import unexplained_noise
    from factorkit.segdiff.training_images import load_data

    settings = SETTINGS | {
        "random_flip": args.mirror,
        "steps": args.stops[-1],
        "device": "cpu",
        "regions": args.regions,
    }
    config = preset_config(**settings, resolution=32).resolved()
    dataset, prepared, probes = load_data(args.data, config.resolution, config.holdout, config.mask_set, False)
    split = load_labelled(dataset.test_images, dataset.test_masks, 32)
    from factorkit.utils.images import pixels_to_signed

    images, result = pixels_to_signed(torch.from_numpy(split.images)), {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for stop in args.stops:
                task = MixtureTask(dataclasses.replace(config, seed=seed), prepared.images, probes, torch.device("cpu"))
                where, quiet = Path(folder) / str(seed), {"progress": False, "report": False}
                model = Trainer(task, task.config, where, {}, device=task.device, stop_at=stop, **quiet).run()
                with torch.no_grad():
                    masks, flipped = (model(x).logits.softmax(1) for x in (images, images.flip(3)))
                row = {"seed": seed, "error": unexplained_noise(model, task.probes, task.schedule)}
                row |= figures(split, images, masks, flipped, args.regions, config.num_fit_images)
                result.setdefault(f"competition K={args.regions} after {stop} of {args.stops[-1]} steps", []).append(
                    row
                )
    return result


def finished(args: argparse.Namespace) -> dict[str, list[dict]]:
    import torch

    import factorkit
    from factorkit.data.datasets import open_dataset
    from factorkit.data.masks import load_labelled
    from factorkit.utils.files import read_log
    from factorkit.utils.images import pixels_to_signed

    rows = []
    for folder in args.runs:
        run = factorkit.load(folder, device="cpu")
        config = run.config
        dataset = open_dataset(args.data, holdout=config.holdout)
        split = load_labelled(dataset.test_images, dataset.test_masks, config.resolution, ignore_label=config.ignore)
        images, predict = pixels_to_signed(torch.from_numpy(split.images)), run.predictor(None, "fast")
        losses = [event["loss"] for event in read_log(folder) if event["event"] == "step"]
        row = {"seed": config.seed, "loss": float(np.mean(losses[-LAST:]))}
        rows.append(
            row
            | figures(
                split, images, predict(images), predict(images.flip(3)), config.num_leaf_regions, config.num_fit_images
            )
        )
    return {args.runs[0].name.rpartition("seed")[0].rstrip("_ "): rows}


def figures(split, images, masks, flipped, regions: int, num_fit_images: int) -> dict[str, float]:
    from factorkit.metrics.segmentation import evaluate_masks
    from factorkit.segdiff.alarms import measure_alarms

    labels, alarms = masks.argmax(1), measure_alarms(images, masks, flipped)
    iou = evaluate_masks(labels.numpy(), split.foreground, split.valid, regions, min(num_fit_images, len(split) // 2))[
        "iou"
    ]
    return {"eta_gap": alarms.eta_gap, "entropy": alarms.entropy, "edge": edge_alignment(images, labels), "iou": iou}


def edge_alignment(images, labels) -> float:
    steps, borders = [], []
    for dim in (2, 3):
        steps.append(images.diff(dim=dim).square().sum(1).sqrt().flatten())
        borders.append((labels.diff(dim=dim - 1) != 0).flatten())
    steps, borders = np.concatenate(steps), np.concatenate(borders)
    return float(steps[borders].mean() / steps.mean())


def judged(rows: list[dict]) -> dict[str, dict[str, float]]:
    """How well the ranks of each figure go with those of IoU, as if more of it were better, and what its best has."""
    from scipy.stats import spearmanr

    result = {}
    for name in (name for name in rows[0] if name not in ("seed", "iou")):
        sign = 1 if name in MORE_IS_BETTER else -1
        ranked = spearmanr([sign * row[name] for row in rows], [row["iou"] for row in rows])[0]
        result[name] = {"spearman": round(float(ranked), 2), "picks": max(rows, key=lambda r: sign * r[name])["iou"]}
    return result


if __name__ == "__main__":
    main()
