"""The training settings that all models share, and the names that settings had in stored runs of earlier versions.

A model's configuration derives from :class:`EngineConfig`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, get_type_hints

from typeguard import TypeCheckError, check_type

from factorkit.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

Config = TypeVar("Config", bound="EngineConfig")
T = TypeVar("T")

MAX_TIMESTEPS = 1_000_000  # of a noise schedule, which is held in memory; a file may ask for any number


@dataclass(kw_only=True)
class EngineConfig:
    """Training settings common to all models."""

    steps: int = 50_000
    """Total number of optimiser steps. 50,000 is enough for 64-pixel images at the default batch size."""
    batch_size: int = 128
    """Images per optimiser step, over all processes together."""
    micro_batch_size: int | None = None
    """Images in memory at once in each process. None uses the process's whole share of the batch. A smaller value needs
    less memory; batch statistics of the model, if any, are then those of the micro-batch."""
    learning_rate: float = 1e-4
    """Peak learning rate of Adam. 1e-4 is the usual value for diffusion models."""
    warmup_steps: int = 0
    """Number of first steps over which the learning rate rises linearly from 0. 0 starts at the peak."""
    lr_decay_fraction: float = 0.0
    """Fraction of the steps, at the end of training, over which the learning rate decays linearly, floored at 10% of
    the peak. 0 keeps the learning rate constant."""
    gradient_clip: float | None = None
    """Upper bound on the norm of the gradient. None does not clip."""
    ema_decay: float = 0.9999
    """Decay of the exponential moving average of the weights, which is used for segmentation and generation. After n
    steps the decay is min(ema_decay, (1+n)/(10+n)), so that short runs are not dominated by the initial weights."""
    extra_ema_decays: tuple[float, ...] = ()
    """Decays of additional moving averages of the same training. Each is one more copy of the weights in memory and in
    every checkpoint. factorkit.load(run, weights=DECAY) loads one. A decay added on resuming starts at that step."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the activations, by autocast. Weights, statistics and masks are always fp32. bf16 is faster and
    needs half the memory, but a CPU without bf16 instructions is many times slower with it: "auto" is bf16 on a GPU
    and on a CPU that has them, otherwise fp32. fp32 on a GPU is torch's default: convolutions in TF32, matrix products
    in fp32."""
    seed: int = 0
    """Seed of the weights, the data order, the time steps and the noise."""
    device: str = "auto"
    """Device to train on: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" and so on."""
    threads: int | None = None
    """Number of CPU threads. None uses torch's default, one per core. Small models run best on one thread: their
    operations are too short to be worth synchronising threads."""
    cuda_graph: bool = True
    """Run the training step as one CUDA graph where possible: in a single process on a GPU that holds the images. This
    removes the cost of launching kernels one by one."""
    shard: bool = False
    """Shard the weights, their average and Adam's moments over the processes (FSDP2), for models that do not fit on
    one GPU. The losses do not change. A single process ignores this setting."""
    checkpoint_every: int = 1000
    """Steps between checkpoints. The last step always writes one."""
    keep_checkpoints: int = 3
    """Number of newest checkpoints to keep."""
    sample_every: int = 1000
    """Steps between sample grids and label-free alarms. 0 computes them only at the end."""
    stop_on_failure: bool = False
    """Stop training when an alarm reports a failure, instead of logging it and continuing."""
    log_every: int = 50
    """Steps between lines of the log."""
    tensorboard: bool = False
    """Also write the log for TensorBoard (needs the extra `tensorboard`)."""

    #: settings that may differ when a run is resumed: they affect neither the model nor the steps already trained
    RESUMABLE = frozenset(
        (
            *("steps", "device", "checkpoint_every", "keep_checkpoints", "sample_every", "log_every", "tensorboard"),
            *("stop_on_failure", "micro_batch_size", "threads", "cuda_graph", "extra_ema_decays", "shard"),
        )
    )

    def validate(self) -> None:
        """Raise ConfigError for values that cannot work, naming the setting."""
        positive = ("steps", "batch_size", "checkpoint_every", "keep_checkpoints", "log_every")
        optional = ("micro_batch_size", "threads")
        for name in (*positive, *optional, "warmup_steps", "sample_every"):
            value, low = getattr(self, name), 1 if name in positive + optional else 0
            if not (value is None and name in optional) and (not isinstance(value, int) or value < low):
                raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")
        for name in ("ema_decay", "lr_decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be between 0 and 1")
        if not all(0 <= decay <= 1 for decay in self.extra_ema_decays):
            raise ConfigError(f"extra_ema_decays={self.extra_ema_decays} must lie between 0 and 1")
        if len({self.ema_decay, *self.extra_ema_decays}) != 1 + len(self.extra_ema_decays):
            raise ConfigError(
                f"extra_ema_decays={self.extra_ema_decays} must differ from ema_decay={self.ema_decay} and each other"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive and finite")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ConfigError(f"gradient_clip={self.gradient_clip} must be positive, or None not to clip")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ConfigError(f"precision={self.precision!r} is unknown; choose auto, bf16 or fp32")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the step that follows ``step`` finished ones."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.lr_decay_fraction * self.steps
        if decay_steps > 0 and step >= self.steps - decay_steps:
            rate *= max(0.1, (self.steps - step) / decay_steps)
        return rate

    def stage(self: Config, name: str, **changes: Any) -> Config:
        """Return the configuration of a stage of the run, with its own seed."""
        from factorkit.utils.rng import derived_seed

        return dataclasses.replace(self, seed=derived_seed(name, self.seed) % 2**31, **changes)

    def memory_advice(self, at_once: int) -> str:
        """Return a sentence, without full stop, on how a step of ``at_once`` images needs less memory."""
        return "Make the step or the model smaller"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as in config.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """Return the configuration with these settings; the inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a setting is unknown, or its value has another type.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ConfigError(f"unknown setting {names} for {cls.__name__}; there are: {', '.join(sorted(known))}")
        values = {k: to_python(v) for k, v in values.items()}
        types = get_type_hints(cls)
        for name, value in values.items():
            if isinstance(value, str) and "Literal" in str(types[name]):
                continue  # validate() checks the choices
            try:
                check_type(value, types[name])
            except TypeCheckError as error:
                raise ConfigError(f"{name}={value!r:.80}: {' '.join(str(error).split())}") from error
        return cls(**values)


def to_python(value: Any) -> Any:
    """Convert integers of numpy and torch to int, lists to tuples, and paths to strings."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return tuple(map(to_python, value))
    if not isinstance(value, int):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    return value


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` CPU threads during the block; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_precision(precision: str, device: torch.device) -> Literal["bf16", "fp32"]:
    """Return the precision that a setting of EngineConfig.precision means on a device."""
    import torch

    if precision == "auto":
        # torch 2.11 and earlier may not list the capabilities; the width of the vectors is the nearest to it
        capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        if not capabilities:
            has_bf16 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        return "bf16" if device.type == "cuda" or has_bf16 else "fp32"
    return "bf16" if precision == "bf16" else "fp32"


def autocast(config: EngineConfig, device: torch.device) -> torch.autocast:
    """Return the autocast of the configured precision on a device."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(config.precision, device) == "bf16")


def resolve_device(name: str) -> torch.device:
    """Return the torch device called ``"auto"``, ``"cpu"``, ``"cuda"`` ...; raises ConfigError if it does not exist."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device of torch; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch finds no GPU; use device='cpu', or see `factorkit doctor`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but the last GPU is cuda:{torch.cuda.device_count() - 1}")
    return device


def peak_memory(device: Any) -> int:
    """Return the peak bytes so far: of the GPU's allocator, or of the process on a CPU."""
    import resource
    import sys

    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


# Settings of earlier versions: stored run folders and checkpoints are read under the names of today.


class _Changes(NamedTuple):
    names: dict[str, str]  # old name -> name of today
    values: dict[tuple[str, Any], Any]  # (name of today, old value) -> value of today
    removed: dict[str, Any]  # old name -> the only value that today's code still computes
    tensors: dict[str, str]  # old part of a tensor's dotted name -> part of today
    added: dict[str, Any]  # name -> the value that runs had before there was the setting
    unread: dict[str, tuple[str, Any]]  # name -> (name, value) of the only setting beside which it is read


_COMMON = {"decay": "lr_decay_fraction", "ema": "ema_decay", "ema_also": "extra_ema_decays"}  # of EngineConfig
_CHANGES: dict[str, _Changes] = {}
NO_CHANGES = _Changes({}, {}, {}, {}, {}, {})


def register_renamed_settings(
    models: Iterable[str],
    names: Mapping[str, str],
    values: Mapping[tuple[str, Any], Any] | None = None,
    removed: Mapping[str, Any] | None = None,
    tensors: Mapping[str, str] | None = None,
    added: Mapping[str, Any] | None = None,
    unread: Mapping[str, tuple[str, Any]] | None = None,
) -> None:
    """Declare which settings of a model have changed since runs were first stored.

    Args:
        models: values of ``model`` in the stored settings that the table applies to.
        names: old name -> new name.
        values: (new name, old value) -> new value.
        removed: settings that are gone, with the value that the code now always uses.
        tensors: old part of the dotted names of tensors -> new part.
        added: settings with another default than runs had before there was the setting -> what those runs had.
        unread: settings that runs stored but read only beside a value of another one -> (the other, its value).
    """
    changes = _Changes(
        dict(names), dict(values or {}), dict(removed or {}), dict(tensors or {}), dict(added or {}), dict(unread or {})
    )
    _CHANGES.update(dict.fromkeys(models, changes))


def migrate_settings(settings: dict[str, Any], source: object) -> dict[str, Any]:
    """Return stored settings under the names and values of this version; others are left as they are.

    Raises:
        CheckpointError: a removed setting has a value that this version cannot compute; ``source`` is named.
    """
    changes = _CHANGES.get(str(settings.get("model")), NO_CHANGES)
    migrated = dict(changes.added)
    for name, value in settings.items():
        if name in changes.removed:
            if value != changes.removed[name]:
                raise CheckpointError(
                    f"{source} was written with {name}={value!r} by an earlier factorkit; this version only supports "
                    f"{name}={changes.removed[name]!r}. Use the earlier version, or train again"
                )
            continue
        new = changes.names.get(name) or _COMMON.get(name, name)
        if new != name and new in settings:
            new = name
        if isinstance(value, (str, int, float, type(None))):
            value = changes.values.get((new, value), value)
        migrated[new] = value
    unread = {name for name, (other, value) in changes.unread.items() if migrated.get(other) != value}
    return {name: value for name, value in migrated.items() if name not in unread}


def migrate_tensor_names(tensors: Mapping[str, T], model: object) -> dict[str, T]:
    """Return the tensors of a stored model of this kind under the names of this version."""
    migrated = dict(tensors)
    for old, new in _CHANGES.get(str(model), NO_CHANGES).tensors.items():
        part = re.compile(rf"(?<![^.]){re.escape(old)}(?![^.])")
        migrated = {part.sub(new, name): tensor for name, tensor in migrated.items()}
    return migrated
