"""``factorkit.train_segdiff``: from images to a run folder and a model that segments and generates."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from factorkit.data.classes import Classes, read_classes
from factorkit.data.datasets import Dataset
from factorkit.engine.checkpoint import Checkpoints
from factorkit.engine.config import autocast, cpu_threads, peak_memory, resolve_device
from factorkit.engine.run_folder import CONFIG, check_claim, claimed, copy_folder, read_object, write_json
from factorkit.engine.run_log import RunLog
from factorkit.engine.trainer import Trainer
from factorkit.report.content import judged_alarms
from factorkit.segdiff.alarms import Alarms
from factorkit.segdiff.autoencoder import estimate as estimate_autoencoder
from factorkit.segdiff.config import ResolvedSegdiffConfig, preset_config
from factorkit.segdiff.drawn_images import (
    DRAWN_IMAGES,
    NUM_CHECK_STEPS,
    NUM_CHECKED,
    STRUCTURE,
    choose_photos,
    log_drawn_checks,
    read_photos,
    score_drawn,
    skip_checks,
)
from factorkit.segdiff.evaluate import VERDICT_BASELINES
from factorkit.segdiff.latents import encode_images, hash_autoencoder, store_space
from factorkit.segdiff.network import FactorizedDenoiser, count_parameters
from factorkit.segdiff.object_stages import ObjectStages, TimedStages
from factorkit.segdiff.run import SegdiffRun
from factorkit.segdiff.settle import (
    advise_size,
    log_latents,
    read_stored,
    settle_latents,
    settle_regions,
    train_own_autoencoder,
)
from factorkit.segdiff.task import SegdiffTask
from factorkit.segdiff.training_images import DATA_NAME, MIN_IMAGES, describe_data, load_data
from factorkit.segdiff.verdict import write_report
from factorkit.utils import distributed
from factorkit.utils.distributed import join_processes
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.files import LOG_NAME, read_log

#: length of a seed trial: a fraction of the steps, and a limit by which the masks of the presets have converged
SEED_TRIAL_FRACTION, MAX_SEED_TRIAL_STEPS = 0.5, 400

STAGE_SETTINGS = {"cue_weight", "mixture_steps", "distil_steps"}  # nothing else than masks="auto" reads them


def train_segdiff(
    data: Any = None,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    seed_trials: int = 1,
    progress: bool = True,
    baselines: bool = False,
    classes: Any = None,
    **changes: Any,
) -> SegdiffRun:
    """Train a factorized diffusion model on unlabelled images; the same call again resumes, exactly.

    Args:
        data: a folder of images (perhaps with ``images/`` and ``masks/``), a zip, an ``.npz``/``.npy`` array, an array,
            a list of paths; None: the procedural flowers of the package, for a hierarchy its rooms.
        out: the run folder; None: ``runs/<preset>``. From 128 pixels on an autoencoder is trained first, in the folder
            ``<out>_autoencoder``, and the model denoises its latents (``latent=``).
        preset: ``"demo"``, ``"fast32"``, ``"fast64"`` (regional form), ``"uvit32"``, ``"uvit64"``, ``"uvit128"``
            (with a transformer), or ``"flowers64"``, ``"flowers128"``, ``"cub64"``, ``"cub128"``, ``"ffhq64"``,
            ``"ffhq128"``, ``"imagenet64"`` (the thesis' settings). None: ``"demo"`` without data, else ``"fast64"``.
        seed_trials: number of short trainings from different seeds. Those that the label-free alarms fail are dropped,
            and the best continues: by the noise its regions leave unexplained, for masks="network" by the eta gap.
        progress: show a progress bar with the time left.
        baselines: score all trivial predictors at the end, if there are labels; else only the mean mask and 2-means.
        classes: condition the model on the class of each image, so that it generates by class; ``"folders"``, a .csv,
            .tsv or .json file, a mapping of names to classes, a list for arrays, or True for the classes of the data
            set (:func:`factorkit.data.read_classes`). Segmenting stays without labels.
        **changes: any field of :class:`~factorkit.segdiff.config.SegdiffConfig`, such as ``regions=``, ``resolution=``,
            ``form=``, ``decoding=``, ``prediction=``, ``steps=``, ``seed=``, ``device=``.

    Returns:
        The finished run, to segment, generate, evaluate and save.

    Raises:
        ConfigError: a setting or combination that cannot work.
        DataError: no usable images.
        CheckpointError: the folder holds another run, or a checkpoint cannot be written or read.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once a checkpoint is written.

    Example:
        >>> import factorkit
        >>> from factorkit.data import draw_flowers
        >>> images, masks = draw_flowers(24, 16, seed=0)    # uint8 [24, 16, 16, 3], bool [24, 16, 16]
        >>> tiny = {"resolution": 16, "regions": 2, "model_channels": 8, "channel_mult": (1, 2)}
        >>> tiny |= {"batch_size": 4, "steps": 2, "mixture_steps": 2, "distil_steps": 2}
        >>> run = factorkit.train_segdiff(images, out="runs/flowers", preset="demo", progress=False, **tiny)
        >>> run.step
        2
    """
    if seed_trials < 1:
        raise ConfigError(f"seed_trials={seed_trials} must be at least 1")
    preset = preset or ("demo" if data is None else "fast64")
    folder = Path(out) if out is not None else Path("runs") / preset
    user_config = preset_config(preset, **changes)
    device = distributed.local_device(resolve_device(user_config.device))
    join_processes(device)
    distributed.check_batch(user_config.batch_size)  # before the images are prepared, which may take long
    stored = read_stored(folder)
    settled = settle_latents(preset, changes, folder, stored)
    user_config, note = settle_regions(settled.config, folder, stored)
    settled = settled._replace(config=user_config)
    config = user_config.resolved()
    if seed_trials > 1 and config.num_leaf_regions == 1:
        raise ConfigError(f"seed_trials={seed_trials} compares masks, but regions=1 has none; use seed_trials=1")
    if config.class_names:
        raise ConfigError("class_names= is set by train_segdiff(classes=...); give classes= instead")
    with distributed.first_on_machine():
        dataset, prepared, probes = load_data(
            data, config.resolution, config.holdout, config.mask_set, progress, nested=len(config.nesting) > 1
        )
    settled = settled.for_images(len(prepared), describe_data(dataset, prepared))
    config = settled.config.resolved()
    notes = "\n".join(line for line in (note, settled.note, advise_size(preset, config)) if line)
    if progress and notes:
        distributed.run_on_first(lambda: print(notes, file=sys.stderr))
    image_classes = find_classes(classes, dataset, prepared.names)
    labels = None
    if image_classes is not None:
        config = dataclasses.replace(config, class_names=tuple(image_classes.names))
        labels = image_classes.labels
    settings = {"model": "segdiff", **config.to_dict(), "preset": preset, "seed_trials": seed_trials}
    settings["data"] = describe_data(dataset, prepared, labels)
    if user_config.regions is None:
        settings["regions"] = None  # until the stages have chosen it
    resumable = config.RESUMABLE | {DATA_NAME} | (STAGE_SETTINGS if config.masks != "auto" else set())
    autoencoder, space, inputs, encoding_seconds = settled.autoencoder, None, prepared.images, 0.0
    if config.latent_channels:  # before the work that follows
        distributed.run_on_first(lambda: check_claim(folder, settings, resumable | {"autoencoder"}))
    if settled.training:
        autoencoder = train_own_autoencoder(data, Path(config.latent), settled.training, progress)
    if autoencoder is not None:  # encoded before the folder is claimed: a kill leaves no run without its autoencoder
        settings["autoencoder"] = hash_autoencoder(autoencoder)
        with cpu_threads(config.threads):
            start, encoding = time.perf_counter(), (prepared.images, config.random_flip, folder, device)
            space, inputs = encode_images(config.latent, autoencoder, *encoding)
            encoding_seconds = time.perf_counter() - start

    def begin(folder: Path) -> None:
        if space is not None:
            store_space(folder, space, encoding_seconds, config.latent, own=bool(settled.training))
        log_latents(folder, settled.note)

    def make_trainer(config: ResolvedSegdiffConfig, folder: Path, stop_at: int | None = None) -> Trainer:
        distributed.run_on_first(lambda: begin(folder))
        task = SegdiffTask(config, inputs, probes, device, labels, space)
        meta = {**settings, **config.to_dict()}
        if config.masks == "auto" and config.num_leaf_regions > 1 and not Checkpoints(folder / "checkpoints").paths():
            latents = None if space is None else inputs
            stages = ObjectStages(config, prepared.images, folder, meta, device, progress, latents)
            cast(nn.Module, cast(FactorizedDenoiser, task.model).masks).load_state_dict(stages.run().state_dict())
        return Trainer(
            task, config, folder, meta, device=device, progress=progress, stop_at=stop_at, report=write_report
        )

    run_folder = claimed(folder, settings, resumable)
    with cpu_threads(config.threads), distributed.enter_on_first(run_folder):
        distributed.run_on_first(lambda: begin(folder))
        if user_config.regions is None:
            meta = settings | config.to_dict()
            stages = ObjectStages(config, prepared.images, folder, meta, device, progress)
            settings["regions"] = regions = stages.choose_regions()
            config = dataclasses.replace(config, regions=regions)
            distributed.run_on_first(lambda: write_json(folder / CONFIG, settings))
        if seed_trials > 1:
            config = run_seed_trials(config, folder, seed_trials, make_trainer)
        make_trainer(config, folder).run()
        run = SegdiffRun.load(folder, device=device)
        if dataset.test_images is not None and config.num_leaf_regions > 1:
            score_run(run, dataset, baselines)
        judge_drawn_images(run, prepared.images)
    return run


def score_run(run: SegdiffRun, dataset: Dataset, baselines: bool) -> None:
    """Score a finished run on its held-out images, unless scores.json already holds the scores of these weights."""
    scores = distributed.run_on_first(lambda: run.scores) or {}
    all_scored = bool(set(scores.get("baselines", ())) - set(VERDICT_BASELINES))
    if scores.get("step") == run.step and (all_scored or not baselines):
        return
    try:
        # Nested labels are scored level by level for a hierarchy of as many levels, else as foreground.
        nesting = dataset.nesting if len(dataset.nesting or ()) == len(run.config.nesting) else None
        run.evaluate(dataset.test_images, dataset.test_masks, baselines=baselines, nesting=nesting)
    except (ConfigError, DataError) as error:  # An unreadable mask must not fail a finished run.
        warnings.warn(f"the run is finished, but could not be scored: {error}", stacklevel=3)
        return
    distributed.run_on_first(lambda: write_report(cast(Path, run.folder)))


def judge_drawn_images(run: SegdiffRun, photos: np.ndarray) -> None:
    """Add the alarms on drawn images to a finished run, unless its log has it; ``photos`` uint8 [N, R, R, 3]."""
    folder = cast(Path, run.folder)
    alarms = distributed.run_on_first(lambda: judged_alarms(read_log(folder))[0]) or {}
    logged = {check["name"]: check["status"] for check in alarms.get("checks", ())}
    if alarms.get("step") == run.step and (STRUCTURE in logged or logged.get(DRAWN_IMAGES) == "not run"):
        return
    checks = skip_checks(run.step, len(photos))
    if not checks:
        reference, others = choose_photos(len(photos), NUM_CHECKED)
        drawn = run.generate(len(others), steps=min(NUM_CHECK_STEPS, run.config.timesteps)).images
        factor = run.config.latent_factor
        known = read_photos(photos[reference], factor), read_photos(photos[others], factor)
        checks = score_drawn(drawn, *known, factor).checks()

    def write() -> None:
        log_drawn_checks(folder, run.step, checks)
        write_report(folder)

    distributed.run_on_first(write)


def find_classes(classes: Any, dataset: Dataset, names: Sequence[str]) -> Classes | None:
    """Return the classes of the images ``names`` of ``dataset.train``; None if ``classes`` is None or False.

    Raises:
        ConfigError, DataError: as :func:`factorkit.data.read_classes`.
    """
    if classes is None or classes is False:
        return None
    known = None
    if dataset.labels is not None:  # ``names`` lacks images that could not be decoded
        label_of = dict(zip(dataset.train.names, dataset.labels, strict=True))
        known = Classes(np.array([label_of[name] for name in names], np.int64), list(dataset.class_names or ()))
    return read_classes(classes, names, positional=dataset.train.positional, dataset_classes=known)


def run_seed_trials(
    config: ResolvedSegdiffConfig, folder: Path, seed_trials: int, make_trainer: Callable[..., Trainer]
) -> ResolvedSegdiffConfig:
    """Train briefly from consecutive seeds; return the settings with the best seed by the label-free alarms.

    A trial is a run folder under ``seed_trials/``. It stops early but follows the full run's schedule, so the run
    continues from the checkpoint of the best. Trials resume after a kill.
    """
    stop_at = max(1, min(MAX_SEED_TRIAL_STEPS, round(SEED_TRIAL_FRACTION * config.steps)))
    if config.masks == "auto":
        stop_at = 1  # the stages before it decide the masks
    trials = folder / "seed_trials"
    choice = trials / "chosen.json"
    if not choice.exists():
        alarms: dict[int, Alarms] = {}
        for seed in range(config.seed, config.seed + seed_trials):
            trial = make_trainer(dataclasses.replace(config, seed=seed), trials / f"seed_{seed}", stop_at)
            model = trial.run()
            with autocast(config, trial.device):
                alarms[seed] = cast(SegdiffTask, trial.task).alarms(model)
        best = max(alarms, key=lambda seed: alarms[seed].score())
        if distributed.rank() == 0:
            winner = trials / f"seed_{best}"
            copy_folder(winner / "checkpoints", folder / "checkpoints")
            shutil.copyfile(winner / LOG_NAME, folder / LOG_NAME)
            with RunLog(folder) as log:
                for seed, each in alarms.items():
                    message = f"seed trial {seed}: {'healthy' if each.ok else '; '.join(each.failures())}"
                    log.event("restart", step=stop_at, seed=seed, message=message, **each.to_dict())
                doubt = "" if alarms[best].ok else ", although the alarms fail every seed"
                message = f"continuing with seed {best}, the best of {seed_trials}{doubt}"
                log.event("restart", step=stop_at, restarts=seed_trials, seed=best, message=message)
            write_json(choice, {"seed": best})
        distributed.barrier()
    return dataclasses.replace(config, seed=read_object(choice)["seed"])


def estimate(
    data: Any = None,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    classes: Classes | None = None,
    num_images: int | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Estimate parameters, memory and time for ``--dry-run`` by a few training steps on random images.

    Args:
        data: only whether it is None, which selects the preset.
        out, preset: as for :func:`train_segdiff`.
        classes: of the images, as :func:`find_classes` returns them.
        num_images: to train on; None: enough.
        **changes: settings.

    Returns:
        regions (None: the images decide; the rest is for 3), parameters, images_per_second, seconds (of the whole run),
        stage_seconds (of these, before the first step, for masks="auto"), autoencoder_seconds (of these, for the
        autoencoder that is trained first, if one is), latent_note (why pixels or latents, or empty), memory_gib (of
        training; measured on a GPU, on a CPU the growth of the process, at least the weights, their gradients, average
        and Adam's two moments), trial_images (the micro-batch timed).
    """
    preset = preset or ("demo" if data is None else "fast64")
    folder = Path(out) if out is not None else Path("runs") / preset
    settled = settle_latents(preset, changes, folder, read_stored(folder))
    settled = settled.for_images(MIN_IMAGES if num_images is None else num_images)
    user_config = settled.config
    config = user_config.resolved()
    if classes is not None:
        config = dataclasses.replace(config, class_names=tuple(classes.names))
    device = resolve_device(config.device)
    before = peak_memory(device)
    trainer = make_trial(config, device)
    count = trainer.config.batch_size
    with cpu_threads(config.threads):
        seconds = trainer.measure_step_seconds(steps=3)
        stages = TimedStages(config, device)
        if config.masks == "auto" and config.num_leaf_regions > 1:
            stages.run()
    parameters = count_parameters(trainer.task.model)
    grown = peak_memory(device) - (before if device.type == "cpu" else 0)
    first = 0.0
    if settled.training and (left := settled.training["steps"] - settled.trained_steps):
        first = estimate_autoencoder(**settled.training)["seconds"] * left / settled.training["steps"]
    return {
        "preset": preset,
        "regions": user_config.regions,
        "parameters": parameters,
        "images_per_second": count / seconds,
        "seconds": config.steps * config.batch_size * seconds / count + stages.seconds + first,
        "stage_seconds": stages.seconds,
        "autoencoder_seconds": first,
        "latent_note": settled.note,
        "memory_gib": max(grown, 5 * 4 * parameters) / 2**30,
        "trial_images": count,
        "steps": config.steps,
        "batch_size": config.batch_size,
        "device": str(device),
    }


def make_trial(config: ResolvedSegdiffConfig, device: torch.device) -> Trainer:
    """Make a trainer whose steps on random images are timed, with as many images as fit; nothing is written."""
    count = min(config.micro_batch_size or config.batch_size, config.batch_size)
    if device.type == "cpu":
        count = min(count, 16 if config.resolution * config.model_channels <= 2048 else 1)
    count = -(-count // distributed.world_size()) * distributed.world_size()
    trial = dataclasses.replace(config, batch_size=count, micro_batch_size=None)
    shape = (max(2, count), config.resolution, config.resolution, 3)
    images = probes = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    if config.latent_channels:
        images = np.zeros((max(2, count), 1, config.latent_channels, config.side, config.side), np.float16)
    labels = np.zeros(len(images), np.int64) if config.class_names else None
    task = SegdiffTask(trial, images, probes, device, labels)
    return Trainer(task, trial, Path("."), {}, device=device, progress=False)
