"""The rates that this machine reaches at most: a copy in its memory, a matrix product, the U-Net's convolution.

python -m benchmarks.ceilings --device cuda
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.contenders import PRESETS
from benchmarks.measure import convolution_rate, copy_bandwidth, machine, matrix_rate
from benchmarks.recording import append_row
from factorkit.segdiff.config import preset_config

ROUNDS = 10
MEGABYTES = {"cpu": 64, "cuda": 1024}  # of the copy
SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", help="whose convolution is measured")
    parser.add_argument("--batch", type=int, help="images; the preset's batch if left out")
    parser.add_argument("--output", type=Path, help="takes the result, a line of JSON")
    args = parser.parse_args()
    row = {"name": "ceilings", **measure_ceilings(args.device, args.preset, args.batch)}
    print(row)
    if args.output:
        append_row(args.output, row)


def measure_ceilings(device_name: str, preset: str | None = None, batch: int | None = None) -> dict[str, object]:
    """Return GB/s of the copy, TFLOP/s of the bf16 product and the finest level's 3x3 convolution, and the machine."""
    device = torch.device(device_name)
    if device.type == "cpu":
        torch.set_num_threads(1)
    config = preset_config(preset or PRESETS[device.type]).resolved()
    shape = (batch or config.batch_size, config.model_channels, config.resolution, config.resolution)
    images = torch.randn(*shape, device=device, dtype=torch.bfloat16)
    return {
        "copy_gb_s": round(copy_bandwidth(device, MEGABYTES[device.type], ROUNDS), 2),
        "matrix_tflop_s": round(matrix_rate(device, SIDE[device.type], torch.bfloat16, ROUNDS), 4),
        "convolution_tflop_s": round(convolution_rate(images, ROUNDS), 4),
        "convolution_shape": list(shape),
        **machine(device),
    }


if __name__ == "__main__":
    main()
