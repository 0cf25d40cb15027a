"""The doctor's report: complete if packages are missing or broken, and correct about the supported GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from factorkit.cli import doctor

KEYS = {"factorkit", "python", "cpu", "torch", "driver", "gpus", "extension", "optional", "ops", "problems"}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    """Shadow any module of that name by one with this source."""
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setitem(sys.modules, name, None)  # monkeypatch then restores the previous state at the end
    monkeypatch.delitem(sys.modules, name)


def find_problem(report: dict, start: str) -> dict:
    result = [entry for entry in report["problems"] if entry["what"].startswith(start)]
    assert len(result) == 1, (start, report["problems"])
    return result[0]


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], targets: list[str]) -> None:
    """A machine with one GPU, and an extension built for these targets; none means built without CUDA."""
    built = {"version": None, "compiler": "gcc", "simd": "avx2", "cuda": bool(targets), "cuda_targets": targets}
    built["cuda_version"] = "13.0" if targets else None
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: None)
    monkeypatch.setitem(sys.modules, "factorkit._C", SimpleNamespace(build_info=lambda: built, cuda_devices=lambda: []))
    gpu = doctor._gpu("Fast GPU", capability, 80 * 2**30)
    monkeypatch.setattr(doctor, "_gpus", lambda torch, extension: ([gpu], None))
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def keep_packages(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Report on these optional packages alone: importing all of them takes seconds."""
    monkeypatch.setattr(doctor, "OPTIONAL", {name: doctor.OPTIONAL[name] for name in names})


@pytest.fixture
def few_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_packages(monkeypatch, "triton", "tinycudann", "viser")


@pytest.mark.slow
def test_report_has_all_keys_and_is_json():
    report = doctor.report()
    assert set(report) == KEYS
    assert json.loads(json.dumps(report)) == report
    assert report["torch"]["version"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["simd"] and report["cpu"]["logical"] >= 1
    assert set(report["optional"]) == set(doctor.OPTIONAL)
    text = doctor.format_report(report)
    for entry in report["problems"]:
        assert entry["what"] in text and entry["costs"] in text and entry["cure"] in text


def test_report_distinguishes_missing_and_broken_packages(monkeypatch, tmp_path):
    keep_packages(monkeypatch, "triton", "viser", "tinycudann", "tensorboard", "cv2", "gradio")
    monkeypatch.setitem(sys.modules, "viser", None)  # Python's marker for a missing module
    install(monkeypatch, tmp_path, "tinycudann", "raise OSError('no CUDA driver\\nlong story')")
    install(monkeypatch, tmp_path, "tensorboard", "raise SystemExit('goodbye')")
    install(monkeypatch, tmp_path, "cv2", "import a_library_that_is_not_there")
    install(monkeypatch, tmp_path, "gradio", "__version__ = '7.8'")

    report = doctor.report()
    parts = report["optional"]
    assert parts["viser"] == {"state": "missing", "version": None, "cause": None}
    assert parts["tinycudann"] == {"state": "broken", "version": None, "cause": "OSError: no CUDA driver"}
    assert parts["tensorboard"]["cause"] == "SystemExit: goodbye"
    assert parts["cv2"]["state"] == "broken" and "a_library_that_is_not_there" in parts["cv2"]["cause"]
    assert parts["gradio"] == {"state": "ok", "version": "7.8", "cause": None}
    assert find_problem(report, "tinycudann")["what"] == "tinycudann is broken (OSError: no CUDA driver)"
    assert "[viewer]" in find_problem(report, "viser")["cure"]
    assert not any("gradio" in entry["what"] for entry in report["problems"])
    assert "broken: OSError: no CUDA driver" in doctor.format_report(report)


def test_report_with_everything_broken_is_complete(monkeypatch, few_packages):
    def fail(*args, **kwargs):
        raise RuntimeError("no way")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    monkeypatch.setattr(doctor.importlib.metadata, "version", fail)
    monkeypatch.setattr(doctor.subprocess, "run", fail)
    monkeypatch.setattr(doctor.Path, "read_text", fail)

    report = doctor.report()
    assert set(report) == KEYS
    assert report["torch"]["state"] == report["extension"]["state"] == "broken"
    assert report["torch"]["cause"] == "RuntimeError: no way"
    assert find_problem(report, "torch is broken")["costs"] == "nothing works without it"
    assert "unknown" in doctor.format_report(report)


@pytest.mark.slow
def test_report_suppresses_output_of_imports(monkeypatch, tmp_path, capsys, few_packages):
    install(monkeypatch, tmp_path, "viser", "print('welcome!')")
    assert doctor.report()["optional"]["viser"]["state"] == "ok"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("targets", "capability", "expected"),
    [
        (["sm_80", "sm_90", "compute_90"], (9, 0), "machine code"),
        (["sm_80", "sm_90", "compute_90"], (8, 6), "machine code"),  # a later minor version runs it
        (["sm_86"], (8, 0), "no"),  # an earlier one does not
        (["sm_80"], (9, 0), "no"),  # nor does another major one
        (["sm_80", "sm_90", "compute_90"], (10, 0), "PTX"),
        (["sm_80", "sm_90", "compute_90"], (12, 0), "PTX"),
        (["sm_80", "sm_90", "compute_90"], (7, 5), "no"),
        (["compute_80", "sm_90"], (9, 0), "machine code"),  # The better of the two is chosen in any order.
        (["sm_90a"], (9, 0), "machine code"),
        (["sm_100a", "compute_100a"], (10, 3), "no"),
        (["sm_100f"], (10, 3), "machine code"),
        (["compute_100f"], (12, 0), "no"),
        ([], (9, 0), "no"),
    ],
)
def test_coverage_of_targets_and_capability(targets, capability, expected):
    assert doctor.coverage(targets, capability) == expected


