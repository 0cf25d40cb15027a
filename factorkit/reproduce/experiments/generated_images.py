"""Table 2.5, figures 2.7, 2.8 and 2.24 to 2.26: images and masks generated from noise, beside the plain DDPM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from factorkit.metrics import frechet
from factorkit.metrics.segmentation import count_overlaps, score_classes
from factorkit.report.image_grid import draw_image_grid, overlay_enlarged
from factorkit.reproduce.experiment import (
    CellResult,
    CellUnavailableError,
    Citation,
    Column,
    Experiment,
    Row,
    RowArrays,
    Setup,
    percent,
)
from factorkit.reproduce.experiments.class_segmentation import (
    NUM_CLUSTERS,
    choose_our_regions,
    fit_clusters,
    load_class_labels,
    train_class_unet,
    train_ours,
    train_plain,
)
from factorkit.reproduce.segdiff_runs import GRID_IMAGES, Trainings, list_our_models, predict_regions
from factorkit.segdiff.baselines.supervised import predict_classes
from factorkit.segdiff.config import ResolvedSegdiffConfig
from factorkit.segdiff.run import Generation, SegdiffRun
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import images_to_pixels, pixels_to_images

#: Number of generated images, and of denoising steps (None for the whole schedule), by scale.
GENERATED: dict[str, tuple[int, int | None]] = {"small": (256, 25), "gpu": (5000, 50), "full": (50_000, None)}

DISTANCE = Column("frechet", "Fréchet, random features", 1.0, 3, lower=True)
FID = Column("fid", "FID", 1.0, 2, lower=True)
NOTE = (
    "Fréchet, random features: the distance of Heusel et al. 2017 between as many generated and training images, on a "
    "network of fixed random weights in place of Inception's. It is not FID: only the rows of one table compare. FID "
    "has its own rows, because it needs Inception's weights."
)
DATA_SETS = ("Flower-64", "Flower-128", "CUB-64", "CUB-128", "FFHQ-64", "FFHQ-128", "ImageNet-64")
PUBLISHED_FID = {
    "DDPM": (15.81, 14.62, 14.45, 14.01, 13.72, 13.35, 7.02),
    "ours": (13.33, 11.50, 10.91, 10.28, 12.02, 10.79, 6.54),
}


def generate(scale: str, run: SegdiffRun, seed: int) -> Generation:
    """Generate the images of a scale, by DDIM if in few steps and by DDPM for the whole schedule."""
    count, steps = GENERATED[scale]
    if steps is None:
        return run.generate(count, steps=None, sampler="ddpm", seed=seed)
    return run.generate(count, steps=min(steps, run.config.timesteps), seed=seed)


def random_distance(trainings: Trainings, run: SegdiffRun, images: Tensor) -> float:
    """Return the Fréchet distance of images [N, 3, R, R] to as many training images, in random features."""
    real = pixels_to_images(trainings.training_pixels(run.config, len(images)))
    features = frechet.random_features
    return frechet.frechet_distance(features(images[: len(real)]), features(real))


def fid(trainings: Trainings, run: SegdiffRun, images: Tensor) -> float:
    """Return the FID of images [N, 3, R, R] to as many training images.

    Raises:
        CellUnavailableError: Inception's weights are missing; the message names the file.
    """
    real = pixels_to_images(trainings.training_pixels(run.config, len(images)))
    try:
        return frechet.compute_fid(real, images[: len(real)], run.device)
    except ConfigError as error:
        raise CellUnavailableError(str(error)) from error


def count_multiply_adds(config: ResolvedSegdiffConfig) -> int:
    """Count the multiply-adds of one forward pass of one image, in convolutions and matrix products alone.

    In a space of latents, those of the denoiser, without the autoencoder.
    """
    with torch.device("meta"):
        model = config.build().eval()
        image = torch.empty(1, config.make_backbone().image_channels, config.side, config.side)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image, torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() // 2


def _train_equal_compute(trainings: Trainings, seed: int) -> SegdiffRun:
    """Train a plain DDPM for as many steps as cost the multiply-adds of ours."""
    regions, plain = choose_our_regions(trainings), trainings.config(regions=1)
    if regions is None:  # the training chooses it
        ours = train_ours(list_our_models(trainings)[0], trainings, seed).config
    else:
        ours = trainings.config(regions=regions)
    steps = round(ours.steps * count_multiply_adds(ours) / count_multiply_adds(plain))
    return trainings.train("plain-compute", seed, regions=1, steps=steps)


Train = Callable[[Trainings, int], SegdiffRun]


def _rows(setup: Setup) -> list[Row]:
    trainings = Trainings(setup, "flowers64")
    runs: dict[str, Train] = {
        "plain DDPM, equal steps": train_plain,
        "plain DDPM, equal compute": _train_equal_compute,
        **{model.row: partial(train_ours, model) for model in list_our_models(trainings)},
    }
    rows = [Row(name, partial(_score, trainings, train)) for name, train in runs.items()]
    return rows + [Row(f"{name}: FID", partial(_score_fid, trainings, train), 1) for name, train in runs.items()]


def _score(trainings: Trainings, train: Train, seed: int) -> CellResult:
    """Score the distance, and how well the masks agree with the supervised U-Net on the generated images."""
    run = train(trainings, seed)
    generation = generate(trainings.setup.scale, run, seed)
    pixels = images_to_pixels(generation.images)
    known, reference = load_class_labels(trainings), predict_classes(train_class_unet(trainings, seed), pixels)
    num_regions = run.config.num_leaf_regions
    if num_regions > 1:
        regions, real_regions = generation.labels.numpy(), predict_regions(run, known.images)
    else:
        clusters, num_regions = fit_clusters(trainings, run, seed), NUM_CLUSTERS
        regions, real_regions = clusters.segment(pixels), clusters.segment(known.images)
    mapping = known.match(real_regions, num_regions)
    agreement = score_classes(count_overlaps(regions, reference, num_regions, known.num_classes), mapping)["acc"]
    distance = random_distance(trainings, run, generation.images)
    scores = {DISTANCE.key: distance, "consistency": agreement, "steps": run.step}
    return CellResult(scores, {"images": pixels[:GRID_IMAGES], "classes": mapping[regions[:GRID_IMAGES]]})


def _score_fid(trainings: Trainings, train: Train, seed: int) -> CellResult:
    run = train(trainings, seed)
    value = fid(trainings, run, generate(trainings.setup.scale, run, seed).images)
    return CellResult({FID.key: value, "steps": run.step})


def _draw(setup: Setup, arrays: RowArrays) -> Sequence[str]:
    rows, captions = [], []
    for name, row in arrays.items():
        pairs = zip(row["images"], row["classes"], strict=True)
        rows += [list(row["images"]), [overlay_enlarged(image, classes) for image, classes in pairs]]
        captions += [name, "  its masks"]
    return [setup.save_image(draw_image_grid(rows, None, captions), "generated.png")] if rows else []


EXPERIMENTS = (
    Experiment(
        name="table2.5",
        title="images and masks generated from noise",
        data="any of Flower, CUB, FFHQ, ImageNet, or a folder with images/ and masks/; the default is procedural "
        "flowers",
        duration={
            "small": "12 minutes a seed on one CPU core",
            "gpu": "not measured",
            "full": "not measured (thesis: 50 000 to 500 000 steps on 8 to 32 V100)",
        },
        columns=(DISTANCE, FID, percent("consistency", "Acc of masks"), Column("steps", "steps", 1.0, 0)),
        rows=_rows,
        citations=[
            Citation(f"{row}, {name}", "dissertation, table 2.5", {"fid": value})
            for row, values in PUBLISHED_FID.items()
            for name, value in zip(DATA_SETS, values, strict=True)
        ],
        figures=("fig2.7", "fig2.8", "fig2.24", "fig2.25", "fig2.26"),
        seeds=1,
        notes=(
            NOTE,
            "Acc of masks: the share of pixels on which the masks of generated images agree with the supervised U-Net. "
            "Our masks are generated with the image, those of the plain DDPM by DatasetDDPM afterwards. Both are "
            "matched on real images.",
            "Equal compute: a plain DDPM trained for as many more steps as ours costs more multiply-adds an image.",
        ),
        draw=_draw,
    ),
)
