"""Editing real images with a loaded model."""

from __future__ import annotations

from typing import Any

from factorkit.segdiff.editing.branches import Branches, decompose_images
from factorkit.segdiff.editing.interpolate import Interpolation, interpolate_images
from factorkit.segdiff.editing.recompose import Recomposition, recompose_images
from factorkit.segdiff.inference.segmenter import LoadedModel
from factorkit.segdiff.sampling import check_edit_time


class Editor(LoadedModel):
    """The editing methods of :class:`~factorkit.segdiff.run.SegdiffRun`."""

    def interpolate(self, a: Any, b: Any, *, frames: int = 9, t: int | None = None, steps: int = 25) -> Interpolation:
        """Interpolate between images a and b: take them to time step t by DDIM, mix them and return (fig. 2.12).

        The end frames reconstruct a and b.

        Args:
            a, b: images as for :meth:`segment`, cropped to their central squares; as many of each, or one.
            frames: images along the way, both ends included.
            t: time step of the mixing; None: a quarter of those trained on (250 of 1000). The higher, the freer.
            steps: of DDIM each way, at most t + 1. The inversion calls the network twice a step.

        Raises:
            ConfigError: frames, steps or t out of range.
            DataError: nothing to read, or images that cannot be paired.
        """
        t = check_edit_time(self.config, t)
        first, second = self._read_squares(a), self._read_squares(b)
        with self._autocast():
            return interpolate_images(
                self.model, self.config, self.schedule, first, second, frames=frames, t=t, steps=steps
            )

    def branches(self, images: Any, t: int | None = None) -> Branches:
        """Return the output of each branch for images at one noise level, and its mask (fig. 2.9).

        Args:
            images: as for :meth:`segment`, cropped to their central squares.
            t: time step; None: a quarter of those trained on. At low ones every branch can copy its input.

        Raises:
            ConfigError: t out of range, or a model without branches (``decoding="concat"``).
            DataError: nothing to read.
        """
        t = check_edit_time(self.config, t)
        with self._autocast():
            return decompose_images(self.model, self.config, self.schedule, self._read_squares(images), t)

    def recompose(
        self,
        images: Any,
        region: int,
        *,
        from_: Any = None,
        remove: bool = False,
        t: int | None = None,
        steps: int = 50,
        sampler: str = "ddpm",
        seed: int = 0,
    ) -> Recomposition:
        """Edit images by region: generate one anew (the default), transfer it from other images, or remove it.

        Pixels outside the edited areas stay bit-identical (:class:`~factorkit.segdiff.editing.recompose.Recomposer` has
        the formulas).

        Args:
            images: as for :meth:`segment`, cropped to their central squares.
            region: number of the region, 0 to K-1, as in the labels of :meth:`segment`.
            from_: images to transfer the region from, as many as images, or one; its old area is filled.
            remove: remove the region and fill its area.
            t: the region is held to its pixels down to this time step and denoised freely below. None: with ``from_`` a
                twentieth of the steps, which fits it in without changing it; else all of them. 0 pastes.
            steps: denoising steps.
            sampler, seed: as for :meth:`generate`.

        Raises:
            ConfigError: a plain DDPM, an unknown region or time step, ``from_`` with ``remove``, steps out of range, or
                an unknown sampler.
            DataError: nothing to read, or images that cannot be paired.
        """
        options: dict[str, Any] = {"region": region, "remove": remove, "t": t, "steps": steps}
        options |= {"sampler": sampler, "seed": seed}
        originals, sources = self._read_squares(images), None if from_ is None else self._read_squares(from_)
        with self._autocast():
            return recompose_images(self.model, self.config, self.schedule, originals, sources, **options)
