"""Cut a photo into its regions and generate new images.

    python examples/segment_and_generate.py runs/photos photo.jpg

Writes region_0.png ... (the photo inside each region, transparent elsewhere) and generated_0.png ... into this folder.
"""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

import factorkit

if __name__ == "__main__":
    folder, path = sys.argv[1:]
    run = factorkit.load(folder)

    photo = Image.open(path).convert("RGB")
    masks = run.segment(photo).masks[0]  # [K, H, W], summing to 1 over the K regions
    for k, mask in enumerate(masks):
        alpha = Image.fromarray(np.uint8(255 * mask.numpy()))
        photo.putalpha(alpha)
        photo.save(f"region_{k}.png")

    generated = run.generate(4, seed=0)
    for i, image in enumerate(generated.images):  # [3, R, R] in [0, 1]
        Image.fromarray(np.uint8(255 * image.permute(1, 2, 0).numpy())).save(f"generated_{i}.png")
