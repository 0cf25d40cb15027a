"""A tiny trained run, and fixtures that call the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from factorkit.cli.main import main
from factorkit.metrics.baselines import BASELINES, all_foreground
from tests.data.flower_folder import write_flowers

SMALL = {
    "resolution": 16,
    "regions": 2,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "norm_groups": 4,
    "mixture_steps": 1,
    "distil_steps": 1,
    "steps": 4,
    "batch_size": 4,
    "log_every": 1,
    "sample_every": 0,
}


@pytest.fixture(scope="session")
def small() -> dict:
    """Settings of a tiny training."""
    return SMALL


@pytest.fixture(scope="session")
def flags():
    """flags(**changes): a tiny training as flags, over the preset demo."""
    return tiny_training


def tiny_training(**changes) -> list[str]:
    values = {key: value for key, value in (SMALL | changes).items() if value != ()}
    words = ["train", "segdiff", "--preset", "demo"]
    for key, value in values.items():
        words += [f"--{key.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def make_quick(patch: pytest.MonkeyPatch) -> None:
    """Skip GrabCut, which takes half a second per image."""
    patch.setitem(BASELINES, "grabcut", all_foreground)
    patch.setenv("OMP_NUM_THREADS", "1")  # For subprocesses.


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_quick(monkeypatch)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Give each test its own cache and working folder."""
    monkeypatch.setenv("FACTORKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))


@pytest.fixture
def run_cli(capsys):
    """run_cli(*words): exit code, standard output, standard error."""

    def run(*words) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def run_json(run_cli):
    """run_json(*words): the JSON object, which must be the only line on standard output."""

    def run(*words) -> dict:
        code, out, err = run_cli(*words, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


@pytest.fixture
def run_refused(run_cli):
    """run_refused(*words): the message of a usage error, which must be equal in text and in JSON."""

    def run(*words) -> str:
        code, out, err = run_cli(*words, "--json")
        assert code == 2 and "Traceback" not in err
        message = json.loads(out)["error"]
        assert f"error: {message}" in err
        return message

    return run


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A data set of 24 drawn flowers with masks."""
    return write_flowers(tmp_path_factory.mktemp("data") / "photos", 24, 20, seed=1)


@pytest.fixture(scope="session")
def run(photos, tmp_path_factory) -> Path:
    """A run trained on them for 4 steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        patch.setenv("FACTORKIT_CACHE", str(folder.parent / "cache"))
        assert main([*tiny_training(), "--data", str(photos), "--out", str(folder)]) == 0
    return folder
