"""Builds the compiled module `factorkit._C` from csrc/: C++ always, CUDA where nvcc is found.

Everything else about the package is in pyproject.toml. What the environment can say:

FACTORKIT_CUDA        0: without CUDA. 1: with CUDA, or stop. Unset: with CUDA if nvcc is found.
FACTORKIT_CUDA_ARCHS  what to compile for, in nvcc's words: sm_90 is machine code, compute_90 is PTX, which the driver
                      compiles for any newer GPU. Default: sm_80,sm_90,compute_90
CUDA_HOME             the CUDA toolkit; without it nvcc is looked for on PATH
CXX                   the C++ compiler, default c++
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """The nvcc to build with, or None to build without CUDA, as FACTORKIT_CUDA asks."""
    wish = os.environ.get("FACTORKIT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SetupError(f"FACTORKIT_CUDA={wish} means nothing; set it to 0 (no CUDA) or 1 (CUDA), or leave it unset")
    if wish == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None and wish == "1":
        where = f"CUDA_HOME ({home})" if home else "PATH"
        raise SetupError(
            f"FACTORKIT_CUDA=1 asks for CUDA, but there is no nvcc in {where}. Install the CUDA toolkit, "
            "point CUDA_HOME at it, or set FACTORKIT_CUDA=0 to build for the CPU only"
        )
    return nvcc


def cuda_targets() -> list[str]:
    """The targets of FACTORKIT_CUDA_ARCHS, such as ["sm_80", "sm_90", "compute_90"]."""
    targets = re.split(r"[\s,;]+", os.environ.get("FACTORKIT_CUDA_ARCHS", "").strip() or "sm_80,sm_90,compute_90")
    for target in targets:
        if not re.fullmatch(r"(sm|compute)_\d+[af]?", target):
            raise SetupError(f"FACTORKIT_CUDA_ARCHS has {target!r}; name targets like sm_90 (code) or compute_90 (PTX)")
    return targets


class NinjaBuild(build_ext):
    """Compiles with ninja: in parallel, and again only what changed; setuptools follows neither headers nor .cu."""

    def build_extension(self, ext: Extension) -> None:
        """Compile with ninja."""
        # Not at the top: metadata and source archives are made without the tools that compile.
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer, escape

        cxx = shlex.split(os.environ.get("CXX", "c++"))
        nvcc = find_nvcc()
        targets = cuda_targets() if nvcc else []
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not setuptools' own build folder: that one is temporary, and objects are to outlive this build. With CUDA or
        # without, it is the same one: only the bindings differ.
        folder = ROOT / "build" / f"csrc-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)

        cxx_command = [*cxx, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # What lets loops vectorise without -ffast-math: reductions where a pragma says so, no errno, no traps.
        cxx_command += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
        module = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-s"]
        libraries = ["-ldl"] if sys.platform == "linux" else []  # of dlsym, before glibc 2.34
        link_command = [*cxx, *module]
        if nvcc:
            nvcc_command = [nvcc, "-ccbin", cxx[-1], "-std=c++17", "-O3"]
            nvcc_command += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
            nvcc_command += [f"-gencode=arch={re.sub('^sm', 'compute', target)},code={target}" for target in targets]
            # The static CUDA runtime lets the module import where there is no CUDA; its symbols stay inside.
            link_command = [nvcc, "-ccbin", cxx[-1], "-shared", "-cudart=static", "-Xlinker=-s,--exclude-libs=ALL"]
        # Only the bindings see Python and the version, so that a new one of either recompiles nothing else.
        bindings = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        bindings += [f'-DFACTORKIT_VERSION="{self.distribution.get_version()}"']
        bindings += [f'-DFACTORKIT_CUDA_TARGETS="{",".join(targets)}"'] if nvcc else []

        with open(folder / "build.ninja", "w", encoding="utf-8") as file:
            plan = Writer(file)
            compile_one = " $flags -MMD -MF $out.d -c $in -o $out"  # $out.d lists the headers for ninja
            plan.rule("cxx", escape(shlex.join(cxx_command)) + compile_one, depfile="$out.d", deps="gcc")
            if nvcc:
                plan.rule("nvcc", escape(shlex.join(nvcc_command)) + compile_one, depfile="$out.d", deps="gcc")
            plan.rule("link", escape(shlex.join(link_command)) + " $in -o $out " + shlex.join(libraries))
            objects = []
            for source in map(Path, ext.sources):
                if source.suffix == ".cu" and not nvcc:
                    continue
                flags = escape(shlex.join(bindings)) if source.name.startswith("bindings") else ""
                rule = "nvcc" if source.suffix == ".cu" else "cxx"
                objects += plan.build(f"{source.name}.o", rule, str(ROOT / source), variables={"flags": flags})
            plan.build(str(output), "link", objects)

        if subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-v"]).returncode:
            cure = "this needs a C++17 compiler (CXX names another one) and Python's headers"
            if nvcc:
                cure += "; FACTORKIT_CUDA=0 builds without CUDA"
            raise SetupError(f"csrc/ did not compile, see the messages above; {cure}")


def csrc(*suffixes: str) -> list[str]:
    """The files of csrc/ with these suffixes, as the relative paths that setuptools asks for."""
    return sorted(f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.suffix in suffixes)


setup(
    # kernels/ lies beside the package and is installed as factorkit.kernels ([tool.setuptools.package-dir])
    packages=[*find_packages(include=["factorkit", "factorkit.*"]), "factorkit.kernels"],
    ext_modules=[Extension("factorkit._C", sources=csrc(".cpp", ".cu"), depends=csrc(".h"))],
    cmdclass={"build_ext": NinjaBuild},
)
