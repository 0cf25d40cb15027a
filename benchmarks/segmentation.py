"""Does a segmentation emerge? Trains segdiff from several seeds on one data set, scores each on held-out images.

    python -m benchmarks.segmentation procedural --preset demo --seeds 0 1 2 3 4
    python -m benchmarks.segmentation flowers17 --data PHOTOS --preset fast32 --ignore 128 --seeds 0 1 2 3 4
    python -m benchmarks.segmentation flowers17 --data PHOTOS --preset fast32 --ignore 128 --seeds 0 --form thesis
    python -m benchmarks.segmentation horses --data PHOTOS --preset uvit32 --processor-seconds 75 --seeds 0
    python -m benchmarks.segmentation horses --data PHOTOS --preset fast32 --set resolution=128 \
        --latent runs/autoencoder --processor-seconds 75 --mask-size 128 --image-size 32 --seeds 0

With --processor-seconds a run has as many steps as take so long, so that networks compare at equal cost; its drawn
images are then scored too (Fréchet distance in fixed random features, which compares runs of one data set alone).
--mask-size scores the masks of `segment` at that size, and --image-size the drawn images averaged to that size, so that
runs of different resolutions compare.
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
DRAWN_IMAGES, DRAWING_STEPS = 64, 10  # and as many photos in their place
TIMED_STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="what the data set is called in the table")
    parser.add_argument("--data", help="as train_segdiff takes it; left out: the procedural flowers")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--form", default="regional", choices=("regional", "thesis"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings, VALUE in JSON")
    parser.add_argument("--ignore", type=int)
    parser.add_argument("--processor-seconds", type=int, help="length of the training, in place of the preset's steps")
    parser.add_argument("--latent", type=Path, help="an autoencoder's run folder, whose latents replace pixels")
    parser.add_argument("--mask-size", type=int, help="side at which masks are scored, in place of the resolution")
    parser.add_argument("--image-size", type=int, help="side at which drawn images are scored; divides the resolution")
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
    from factorkit.segdiff.config import PIXELS
    from factorkit.segdiff.settle import settle_latents

    space = {"latent": str(args.latent or PIXELS)}
    config = settle_latents(args.preset, {"form": args.form, **changes, **space}, Path(), {}).config.resolved()
    masks = config.masks
    settings = {"preset": args.preset, "form": args.form, **changes, "masks": masks}
    if masks == "network":
        del settings["masks"]  # as in the results that were stored when it was the default
    if args.latent:
        settings["latent"] = f"{config.latent_factor}x"  # an autoencoder's folder means nothing elsewhere
    for name in ("processor_seconds", "mask_size", "image_size"):
        if getattr(args, name):
            settings[name] = getattr(args, name)
    key = " ".join([args.name, *(f"{k}={v}" for k, v in settings.items()), f"seed={seed}"])
    if key in read_results(RESULTS):
        return
    out = args.out / key.replace(" ", "_").replace("/", "_")
    shutil.rmtree(out, ignore_errors=True)  # a result is of one unbroken, timed run
    holdout = int(args.holdout) if args.holdout.isdigit() else args.holdout
    if args.processor_seconds:
        changes = {**changes, "steps": round(args.processor_seconds / measure_step(config)), "sample_every": 0}
    start, processor_start = time.perf_counter(), time.process_time()
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
        **space,
    )
    seconds, processor_seconds = time.perf_counter() - start, time.process_time() - processor_start
    scores = dict(run.scores or {})
    if args.mask_size:
        scores |= score_masks(run, args.data, holdout, args.mask_size)
    drawn = {}
    if args.processor_seconds:
        drawn = {"drawn": score_images(run, args.data, holdout, args.image_size or config.resolution)}
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    alarms = [e for e in events if e["event"] == "alarms"][-1]
    record = {
        "set": args.name,
        **settings,
        "seed": seed,
        "scores": scores,
        **drawn,
        "steps": run.step,
        "processor_seconds_used": round(processor_seconds, 1),
        "alarms": {k: v for k, v in alarms.items() if k not in ("event", "time")},
        "training_seconds": round(sum(e["seconds"] for e in steps), 1),
        "seconds": round(seconds, 1),
        "images_per_second": round(statistics.median(e["images_per_second"] for e in steps), 1),
        "machine": machine(run.config.threads or torch.get_num_threads()),
        "commit": commit(),
        "torch": torch.__version__,
    }
    write_result(RESULTS, key, record)
    print(key, {k: round(scores[k], 3) for k in ("acc", "iou", "dice")}, f"{seconds:.0f} s", flush=True)


def score_masks(run, data, holdout, size: int) -> dict:
    """Return the scores of the masks that `segment` returns for the held-out photos of that size."""
    from factorkit.data.masks import load_labelled
    from factorkit.segdiff.evaluate import score_foreground_regions
    from factorkit.segdiff.training_images import load_data

    config = run.config
    dataset = load_data(data, config.resolution, holdout, config.mask_set, progress=False)[0]
    values = {"ignore_label": config.ignore, "foreground": config.foreground, "mask_threshold": config.mask_threshold}
    labelled = load_labelled(dataset.test_images, dataset.test_masks, size, **values)
    count = max(1, min(config.num_fit_images, len(labelled) // 2))
    labels = run.segment(labelled.images).labels.numpy()
    return score_foreground_regions(labels, labelled, config.nesting, count) | {"size": size}


def score_images(run, data, holdout, size: int) -> dict:
    """Return the scores of drawn images, averaged to that size, against photos of that size."""
    import torch.nn.functional as F

    from factorkit.segdiff.drawn_images import choose_photos, score_drawn
    from factorkit.segdiff.training_images import load_data
    from factorkit.utils.images import pixels_to_images

    photos = pixels_to_images(load_data(data, size, holdout, run.config.mask_set, progress=False)[1].images)
    reference, others = choose_photos(len(photos), DRAWN_IMAGES)
    drawn = F.avg_pool2d(run.generate(len(others), steps=DRAWING_STEPS).images, run.config.resolution // size)
    return score_drawn(drawn, photos[reference], photos[others]).to_dict()


def measure_step(config) -> float:
    """Return the processor seconds of a training step, by some on random images."""
    import numpy as np
    import torch

    from factorkit.engine.config import cpu_threads
    from factorkit.engine.trainer import Trainer
    from factorkit.segdiff.task import SegdiffTask

    shape = (config.batch_size, config.resolution, config.resolution, 3)
    images = probes = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if config.latent_channels:
        images = np.zeros((config.batch_size, 1, config.latent_channels, config.side, config.side), np.float16)
    device = torch.device("cpu")
    with cpu_threads(config.threads):
        trainer = Trainer(
            SegdiffTask(config, images, probes, device), config, Path("."), {}, device=device, progress=False
        )
        trainer.measure_step_seconds(steps=1)
        start = time.process_time()
        trainer.measure_step_seconds(steps=TIMED_STEPS - 1)  # and one before these
    return (time.process_time() - start) / TIMED_STEPS


def table(results: dict[str, dict]) -> str:
    """One line a data set and setting: seeds tried, seeds that worked, IoU of each, time."""
    groups: dict[str, list[dict]] = {}
    for key, record in results.items():
        groups.setdefault(key.rsplit(" seed=", 1)[0], []).append(record)
    lines = ["| run | seeds | worked (IoU >= .80) | IoU a seed | mean | training, s | steps | Fréchet a seed |"]
    lines.append("|---" * 8 + "|")
    for name, records in sorted(groups.items()):
        records.sort(key=lambda r: r["seed"])
        iou = [r["scores"]["iou"] for r in records]
        seconds = statistics.median(r["training_seconds"] for r in records)
        each = " ".join(f"{x:.3f}".lstrip("0") for x in iou)
        worked = sum(x >= WORKED for x in iou)
        steps = " ".join(str(r["steps"]) for r in records if "steps" in r)
        frechet = " ".join(f"{r['drawn']['frechet']:.3f}".lstrip("0") for r in records if "drawn" in r)
        mean = f"{statistics.mean(iou):.3f}"
        lines.append(f"| {name} | {len(iou)} | {worked} | {each} | {mean} | {seconds:.0f} | {steps} | {frechet} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
