"""``factorkit generate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from factorkit.cli.base import Flag, OutputCommand, Result

if TYPE_CHECKING:
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
