"""What does a sampler make of how many steps? Draws the same number of images from one run with each sampler.

    factorkit train segdiff --preset demo --out runs/demo
    python -m benchmarks.samplers procedural --run runs/demo --samplers ddpm ddim heun dpm++ --steps 5 10 20 50 100 250
    python -m benchmarks.samplers kinds --run runs/kinds --data KINDS --samplers ddim dpm++ --steps 10 --classes all
    python -m benchmarks.samplers

Quality is the Frechet distance to the training images on fixed random convolutions (factorkit.metrics.frechet): no FID,
and comparable within this table alone. Cost is how often the network is called for an image. Each cell is a JSON object
in benchmarks/results/samplers.json with its machine, commit and settings; one that stands there is not drawn again. The
floor is what as many held-out images have, which a perfect sampler of a perfect model would. Of several seeds of the
sampling the table has the mean and the standard deviation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.recording import commit, machine, read_results, write_result

RESULTS = Path(__file__).with_name("results") / "samplers.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="what the data set is called in the table")
    parser.add_argument("--run", type=Path, help="a trained run")
    parser.add_argument("--data", help="what it was trained on; left out: the procedural flowers")
    parser.add_argument("--classes", nargs="*", help="what to draw, of a run with classes")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--samplers", nargs="*", default=[])
    parser.add_argument("--steps", type=int, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.name:
        measure(args)
    print(table(read_results(args.out)))


def measure(args: argparse.Namespace) -> None:
    """Draw every cell that is not there yet, the cheapest first."""
    import torch

    import factorkit
    from factorkit.diffusion.samplers import count_evaluations
    from factorkit.metrics.frechet import frechet_distance, random_features
    from factorkit.segdiff.drawn_images import average_squares
    from factorkit.segdiff.training_images import load_data

    run = factorkit.load(args.run)
    names = (
        "form",
        "regions",
        "resolution",
        "model_channels",
        "prediction",
        "schedule",
        "t_max",
        "high_noise_fraction",
        "loss_weighting",
    )
    factor = run.config.latent_factor  # drawn images are scored at the latents' size: a decoder makes even noise smooth
    settings = {name: getattr(run.config, name) for name in names} | ({"latent": f"{factor}x"} if factor > 1 else {})
    settings |= {"steps": run.step, "seed": run.config.seed}
    condition = {"classes": " ".join(args.classes), "guidance": args.guidance} if args.classes else {}
    model = " ".join([args.name, *(f"{k}={v}" for k, v in (settings | condition).items())])
    guided = {"classes": "all" if args.classes == ["all"] else args.classes, "guidance": args.guidance}
    config = run.config
    dataset, prepared, _ = load_data(args.data, config.resolution, config.holdout, config.mask_set, progress=False)
    unit = lambda images: torch.from_numpy(images.copy()).movedim(3, 1).float() / 255  # noqa: E731
    features = lambda images: random_features(average_squares(images, factor))  # noqa: E731
    real = features(unit(prepared.images))
    facts = {
        "model": model,
        "images": args.images,
        "seed": args.seed,
        "machine": machine(torch.get_num_threads()),
        "commit": commit(),
        "torch": torch.__version__,
    }

    def write(key: str, frechet: float, **more) -> None:
        write_result(args.out, key, {**facts, "frechet": frechet, **more})
        print(f"{key}: {frechet:.4f}", flush=True)

    key = f"{model} n={args.images} held out"
    if dataset.test_images is not None and key not in read_results(args.out):
        other = prepare_held_out(dataset, run.config.resolution)[: args.images]
        if len(other) == args.images:
            write(key, frechet_distance(features(unit(other)), real), sampler="held-out images", evaluations=0)
    for steps in sorted(args.steps):
        for sampler in args.samplers:
            key = f"{model} n={args.images} seed={args.seed} {sampler} {steps}"
            if key in read_results(args.out):
                continue
            start = time.perf_counter()
            images = run.generate(args.images, sampler=sampler, steps=steps, seed=args.seed, **guided).images
            seconds = round(time.perf_counter() - start, 1)
            cost = {"steps": steps, "evaluations": count_evaluations(sampler, steps), "seconds": seconds}
            write(key, frechet_distance(features(images), real), sampler=sampler, **cost)


def prepare_held_out(dataset, resolution: int):
    from factorkit.data import prepare

    return prepare(dataset.test_images, resolution, progress=False).images


def table(results: dict[str, dict]) -> str:
    """For each model and number of images a table: a line a sampler, a column a number of steps."""
    models: dict[tuple[str, int], list[dict]] = {}
    for record in results.values():
        models.setdefault((record["model"], record["images"]), []).append(record)
    lines = []
    for (model, count), records in sorted(models.items()):
        drawn = [r for r in records if r["evaluations"]]
        floor = [r["frechet"] for r in records if not r["evaluations"]]
        steps = sorted({r["steps"] for r in drawn})
        lines += ["", f"{model}, {count} images a cell" + (f", held-out images {floor[0]:.3f}" if floor else "")]
        lines += ["", "| sampler | " + " | ".join(f"{n} steps" for n in steps) + " |", "|---" * (len(steps) + 1) + "|"]
        for sampler in dict.fromkeys(r["sampler"] for r in drawn):
            cells = [[r for r in drawn if (r["sampler"], r["steps"]) == (sampler, n)] for n in steps]
            lines.append(f"| {sampler} | " + " | ".join(map(format_seeds, cells)) + " |")
    return "\n".join(lines).strip()


def format_seeds(records: list[dict]) -> str:
    """Mean distance over the seeds, their standard deviation, and in brackets the network calls an image."""
    if not records:
        return ""
    distances = [r["frechet"] for r in records]
    spread = f" ± {statistics.stdev(distances):.3f}" if len(records) > 1 else ""
    return f"{statistics.mean(distances):.3f}{spread} ({records[0]['evaluations']})"


if __name__ == "__main__":
    main()
