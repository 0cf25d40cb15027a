"""``factorkit generate``, ``interpolate``, ``branches`` and ``recompose``: make new images, and edit given ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from factorkit.cli.base import Flag, NoiseLevel, OptionalPath, OutputCommand, Paths, Result
from factorkit.utils.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from factorkit.data.sources import Source
    from factorkit.segdiff.run import Generation

TRAJECTORY_COLUMNS, TRAJECTORY_SAMPLES = 10, 8  # denoising steps and images in trajectory.png
GRID_COLUMNS = 8

Sampler = Literal["ddim", "ddpm", "heun", "dpm++"]


@dataclass(kw_only=True)
class Generate(OutputCommand):
    """Generate new images together with their masks.

    OUT receives generated_0000.png, generated_0000_labels.png, generated_0000_mask_K.png and so on, and
    overview.png with all of them.

    Examples:
        factorkit generate runs/photos -n 16 --out generated
        factorkit generate runs/photos -n 4 --out generated --sampler ddpm --steps 250 --trajectory
        factorkit generate runs/photos -n 16 --out generated --sampler heun --steps 10
        factorkit generate runs/kinds -n 64 --out generated --classes all --guidance 2
    """

    out: Path
    """Folder to write to. It is created if needed."""
    count: Annotated[int, arg(aliases=["-n"])] = 16
    """Number of images."""
    sampler: Sampler = "dpm++"
    """dpm++ and heun are of second order and need few steps; heun calls the network twice per step. ddim is
    of first order. ddpm is ancestral sampling. Each of them works with every prediction type."""
    steps: int = 20
    """Denoising steps."""
    seed: int = 0
    """The same seed generates the same images."""
    classes: Annotated[tuple[str, ...], arg(metavar="NAMES...", help_behavior_hint="")] = ()
    """For a run with classes: the classes to generate, in turn, or all. The default is no class."""
    guidance: float = 1.0
    """Scale of classifier-free guidance. 1 is none; 2 to 4 is usual, at twice the cost."""
    trajectory: Flag = False
    """Also write trajectory.png: the first 8 images and their regions during denoising."""

    def execute(self) -> Result:
        """Write generated images with their masks."""
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.utils import distributed
        from factorkit.utils.output_record import OutputRecord

        source = f"generate, seed {self.seed}: {self.run.resolve()}"
        names = [f"generated_{i:04d}.png" for i in range(self.count)]
        OutputRecord(self.out, overwrite=self.overwrite).check([*names, "overview.png"], source)
        generation = SegdiffRun.load(self.run, device=self.device).generate(
            self.count,
            sampler=self.sampler,
            steps=self.steps,
            seed=self.seed,
            classes="all" if self.classes == ("all",) else self.classes or None,
            guidance=self.guidance,
            trajectory=self.trajectory,
            progress=True,
        )
        data = distributed.run_on_first(lambda: write_generated(generation, self.out, source, self.overwrite))
        return data, f"{data['generated']} generated: {self.out}\noverview: {data['overview']}"


def write_generated(
    generation: Generation, out: Path, source: str = "generate", overwrite: bool = False
) -> dict[str, Any]:
    """Write generated images, their labels and masks if there are several regions, and image grids of all.

    Args:
        generation: what to write.
        source: identifies the run and the seed; files that were written for others are not replaced.
        overwrite: replace them, and files of another origin, as well.

    Returns:
        The paths and the number of images.

    Raises:
        WriteError: a file of another origin is in the way.
    """
    import numpy as np
    from PIL import Image

    from factorkit.report.image_grid import draw_image_grid, make_label_image, make_mask_image
    from factorkit.segdiff import previews
    from factorkit.utils.images import images_to_pixels
    from factorkit.utils.output_record import OutputRecord

    files: dict[str, Image.Image] = {}
    images, masks, labels = images_to_pixels(generation.images), generation.masks.numpy(), generation.labels.numpy()
    has_regions = masks.shape[1] > 1
    for i, image in enumerate(images):
        stem = f"generated_{i:04d}"
        files[f"{stem}.png"] = Image.fromarray(image)
        if has_regions:
            files[f"{stem}_labels.png"] = make_label_image(labels[i])
            files |= {f"{stem}_mask_{k}.png": make_mask_image(mask) for k, mask in enumerate(masks[i])}
    data: dict[str, Any] = {"out": str(out), "generated": len(images), "overview": str(out / "overview.png")}
    if generation.classes is not None:
        grid = previews.draw_class_grid(images, masks, generation.classes)
        data["classes"] = generation.classes
    elif has_regions:
        grid = previews.draw_generation_grid(images, masks, labels)
    else:
        grid = draw_image_grid([list(images[i : i + GRID_COLUMNS]) for i in range(0, len(images), GRID_COLUMNS)])
    files["overview.png"] = grid
    if generation.trajectory is not None:
        count = len(generation.trajectory)
        columns = np.linspace(0, count - 1, min(TRAJECTORY_COLUMNS, count)).round().astype(int)
        steps = [generation.trajectory[i] for i in columns]
        regions = [step.masks[:TRAJECTORY_SAMPLES].argmax(1).numpy() for step in steps] if has_regions else None
        images_of_steps = [images_to_pixels(step.images[:TRAJECTORY_SAMPLES]) for step in steps]
        data["trajectory"] = str(out / "trajectory.png")
        files["trajectory.png"] = previews.draw_trajectory_grid(images_of_steps, regions, [step.t for step in steps])
    with OutputRecord(out, overwrite=overwrite) as record:
        record.write({name: image.save for name, image in files.items()}, source)
    return data


@dataclass(kw_only=True)
class Interpolate(OutputCommand):
    """Generate the images between two images, and their regions.

    Both images are taken to noise level T by DDIM inversion, mixed there and denoised; the end frames reconstruct them.
    A and B are one image each, or folders with equal
    numbers of images. OUT receives pair_0000_00.png to pair_0000_08.png, their _labels.png, and overview.png with
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
    steps: int = 25
    """Steps to the noise level, and back."""

    def execute(self) -> Result:
        """Write the images between the two of each pair."""
        import numpy as np
        from PIL import Image

        from factorkit.data.open import open_source
        from factorkit.report.image_grid import make_label_image
        from factorkit.segdiff.previews import draw_interpolation_grid
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.utils.images import images_to_pixels

        a, b = open_source(self.a), open_source(self.b)
        results = _Results(self, [a, b], f"interpolate with {self.b.resolve()}")
        result = SegdiffRun.load(self.run, device=self.device).interpolate(
            a, b, frames=self.frames, t=self.t, steps=self.steps
        )
        images, labels = images_to_pixels(result.images), result.labels.numpy()
        for i, j in np.ndindex(labels.shape[:2]):
            name = f"pair_{i:04d}_{j:02d}"
            results.add(f"{name}.png", Image.fromarray(images[i, j]))
            results.add(f"{name}_labels.png", make_label_image(labels[i, j]))
        regions = None if result.masks.shape[2] == 1 else labels
        grid = draw_interpolation_grid(
            images_to_pixels(result.a), images_to_pixels(result.b), images, regions, result.shares.tolist()
        )
        return results.write(grid, len(images), pairs=len(images), frames=images.shape[1])


