"""Import every module, train tiny models and use them: `python -W error tests/strict_run.py FOLDER`."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path

import factorkit


def main(folder: Path) -> None:
    # kernels need Triton, which may be missing; __main__ would run the command line
    for module in pkgutil.walk_packages(factorkit.__path__, "factorkit."):
        if not module.name.startswith(("factorkit.kernels", "factorkit.__main__")):
            importlib.import_module(module.name)
    from benchmarks.fuzz_runs import good_runs
    from factorkit.nerfdiff.stages import stage_training

    stage_training.HELD_OUT_STEPS = 6  # of 100: most steps of a tiny run
    runs = good_runs(folder)
    run = factorkit.load(runs["segdiff"])
    assert run.segment(folder / "data" / "images").labels.shape == (12, 16, 16)
    assert run.generate(1, steps=2).images.shape == (1, 3, 16, 16)
    scene = factorkit.load(runs["nerfdiff"])
    assert scene.render_path("orbit", frames=1).images.shape == (1, 3, 8, 8)
    print("strict")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