def test_report_gpu_not_covered_names_cure(monkeypatch, few_packages):
    fake_gpu(monkeypatch, (12, 0), ["sm_90"])
    report = doctor.report()
    assert report["gpus"][0]["covered"] == "no" and report["gpus"][0]["bf16"]
    assert "FACTORKIT_CUDA_ARCHS=sm_120 " in find_problem(report, "factorkit._C has no code")["cure"]
    assert "Fast GPU, capability 12.0, 80.0 GiB" in doctor.format_report(report)


def test_report_gpu_covered_has_no_problem(monkeypatch, few_packages):
    fake_gpu(monkeypatch, (9, 0), ["sm_90", "compute_90"])
    report = doctor.report()
    assert not any("GPU" in entry["what"] or "_C" in entry["what"] for entry in report["problems"])
    assert "CUDA 13.0 for sm_90 compute_90" in doctor.format_report(report)


def test_report_extension_without_cuda_names_nvcc(monkeypatch, few_packages):
    fake_gpu(monkeypatch, (9, 0), [])
    assert "nvcc" in find_problem(doctor.report(), "factorkit._C has no CUDA code")["cure"]


def test_report_torch_without_cuda_names_cure(monkeypatch, few_packages):
    monkeypatch.setattr(doctor, "_driver", lambda: "580.65.06")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find_problem(doctor.report(), "there is an NVIDIA GPU")["cure"] == "install a CUDA build of torch"


def test_report_unusable_driver_names_cause(monkeypatch):
    def cuda_devices():
        raise RuntimeError("the driver supports CUDA 11.4, this build needs 13.0")

    extension = SimpleNamespace(cuda_devices=cuda_devices)
    assert doctor._gpus(None, extension) == ([], "RuntimeError: the driver supports CUDA 11.4, this build needs 13.0")


def test_report_extension_of_other_version_is_broken(monkeypatch, few_packages):
    extension = SimpleNamespace(build_info=lambda: {"version": "0.0.1"}, cuda_devices=lambda: [])
    monkeypatch.setitem(sys.modules, "factorkit._C", extension)
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.1.0")
    assert find_problem(doctor.report(), "factorkit._C")["what"].endswith(
        "(built for factorkit 0.0.1, installed is 0.1.0)"
    )


def test_report_ops_name_forced_reference(monkeypatch, few_packages):
    from factorkit import ops

    monkeypatch.delenv("FACTORKIT_REFERENCE", raising=False)
    assert doctor.report()["ops"] == ops.IMPLEMENTATIONS
    monkeypatch.setenv("FACTORKIT_REFERENCE", "1")
    forced = doctor.report()["ops"]
    assert set(forced) == set(ops.IMPLEMENTATIONS) and all("forced" in how for how in forced.values())


def test_commit_is_of_own_checkout_only(monkeypatch, tmp_path):
    (tmp_path / "venv").mkdir()
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path / "factorkit")
    assert doctor._commit() == "unknown"

    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    assert doctor._commit() == head
    (tmp_path / "file").write_text("two")
    assert doctor._commit() == f"{head}-dirty"
    # An installed copy inside another checkout does not belong to that commit.
    monkeypatch.setattr(doctor, "PACKAGE", tmp_path / "venv" / "factorkit")
    assert doctor._commit() == "unknown"
