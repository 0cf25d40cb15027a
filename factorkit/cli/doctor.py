"""``factorkit doctor``: report what is installed, what it runs on, and what is missing.

The report never fails: each part is examined by itself, and a broken one is reported with its cause.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factorkit.cli.base import Command, Result

PACKAGE = Path(__file__).resolve().parents[1]

#: Optional packages by import name: what is lost without the package, and how to get it.
OPTIONAL = {
    "triton": (
        "the fused kernels on a GPU run as plain PyTorch; on a CPU nothing is lost",
        "it comes with a CUDA build of torch; by itself: pip install 'triton>=3.6' (Linux)",
    ),
    "tinycudann": (
        "no tiny-cuda-nn fields; factorkit never requires it",
        "build it on a machine with nvcc, as its repository (NVlabs/tiny-cuda-nn) describes",
    ),
    "av": ("no videos are read or written", "pip install -e '.[video]' in the source checkout"),
    "skimage": ("no meshes are exported", "pip install -e '.[mesh]' in the source checkout"),
    "viser": ("no interactive viewer", "pip install -e '.[viewer]' in the source checkout"),
    "gradio": ("no page to drop photos on", "pip install -e '.[app]' in the source checkout"),
    "tensorboard": (
        "no TensorBoard log; log.jsonl and report.html are always written",
        "pip install -e '.[tensorboard]' in the source checkout",
    ),
    "sklearn": ("no colour 2-means baselines", "pip install -e '.[baselines]' in the source checkout"),
    "cv2": ("no GrabCut baseline", "pip install -e '.[baselines]' in the source checkout"),
}
REINSTALL = "pip install -e . in the source checkout; if it fails, its last lines name the cause"


@dataclass(kw_only=True)
class Doctor(Command):
    """Report what is installed, what it runs on, what is missing, what that costs, and how to get it."""

    def execute(self) -> Result:
        """Check the installation."""
        data = report()
        return data, format_report(data)


def report() -> dict[str, Any]:
    """Collect the state of this installation and machine, ready for JSON. Never raises.

    Returns:
        A dict; unknown values are None.

        - ``factorkit``: version, commit (``git describe`` of a source checkout, else "unknown"), location
        - ``python``: version, platform
        - ``cpu``: model, cores (physical), logical (usable by this process), threads (of torch), simd, bf16 (in
          hardware)
        - ``torch``, ``extension`` (``factorkit._C``) and each entry of ``optional``: state ("ok", "missing" or
          "broken"), version, cause (if broken); torch also cuda; the extension also compiler, cuda, cuda_version,
          cuda_targets
        - ``driver``: version of the NVIDIA driver
        - ``gpus``: name, capability [major, minor], memory_gib, bf16, and covered (see :func:`coverage`) of each
        - ``ops``: the implementation of each operation
        - ``problems``: what, costs and cure of everything that is missing or broken
    """
    torch, torch_part = _probe("torch")
    extension, extension_part = _probe("factorkit._C")
    optional = {name: _probe(name)[1] for name in OPTIONAL}
    built = _ask(extension.build_info, {}) if extension else {}

    torch_part["cuda"] = _ask(lambda: torch.version.cuda)
    for key in ("compiler", "cuda", "cuda_version", "cuda_targets"):
        extension_part[key] = built.get(key)
    version = _ask(lambda: importlib.metadata.version("factorkit"))
    extension_part["version"] = built.get("version")
    if extension and version not in (None, built.get("version")):
        cause = f"built for factorkit {built.get('version')}, installed is {version}"
        extension_part.update(state="broken", cause=cause)

    gpus, gpu_cause = _gpus(torch, extension)
    for gpu in gpus:
        gpu["covered"] = coverage(built.get("cuda_targets") or [], gpu["capability"])
    result = {
        "factorkit": {"version": version, "commit": _commit(), "location": str(PACKAGE)},
        "python": {"version": platform.python_version(), "platform": platform.platform()},
        "cpu": _cpu(torch, built),
        "torch": torch_part,
        "driver": _driver(),
        "gpus": gpus,
        "extension": extension_part,
        "optional": optional,
        "ops": _ops(extension_part, optional["triton"]),
    }
    return result | {"problems": _problems(result, gpu_cause)}


def format_report(report: dict[str, Any]) -> str:
    """Format the report as text: a table of two columns, then the problems with their costs and cures."""
    torch, extension, cpu = report["torch"], report["extension"], report["cpu"]
    threads = f"{_known(cpu['threads'])} threads on {_known(cpu['cores'])} cores ({_known(cpu['logical'])} usable)"
    code = "no CUDA"
    if extension["cuda"]:
        code = f"CUDA {extension['cuda_version']} for {' '.join(extension['cuda_targets'])}"
    rows = [
        ("factorkit", f"{_known(report['factorkit']['version'])}, commit {report['factorkit']['commit']}"),
        ("  in", report["factorkit"]["location"]),
        ("Python", f"{report['python']['version']} on {report['python']['platform']}"),
        ("CPU", f"{_known(cpu['model'])}, {threads}"),
        ("  SIMD", f"{_known(cpu['simd'])}, bf16 {_yes(cpu['bf16'], 'in hardware', 'emulated')}"),
        ("torch", _state(torch, f"CUDA {torch['cuda']}" if torch["cuda"] else "no CUDA")),
        ("NVIDIA driver", report["driver"] or "none"),
    ]
    for gpu in report["gpus"]:
        capability = ".".join(map(str, gpu["capability"]))
        bf16 = _yes(gpu["bf16"], "bf16", "no bf16")
        covered = f"covered by _C: {gpu['covered']}"
        rows.append(("GPU", f"{gpu['name']}, capability {capability}, {gpu['memory_gib']} GiB, {bf16}, {covered}"))
    if not report["gpus"]:
        rows.append(("GPU", "none"))
    rows.append(("factorkit._C", _state(extension, f"{code}, {extension['compiler']}")))
    rows += [(name, _state(part)) for name, part in report["optional"].items()]
    rows += [("op " + name, how) for name, how in report["ops"].items()]

    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    for problem in report["problems"]:
        lines += ["", f"- {problem['what']}", f"    costs: {problem['costs']}", f"    cure:  {problem['cure']}"]
    return "\n".join(lines)


def coverage(targets: Sequence[str], capability: Sequence[int]) -> str:
    """Return how code compiled for ``targets`` runs on a GPU of compute capability ``(major, minor)``.

    Args:
        targets: nvcc's. "sm_90" is machine code, which also runs on later minor versions of the same major one;
            "compute_90" is PTX, which the driver compiles at first use for any GPU at least as new. The suffix "a"
            restricts it to that architecture, "f" to its family (CUDA C++ Programming Guide, Compute Capabilities).
        capability: of the GPU.

    Returns:
        "machine code", "PTX" or "no".
    """
    reached = "no"
    for target in targets:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", target)
        if match is None:
            continue
        kind, built, suffix = match[1], (int(match[2]), int(match[3])), match[4]
        same_major, new_enough = built[0] == capability[0], tuple(capability) >= built
        if suffix == "a":
            runs = tuple(capability) == built
        else:
            runs = new_enough and (same_major or (kind == "compute" and not suffix))
        if runs and kind == "sm":
            return "machine code"
        if runs:
            reached = "PTX"
    return reached


def _ask(question: Callable[[], Any], otherwise: Any = None) -> Any:
    """Return the answer, or ``otherwise`` if the question fails in any way."""
    try:
        return question()
    except (Exception, SystemExit):
        return otherwise


def _probe(name: str) -> tuple[Any, dict[str, Any]]:
    """Import a module (None if that fails) and describe its state."""
    part: dict[str, Any] = {"state": "ok", "version": None, "cause": None}
    try:
        # some packages print when imported, and --json promises one line
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        part["state"] = "missing" if absent else "broken"
        part["cause"] = None if absent else _cause(error)
        return None, part
    part["version"] = _ask(lambda: str(module.__version__)) or _ask(lambda: importlib.metadata.version(name))
    return module, part


def _cause(error: BaseException) -> str:
    first_line = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first_line}"


def _commit() -> str:
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return "unknown"  # otherwise git would describe any checkout that surrounds an installed copy
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
    result = _ask(lambda: subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL))
    return result.stdout.strip() if result is not None and result.returncode == 0 else "unknown"


def _cpu(torch: Any, built: dict[str, Any]) -> dict[str, Any]:
    # on Linux only; elsewhere these stay unknown
    info = _ask(Path("/proc/cpuinfo").read_text, "")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    siblings = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return {
        "model": model[1].strip() if model else platform.machine(),
        "cores": len(_ask(lambda: {path.read_text() for path in siblings}, set())) or None,
        "logical": _ask(lambda: len(os.sched_getaffinity(0))) or os.cpu_count(),
        "threads": _ask(lambda: torch.get_num_threads()),
        "simd": built.get("simd") or _ask(lambda: torch.backends.cpu.get_cpu_capability().lower()),
        "bf16": bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags[1].split())) if flags else None,
    }


def _driver() -> str | None:
    text = _ask(Path("/proc/driver/nvidia/version").read_text, "")
    match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return match[0] if match else None


def _gpus(torch: Any, extension: Any) -> tuple[list[dict[str, Any]], str | None]:
    """Return the GPUs that torch sees, or else those that the extension sees, and the cause if both queries failed."""

    def from_torch() -> list[dict[str, Any]]:
        gpus = []
        for index in range(torch.cuda.device_count() if torch and torch.cuda.is_available() else 0):
            device = torch.cuda.get_device_properties(index)
            gpus.append(_gpu(device.name, (device.major, device.minor), device.total_memory))
        return gpus

    def from_extension() -> list[dict[str, Any]]:
        devices = extension.cuda_devices() if extension else []
        return [_gpu(device["name"], device["capability"], device["memory_bytes"]) for device in devices]

    cause = None
    for query in (from_torch, from_extension):
        try:
            gpus = query()
        except Exception as error:
            cause = _cause(error)
            continue
        if gpus:
            return gpus, None
    return [], cause


def _gpu(name: str, capability: Sequence[int], memory_bytes: int) -> dict[str, Any]:
    # tensor cores compute in bf16 from Ampere (8.0) on
    memory_gib = round(memory_bytes / 2**30, 1)
    return {"name": name, "capability": list(capability), "memory_gib": memory_gib, "bf16": tuple(capability) >= (8, 0)}


def _ops(extension: dict[str, Any], triton: dict[str, Any]) -> dict[str, str]:
    try:
        ops = importlib.import_module("factorkit.ops")
        dispatch = importlib.import_module("factorkit.ops.dispatch")
        if dispatch.use_reference():
            return {name: "reference, forced by FACTORKIT_REFERENCE" for name in ops.IMPLEMENTATIONS}
        present = dict(ops.IMPLEMENTATIONS)
        for language, part in (("C++", extension), ("Triton", triton)):
            if part["state"] != "ok":
                present = {name: how.replace(language, "PyTorch") for name, how in present.items()}
        return present
    except Exception as error:
        return {"(all)": f"broken: {_cause(error)}"}


def _problems(report: dict[str, Any], gpu_cause: str | None) -> list[dict[str, str]]:
    problems = []

    def add(what: str, costs: str, cure: str) -> None:
        problems.append({"what": what, "costs": costs, "cure": cure})

    torch, extension, gpus, driver = report["torch"], report["extension"], report["gpus"], report["driver"]
    if report["factorkit"]["version"] is None:
        what = "factorkit is only found on the path, not installed"
        add(what, "no `factorkit` command, no compiled module", REINSTALL)
    if torch["state"] != "ok":
        add(_named("torch", torch), "nothing works without it", "pip install torch, in the build for your machine")
    elif (gpus or driver) and not torch["cuda"]:
        costs = "everything runs on the CPU, at a small share of the speed"
        add("there is an NVIDIA GPU, but this torch is built without CUDA", costs, "install a CUDA build of torch")
    elif not gpus:
        why = f" ({gpu_cause})" if gpu_cause else ""
        costs = "training runs on the CPU: use the small presets, those of the thesis take too long"
        cure = "an NVIDIA GPU of capability 8.0 or newer, its driver, and a CUDA build of torch"
        if driver:
            cure = f"driver {driver} is loaded: make a GPU visible to this process (CUDA_VISIBLE_DEVICES, container)"
        add(f"no usable GPU{why}", costs, cure)

    if extension["state"] != "ok":
        costs = "operations that have C++ or CUDA code run as plain PyTorch: same results, slower"
        add(_named("factorkit._C", extension), costs, REINSTALL)
    elif gpus and not extension["cuda"]:
        cure = "install the CUDA toolkit (nvcc), then FACTORKIT_CUDA=1 pip install -e ."
        add("factorkit._C has no CUDA code", "its operations run as plain PyTorch on the GPU, slower", cure)
    else:
        for gpu in gpus:
            if gpu["covered"] == "no":
                target = "sm_" + "".join(map(str, gpu["capability"]))
                cure = f"FACTORKIT_CUDA=1 FACTORKIT_CUDA_ARCHS={target} pip install -e ."
                what = f"factorkit._C has no code for the {gpu['name']} ({target})"
                add(what, "its operations run as plain PyTorch on it, slower", cure)

    for name, (costs, cure) in OPTIONAL.items():
        if report["optional"][name]["state"] != "ok":
            add(_named(name, report["optional"][name]), costs, cure)
    return problems


def _named(name: str, part: dict[str, Any]) -> str:
    return f"{name} is {part['state']}" + (f" ({part['cause']})" if part["cause"] else "")


def _state(part: dict[str, Any], more: str = "") -> str:
    if part["state"] != "ok":
        return part["state"] + (f": {part['cause']}" if part["cause"] else "")
    return ", ".join(filter(None, [_known(part["version"]), more]))


def _known(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _yes(value: bool | None, yes: str, no: str) -> str:
    return "unknown" if value is None else yes if value else no
