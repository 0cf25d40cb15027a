"""The latents of an autoencoder as the space in which a segdiff model denoises: ``latent=`` of a training.

A run keeps a copy of the autoencoder in its folder, and an exported model holds it, so that both work alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from factorkit.engine.checkpoint import read_checkpoint, write_checkpoint
from factorkit.engine.run_folder import read_object, sum_step_seconds
from factorkit.nn.autoencoder import Autoencoder, AutoencoderSizes
from factorkit.segdiff.autoencoder import AutoencoderRun
from factorkit.segdiff.masks.proposal import without_autocast
from factorkit.segdiff.network import PixelSpace
from factorkit.utils import distributed
from factorkit.utils.errors import CheckpointError
from factorkit.utils.files import is_number
from factorkit.utils.images import pixels_to_signed

COPY_NAME = "autoencoder.safetensors"  # in a run folder
PREFIX = "autoencoder."  # of the tensors of an autoencoder that belongs to a run
ENCODING_BATCH_SIZE = 16  # images
MEASURED_IMAGES = 1024  # of the training set, evenly spaced, whose latents give mean and deviation
MIN_DEVIATION = 1e-6
FORMAT_GROUPS = 32  # groups of the norms in diffusers' format where config.json does not say
FORMAT_FILE, FORMAT_CONFIG = "diffusion_pytorch_model.safetensors", "config.json"  # diffusers' names of them
# Names of attention in older files of the format -> names of today.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class LatentSpace(PixelSpace):
    """Latents of a fixed autoencoder, of zero mean and unit deviation a channel on the training set.

    Args:
        autoencoder: moved to the device of its inputs.
        mean, deviation: of each channel [C]; None: 0 and 1.
    """

    clip = False

    def __init__(self, autoencoder: Autoencoder, mean: Tensor | None = None, deviation: Tensor | None = None):
        channels = autoencoder.sizes.latent_channels
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.autoencoder.eval().requires_grad_(False)
        self.mean = torch.zeros(channels) if mean is None else mean
        self.deviation = torch.ones(channels) if deviation is None else deviation

    def __deepcopy__(self, memo: Any) -> LatentSpace:
        return self  # it never changes: averages and previews share it

    def encode(self, images: Tensor) -> Tensor:
        """Return the scaled mean latents [B, C, H / f, W / f]."""
        return self._scale(self._encode(images))

    def decode(self, x: Tensor) -> Tensor:
        """Return images [B, 3, f h, f w], clipped."""
        with torch.no_grad(), without_autocast(x.device):
            autoencoder = self._on(x.device)
            return autoencoder.decode(x.float() * self.deviation[:, None, None] + self.mean[:, None, None]).clamp(-1, 1)

    def _on(self, device: torch.device) -> Autoencoder:
        if self.mean.device != device:
            self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
            self.autoencoder.to(device)
        return self.autoencoder

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights of the autoencoder and what scales its latents, by name."""
        extra = {"mean": self.mean, "deviation": self.deviation}
        extra["norm_groups"] = torch.tensor(self.autoencoder.sizes.norm_groups)
        return {PREFIX + name: value for name, value in {**self.autoencoder.state_dict(), **extra}.items()}

    @classmethod
    def from_tensors(cls, path: Path, tensors: Mapping[str, Tensor]) -> LatentSpace:
        """Return the space of what :meth:`tensors` returned.

        Raises:
            CheckpointError: there is none among the tensors of the file ``path``.
        """
        own = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        try:
            mean, deviation, groups = (own.pop(name) for name in ("mean", "deviation", "norm_groups"))
        except KeyError as error:
            raise CheckpointError(f"{path} does not hold the autoencoder of this run's latents") from error
        return cls(build_autoencoder(path, own, int(groups)), mean, deviation)

    def encode_all(self, images: np.ndarray, mirrored: bool, device: torch.device, measure: bool = False) -> Tensor:
        """Return the latents of images uint8 [N, R, R, 3] and, if ``mirrored``, of their mirror images. Collective.

        ``measure`` sets mean and deviation by them first. fp16 [N, 1 or 2, C, h, w] on the CPU.

        Raises:
            CheckpointError: measured, they are not finite, or the same everywhere.
        """

        def share(rows: slice) -> Tensor:
            parts = []
            for start in range(rows.start, rows.stop, ENCODING_BATCH_SIZE):
                pixels = np.array(images[start : min(start + ENCODING_BATCH_SIZE, rows.stop)])
                batch = pixels_to_signed(torch.from_numpy(pixels)).to(device)
                views = [batch, batch.flip(3)] if mirrored else [batch]
                parts.append(torch.stack([self._encode(view) for view in views], 1).half().cpu())
            return torch.cat(parts)

        # Rounded before they are scaled: a run that resumes with its stored mean and deviation has the same latents.
        latents = distributed.map_shares(share, len(images))
        if measure:
            chosen = latents[:: -(-len(latents) // MEASURED_IMAGES), 0].float().transpose(0, 1).flatten(1)
            self.mean, self.deviation = chosen.mean(1), chosen.std(1).clamp_min(MIN_DEVIATION)
            if not (self.mean + self.deviation).isfinite().all():
                raise CheckpointError("the latents of the training images are not all finite numbers")
            if self.deviation.max() <= MIN_DEVIATION:
                raise CheckpointError("the latents of the training images are the same everywhere")
        for part in latents.split(ENCODING_BATCH_SIZE):
            part.copy_(self._scale(part.to(self.mean.device).float()))
        return latents

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """Return the mean latents [B, C, H / f, W / f], not scaled."""
        with without_autocast(images.device):
            return self._on(images.device).encode(images.float())[0]

    def _scale(self, latents: Tensor) -> Tensor:
        return (latents - self.mean[:, None, None]) / self.deviation[:, None, None]


def open_autoencoder(path: str | Path) -> Autoencoder:
    """Open a run folder or an exported file of :func:`factorkit.train_autoencoder`, or diffusers' AutoencoderKL.

    The latter is a local ``.safetensors`` file, or its folder with config.json. The copy in the folder of a segdiff run
    is read too.

    Raises:
        CheckpointError: nothing there, damaged, or another model.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"latent={str(path)!r}: no such file or folder. Give the run folder of `factorkit train autoencoder`, or a "
            ".safetensors file in diffusers' AutoencoderKL format"
        )
    config_file = (path if path.is_dir() else path.parent) / FORMAT_CONFIG
    settings = read_object(config_file, "give another file") if config_file.is_file() else {}
    if path.is_dir() and "model" in settings:
        return AutoencoderRun.load(path, device="cpu").model
    file = _find_weights(path)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error
    if any(name.startswith("ema.module.") for name in tensors):
        return AutoencoderRun.load(file, device="cpu").model
    if any(name.startswith(PREFIX) for name in tensors):
        return read_space(file).autoencoder
    if "_class_name" not in settings:  # the config.json of something else
        settings = {}
    return _read_format(file, tensors, settings)


def _find_weights(path: Path) -> Path:
    """Return the file of the weights in a folder, or the file itself."""
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.safetensors"))
    chosen = [file for file in files if file.name == FORMAT_FILE] or files
    if len(chosen) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise CheckpointError(
            f"{path} is no run folder, and does not hold one .safetensors file (there: {listed}). Give a file"
        )
    return chosen[0]


def _read_format(file: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Autoencoder:
    """Build the autoencoder of a file in diffusers' format; ``settings`` are of its config.json, perhaps empty."""
    kind = settings.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL" or any(name.startswith("quantize.") for name in tensors):
        found = kind if kind != "AutoencoderKL" else "an autoencoder with a codebook (VQ)"
        raise CheckpointError(f"{file} is {found}; latent= reads AutoencoderKL alone")
    if settings.get("act_fn", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{file}: act_fn={settings['act_fn']!r:.80} in its config.json; latent= reads silu alone")
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new) if ".attentions." in name else name
        renamed[name] = tensor.float().clone()
    config, groups = file.with_name(FORMAT_CONFIG), settings.get("norm_num_groups", FORMAT_GROUPS)
    if type(groups) is not int or groups < 1:
        raise CheckpointError(f"{config}: norm_num_groups={groups!r:.80} must be an integer of at least 1")
    autoencoder = build_autoencoder(file, renamed, groups)
    sizes = list(autoencoder.sizes.channels)
    if (channels := settings.get("block_out_channels", sizes)) != sizes:
        raise CheckpointError(
            f"{config}: block_out_channels={channels!r:.80}, but the levels of {file.name} have {sizes} channels: they "
            "belong to different models"
        )
    return autoencoder


def build_autoencoder(path: Path, tensors: Mapping[str, Tensor], norm_groups: int) -> Autoencoder:
    """Build the autoencoder that the tensors of the file ``path`` are of.

    Raises:
        CheckpointError: they are of another architecture, of sizes that do not fit together, or not finite.
    """
    other = f"{path} is no AutoencoderKL of images"
    try:
        sizes = AutoencoderSizes.from_shapes({name: tensor.shape for name, tensor in tensors.items()}, norm_groups)
        if not sizes.channels:
            raise KeyError("encoder.down_blocks.0.resnets.0.conv1.weight")
    except KeyError as error:
        first = ", ".join(sorted(tensors)[:3]) or "none"
        raise CheckpointError(f"{other}: it has no tensor {error}; its first are {first}") from error
    except ValueError as error:
        raise CheckpointError(f"{other}: {error}") from error
    if uneven := [channels for channels in sizes.encoder_channels + sizes.channels if channels % norm_groups]:
        raise CheckpointError(
            f"{other}: {norm_groups} groups of a norm do not divide {uneven[0]} channels; put its config.json with "
            "norm_num_groups beside it"
        )
    with torch.device("meta"):
        autoencoder = Autoencoder(sizes)
    shapes = {name: tuple(value.shape) for name, value in autoencoder.state_dict().items()}
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise CheckpointError(f"{other}: it has no tensor {missing[0]}, of {len(missing)} that are missing")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise CheckpointError(f"{other}: it has a tensor {unknown[0]}, of {len(unknown)} that the format does not have")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{other}: {name} is {tuple(tensors[name].shape)}, and has to be {shape}")
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{path} is damaged: {name} holds NaN or infinite values")
    autoencoder.load_state_dict(dict(tensors), assign=True)
    return autoencoder


def hash_autoencoder(autoencoder: Autoencoder) -> str:
    """Return what identifies the weights of an autoencoder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def encode_images(
    latent: str, autoencoder: Autoencoder, images: np.ndarray, mirrored: bool, folder: Path, device: torch.device
) -> tuple[LatentSpace, np.ndarray]:
    """Return the space of a run in ``folder``, which may hold it already, and the latents of its images. Collective.

    Arguments and latents as of :meth:`LatentSpace.encode_all`; ``latent`` is the setting, for the message.

    Raises:
        CheckpointError: the autoencoder makes nothing of the images that could be denoised.
    """
    stored = distributed.run_on_first((folder / COPY_NAME).exists)
    space = read_space(folder) if stored else LatentSpace(autoencoder)
    try:
        return space, space.encode_all(images, mirrored, device, measure=not stored).numpy()
    except CheckpointError as error:
        raise CheckpointError(f"latent={latent!r}: {error}; give another autoencoder, or latent='no'") from error


def store_space(folder: Path, space: LatentSpace, encoding_seconds: float, source: str, own: bool) -> None:
    """Write the autoencoder of a run into its folder, with the seconds that its latents took, unless it is there.

    Args:
        folder: of the run.
        space: of the run.
        encoding_seconds: that encoding the images of the training took.
        source: where the autoencoder is from, as for :func:`open_autoencoder`.
        own: it was trained for this run alone.
    """
    if not (folder / COPY_NAME).exists():
        cost = {"encoding_seconds": encoding_seconds, "autoencoder_seconds": read_training_seconds(Path(source))}
        write_checkpoint(folder / COPY_NAME, space.tensors(), {"model": "latents", "own_autoencoder": own, **cost})


def read_training_seconds(path: Path) -> float | None:
    """Return the seconds that training an autoencoder took; None where its folder or file does not say."""
    path = path.expanduser()
    if path.is_dir():
        return sum_step_seconds(path) or None
    try:
        return read_cost(path)["autoencoder_seconds"]
    except CheckpointError:  # of diffusers
        return None


def read_cost(path: Path) -> dict[str, Any]:
    """Return what :func:`store_space` stored in the file ``path`` on the seconds that the latents of a run took.

    Returns:
        encoding_seconds, autoencoder_seconds, each None where unknown; own_autoencoder.
    """
    _, meta = read_checkpoint(path)
    seconds = {name: meta.get(name) for name in ("encoding_seconds", "autoencoder_seconds")}
    known = {name: value if is_number(value) else None for name, value in seconds.items()}
    return known | {"own_autoencoder": meta.get("own_autoencoder") is True}


def read_space(path: Path) -> LatentSpace:
    """Read the autoencoder of a run folder, an exported model, or a checkpoint in a run folder.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if path.is_dir():
        path = path / COPY_NAME
    tensors, _ = read_checkpoint(path)
    beside = path.parent.parent / COPY_NAME
    if not any(name.startswith(PREFIX) for name in tensors) and beside.exists():
        return read_space(beside.parent)
    return LatentSpace.from_tensors(path, tensors)
