"""The flags of the commands that take pictures apart and put them together again with a trained segdiff run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from factorkit.cli.flag_types import Flag, OptionalPath, Result, RunCommand

Level = Annotated[int | None, arg(aliases=["-t"], metavar="INT", help_behavior_hint="")]
Pictures = Positional[Annotated[tuple[Path, ...], arg(metavar="PICTURES...", help_behavior_hint="(required)")]]


@dataclass(kw_only=True)
class Interpolate(RunCommand):
    """Draw the pictures between two pictures, and the regions along the way.

    Both are taken to noise level T, mixed there and denoised. A and B are a picture each, or folders of as many. OUT
    receives pair_0000_00.png to pair_0000_08.png, their _labels.png, and contact_sheet.png of all pairs.

    EXAMPLES
        factorkit interpolate runs/photos first.jpg second.jpg --out between
        factorkit interpolate runs/photos first.jpg folder/ --out between --frames 5 -t 400
    """

    a: Positional[Annotated[Path, arg(metavar="A")]]
    """Where to begin."""
    b: Positional[Annotated[Path, arg(metavar="B")]]
    """Where to end."""
    out: Path
    """Where to write; made if it is not there."""
    frames: int = 9
    """Pictures along the way, both ends included."""
    t: Level = None
    """Noise level at which they are mixed; without: a quarter of the model's (250). The higher, the freer."""
    steps: int = 50
    """Denoising steps."""
    sampler: Literal["ddpm", "ddim", "heun", "dpm++"] = "ddpm"
    """As of generate."""
    seed: int = 0
    """The same seed draws the same pictures."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_editing

        options = {"frames": self.frames, "t": self.t, "steps": self.steps, "sampler": self.sampler, "seed": self.seed}
        return commands_editing.interpolate(self.run, self.a, self.b, self.out, self.device, **options)


@dataclass(kw_only=True)
class Branches(RunCommand):
    """Show what each branch of the model makes of pictures, and its mask.

    For each picture, cut to its centred square at the model's resolution, OUT receives
        NAME_estimate.png    the clean picture as the model guesses it from level T, in one step
        NAME_branch_K.png    the same by branch K alone, transparent where its mask is 0
        contact_sheet.png    all of it side by side, branches with and without their masks

    EXAMPLES
        factorkit branches runs/photos holiday.jpg --out apart
        factorkit branches runs/photos photos/ --out apart -t 500
    """

    paths: Pictures
    """Pictures and folders of pictures; or one .zip, .npz or .npy."""
    out: Path
    """Where to write; made if it is not there."""
    t: Level = None
    """Noise level; without: a quarter of the model's (250). At low levels each branch can copy what it sees."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_editing

        return commands_editing.branches(self.run, self.paths, self.out, self.t, self.device)


@dataclass(kw_only=True)
class Recompose(RunCommand):
    """Edit pictures by region: make one anew, bring it from another picture, or take it away.

    The other regions stay as they are. Pictures are cut to their centred squares at the model's resolution. For each,
    OUT receives NAME_recomposed.png and NAME_labels.png, its regions; and contact_sheet.png shows all of them.
    `factorkit segment` shows which region is which.

    EXAMPLES
        factorkit recompose runs/photos garden.jpg --region 1 --out anew --seed 3
        factorkit recompose runs/photos garden.jpg --region 1 --from rose.jpg --out with_rose
        factorkit recompose runs/photos garden.jpg --region 1 --remove --out empty
    """

    paths: Pictures
    """Pictures and folders of pictures; or one .zip, .npz or .npy."""
    region: int
    """Which region, 0 to K-1."""
    out: Path
    """Where to write; made if it is not there."""
    from_: Annotated[OptionalPath, arg(name="from")] = None
    """The picture to bring the region from, or as many as there are pictures; the place it leaves is filled."""
    remove: Flag = False
    """Take the region away and fill its place."""
    t: Level = None
    """Level down to which the region is held to its pixels, and below which it is painted freely; without: none of them
    is held, or with --from all but the last twentieth (50). 0 pastes."""
    steps: int = 50
    """Denoising steps."""
    sampler: Literal["ddpm", "ddim", "heun", "dpm++"] = "ddpm"
    """As of generate; ddpm fits what is new to what is kept better."""
    seed: int = 0
    """The same seed draws the same pictures."""

    def run_command(self) -> Result:
        from factorkit.cli import commands_editing

        options = {"remove": self.remove, "t": self.t, "steps": self.steps, "sampler": self.sampler, "seed": self.seed}
        return commands_editing.recompose(
            self.run, self.paths, self.region, self.from_, self.out, self.device, **options
        )
