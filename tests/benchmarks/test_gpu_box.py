"""The command for a machine with a GPU, with a fake device and fake stages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import factorkit
from benchmarks import gpu_box, gpu_install, nerfdiff
from benchmarks.contenders import REGION_OPS
from benchmarks.gpu_box import read_rows, run_stage, run_stages
from benchmarks.gpu_stages import SANITIZER_STAGES, Stage, gpu_stages
from benchmarks.gpu_table import camera_line, tables
from benchmarks.recording import read_results
from benchmarks.rendering_cases import RENDERING_OPS
from benchmarks.step_profile import summarise

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "Fake 9000", "commit": "abc", "sources": "123"}
APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\n')"
SCORES = {"psnr": 30.0, "rotation_median_deg": 1.0, "encoder_rotation_median_deg": 2.0, "psnr_encoder": 20.0}
ROWS = [
    {"name": "ceilings", "copy_gb_s": 2.0, "matrix_tflop_s": 1.0, "convolution_tflop_s": 0.5},
    {"name": "test_region_op[cuda-region_pool-ours-both]", "median_ms": 2.0, "bytes": 2_000_000},
    {"name": "test_region_op[cuda-region_pool-compiled-both]", "median_ms": 3.0},
    {"name": "test_rendering_op[cuda-composite packed-ours-forward]", "median_ms": 1.0},
    {"name": "test_rendering_op[cuda-composite packed-nerfacc-forward]", "median_ms": 4.0},
    {"name": "test_segdiff_step[cuda-thesis-graph]", "median_ms": 10.0, "images": 5, "peak_bytes": 3e9},
    {"name": "test_segdiff_step[cuda-thesis-reference]", "median_ms": 25.0, "images": 5, "peak_bytes": 6e9},
    {
        "name": "demo",
        "seconds": 9,
        "stage_seconds": {"search": 5},
        "scores": {"psnr": 30.0, "rotation_median_deg": 1.0},
    },
    {"name": "profile graph", "launches": 7, "waits": 0, **summarise([("a", 0, 10), ("b", 5, 20), ("a", 30, 31)])},
]


def stage(name: str, *rows: object, then: str = "", limit_s: int = 20) -> Stage:
    text = "\n".join(json.dumps(row) for row in rows)
    return Stage(name, limit_s, ("{python}", "-c", f"{APPEND}\n{then}", "{output}", text))


def test_stages_that_fail_or_hang_do_not_stop_the_next(tmp_path):
    results, out = tmp_path / "results" / "gpu.json", tmp_path / "out"
    results.parent.mkdir()
    stages = [
        stage("dies", {"name": "first"}, then="print('the cause', flush=True); import os; os.abort()"),
        stage("hangs", {"name": "second"}, then="import time; time.sleep(60)", limit_s=2),
        Stage("missing", 5, ("no-such-program",)),
        stage("works", {"name": "third"}),
    ]
    assert run_stages(stages, MACHINE, results, out) == 3
    (record,) = read_results(results).values()
    states = {name: result["status"] for name, result in record["stages"].items()}
    assert states["dies"] == "failed with exit code -6" and states["hangs"] == "stopped at its limit of 2 s"
    assert states["missing"].startswith("failed: ") and states["works"] == "passed"
    names = [row["name"] for result in record["stages"].values() for row in result["rows"]]
    assert names == ["first", "second", "third"]
    assert "the cause" in record["stages"]["dies"]["output_tail"]
    assert (out / "gpu.json").read_text() == results.read_text() and "the cause" in (out / "dies.log").read_text()


def test_stage_at_its_limit_ends_with_its_children(tmp_path):
    child = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    run_stage(stage("parent", then=f"{child}\nimport time; time.sleep(60)", limit_s=3), tmp_path)
    pid = int((tmp_path / "parent.log").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_half_finished_results_are_resumed(tmp_path, capsys):
    results, out = tmp_path / "gpu.json", tmp_path / "out"
    assert run_stages([stage("one", {"run": 1}), stage("two", then="sys.exit(3)")], MACHINE, results, out) == 1
    assert run_stages([stage("one", {"run": 2}), stage("two", {"run": 2})], MACHINE, results, out) == 0
    (record,) = read_results(results).values()
    assert [result["rows"] for result in record["stages"].values()] == [[{"run": 1}], [{"run": 2}]]
    assert "one: passed before" in capsys.readouterr().out
    run_stages([stage("one", {"run": 3})], MACHINE, results, out, again=True)
    run_stages([stage("one", {"run": 4})], MACHINE | {"sources": "456"}, results, out)
    assert [r["stages"]["one"]["rows"][0]["run"] for r in read_results(results).values()] == [3, 4]


def test_damaged_results_are_set_aside(tmp_path, capsys):
    results = tmp_path / "gpu.json"
    results.write_text('{"half')
    assert run_stages([stage("one")], MACHINE, results, tmp_path / "out") == 0
    assert (tmp_path / "gpu.damaged.json").read_text() == '{"half' and len(read_results(results)) == 1
    assert "is not JSON; it was renamed to" in capsys.readouterr().out


def test_line_that_a_kill_cut_off_is_left_out(tmp_path):
    (tmp_path / "rows").write_text('{"a": 1}\n{"a": 2')
    assert read_rows(tmp_path / "rows") == [{"a": 1}] and read_rows(tmp_path / "absent") == []


def test_limits_of_the_real_stages_sum_to_less_than_nine_minutes():
    stages = gpu_stages("cuda", None, None, Path("lego"))
    assert sum(s.limit_s for s in stages) < 540 and len({s.name for s in stages}) == len(stages)
    assert sum(s.limit_s for s in SANITIZER_STAGES) <= 540


def test_real_stages_name_modules_and_files_that_exist():
    for part in [*gpu_stages("cuda", "flowers64", 64, None), *SANITIZER_STAGES]:
        words = part.command[part.command.index("{python}") :]
        module = words[2]
        assert importlib.util.find_spec(module) is not None
        assert module != "pytest" or all((ROOT / word).exists() for word in words if "/" in word and "{" not in word)


def test_suite_stages_select_benchmarks_of_their_device():
    pytest.importorskip("pytest_benchmark")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--collect-only", "-q"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    counts = {}
    for part in gpu_stages("cpu", None, None, None):
        if "--benchmark-only" in part.command:
            expression, file = part.command[part.command.index("-k") + 1], part.command[3]
            counts[part.name] = sum(matches(expression, name) for name in names if name.startswith(file))
    assert min(counts.values()) > 0 and set(counts) == {
        "steps",
        "region-ops",
        "rendering-ops",
        "step-peers",
        "op-peers",
    }
    assert counts["region-ops"] == 2 * len(REGION_OPS) and counts["rendering-ops"] == 2 * len(RENDERING_OPS)


def matches(expression: str, name: str) -> bool:
    """Evaluate pytest's -k, whose words are parts of names."""
    return eval(re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda word: str(word[0] in name), expression))


