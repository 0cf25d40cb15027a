"""Draw docs/captures.jpg: rendered photos taken rightly and wrongly, each row with what structure from motion finds.

python -m benchmarks.capture_pictures docs/captures.jpg
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from factorkit.nerfdiff.stages.feature_images import FeatureImage
from factorkit.nerfdiff.stages.sfm import find_cameras
from factorkit.report.image_grid import draw_image_grid
from tests.nerfdiff.textured import make_intrinsics_of, orbit, render_photo

SIZE = (240, 320)
K = make_intrinsics_of(SIZE)
WALK = orbit(np.arange(0, 88, 11.0))
Photos = list[tuple[np.ndarray, np.ndarray]]


def turn_on_the_spot() -> np.ndarray:
    """Return the poses of a camera that only turns."""
    poses = []
    for angle in np.radians(np.linspace(-12, 12, len(WALK))):
        turn, c, s = np.eye(4), np.cos(angle), np.sin(angle)
        turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = c, s, -s, c
        poses.append(WALK[0] @ turn)
    return np.stack(poses)


def render(poses: np.ndarray, still: bool = False) -> Photos:
    """Return images and masks of the block."""
    return [render_photo(pose, K, SIZE, still=still) for pose in poses]


def blur(photos: Photos) -> Photos:
    """Return photos that a moving hand blurred."""
    filtered = [Image.fromarray(pixels).filter(ImageFilter.BoxBlur(9)) for pixels, _ in photos]
    return [(np.asarray(image), mask) for image, (_, mask) in zip(filtered, photos, strict=True)]


def make_captures() -> dict[str, tuple[Photos, bool]]:
    """Return photos by what was done, and whether their masks are given."""
    turntable = render(WALK, still=True)
    return {
        "right: a walk around, 11 degrees a photo": (render(WALK), False),
        "right: a turntable, with masks": (turntable, True),
        "wrong: the same before a still background, without masks": (turntable, False),
        "wrong: turned on the spot": (render(turn_on_the_spot()), False),
        "wrong: 45 degrees a photo": (render(orbit(np.arange(0, 360, 45.0))), False),
        "wrong: moved while it exposed": (blur(render(WALK)), False),
    }


def describe(photos: Photos, masked: bool) -> str:
    """Return how many cameras structure from motion finds."""
    images = [
        FeatureImage(f"{i}", pixels.mean(-1).round().astype(np.uint8), mask if masked else None, K, "unknown")
        for i, (pixels, mask) in enumerate(photos)
    ]
    with tempfile.TemporaryDirectory() as folder:
        result = find_cameras(images, Path(folder) / "sfm", ordered=False, progress=False)
    print(*result.describe(), sep="\n")
    return f"{len(result.registered)} of {len(photos)} cameras"


def main() -> None:
    """Draw the figure."""
    rows, captions = [], []
    for title, (photos, masked) in make_captures().items():
        print(title)
        captions.append(f"{title}: {describe(photos, masked)}")
        shown = [np.where(m[..., None], p, np.uint8(255)) if masked else p for p, m in photos[::2]]
        rows.append([np.asarray(Image.fromarray(pixels).resize((160, 120))) for pixels in shown])
    draw_image_grid(rows, row_captions=captions, cell=160).save(sys.argv[1], quality=85)


if __name__ == "__main__":
    main()
