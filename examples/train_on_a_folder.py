"""Train on a folder of photos, without labels.

    python examples/train_on_a_folder.py photos/ runs/photos

The same call again resumes. With images/ and masks/ in the folder the labelled images are held out and scored.
"""

from __future__ import annotations

import sys

import factorkit

if __name__ == "__main__":
    photos, out = sys.argv[1:]
    run = factorkit.train_segdiff(photos, out=out, preset="fast64")
    print(f"open {out}/report.html in a browser")
    if run.scores:
        print(f"IoU {run.scores['iou']:.3f} on {run.scores['scored']} labelled photos")
