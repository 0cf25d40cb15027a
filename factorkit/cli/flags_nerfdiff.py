"""The flags of the commands on nerfdiff runs; see :mod:`factorkit.cli.flags`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from factorkit.cli.flag_types import Command, Flag, OptionalInt, OptionalPath, Result, RunCommand, read_flags

Config = TypeVar("Config")
Paths = Positional[Annotated[tuple[Path, ...], arg(metavar="PATHS...", help_behavior_hint="(required)")]]


@dataclass(kw_only=True)
class TrainNerfdiff(Command, Generic[Config]):
    """Find the cameras and the scene behind views of one thing, or take an interrupted training up again.

    The run is a folder: settings, checkpoints of every stage, sample sheets, log, scores.json and report.html. The same
    command again resumes it, exactly, from the newest checkpoint.

    Data are a scene of NeRF's synthetic set, a nerfstudio, LLFF or ShapeNet-SRN folder, an .npz as tiny_nerf_data's, a
    folder of pictures or a video. Poses among them are used with --poses known alone, and else to score the result.

    PRESETS
        demo, fast                the robust recipe: search over fixed directions, refinement, flip test, encoder
        lego, drums, car, llff    the thesis' settings, to the letter; they want a GPU

    EXAMPLES
        factorkit train nerfdiff
        factorkit train nerfdiff --data lego/ --out runs/lego --preset fast
        factorkit train nerfdiff --data lego/ --out runs/supervised --preset fast --poses known
        factorkit train nerfdiff --data lego/ --out runs/thesis --preset lego
        torchrun --nproc-per-node 8 -m factorkit train nerfdiff --data lego/ --preset lego
    """

    model: Positional[Literal["nerfdiff"]]
    """What to train."""
    data: OptionalPath = None
    """Views to train on; without: the procedural scene the package ships."""
    out: OptionalPath = None
    """The run folder; without: runs/nerfdiff-PRESET."""
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Settings to start from; without: fast, or demo where no data is given."""
    config: OmitArgPrefixes[Config]

    @classmethod
    def parse(cls, prog: str, args: Sequence[str]) -> TrainNerfdiff:
        basis, _ = tyro.cli(_Basis, prog=prog, args=args, add_help=False, return_unknown_args=True)
        from factorkit.nerfdiff.config import NerfdiffConfig, preset_config

        given = {name: getattr(basis, name) for name in ("search", "resolution", "field")}
        given = {name: value for name, value in given.items() if value is not None}
        default = cls(model=tyro.MISSING, config=preset_config(_preset(basis), **given))
        return read_flags(cls[NerfdiffConfig], cls, prog, args, default=default)

    def run_command(self) -> Result:
        from factorkit.cli import commands_nerfdiff

        out = self.out or Path("runs") / f"nerfdiff-{_preset(self)}"
        return commands_nerfdiff.train(self.data, out, self.preset, self.config.to_dict())


@dataclass(kw_only=True)
class _Basis:
    """The flags that decide the defaults of the others."""

    data: OptionalPath = None
    preset: str | None = None
    search: str | None = None
    resolution: int | None = None
    field: str | None = None


def _preset(flags: _Basis | TrainNerfdiff) -> str:
    return flags.preset or ("demo" if flags.data is None else "fast")


