"""Settings every model's training shares. A model's own configuration derives from this one."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from typeguard import TypeCheckError, check_type

from factorkit.utils.errors import ConfigError

MOST_STEPS = 1_000_000  # T of a noise schedule: it lies in memory, and a setting may come with a file


@dataclass(kw_only=True)
class EngineConfig:
    """Training settings common to all models."""

    steps: int = 50_000
    """Optimiser steps of the whole run."""
    batch_size: int = 128
    """Images a step, over all processes together."""
    micro_batch_size: int | None = None
    """Images in memory at once in each process; None means the process's whole share of the batch.
    Statistics over the batch, where a model has any, are then those of the piece."""
    learning_rate: float = 1e-4
    """Of Adam."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: float = 0.0
    """Last share of the steps, over which the learning rate falls along a line to 0 that is cut off at a tenth."""
    gradient_clip: float | None = None
    """Greatest norm of the gradient; None does not clip."""
    ema: float = 0.9999
    """Decay of the moving average of the weights, the one that segments and generates. After n steps it is
    (1+n)/(10+n), until that reaches this number."""
    ema_also: tuple[float, ...] = ()
    """Decays of further moving averages of the same training, each one more copy of the weights in memory and in every
    checkpoint; factorkit.load(run, weights=DECAY) takes one. One that is new on resuming begins there."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of activations, by autocast; weights, statistics and masks stay fp32."""
    seed: int = 0
    """Of the weights, the data order, time steps and noise."""
    device: str = "auto"
    """"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ..."""
    threads: int | None = None
    """CPU threads; None: torch's default, one a core. Small models run best on one: their operations are so short that
    on a machine with anything else to do, waiting for the second thread takes many times as long as the work."""
    cuda_graph: bool = True
    """Run the training step as one CUDA graph where it can be: on a GPU that holds the images, in a single process."""
    shard: bool = False
    """Hold of each weight, its average and Adam's moments only a part in each process (FSDP2), for models that do not
    fit on one GPU. The losses are the same; one process alone holds everything anyway."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept."""
    sample_every: int = 1000
    """Steps between sample sheets and label-free alarms; 0 only at the end."""
    stop_on_failure: bool = False
    """Stop where an alarm names a failure, instead of saying so and going on."""
    log_every: int = 50
    """Steps between lines of the log."""
    tensorboard: bool = False
    """Mirror the log for TensorBoard (needs the extra `tensorboard`)."""

    #: settings that may differ when a run is resumed: they change neither the model nor what it saw so far
    RESUMABLE = frozenset(
        {
            "steps",
            "device",
            "checkpoint_every",
            "keep_checkpoints",
            "sample_every",
            "log_every",
            "tensorboard",
            "stop_on_failure",
            "micro_batch_size",
            "threads",
            "cuda_graph",
            "ema_also",
            "shard",
        }
    )

    def validate(self) -> None:
        """Raise ConfigError for numbers that cannot work, naming the setting."""
        least = {
            "steps": 1,
            "batch_size": 1,
            "micro_batch_size": 1,
            "threads": 1,
            "warmup_steps": 0,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
            "sample_every": 0,
            "log_every": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if name in ("micro_batch_size", "threads") and value is None:
                continue
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} must be a whole number, at least {low}")
        for name in ("ema", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not all(0 <= decay <= 1 for decay in self.ema_also):
            raise ConfigError(f"ema_also={self.ema_also} must lie between 0 and 1")
        if len({self.ema, *self.ema_also}) != 1 + len(self.ema_also):
            raise ConfigError(f"ema_also={self.ema_also} must be decays that differ from ema={self.ema} and each other")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate} must be positive and finite")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ConfigError(f"gradient_clip={self.gradient_clip} must be positive, or None not to clip")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"precision={self.precision!r} is unknown; choose bf16 or fp32")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the step that follows ``step`` finished ones."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))
        tail = self.decay * self.steps
        if tail > 0 and step >= self.steps - tail:
            rate *= max(0.1, (self.steps - step) / tail)
        return rate

    def memory_advice(self, at_once: int) -> str:
        """What makes a step of ``at_once`` images need less memory, in words."""
        return "Make the step or the model smaller"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in config.json."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]):
        """The configuration behind :meth:`to_dict`.

        Raises:
            ConfigError: settings this version does not know, or values of another type than the setting's.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            near = ", ".join(sorted(known))
            raise ConfigError(f"unknown setting {', '.join(map(repr, unknown))} for {cls.__name__}; there are: {near}")
        values = {k: plain(v) for k, v in values.items()}
        types = get_type_hints(cls)
        for name, value in values.items():
            if isinstance(value, str) and "Literal" in str(types[name]):
                continue  # validate() knows the choices
            try:
                check_type(value, types[name])
            except TypeCheckError as error:
                raise ConfigError(f"{name}={value!r:.80}: {' '.join(str(error).split())}") from error
        return cls(**values)


def plain(value: Any) -> Any:
    """A setting as Python's own: whole numbers of numpy and torch as int, lists as tuples; all else as it is."""
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    if not isinstance(value, int):
        with contextlib.suppress(TypeError):
            return operator.index(value)
    return value


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let torch use ``count`` CPU threads meanwhile; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(name: str):
    """The torch device behind ``"auto"``, ``"cpu"``, ``"cuda"`` ... Raises ConfigError when it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is not a device torch knows; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name!r} is not one factorkit trains on; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but torch sees no GPU; use device='cpu', or see `factorkit doctor`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name!r}, but the last GPU torch sees is cuda:{torch.cuda.device_count() - 1}")
    return device