@dataclass(kw_only=True)
class Branches(OutputCommand):
    """Show the output of each branch of the model, with its mask.

    Images are cropped to their centred square at the model's resolution. For each image, OUT receives
        NAME_estimate.png    the clean image that the model predicts from noise level T in one step
        NAME_branch_K.png    the prediction of branch K alone, transparent where its mask is 0
        overview.png         all of them side by side, branches with and without their masks

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
        """Write a grid of the branches of each image."""
        import numpy as np
        from PIL import Image

        from factorkit.segdiff.previews import draw_branch_grid
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.utils.images import images_to_pixels, unit_to_uint8

        source = _open_images(self.paths, "branches RUN PATHS... --out DIR")
        results = _Results(self, [source], "branches")
        result = SegdiffRun.load(self.run, device=self.device).branches(source, t=self.t)
        images, masks, branches = (
            images_to_pixels(result.images),
            result.masks.numpy(),
            images_to_pixels(result.branches),
        )
        for n in range(len(source)):
            results.add_to_input(n, "estimate.png", Image.fromarray(images[n]))
            for k, branch in enumerate(branches[n]):
                image = Image.fromarray(np.dstack([branch, unit_to_uint8(masks[n, k])]))
                results.add_to_input(n, f"branch_{k}.png", image)
        grid = draw_branch_grid(images_to_pixels(result.noisy), images, masks, branches)
        areas = masks.mean((0, 2, 3)).tolist()
        return results.write(grid, len(images), images=len(images), regions=masks.shape[1], areas=areas)


@dataclass(kw_only=True)
class Recompose(OutputCommand):
    """Edit one region of images: generate it anew, take it from another image, or remove it.

    The other regions stay as they are. Images are cropped to their centred square at the model's resolution. For each
    image, OUT receives NAME_recomposed.png and NAME_labels.png; overview.png shows all of them. The command
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
        """Write the edited images."""
        from PIL import Image

        from factorkit.data.open import open_source
        from factorkit.report.image_grid import make_label_image
        from factorkit.segdiff.previews import draw_recomposition_grid
        from factorkit.segdiff.run import SegdiffRun
        from factorkit.utils.images import images_to_pixels

        source = _open_images(self.paths, "recompose RUN PATHS... --region K --out DIR")
        from_ = None if self.from_ is None else open_source(self.from_)
        origin = "without it" if self.remove else f"from {self.from_.resolve()}" if self.from_ else f"seed {self.seed}"
        what = f"recompose region {self.region}, {origin}"
        results = _Results(self, [source] if from_ is None else [source, from_], what)
        result = SegdiffRun.load(self.run, device=self.device).recompose(
            source,
            self.region,
            from_=from_,
            remove=self.remove,
            t=self.t,
            steps=self.steps,
            sampler=self.sampler,
            seed=self.seed,
        )
        images, labels, kept = images_to_pixels(result.images), result.labels.numpy(), result.kept.numpy()
        one_of_many = len(source) < len(images)  # one image, recomposed with each of several others
        for n in range(len(images)):
            number, start = (0, f"{n:04d}_") if one_of_many else (n, "")
            results.add_to_input(number, f"{start}recomposed.png", Image.fromarray(images[n]))
            results.add_to_input(number, f"{start}labels.png", make_label_image(labels[n]))
        sources = None if result.sources is None else images_to_pixels(result.sources)
        grid = draw_recomposition_grid(images_to_pixels(result.originals), sources, kept, images, labels)
        shares = kept.mean((1, 2)).tolist()
        return results.write(grid, len(images), images=len(images), region=self.region, kept=shares)