def test_tables_show_rates_ratios_and_every_stage():
    stages = {
        "second": {"started": 5, "status": "stopped at its limit of 9 s", "seconds": 9, "rows": []},
        "third": {"started": 3, "status": "passed", "seconds": 1, "rows": ROWS},
    }
    for row in ROWS:
        if "median_ms" in row:
            row |= {"q1_ms": row["median_ms"], "q3_ms": row["median_ms"], "group": ""}
    text = tables({"key": {"machine": MACHINE, "stages": stages}})
    assert "Fake 9000" in text and "| third | passed | 1 |\n| second | stopped at its limit of 9 s | 9 |" in text
    assert "| region_pool | both | 2 ms (2 to 2) | 1 | 50% | - | 1.50x | - |" in text
    assert "| composite packed | forward | 1 ms (1 to 1) | - | - | - | - | nerfacc 4.00x |" in text
    assert "segdiff_step[cuda-thesis-reference] | 25 ms (25 to 25) | 200.0 | 6.00 | 2.50x |" in text
    assert "demo: 9 s (search 5 s), 30.00 dB, 1.00 degrees" in text
    assert "profile graph: busy 0.021 ms, gaps 0.01 ms, 7 launches, 0 waits" in text
    assert tables({}) == "nothing was measured yet"


def test_command_runs_stages_of_a_fake_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_box, "RESULTS", tmp_path / "gpu.json")
    monkeypatch.setattr(gpu_box, "describe_machine", lambda device: MACHINE)
    monkeypatch.setattr(gpu_box, "gpu_stages", lambda *at: [stage("one", *ROWS[:1]), stage("two", then="sys.exit(1)")])
    assert gpu_box.main(["--out", str(tmp_path / "out")]) == 1
    assert gpu_box.main(["--out", str(tmp_path / "out"), "--only", "one"]) == 0
    assert "copy 2.0 GB/s" in capsys.readouterr().out.split("one: passed before")[1]
    with pytest.raises(SystemExit):
        gpu_box.main(["--only", "three"])
    assert "--only three: no such stage; choose from one, two" in capsys.readouterr().err


def test_wheels_of_installed_packages_are_not_installed_again(tmp_path):
    for name in ("pytest-9.0-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert [path.name for path in gpu_install.missing_wheels(tmp_path)] == ["no_such_package-1.0-py3-none-any.whl"]


def test_cameras_stage_parses_and_stores_its_record(tmp_path, monkeypatch):
    rows, run = tmp_path / "rows", tmp_path / "run"
    (part,) = [s for s in gpu_stages("cpu", None, None, None) if s.name == "cameras"]
    words = [str(rows) if word == "{output}" else word for word in part.command[3:]]
    monkeypatch.setattr(sys, "argv", ["nerfdiff", *words, "--out", str(run)])
    monkeypatch.setattr(nerfdiff, "views_of", lambda args: ([], []))
    log = '{"event": "train", "seconds": 1.5}\n{"event": "alarms", "failures": []}\n'

    def train(views, out, preset, progress, **settings):
        for folder in (out / "stages" / "search", out):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.jsonl").write_text(log)
        assert settings["resolution"] == 128 and settings["device"] == "cpu"
        return SimpleNamespace(evaluate=lambda *at, **more: SCORES, config=SimpleNamespace(threads=1))

    monkeypatch.setattr(factorkit, "train_nerfdiff", train)
    before = nerfdiff.RESULTS.read_bytes()
    nerfdiff.main()
    (row,) = read_rows(rows)
    assert row["stage_seconds"] == {"search": 1.5, "last": 1.5} and nerfdiff.RESULTS.read_bytes() == before
    assert "30.00 dB, 1.00 degrees" in camera_line(row)