@dataclass(kw_only=True)
class Pose(RunCommand):
    """Say where pictures of a known scene were taken from.

    The result is camera-to-world matrices in the run's own coordinates (OpenGL's axes), with the score of every
    candidate.

    EXAMPLES
        factorkit pose runs/lego photo.png more/ --json
        factorkit pose runs/lego photo.png --out poses.json
    """

    paths: Paths
    """Pictures, a folder of them, or views of any kind that train reads."""
    out: OptionalPath = None
    """A JSON file to write."""
    refine: int = 0
    """Steps down the pictures' photometric error, from where --check leads; 60 take the last degrees."""
    check: Flag = False
    """Choose the candidate from which the scene looks most like the picture, instead of the best score."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_nerfdiff

        return commands_nerfdiff.pose(self.run, self.paths, self.out, self.refine, self.check, self.device)


@dataclass(kw_only=True)
class Reconstruct(RunCommand):
    """Render the scene from where pictures were taken: what the model makes of them.

    OUT receives NAME.png and NAME_depth.png for each picture, and contact_sheet.png of pictures beside renders.

    EXAMPLES
        factorkit reconstruct runs/lego photo.png more/ --out seen
    """

    paths: Paths
    """Pictures, a folder of them, or views of any kind that train reads."""
    out: Path
    """Where to write; made if it is not there."""
    size: OptionalInt = None
    """Pixels of the longer side; without: as trained."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_nerfdiff

        return commands_nerfdiff.reconstruct(self.run, self.paths, self.out, self.size, self.device)


@dataclass(kw_only=True)
class Render(RunCommand):
    """Fly through the scene on a camera path.

    EXAMPLES
        factorkit render runs/lego --out orbit.gif
        factorkit render runs/lego --path spiral --frames 120 --size 400 --out spiral.mp4
        factorkit render runs/lego --out frames/
    """

    out: Path
    """A .gif, an .mp4, or a folder for PNGs."""
    path: Literal["orbit", "spiral"] = "orbit"
    """Once around at one height, or rising and sinking on the way."""
    frames: int = 60
    """How many."""
    size: OptionalInt = None
    """Pixels of the longer side; without: as trained."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_nerfdiff

        return commands_nerfdiff.render(self.run, self.out, self.path, self.frames, self.size, self.device)


@dataclass(kw_only=True)
class Sample(RunCommand):
    """Draw views and their cameras from pure noise.

    OUT receives view_0000.png and so on, poses.json, and with --trajectory trajectory.png: how they take shape.

    EXAMPLES
        factorkit sample runs/lego -n 8 --out drawn --trajectory
    """

    out: Path
    """Where to write; made if it is not there."""
    count: Annotated[int, arg(aliases=["-n"])] = 4
    """How many."""
    steps: OptionalInt = None
    """Denoising steps; without: all of the schedule."""
    seed: int = 0
    """The same seed draws the same views."""
    trajectory: Flag = False
    """Also show every tenth step."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_nerfdiff

        options = {"n": self.count, "steps": self.steps, "seed": self.seed, "trajectory": self.trajectory}
        return commands_nerfdiff.sample(self.run, self.out, self.device, **options)


@dataclass(kw_only=True)
class Export(RunCommand):
    """Write the scene or its cameras for other programs.

    EXAMPLES
        factorkit export runs/lego scene.ply
        factorkit export runs/lego mesh.glb
        factorkit export runs/lego nerfstudio/transforms.json
        factorkit export runs/lego colmap/
    """

    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """scene.ply (coloured points), mesh.ply (also .obj, .glb), transforms.json (nerfstudio), or a folder (COLMAP)."""
    kind: Annotated[Literal["points", "mesh", "nerfstudio", "colmap"] | None, arg(help_behavior_hint="")] = None
    """Without: what the path says."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_nerfdiff

        return commands_nerfdiff.export(self.run, self.out, self.kind, self.device)


@dataclass(kw_only=True)
class View(RunCommand):
    """Look at the scene in a browser: points, found and true cameras with their pictures, live renders.

    While the training goes on, what it has found is shown anew with every checkpoint. Ctrl-C ends it. Needs the extra
    `viewer`.

    EXAMPLES
        factorkit view runs/lego
        factorkit view runs/lego --port 9000
    """

    host: str = "127.0.0.1"
    """Address to serve at; 0.0.0.0 lets other machines in."""
    port: int = 8080
    """Or the next free one."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_nerfdiff

        return commands_nerfdiff.view(self.run, self.host, self.port, self.device)
