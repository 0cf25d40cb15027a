"""What three processes generate, score, segment and render together is what one does alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from factorkit.utils import distributed
from factorkit.utils.errors import ConfigError
from tests.engine.trained import run_script


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return run_script(Path(__file__).with_name("process_commands.py"), tmp_path_factory.mktemp("commands"), timeout=240)


def read_output(results: Path, world: int, name: str) -> dict:
    """What process 0 printed; the others say nothing."""
    assert all(not (results / f"{world}/{name}.{rank}.txt").read_text() for rank in range(1, world))
    return json.loads((results / f"{world}/{name}.0.txt").read_text().replace(str(results / str(world)), "OUT"))


def assert_alike(one, other) -> None:
    """Numbers to rounding, everything else exactly."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"seconds", "stamp", "time"}:
            assert_alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-3)
    else:
        assert one == other


@pytest.mark.parametrize("name", ["generate", "few", "evaluate", "segment", "again", "render", "sample", "pose"])
@pytest.mark.slow
def test_commands_in_three_processes_print_once(results, name):
    assert_alike(read_output(results, 1, name), read_output(results, 3, name))


@pytest.mark.parametrize(
    ("name", "count"), [("generate", 67), ("few", 2), ("segment", 6), ("render", 4), ("sample", 5)]
)
@pytest.mark.slow
def test_commands_in_three_processes_write_the_same_files(results, name, count):
    alone, together = (results / f"{world}/{name}" for world in (1, 3))
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in together.iterdir())
    assert sum(name.endswith(".png") for name in names) >= count
    for path in alone.glob("*.png"):
        one, other = (np.asarray(Image.open(p)).astype(int) for p in (path, together / path.name))
        apart = abs(one - other)
        assert one.shape == other.shape and (apart > 1).mean() < 2e-3, (path.name, apart.max())


@pytest.mark.slow
def test_segment_in_three_processes_handles_each_image_once(results):
    lines = [json.loads(line) for line in (results / "3/segment/segments.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines if "files" in line) == [f"{i}.png" for i in (0, 1, 2, 4, 5, 6)]
    assert [read_output(results, world, "again")["already"] for world in (1, 3)] == [6, 6]
    found = [json.loads((results / f"{world}/segment/annotations.json").read_text()) for world in (1, 3)]
    assert_alike(*found)


@pytest.mark.slow
def test_segment_write_error_in_one_process_ends_all(results):
    """The exit codes are 1 (process_commands.py); what the other process finished counts the next time."""
    assert "No space left on device" in (results / "stderr.txt").read_text()
    assert all("No space left" in (results / f"lost.{rank}.txt").read_text() for rank in (0, 1))
    left = sorted(path.name for path in (results / "lost").glob("*_labels.png"))
    assert left == [f"{i}_labels.png" for i in (0, 2, 4, 6)]


def test_map_shares_single_process_runs_the_work_unchanged():
    rows = torch.arange(5)
    assert torch.equal(distributed.map_shares(lambda share: {"a": [rows[share]]}, 5)["a"][0], rows)
    assert distributed.gather_results(lambda: 3) == [3] and distributed.run_on_first(lambda: 4) == 4
    with pytest.raises(ConfigError, match="mine"):
        distributed.gather_results(lambda: (_ for _ in ()).throw(ConfigError("mine")))
