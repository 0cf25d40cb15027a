"""A trained segdiff model and everything it can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from factorkit.engine.config import resolve_device
from factorkit.engine.run_folder import TrainedRun, load_trained, select_settings, sum_step_seconds, write_json
from factorkit.metrics.frechet import compute_fid, find_weights
from factorkit.segdiff.class_labels import select_labels
from factorkit.segdiff.config import ResolvedSegdiffConfig, SegdiffConfig
from factorkit.segdiff.drawn_images import choose_photos, log_drawn_checks, score_drawn, skip_checks
from factorkit.segdiff.editing.editor import Editor
from factorkit.segdiff.evaluate import score_labelled_images, share_images
from factorkit.segdiff.hierarchy import SegdiffModel
from factorkit.segdiff.inference.segment import hard_labels, predict_masks
from factorkit.segdiff.inference.segmenter import Segmenter
from factorkit.segdiff.inference.zero_shot import score_zero_shot
from factorkit.segdiff.latents import COPY_NAME, read_cost, read_space
from factorkit.segdiff.network import PixelSpace
from factorkit.segdiff.sampling import DEFAULT_SAMPLER, DEFAULT_STEPS, Frame, Generation, draw_images
from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError
from factorkit.utils.images import signed_to_unit


class SegdiffRun(TrainedRun, Segmenter, Editor):
    """A trained factorized diffusion model: its averaged weights after ``step`` steps, and its run folder if any."""

    MODEL = "segdiff"

    def __init__(
        self,
        config: ResolvedSegdiffConfig,
        model: SegdiffModel,
        device: torch.device,
        step: int,
        folder: Path | None = None,
        space: PixelSpace | None = None,
    ):
        super().__init__(config, model, device)
        self.step, self.folder = step, folder
        self.model.space = space or self.model.space

    @classmethod
    def load(
        cls, path: str | Path, *, device: str | torch.device = "auto", weights: str | float = "average"
    ) -> SegdiffRun:
        """Load a run folder (its newest intact checkpoint) or a single ``.safetensors`` file.

        Args:
            path: the folder or file.
            device: ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or a torch device.
            weights: ``"average"``, the moving average. For a folder also the decay of another average
                (``extra_ema_decays=``), or ``"last"``, the weights of the last step. Only scores of the average are
                written to the folder.

        Raises:
            CheckpointError: nothing there, damaged, or not a segdiff model.
            ConfigError: unknown ``weights``, or weights that the file does not hold.

        Example:
            >>> run = factorkit.SegdiffRun.load("runs/flowers", device="cpu")
            >>> run.config.regions
            2
        """
        path = Path(path)
        config, model, step = load_trained(path, cls.MODEL, weights, read_config)
        torch_device = device if isinstance(device, torch.device) else resolve_device(device)
        space = read_space(path) if config.latent_channels else None
        folder = path if path.is_dir() and weights == "average" else None
        return cls(config, model, torch_device, step, folder, space)

    def _stored_tensors(self) -> dict[str, Tensor]:
        return super()._stored_tensors() | self.model.space.tensors()

    def generate(
        self,
        n: int = 16,
        *,
        sampler: str = DEFAULT_SAMPLER,
        steps: int | None = DEFAULT_STEPS,
        seed: int = 0,
        trajectory: bool = False,
        progress: bool = False,
        classes: Any = None,
        guidance: float = 1.0,
    ) -> Generation:
        """Generate images and their masks from noise (thesis, algorithm 2).

        Args:
            n: number of images.
            sampler: ``"ddim"``, ``"heun"`` or ``"dpm++"`` for few steps, ``"ddpm"`` for many; see
                :func:`factorkit.diffusion.samplers.sample`. All of them support every kind of prediction.
            steps: denoising steps; None: all of the schedule.
            seed: determines the images.
            trajectory: keep every step (fig. 2.10).
            progress: show a progress bar.
            classes: classes of the images, for a run with classes (``config.class_names``): a name or label, a list of
                them, taken in turn (None in it is no class), or ``"all"``; None: no class.
            guidance: scale of classifier-free guidance; 1 is none, 2 to 4 is usual, at twice the cost.

        Raises:
            ConfigError: an unknown sampler or class, guidance without classes, or n or steps out of range.

        Example:
            >>> drawn_again = run.generate(2, steps=3, seed=1)
            >>> drawn_again.images.shape, drawn_again.labels.shape
            (torch.Size([2, 3, 16, 16]), torch.Size([2, 16, 16]))
        """
        if n < 1:
            raise ConfigError(f"n={n} must be at least 1")
        labels = select_labels(classes, self.config.class_names, n, guidance)

        def draw(rows: slice) -> Any:
            return draw_images(
                self.model,
                self.config,
                n,
                sampler=sampler,
                steps=steps,
                seed=seed,
                device=self.device,
                progress=progress and distributed.rank() == 0,
                trajectory=trajectory,
                labels=labels,
                guidance=guidance,
                rows=rows,
            )

        with self._autocast():
            samples = distributed.map_shares(draw, n)
        masks = samples.bottleneck.masks.float().cpu()
        frames = names = None
        if trajectory:
            frames = [Frame(s.t, signed_to_unit(s.x0), s.bottleneck.masks.float().cpu()) for s in samples.trajectory]
        if labels is not None:
            names = [self.config.class_names[i] if i >= 0 else None for i in labels.tolist()]
        images, labels_of_pixels = signed_to_unit(samples.images), hard_labels(masks, self.config.nesting)
        return Generation(images, masks, labels_of_pixels, frames, names)

    def evaluate(
        self,
        images: Any,
        masks: Any,
        *,
        num_fit_images: int | None = None,
        ignore: int | None = None,
        foreground: Sequence[int] | None = None,
        mask_threshold: int | None = None,
        baselines: bool = False,
        t: int | None = None,
        size: int | None = None,
        quality: str = "fast",
        nesting: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Score the regions against foreground masks: Acc, IoU, DICE per image, averaged.

        One mapping from regions to foreground is fitted on the first ``num_fit_images`` labelled images and applied to
        the rest, which are scored (``acc, iou, dice``). ``oracle_*`` chooses the best mapping for each image by its own
        label, an upper bound. In a hierarchy the regions of one level are mapped, named by ``level``: the deepest with
        at most 12. Images and masks are cropped as in training. The result is also written to ``scores.json``.

        Args:
            images, masks: folders, zips, lists or arrays; matched by name, arrays by position. What the values of the
                masks mean is decided from them (:func:`~factorkit.data.mask_values.decide_mask_values`), unless given.
            num_fit_images: labelled images that fit the mapping; None: as in the settings (16), fewer for a small set.
            ignore: mask value that is not scored; None: as in the settings.
            foreground, mask_threshold: values of the foreground, or the least of them; None: as in the settings.
            baselines: score all trivial predictors and GrabCut on the same images; else only the mean mask and 2-means,
                which the verdict needs.
            t: time step; None: as in the settings.
            size: side in pixels at which to score; None: the resolution of the model.
            quality: as for :meth:`segment`.
            nesting: number of classes at each level of nested labels (label 3 i + j of (3, 3) is part j of class i):
                score each level by :func:`~factorkit.metrics.segmentation.nested_accuracy` instead.

        Raises:
            ConfigError: ``num_fit_images`` leaves nothing to score, t out of range, a plain DDPM, or over 12 regions.
            DataError: images and masks that do not match.

        Example:
            >>> scores = run.evaluate(images, masks, num_fit_images=8)
            >>> sorted(scores)[:3], 0 <= scores["iou"] <= 1
            (['acc', 'areas', 'baselines'], True)
        """
        self._require_regions()
        scores = score_labelled_images(
            self.config,
            share_images(self.predictor(t, quality)),
            images,
            masks,
            num_fit_images=num_fit_images,
            ignore=ignore,
            foreground=foreground,
            mask_threshold=mask_threshold,
            baselines=baselines,
            size=size,
            nesting=nesting,
        )
        scores["step"] = self.step
        self._store_scores(scores)
        return scores

    def evaluate_generation(
        self,
        images: Any,
        *,
        n: int = 256,
        sampler: str = DEFAULT_SAMPLER,
        steps: int = DEFAULT_STEPS,
        seed: int = 0,
        latent_factor: int = 1,
    ) -> dict[str, Any]:
        """Score drawn images against photos, and the masks that they were drawn with. Needs no labels.

        Distances are Fréchet distances in fixed random features, so they compare equal numbers of images of one data
        set alone (:mod:`factorkit.metrics.frechet`). A run folder keeps the scores in ``generation.json``; its verdict
        and log have the alarms on them.

        Args:
            images: photos, as for :meth:`segment`; best those of the training. A half at most replaces drawn
                images.
            n: images to draw, at most half as many as there are photos.
            sampler, steps, seed: as for :meth:`generate`.
            latent_factor: images are averaged over squares of so many pixels a side before they are compared, at least
                the run's own ``config.latent_factor``; give the largest of the runs that you compare. The alarms are of
                the run's own.

        Returns:
            The figures of :class:`~factorkit.segdiff.drawn_images.DrawnScores` and ``noise_share``; for a run with
            regions ``mask_agreement``, the share of pixels to which segmenting a drawn image gives the region that it
            was drawn with, and ``mask_agreement_by_chance``, that of another image's regions; ``fid`` where Inception's
            weights are (:mod:`factorkit.metrics.frechet`), without averaging; ``training_seconds`` of a run folder,
            with its stages. For latents these hold ``encoding_seconds`` of the photos and ``autoencoder_seconds`` (None
            where unknown), the latter only of an autoencoder trained for this run (``own_autoencoder``).

        Raises:
            ConfigError: an unknown sampler, or steps out of range.
            DataError: fewer than 32 photos, or nothing to read.
        """
        photos = signed_to_unit(self._read_squares(images))
        reference, others = choose_photos(len(photos), n)
        drawn = self.generate(len(others), sampler=sampler, steps=steps, seed=seed)
        own_factor = self.config.latent_factor
        compared = own = score_drawn(drawn.images, photos[reference], photos[others], own_factor)
        if latent_factor > own_factor:
            compared = score_drawn(drawn.images, photos[reference], photos[others], latent_factor)
        scores = compared.to_dict() | {"sampler": sampler, "steps": steps, "step": self.step}
        scores["resolution"] = self.config.resolution
        if self.config.num_leaf_regions > 1:
            with self._autocast():
                masks = predict_masks(self.model, drawn.images * 2 - 1, self.config.segment_t, self.schedule)
            labels = hard_labels(masks, self.config.nesting)
            scores["mask_agreement"] = float((labels == drawn.labels).double().mean())
            scores["mask_agreement_by_chance"] = float((labels == drawn.labels.roll(1, 0)).double().mean())
        if find_weights() is not None:
            scores["fid"] = compute_fid(photos[others], drawn.images, self.device)
        if (folder := self.folder) is not None:
            scores |= self._count_seconds(folder)
            checks = skip_checks(self.step, len(photos)) or own.checks()

            def write() -> None:
                write_json(folder / "generation.json", scores)
                log_drawn_checks(folder, self.step, checks)

            distributed.run_on_first(write)
        return scores

    def _count_seconds(self, folder: Path) -> dict[str, Any]:
        """Return the seconds of the training, and those of the latents as :func:`read_cost` does."""
        seconds = sum_step_seconds(folder, *folder.glob("stages/*"))
        if not self.config.latent_channels:
            return {"training_seconds": seconds}
        cost = read_cost(folder / COPY_NAME)
        parts = [cost["encoding_seconds"], cost["autoencoder_seconds"] if cost["own_autoencoder"] else None]
        return {"training_seconds": seconds + sum(part or 0 for part in parts), **cost}

    def evaluate_zero_shot(
        self,
        data: Any,
        *,
        split: str = "val",
        label_map: Mapping[str, Any] | None = None,
        num_fit_images: int | None = None,
        t: int | None = None,
        quality: str = "fast",
        mask_set: str | None = None,
    ) -> dict[str, Any]:
        """Score the run on the classes of another data set, each by itself (table 2.7).

        Args:
            data: a data set with class masks, as :func:`factorkit.data.open_dataset` reads it, such as VOC 2012.
            split: the split to score.
            label_map: class of the run that the model is conditioned on, for each class of the data set; None: that of
                the thesis for VOC and a run on ImageNet.
            num_fit_images: images of each class that fit the mapping from regions to foreground; None: as in the
                settings.
            t, quality: as for :meth:`segment`.
            mask_set: which masks of the data set; None: its default.

        Returns:
            The scores of every class and their means, as
            :func:`~factorkit.segdiff.inference.zero_shot.score_zero_shot`.

        Raises:
            ConfigError: a plain DDPM, an unknown split or class, t or quality out of range.
            DataError: nothing to score.
        """
        self._require_regions()
        return score_zero_shot(
            self.config,
            lambda label: share_images(self.predictor(t, quality, label)),
            data,
            split=split,
            label_map=label_map,
            num_fit_images=num_fit_images or self.config.num_fit_images,
            mask_set=mask_set,
        )

    def _require_regions(self) -> None:
        if self.config.num_leaf_regions == 1:
            raise ConfigError("this run was trained with regions=1, the plain DDPM: it has no regions to score")


def read_config(meta: Mapping[str, Any]) -> ResolvedSegdiffConfig:
    """Return the configuration of stored settings."""
    return SegdiffConfig.from_dict(select_settings(SegdiffConfig, meta)).resolved()
