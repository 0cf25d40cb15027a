"""Does a segmentation emerge? Trains segdiff from several seeds on one data set, scores each on held-out images.

    python -m benchmarks.segmentation procedural --preset demo --seeds 0 1 2 3 4
    python -m benchmarks.segmentation flowers17 --data PHOTOS --preset fast32 --ignore 128 --seeds 0 1 2 3 4
    python -m benchmarks.segmentation flowers17 --data PHOTOS --preset fast32 --ignore 128 --seeds 0 --form thesis

Each run is a JSON object in benchmarks/results/segmentation.json with its machine, commit and settings; a run that
stands there is not run again. Without --seeds the table of all results is printed. Scores are of the last step, never
of the best.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path

from benchmarks.recording import commit, machine, read_results, write_result

RESULTS = Path(__file__).with_name("results") / "segmentation.json"
WORKED = 0.8  # IoU from which a run counts as having found the object


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="what the data set is called in the table")
    parser.add_argument("--data", help="as train_segdiff takes it; left out: the procedural flowers")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--form", default="regional", choices=("regional", "thesis"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings, VALUE in JSON")
    parser.add_argument("--ignore", type=int)
    parser.add_argument("--holdout", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks")
    parser.add_argument("--baselines", action="store_true", help="score the trivial predictors too (once is enough)")
    args = parser.parse_args()
    changes = {k: json.loads(v) for k, v in (entry.split("=", 1) for entry in args.set)}
    for seed in args.seeds:
        run_once(args, changes, seed)
    print(table(read_results(RESULTS)))


def run_once(args: argparse.Namespace, changes: dict, seed: int) -> None:
    """Train and score one seed, unless its result is stored already."""
    import torch

    import factorkit
    from factorkit.segdiff.config import preset_config

    masks = preset_config(**{"preset": args.preset, "form": args.form, **changes}).resolved().masks
    settings = {"preset": args.preset, "form": args.form, **changes, "masks": masks}
    if masks == "network":
        del settings["masks"]  # as in the results that were stored when it was the default
    key = " ".join([args.name, *(f"{k}={v}" for k, v in settings.items()), f"seed={seed}"])
    if key in read_results(RESULTS):
        return
    out = args.out / key.replace(" ", "_").replace("/", "_")
    shutil.rmtree(out, ignore_errors=True)  # a result is of one unbroken, timed run
    holdout = int(args.holdout) if args.holdout.isdigit() else args.holdout
    start = time.perf_counter()
    run = factorkit.train_segdiff(
        args.data,
        out=out,
        preset=args.preset,
        form=args.form,
        seed=seed,
        holdout=holdout,
        ignore=args.ignore,
        baselines=args.baselines,
        **changes,
    )
    seconds = time.perf_counter() - start
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    alarms = [e for e in events if e["event"] == "alarms"][-1]
    record = {
        "set": args.name,
        **settings,
        "seed": seed,
        "scores": run.scores,
        "alarms": {k: v for k, v in alarms.items() if k not in ("event", "time")},
        "training_seconds": round(sum(e["seconds"] for e in steps), 1),
        "seconds": round(seconds, 1),
        "images_per_second": round(statistics.median(e["images_per_second"] for e in steps), 1),
        "machine": machine(run.config.threads or torch.get_num_threads()),
        "commit": commit(),
        "torch": torch.__version__,
    }
    write_result(RESULTS, key, record)
    print(key, {k: round(run.scores[k], 3) for k in ("acc", "iou", "dice")}, f"{seconds:.0f} s", flush=True)


def table(results: dict[str, dict]) -> str:
    """One line a data set and setting: seeds tried, seeds that worked, IoU of each, time."""
    groups: dict[str, list[dict]] = {}
    for key, record in results.items():
        groups.setdefault(key.rsplit(" seed=", 1)[0], []).append(record)
    lines = ["| run | seeds | worked (IoU >= .80) | IoU a seed | mean | training, s |", "|---|---|---|---|---|---|"]
    for name, records in sorted(groups.items()):
        iou = [r["scores"]["iou"] for r in sorted(records, key=lambda r: r["seed"])]
        seconds = statistics.median(r["training_seconds"] for r in records)
        each = " ".join(f"{x:.3f}".lstrip("0") for x in iou)
        worked = sum(x >= WORKED for x in iou)
        lines.append(f"| {name} | {len(iou)} | {worked} | {each} | {statistics.mean(iou):.3f} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
