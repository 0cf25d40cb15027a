"""``factorkit demo``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from factorkit.cli.base import Command, OptionalPath, Result, format_duration, report_interruption

SEGMENTED_IMAGES, GENERATED_IMAGES = 8, 16


@dataclass(kw_only=True)
class Demo(Command):
    """Train on procedural images, use the model, and report whether it worked.

    The exit status is 1 if the run's own verdict is bad, or if nothing could judge it. Takes a few minutes on two CPU
    cores. segdiff is scored on 200 held-out flowers beside trivial baselines; 8 of them are segmented, and 16 new ones
    generated. nerfdiff finds the cameras of 80 views of a procedural scene, is scored with their true poses and 20
    other views, and renders an orbit. The same command again resumes, or shows the finished run.

    Examples:
        factorkit demo
        factorkit demo nerfdiff
        factorkit demo --seed 3 --out runs/demo3
    """

    PROCESSES = "all"

    model: Positional[Literal["segdiff", "nerfdiff"]] = "segdiff"
    """Which model to demonstrate."""
    out: OptionalPath = None
    """Run folder. The default is runs/demo, or runs/demo-nerfdiff."""
    seed: int = 0
    """Seed of the weights, the data order and the noise."""

    def execute(self) -> Result:
        """Train on procedural data and show the results."""
        if self.model == "segdiff":
            return self._show_segdiff(self.out or Path("runs/demo"))
        return self._show_nerfdiff(self.out or Path("runs/demo-nerfdiff"))

    def exit_code(self, data: dict[str, Any]) -> int:
        """Return 1 for a verdict that is neither good nor mixed."""
        return 0 if data["status"] in ("good", "mixed") else 1

    def _show_segdiff(self, out: Path) -> Result:
        from factorkit.cli.evaluate import judge_run
        from factorkit.cli.generate import write_generated
        from factorkit.cli.score_tables import format_scores
        from factorkit.data.datasets import make_procedural_dataset
        from factorkit.engine.config import cpu_threads
        from factorkit.segdiff.train import train_segdiff
        from factorkit.segdiff.verdict import REPORT
        from factorkit.utils import distributed

        start = time.perf_counter()
        with report_interruption(out):
            run = train_segdiff(out=out, preset="demo", seed=self.seed, baselines=True)
        flowers = make_procedural_dataset(run.config.resolution, train=1, test=SEGMENTED_IMAGES).test_images
        with cpu_threads(run.config.threads):
            segmented = run.segment_folder(flowers, out / "segmented")
            generation = run.generate(GENERATED_IMAGES, progress=True)
            generated = distributed.run_on_first(lambda: write_generated(generation, out / "generated"))
        scores, (judgement, lines) = run.scores or {}, judge_run(out, REPORT)
        data = {
            **{name: scores[name] for name in ("acc", "iou", "dice")},
            **judgement,
            "seed": self.seed,
            "seconds": time.perf_counter() - start,
            "report": str(out / "report.html"),
            "scores": scores,
            "segmented": str(segmented.overview),
            "generated": generated["overview"],
        }
        lines = [format_scores(scores), "", *_mark_failure(data, lines)]
        if self.exit_code(data):
            lines += [f"Try another seed: factorkit demo --seed {self.seed + 1} --out {out}-{self.seed + 1}"]
            lines += [
                "Or let it choose among seeds: factorkit train segdiff --preset demo --seed-trials 3 --out runs/trials"
            ]
        lines += ["", f"time       {format_duration(data['seconds'])}"]
        lines += [f"{name:<9}  {data[name]}" for name in ("segmented", "generated", "report")]
        return data, "\n".join(lines)

    def _show_nerfdiff(self, out: Path) -> Result:
        from factorkit.cli.evaluate import judge_run
        from factorkit.cli.score_tables import format_pose_scores
        from factorkit.data.procedural.scene import make_procedural_views
        from factorkit.nerfdiff.export.frames import write_frames
        from factorkit.nerfdiff.train import NUM_PROCEDURAL_VIEWS, train_nerfdiff
        from factorkit.nerfdiff.verdict import REPORT, write_report
        from factorkit.utils import distributed

        start = time.perf_counter()
        views = make_procedural_views(NUM_PROCEDURAL_VIEWS + 20, 32)
        with report_interruption(out):
            run = train_nerfdiff(views.select(slice(0, NUM_PROCEDURAL_VIEWS)), out=out, preset="demo", seed=self.seed)
        scores = run.evaluate(views.select(slice(NUM_PROCEDURAL_VIEWS, None)))
        images = run.render_path("orbit", size=64, frames=30).images

        def write() -> Path:
            write_report(out)
            return write_frames(out / "orbit.gif", images)

        orbit, (judgement, lines) = distributed.run_on_first(write), judge_run(out, REPORT)
        data = {
            **scores,
            **judgement,
            "seed": self.seed,
            "seconds": time.perf_counter() - start,
            "orbit": str(orbit),
            "report": str(out / "report.html"),
        }
        lines = [format_pose_scores(scores), "", *_mark_failure(data, lines), ""]
        lines += [f"time    {format_duration(data['seconds'])}"]
        return data, "\n".join([*lines, f"orbit   {orbit}", f"report  {data['report']}"])


def _mark_failure(data: dict[str, Any], lines: list[str]) -> list[str]:
    return lines if data["status"] in ("good", "mixed") else [f"This run FAILED: {lines[0]}", *lines[1:]]
