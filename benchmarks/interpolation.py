"""How well do the end frames of an interpolation reconstruct their photos (thesis fig. 2.12)? Of held-out photos.

    python -m benchmarks.interpolation flowers17 --run runs/flowers --data FOLDER
    python -m benchmarks.interpolation

A record of benchmarks/results/interpolation.json holds the PSNR of both ends of each pair and, of a run on latents, of
the autoencoder's own round trip of the same photos, which bounds it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.recording import commit, machine, read_results, write_result
from benchmarks.samplers import prepare_held_out

RESULTS = Path(__file__).with_name("results") / "interpolation.json"


def score(args: argparse.Namespace) -> None:
    """Interpolate between pairs of held-out photos, and record the PSNR of the end frames."""
    import factorkit
    from factorkit.metrics.image import psnr
    from factorkit.segdiff.training_images import load_data

    run = factorkit.load(args.run)
    config = run.config
    dataset, _, _ = load_data(args.data, config.resolution, config.holdout, config.mask_set, progress=False)
    photos = prepare_held_out(dataset, config.resolution)[: 2 * args.pairs]
    between = run.interpolate(photos[::2], photos[1::2], frames=3, t=args.time)
    true = torch.stack([between.a, between.b], 1)
    measure = lambda images: [round(float(x), 2) for x in psnr(images.flatten(0, 1), true.flatten(0, 1))]  # noqa: E731
    record = {"ends": measure(between.images[:, [0, -1]]), "round_trip": None}
    if config.latent_channels:
        space = run.model.space
        record["round_trip"] = measure(
            ((space.decode(space.encode(2 * true.flatten(0, 1) - 1)) + 1) / 2).unflatten(0, true.shape[:2])
        )
    names = ("backbone", "resolution", "latent_factor", "masks", "num_leaf_regions")
    settings = {name: getattr(config, name) for name in names} | {"steps": run.step, "t": args.time}
    facts = {"machine": machine(torch.get_num_threads()), "commit": commit(), "torch": torch.__version__}
    key = " ".join([args.name, *(f"{k}={v}" for k, v in settings.items())])
    write_result(RESULTS, key, {**settings, **record, **facts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="what the data set is called in the records")
    parser.add_argument("--run", type=Path, help="a trained run")
    parser.add_argument("--data", help="what it was trained on")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--time", type=int, help="time step of the mixing; left out: a quarter of those trained on")
    args = parser.parse_args()
    if args.name:
        score(args)
    for key, record in sorted(read_results(RESULTS).items()):
        trip = record["round_trip"] and f", round trip {min(record['round_trip'])} to {max(record['round_trip'])}"
        print(f"{key}: {min(record['ends'])} to {max(record['ends'])} dB{trip or ''}")


if __name__ == "__main__":
    main()
