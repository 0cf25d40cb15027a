"""The stages of benchmarks/gpu_box.py: what runs, in which order, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

SANITIZED = ("tests/ops", "-m", "gpu", "-q", "-k", "not beyond_2_31", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Stage:
    """A process.

    Attributes:
        name: of the stage and its files.
        limit_s: seconds after which it is stopped.
        command: {python} stands for the interpreter, {output} for the file that takes the results, one JSON object a
            line.
        environment: variables beside those of the caller.
    """

    name: str
    limit_s: int
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def gpu_stages(device: str, preset: str | None, batch: int | None, lego: Path | None) -> list[Stage]:
    """Return the stages of `make gpu`: together less than 9 minutes."""
    sizes = (*(("--preset", preset) if preset else ()), *(("--batch", str(batch)) if batch else ()))

    def module(name: str, limit_s: int, script: str, *options: str) -> Stage:
        return Stage(name, limit_s, ("{python}", "-m", f"benchmarks.{script}", *options, "--output", "{output}"))

    def suite(name: str, limit_s: int, file: str, expression: str, seconds: str = "0.2") -> Stage:
        options = ("--benchmark-only", "--benchmark-max-time", seconds, "--rows", "{output}", *sizes, "-q", "-s")
        selection = ("-k", f"{device} and ({expression})", "-p", "no:cacheprovider", "-p", "no:xdist")
        return Stage(name, limit_s, ("{python}", "-m", "pytest", f"benchmarks/{file}", *options, *selection))

    tests = ("-m", "gpu", "-n", "4", "--dist", "loadfile", "-q", "--timeout", "100", "--continue-on-collection-errors")
    scene = ("lego", "--data", str(lego)) if lego else ("demo",)
    views = ("--size", "128", "--seeds", "0", "--device", device)
    return [
        module("install", 70, "gpu_install", "--device", device),
        Stage("doctor", 15, ("{python}", "-m", "factorkit", "doctor")),
        Stage("tests", 105, ("{python}", "-m", "pytest", *tests)),
        module("ceilings", 20, "ceilings", "--device", device, *sizes),
        suite("steps", 60, "test_training.py", "not reference and not folded and not compiled"),
        suite("region-ops", 35, "test_ops.py", "region_op and ours"),
        suite("rendering-ops", 25, "test_ops.py", "rendering_op and ours"),
        module("cameras", 70, "nerfdiff", *scene, *views),
        module("profile", 25, "step_profile", "--device", device, *sizes),
        suite("step-peers", 50, "test_training.py", "reference or folded or compiled"),
        suite("op-peers", 60, "test_ops.py", "not ours", "0.1"),
    ]


SANITIZER_STAGES = [
    Stage(
        tool,
        270,
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "{python}", "-m", "pytest", *SANITIZED),
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    for tool in ("memcheck", "racecheck")
]
