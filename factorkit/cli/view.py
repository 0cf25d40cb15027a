"""``factorkit view``: show a nerfdiff run or a splat file in a browser."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from factorkit.cli.base import Result, RunCommand

if TYPE_CHECKING:
    from factorkit.nerfdiff.viewer import ViewerScene

CHECKPOINT_POLL_SECONDS = 5.0


@dataclass(kw_only=True)
class View(RunCommand):
    """Show the scene in a browser: points, predicted and true cameras with their images, live renders.

    During a training, every new checkpoint is shown. Ctrl-C stops the viewer. It needs the extra `viewer`.

    Examples:
        factorkit view runs/lego
        factorkit view runs/lego --port 9000
        factorkit view splats.ply
    """

    PROCESSES = "first"

    host: str = "127.0.0.1"
    """Address to serve at. 0.0.0.0 makes the viewer reachable from other machines."""
    port: int = 8080
    """Port to serve at. If it is in use, the next free one is used."""

    def execute(self) -> Result:
        """Serve the viewer until it is interrupted."""
        from factorkit.nerfdiff.viewer import Viewer

        checkpoint, contents = newest_checkpoint(self.run), load_contents(self.run, self.device)
        with Viewer(contents, host=self.host, port=self.port) as viewer:
            print(f"{self.run} at {viewer.url}; Ctrl-C stops it", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(CHECKPOINT_POLL_SECONDS)
                    if newest_checkpoint(self.run) != checkpoint:
                        checkpoint, contents = newest_checkpoint(self.run), load_contents(self.run, self.device)
                        viewer.show(contents)
            data = {"run": str(self.run), "url": viewer.url, "step": contents.step}
            return data, f"shown up to step {contents.step}"


def newest_checkpoint(run: Path) -> Path | None:
    """Find the newest checkpoint of a run folder or of its newest stage; None for a single file."""
    from factorkit.engine.checkpoint import Checkpoints
    from factorkit.nerfdiff.build import find_newest_stage

    for folder in (run, find_newest_stage(run)) if run.is_dir() else ():
        paths = [] if folder is None else Checkpoints(folder / "checkpoints").paths()
        if paths:
            return paths[0]
    return None


def load_contents(path: Path, device: str) -> ViewerScene:
    """Load what the viewer shows of a run: scene, cameras, and the true cameras if they are known.

    Before the run has a model, the contents are those of its newest stage.
    """
    import torch

    from factorkit.nerfdiff.build import load_partial_run
    from factorkit.nerfdiff.evaluate import training_errors
    from factorkit.nerfdiff.export import SPLAT_SUFFIXES
    from factorkit.nerfdiff.run import NerfdiffRun
    from factorkit.nerfdiff.splat_scene import SplatScene
    from factorkit.nerfdiff.training_views import load_views
    from factorkit.nerfdiff.viewer import ViewerScene

    if path.suffix.lower() in SPLAT_SUFFIXES:
        splats = SplatScene(path, device=device)
        return ViewerScene(0, splats.model.field, splats.views, torch.zeros(3))
    checkpoint = newest_checkpoint(path)
    if checkpoint is not None and checkpoint.parent.parent != path:
        _, step, field, views = load_partial_run(path)
        background = torch.zeros(3) if views.background is None else views.background
        return ViewerScene(step, field, views, background, None)
    run = NerfdiffRun.load(path, device=device)
    errors, stored, true_poses = training_errors(run), load_views(run.folder), None
    if errors is not None and stored is not None and stored.poses is not None:
        true_poses = errors.alignment.inverse().apply(stored.poses)
    return ViewerScene(run.step, run.model.field, run.views, run.model.background, true_poses)
