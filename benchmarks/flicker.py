"""How much regions flicker in a clip: smoothing against frame by frame.

    python -m benchmarks.flicker RUN --data PHOTOS

Clips are made of five labelled photos the run was not trained on: 30 frames that stand still under a sensor's
noise (share of the pixels that change region from one frame to the next, over the last 19), and 30 frames of a camera
that moves by two pixels a frame (share of the pixels, over the last 20, that agree with each frame by itself, without
noise). Results go to benchmarks/results/flicker.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.recording import commit, machine, read_results, write_result

RESULTS = Path(__file__).with_name("results") / "flicker.json"
SMOOTH, SIGMAS, FRAMES, IMAGES = (0.0, 0.5, 0.8, 0.9), (5, 15), 30, (3, 15, 30, 45, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--data", help="as train_segdiff takes it; the photos the run was trained on")
    args = parser.parse_args()
    if args.run is not None:
        measure(args.run, args.data)
    for key, record in read_results(RESULTS).items():
        print(key)
        for name in ("still, noise 5", "still, noise 15", "moving, noise 5"):
            print("   ", name, record[name])


def measure(folder: Path, data: str) -> None:
    import torch

    import factorkit
    from factorkit.data.datasets import open_dataset
    from factorkit.segdiff.inference.video import segment_frames

    torch.set_num_threads(1)
    run = factorkit.load(folder, device="cpu")
    size = run.config.resolution
    test = open_dataset(data, holdout=run.config.holdout).test_images
    photos = [np.asarray(test.read(i)) for i in IMAGES]

    def labels(frames: np.ndarray, smooth: float) -> np.ndarray:
        options = {"size": size, "upsample": "guided", "smooth": smooth}
        pairs = segment_frames(frames, run.config, run.predictor(None, "fast"), **options)
        return np.stack([result for _, result in pairs])

    record: dict = {"frames": FRAMES, "machine": machine(1), "commit": commit()}
    for sigma in SIGMAS:
        clips = [noisy(np.repeat(photo[None], FRAMES, 0), sigma, seed=1) for photo in photos]
        result = {s: [labels(clip, s)[10:] for clip in clips] for s in SMOOTH}
        record[f"still, noise {sigma}"] = {
            str(s): round(float(np.mean([(clip[1:] != clip[:-1]).mean() for clip in of])), 5)
            for s, of in result.items()
        }
    agreement: dict[str, list[float]] = {str(s): [] for s in SMOOTH}
    for photo in photos:
        wide = np.pad(photo, ((0, 0), (40, 40), (0, 0)), mode="reflect")
        clean = np.stack([wide[:, 2 * k : 2 * k + photo.shape[1]] for k in range(FRAMES)])
        alone = labels(clean, 0.0)
        for s in SMOOTH:
            agreement[str(s)].append((alone == labels(noisy(clean, 5, seed=2), s))[10:].mean())
    record["moving, noise 5"] = {s: round(float(np.mean(values)), 4) for s, values in agreement.items()}
    write_result(RESULTS, f"{Path(data).name} {folder.name}", record)


def noisy(frames: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    noise = sigma * np.random.default_rng(seed).standard_normal(frames.shape)
    return np.clip(frames + noise, 0, 255).round().astype(np.uint8)


if __name__ == "__main__":
    main()
