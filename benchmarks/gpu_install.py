"""Install wheels from .whl/ that are missing here, and build factorkit for the GPU of this machine, without network."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.recording import append_row

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, required=True, help="takes the result, a line of JSON")
    args = parser.parse_args()
    wheels = missing_wheels(ROOT / ".whl")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    if wheels:
        subprocess.run([*pip, *map(str, wheels)], check=True)
    environment = {"FACTORKIT_CUDA": "0"}
    if args.device == "cuda":
        environment = {"FACTORKIT_CUDA": "1", "FACTORKIT_CUDA_ARCHS": architecture()}
    subprocess.run([*pip, "--no-build-isolation", "-e", str(ROOT)], check=True, env={**os.environ, **environment})
    append_row(args.output, {"name": "install", "wheels": [path.name for path in wheels], **environment})


def missing_wheels(folder: Path) -> list[Path]:
    """Return the wheels of a folder whose distributions are not installed."""

    def is_missing(path: Path) -> bool:
        try:
            importlib.metadata.version(path.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            return True
        return False

    return [path for path in sorted(folder.glob("*.whl")) if is_missing(path)]


def architecture() -> str:
    """Return nvcc's name of the current GPU's architecture, such as sm_90."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


if __name__ == "__main__":
    main()
