"""A task the loop can train in milliseconds: a two-layer net that denoises 8x8 arrays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from factorkit.engine.config import EngineConfig
from factorkit.engine.step import StepLoss
from factorkit.engine.trainer import Trainer

CPU = torch.device("cpu")


class ToyTask:
    """``hook(step, error)`` may raise signals, or answer another error, for the first micro-batch of a step."""

    def __init__(self, hook=lambda step, error: error, statistics: bool = True):
        torch.manual_seed(7)
        norm = nn.BatchNorm1d(16) if statistics else nn.Identity()
        self.model = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 16),
            norm,
            nn.ReLU(),
            nn.Dropout(0.1 if statistics else 0.0),
            nn.Linear(16, 64),
            nn.Unflatten(1, (8, 8)),
        )
        self.images = torch.randn(10, 8, 8)
        self.size, self.hook = 10, hook
        self.seen: list[tuple[int, list[int]]] = []
        self.inspected: list[int] = []

    def parameter_groups(self):
        slow = list(self.model[1].parameters())
        rest = [p for p in self.model.parameters() if not any(p is q for q in slow)]
        return [{"params": slow, "scale": 0.5}, {"params": rest, "scale": 1.0}]

    def loss(self, model: nn.Module, indices: Tensor, draw, step: Tensor) -> StepLoss:
        step = int(step)
        self.seen.append((step, indices.tolist()))
        clean, level = self.images[indices], draw.uniform()
        noisy = clean + level[:, None, None] * draw.normal(8, 8)
        error = self.hook(step, (model(noisy).float() - clean).square().mean((1, 2)))
        return StepLoss(error, error.detach(), level, {"spread": torch.stack([clean.mean(), clean.std()])})

    def inspect(self, model: nn.Module, step: int, folder: Path):
        assert not model.training and not torch.is_grad_enabled()
        self.inspected.append(step)
        return {"failures": ["toy"] if step == 4 else []}


@pytest.fixture
def toy(tmp_path):
    """``toy(steps=..., hook=..., ...)``: a Trainer of a fresh ToyTask in ``tmp_path/run``."""

    def make(
        *, folder="run", hook=None, statistics=True, stop_at=None, progress=False, report=None, **changes
    ) -> Trainer:
        task = ToyTask(statistics=statistics) if hook is None else ToyTask(hook, statistics)
        settings = {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "ema_decay": 0.9,
            "log_every": 2,
            "sample_every": 0,
        }
        config = EngineConfig(**{**settings, **changes})
        config.validate()
        options = {"device": CPU, "progress": progress, "stop_at": stop_at, "report": report}
        return Trainer(task, config, tmp_path / folder, {"toy": 1}, **options)

    return make
