"""``factorkit interpolate``, ``branches`` and ``recompose``: edit images by their regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from factorkit.cli.base import Flag, NoiseLevel, OptionalPath, Paths, Result, RunCommand
from factorkit.cli.generate import Sampler
from factorkit.utils.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from factorkit.data.sources import Source


@dataclass(kw_only=True)
class Interpolate(RunCommand):
    """Generate the images between two images, and their regions.

    Both images are taken to noise level T, mixed there and denoised. A and B are one image each, or folders with equal
    numbers of images. OUT receives pair_0000_00.png to pair_0000_08.png, their _labels.png, and contact_sheet.png with
    all pairs.

    Examples:
        factorkit interpolate runs/photos first.jpg second.jpg --out between
        factorkit interpolate runs/photos first.jpg folder/ --out between --frames 5 -t 400
    """

    a: Positional[Annotated[Path, arg(metavar="A")]]
    """The first image."""
    b: Positional[Annotated[Path, arg(metavar="B")]]
    """The last image."""
    out: Path
    """Folder to write to. It is created if needed."""
    frames: int = 9
    """Number of images, including both ends."""
    t: NoiseLevel = None
    """Noise level of the mixture. The default is a quarter of the schedule (250); higher levels change more."""
    steps: int = 50
    """Denoising steps."""
    sampler: Sampler = "ddpm"
    """See factorkit generate --help."""
    seed: int = 0
    """The same seed generates the same images."""

    def execute(self) -> Result:
        import numpy as np
        from PIL import Image

        from factorkit.data.open import open_source
        from factorkit.segdiff.previews import draw_interpolation_grid, make_label_image
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.utils.atomic import save_image
        from factorkit.utils.images import images_to_pixels

        result = SegdiffRun.load(self.run, device=self.device).interpolate(
            open_source(self.a),
            open_source(self.b),
            frames=self.frames,
            t=self.t,
            steps=self.steps,
            sampler=self.sampler,
            seed=self.seed,
        )
        images, labels = images_to_pixels(result.images), result.labels.numpy()
        for i, j in np.ndindex(labels.shape[:2]):
            path = _output_path(self.out, f"pair_{i:04d}_{j:02d}")
            save_image(Image.fromarray(images[i, j]), Path(f"{path}.png"))
            save_image(make_label_image(labels[i, j]), Path(f"{path}_labels.png"))
        regions = None if result.masks.shape[2] == 1 else labels
        grid = draw_interpolation_grid(
            images_to_pixels(result.a), images_to_pixels(result.b), images, regions, result.shares.tolist()
        )
        return _write_grid(grid, self.out, len(images), pairs=len(images), frames=images.shape[1])


@dataclass(kw_only=True)
class Branches(RunCommand):
    """Show the output of each branch of the model, with its mask.

    Images are cropped to their centred square at the model's resolution. For each image, OUT receives
        NAME_estimate.png    the clean image that the model predicts from noise level T in one step
        NAME_branch_K.png    the prediction of branch K alone, transparent where its mask is 0
        contact_sheet.png    all of them side by side, branches with and without their masks

    Examples:
        factorkit branches runs/photos holiday.jpg --out branches
        factorkit branches runs/photos photos/ --out branches -t 500
    """

    paths: Paths
    """Images and folders of images, or one .zip, .npz or .npy file."""
    out: Path
    """Folder to write to. It is created if needed."""
    t: NoiseLevel = None
    """Noise level. The default is a quarter of the schedule (250). At low levels each branch can copy its input."""

    def execute(self) -> Result:
        import numpy as np
        from PIL import Image

        from factorkit.segdiff.inference.outputs import output_names
        from factorkit.segdiff.previews import draw_branch_grid
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.utils.atomic import save_image
        from factorkit.utils.images import images_to_pixels, unit_to_uint8

        source = _open_images(self.paths, "branches RUN PATHS... --out DIR")
        result = SegdiffRun.load(self.run, device=self.device).branches(source, t=self.t)
        images, masks, branches = (
            images_to_pixels(result.images),
            result.masks.numpy(),
            images_to_pixels(result.branches),
        )
        for n, name in enumerate(output_names(source.names)):
            path = _output_path(self.out, name)
            save_image(Image.fromarray(images[n]), Path(f"{path}_estimate.png"))
            for k, branch in enumerate(branches[n]):
                save_image(
                    Image.fromarray(np.dstack([branch, unit_to_uint8(masks[n, k])])), Path(f"{path}_branch_{k}.png")
                )
        grid = draw_branch_grid(images_to_pixels(result.noisy), images, masks, branches)
        areas = masks.mean((0, 2, 3)).tolist()
        return _write_grid(grid, self.out, len(images), images=len(images), regions=masks.shape[1], areas=areas)


@dataclass(kw_only=True)
class Recompose(RunCommand):
    """Edit one region of images: generate it anew, take it from another image, or remove it.

    The other regions stay as they are. Images are cropped to their centred square at the model's resolution. For each
    image, OUT receives NAME_recomposed.png and NAME_labels.png; contact_sheet.png shows all of them. The command
    `factorkit segment` shows the number of each region.

    Examples:
        factorkit recompose runs/photos garden.jpg --region 1 --out anew --seed 3
        factorkit recompose runs/photos garden.jpg --region 1 --from rose.jpg --out with_rose
        factorkit recompose runs/photos garden.jpg --region 1 --remove --out empty
    """

    paths: Paths
    """Images and folders of images, or one .zip, .npz or .npy file."""
    region: int
    """Number of the region, 0 to K-1."""
    out: Path
    """Folder to write to. It is created if needed."""
    from_: Annotated[OptionalPath, arg(name="from")] = None
    """Image to take the region from, or a folder with as many images as PATHS. The area of the old region is filled."""
    remove: Flag = False
    """Remove the region and fill its area."""
    t: NoiseLevel = None
    """Noise level down to which the region is held to its given pixels; below it the region is generated freely. The
    default is to hold nothing, or with --from all but the last twentieth of the schedule (50). 0 pastes the pixels."""
    steps: int = 50
    """Denoising steps."""
    sampler: Sampler = "ddpm"
    """See factorkit generate --help. ddpm fits new content to the rest of the image better."""
    seed: int = 0
    """The same seed generates the same images."""

    def execute(self) -> Result:
        from PIL import Image

        from factorkit.data.open import open_source
        from factorkit.segdiff.inference.outputs import output_names
        from factorkit.segdiff.previews import draw_recomposition_grid, make_label_image
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.utils.atomic import save_image
        from factorkit.utils.images import images_to_pixels

        source = _open_images(self.paths, "recompose RUN PATHS... --region K --out DIR")
        result = SegdiffRun.load(self.run, device=self.device).recompose(
            source,
            self.region,
            from_=None if self.from_ is None else open_source(self.from_),
            remove=self.remove,
            t=self.t,
            steps=self.steps,
            sampler=self.sampler,
            seed=self.seed,
        )
        images, labels, kept = images_to_pixels(result.images), result.labels.numpy(), result.kept.numpy()
        names = output_names(source.names)
        if len(names) < len(images):  # one image, recomposed with each of several others
            names = [f"{names[0]}_{n:04d}" for n in range(len(images))]
        for n, name in enumerate(names):
            path = _output_path(self.out, name)
            save_image(Image.fromarray(images[n]), Path(f"{path}_recomposed.png"))
            save_image(make_label_image(labels[n]), Path(f"{path}_labels.png"))
        sources = None if result.sources is None else images_to_pixels(result.sources)
        grid = draw_recomposition_grid(images_to_pixels(result.originals), sources, kept, images, labels)
        shares = kept.mean((1, 2)).tolist()
        return _write_grid(grid, self.out, len(images), images=len(images), region=self.region, kept=shares)


def _open_images(paths: Sequence[Path], usage: str) -> Source:
    from factorkit.data.open import open_source

    if not paths:
        raise ConfigError(f"no images are given. Use: factorkit {usage}")
    return open_source(paths[0] if len(paths) == 1 else list(paths))


def _output_path(out: Path, name: str) -> Path:
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_grid(grid: Image.Image, out: Path, count: int, **data: Any) -> Result:
    from factorkit.utils.atomic import save_image

    path = out / "contact_sheet.png"
    save_image(grid, path)
    return data | {"out": str(out), "contact_sheet": str(path)}, f"{count} done: {out}\ncontact sheet: {path}"
