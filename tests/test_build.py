"""The installed package, its compiled module, and the builds of setup.py."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import factorkit

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
HAS_NVCC = shutil.which("nvcc") is not None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that a build reads, so that the test changes neither the checkout nor its installation."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("factorkit", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that does not optimise, in a sixth of the time: the tests compute nothing with what it builds."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def wheel(source: Path, quick_compiler: str) -> Path:
    """Build a wheel without CUDA."""
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    result = run(command, source, FACTORKIT_CUDA="0", CXX=quick_compiler)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (source / "out").glob("*.whl")
    return path


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FACTORKIT_")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=settings | environment, capture_output=True, text=True)


def import_from(folder: Path) -> dict:
    """Return build_info() of the factorkit._C in this folder, from a fresh process, with its file and its devices."""
    code = (
        "import json, factorkit._C as extension;"
        "more = {'file': extension.__file__, 'devices': extension.cuda_devices()};"
        "print(json.dumps(extension.build_info() | more))"
    )
    result = run(["-c", code], folder)
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert Path(info["file"]).is_relative_to(folder)
    return info


def test_versions_of_package_module_and_metadata_agree():
    declared = re.search(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
    assert importlib.metadata.version("factorkit") == declared
    assert importlib.import_module("factorkit._C").build_info()["version"] == declared
    assert factorkit.__version__ == declared


def test_compiled_module_build_info_is_complete():
    extension = importlib.import_module("factorkit._C")
    info = extension.build_info()
    assert set(info) == {"version", "compiler", "simd", "cuda", "cuda_version", "cuda_targets"}
    assert re.match(r"(gcc|clang) \d+", info["compiler"])
    assert info["simd"] in {"avx512", "avx2", "sse2", "neon", "scalar"}
    assert info["cuda"] == bool(info["cuda_targets"]) == (info["cuda_version"] is not None)
    if not info["cuda"]:
        assert extension.cuda_devices() == []


@pytest.mark.gpu
def test_compiled_module_lists_the_gpus_of_torch():
    import torch

    extension = importlib.import_module("factorkit._C")
    if not (torch.cuda.is_available() and extension.build_info()["cuda"]):
        pytest.skip("needs a CUDA device and factorkit._C built with CUDA")
    devices = [(device["name"], device["capability"], device["memory_bytes"]) for device in extension.cuda_devices()]
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    assert devices == [(device.name, (device.major, device.minor), device.total_memory) for device in properties]


def test_simd_level_matches_the_processor():
    try:
        flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    if flags is None:
        pytest.skip("needs the flags of an x86 processor in /proc/cpuinfo")
    flags = flags[1].split()
    expected = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "sse2"
    assert importlib.import_module("factorkit._C").build_info()["simd"] == expected


def test_kernels_are_imported_from_the_folder_beside_the_package():
    kernels = importlib.import_module("factorkit.kernels")
    assert kernels.__name__ == "factorkit.kernels"
    assert Path(kernels.__file__).parent == ROOT / "kernels"


@pytest.mark.slow
def test_wheel_contains_kernels_and_compiled_module(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "factorkit").rglob("*.py")}
    modules |= {f"factorkit/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert [name for name in names if re.fullmatch(r"factorkit/_C\..*\.so", name)]
    assert {name.split("/")[0] for name in names} == {"factorkit", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}

    info = import_from(tmp_path)
    assert not info["cuda"] and info["cuda_targets"] == info["devices"] == []


@pytest.mark.slow
def test_source_archive_contains_every_build_input(source, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    result = run(["-c", code], source)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    csrc = {f"csrc/{file.name}" for file in (ROOT / "csrc").iterdir()}
    assert csrc | {"setup.py", "pyproject.toml", "kernels/__init__.py", "factorkit/ops/__init__.py"} <= names


@pytest.mark.slow
def test_rebuild_after_a_change_compiles_only_dependents(wheel, source):
    import ninja

    (folder,) = (source / "build").glob("csrc-*")

    def pending() -> set[str]:
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-n", "-v"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return set(re.findall(r" -c \S*?(\w+\.cpp) ", output))

    assert pending() == set()
    (source / "csrc" / "system_cpu.cpp").touch()
    assert pending() == {"system_cpu.cpp"}
    (source / "csrc" / "system.h").touch()
    assert pending() == {"system_cpu.cpp", "bindings.cpp"}


@pytest.mark.slow
@pytest.mark.skipif(not HAS_NVCC, reason="needs nvcc")
def test_cuda_build_imports_without_a_gpu(wheel, source, quick_compiler, tmp_path):
    settings = {"FACTORKIT_CUDA": "1", "FACTORKIT_CUDA_ARCHS": "sm_90 compute_90", "CXX": quick_compiler}
    settings["NVCC_APPEND_FLAGS"] = "-Xcicc=-O0 -Xptxas=-O0"  # csrc/test_cuda_compiles.py compiles optimised kernels
    result = run(["setup.py", "-q", "build_ext", "-b", str(tmp_path)], source, **settings)
    assert result.returncode == 0, result.stdout + result.stderr
    # The wheel was built without CUDA; its objects are taken over.
    assert "march_cuda.cu -o" in result.stdout and "composite_cpu.cpp -o" not in result.stdout
    info = import_from(tmp_path)
    assert info["cuda"] and info["cuda_targets"] == ["sm_90", "compute_90"]
    assert re.fullmatch(r"\d+\.\d+", info["cuda_version"])
    assert isinstance(info["devices"], list)
    if info["devices"]:
        return
    code = "import factorkit._C as c; c.intersect_cuda('float32', [0] * 4, 1, [0.0] * 3, [1.0] * 3, 0)"
    process = run(["-c", code], tmp_path)
    assert re.search(r"RuntimeError: launching intersect on CUDA: \w+", process.stderr), process.stderr


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"FACTORKIT_CUDA": "1"}, r"there is no nvcc in CUDA_HOME \(.*\)\. Install the CUDA toolkit"),
        ({"FACTORKIT_CUDA": "yes"}, r"FACTORKIT_CUDA=yes means nothing; set it to 0"),
    ],
)
def test_build_impossible_setting_ends_with_a_message(source, tmp_path, settings, sentence):
    result = run(["setup.py", "-q", "build_ext", "-b", str(tmp_path)], source, CUDA_HOME=str(tmp_path), **settings)
    assert result.returncode != 0
    assert re.search("error: .*" + sentence, result.stderr)
    assert "Traceback" not in result.stderr


def test_build_unknown_target_ends_with_a_message(source, tmp_path):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    settings = {"CUDA_HOME": str(tmp_path), "FACTORKIT_CUDA_ARCHS": "sm_80,9.0"}
    result = run(["setup.py", "-q", "build_ext", "-b", str(tmp_path)], source, **settings)
    assert result.returncode != 0
    assert "FACTORKIT_CUDA_ARCHS has '9.0'; name targets like sm_90" in result.stderr
