from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch

from factorkit.engine.config import EngineConfig, cpu_threads, resolve_device, resolve_precision
from factorkit.utils.errors import ConfigError


def rates(config: EngineConfig) -> list[float]:
    return [config.learning_rate_at(step) for step in range(config.steps)]


def test_learning_rate_at_warms_up_and_decays_to_a_tenth():
    config = EngineConfig(steps=100, learning_rate=2.0, warmup_steps=10, lr_decay_fraction=0.4)
    found = rates(config)
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[10:61] == [2.0] * 51
    assert found[80] == pytest.approx(1.0)  # halfway down
    assert found[60:96] == pytest.approx([2.0 * (100 - i) / 40 for i in range(60, 96)])
    assert found[96:] == pytest.approx([0.2] * 4)


def test_learning_rate_at_default_is_constant():
    assert set(rates(EngineConfig(steps=20, learning_rate=3e-4))) == {3e-4}


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"steps": 5e4},
        {"batch_size": -1},
        {"micro_batch_size": 0},
        {"threads": 0},
        {"warmup_steps": -1},
        {"checkpoint_every": 0},
        {"keep_checkpoints": 0},
        {"sample_every": -5},
        {"log_every": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"learning_rate": float("inf")},
        {"gradient_clip": 0.0},
        {"gradient_clip": float("nan")},
        {"ema_decay": 1.5},
        {"ema_decay": float("nan")},
        {"lr_decay_fraction": -0.1},
        {"precision": "fp16"},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_validate_invalid_numbers_raise_and_name_the_setting(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=f"^{name}="):
        EngineConfig(**changes).validate()


def test_validate_smallest_values_are_accepted():
    EngineConfig(
        steps=1,
        batch_size=1,
        micro_batch_size=1,
        warmup_steps=0,
        checkpoint_every=1,
        keep_checkpoints=1,
        sample_every=0,
        log_every=1,
        ema_decay=0.0,
        lr_decay_fraction=1.0,
        gradient_clip=1e-9,
    ).validate()
    EngineConfig().validate()


def test_from_dict_derived_configuration_survives_json():
    @dataclass(kw_only=True)
    class Derived(EngineConfig):
        channel_mult: tuple[int, ...] = (1, 2)

    config = Derived(steps=7, channel_mult=(3, 4, 5), gradient_clip=0.5)
    back = Derived.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config and isinstance(back.channel_mult, tuple)


def test_from_dict_unknown_setting_raises_and_lists_known_ones():
    with pytest.raises(ConfigError, match=r"'stepz'.*EngineConfig.*steps"):
        EngineConfig.from_dict({"stepz": 3})


def test_resumable_names_are_settings():
    assert {f.name for f in dataclasses.fields(EngineConfig)} >= EngineConfig.RESUMABLE


@pytest.mark.parametrize("name", ["quantum", "cpu:x", "meta", "cuda:99"])
def test_resolve_device_missing_device_raises(name):
    with pytest.raises(ConfigError, match=name):
        resolve_device(name)


def test_resolve_device_known_names_are_resolved():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_cpu_threads_restores_the_number():
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), cpu_threads(before + 1):  # noqa: PT012 (the count inside is part of it)
        assert torch.get_num_threads() == before + 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("capabilities", "vectors", "expected"),
    [
        ({"avx2": True, "avx512_f": True}, "AVX512", "fp32"),
        ({"avx512_bf16": True}, "AVX512", "bf16"),
        ({"amx_bf16": True}, "AVX512", "bf16"),
        ({}, "AVX512", "bf16"),
        ({}, "AVX2", "fp32"),
    ],
)
def test_resolve_precision_auto_on_a_cpu_needs_bf16_instructions(monkeypatch, capabilities, vectors, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    assert resolve_precision("auto", torch.device("cpu")) == expected
    assert resolve_precision("auto", torch.device("cuda")) == "bf16"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"
    assert resolve_precision("fp32", torch.device("cuda")) == "fp32"