def _open_images(paths: Sequence[Path], usage: str) -> Source:
    from factorkit.data.open import open_source

    if not paths:
        raise ConfigError(f"no images are given. Use: factorkit {usage}")
    return open_source(paths[0] if len(paths) == 1 else list(paths))


class _Results:
    """The images that a command writes into its output folder, each for its input.

    Args:
        command: with the output folder.
        sources: what it reads; the files of the first source are named after its images.
        what: what is done with them; other results of the same images get other names.

    Raises:
        WriteError: ``out`` has a file of another origin where the overview belongs.
    """

    def __init__(self, command: OutputCommand, sources: Sequence[Source], what: str):
        from factorkit.segdiff.inference.documents import identify_inputs, name_overview
        from factorkit.segdiff.inference.outputs import output_names
        from factorkit.utils.output_record import OutputRecord

        inputs = [identify_inputs(source) for source in sources]
        self.out: Path = command.out  # type: ignore[attr-defined]  # each of these commands has it
        files = (Path(name) for names in inputs for name in names)
        self.record = OutputRecord(self.out, overwrite=command.overwrite, inputs=files)
        self.what = f"{what}: "
        self.grid, self.shown = name_overview(self.record, inputs[0], self.what)
        self.record.check([self.grid], self.shown)
        self.inputs, self.names = inputs[0], output_names(sources[0].names)
        self.files: dict[tuple[str, str | None], dict[str, Image.Image]] = {}

    def add(self, name: str, image: Image.Image) -> None:
        """Add an image of all inputs."""
        self.files.setdefault((self.shown, None), {})[name] = image

    def add_to_input(self, number: int, ending: str, image: Image.Image) -> None:
        """Add an image that is named after an input."""
        source = f"{self.what}{self.inputs[number]}"
        stem = self.record.distinct_stem(self.names[number], source)
        self.files.setdefault((source, stem), {})[f"{stem}_{ending}"] = image

    def write(self, grid: Image.Image, count: int, **data: Any) -> Result:
        """Write all images, or none if one of them is in the way of another file."""
        from factorkit.utils import distributed

        groups = [*self.files.items(), ((self.shown, Path(self.grid).stem), {self.grid: grid})]
        for (source, _), images in groups:
            self.record.check(images, source)

        def write() -> None:
            with self.record:
                for (source, stem), images in groups:
                    self.record.write({name: image.save for name, image in images.items()}, source, stem=stem)

        distributed.run_on_first(write)
        path = self.out / self.grid
        data |= {"out": str(self.out), "overview": str(path)}
        return data, f"{count} done: {self.out}\noverview: {path}"
