"""The package runs no code from files or from the command line."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import factorkit

PACKAGE = Path(factorkit.__file__).parent
CODE_RUNNING_CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "dill.load",
    "joblib.load",
    "yaml.load",
    "yaml.unsafe_load",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
UNPACKING_METHODS = {"extract", "extractall", "unpack_archive"}


def find_unsafe_calls(source: str) -> list[str]:
    """Return the calls of a source text that could run code from a file, as `line: call`."""
    tree, imported, unsafe = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {
                alias.asname or alias.name.split(".")[0]: (alias.asname and alias.name) or alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = ast.unparse(node.func).partition(".")
        name = ".".join(filter(None, [imported.get(head, head), rest]))
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        is_unsafe = name in CODE_RUNNING_CALLS or ("." in name and name.rpartition(".")[2] in UNPACKING_METHODS)
        is_unsafe |= options.get("shell", "False") != "False" or options.get("allow_pickle", "False") != "False"
        is_unsafe |= name == "torch.load" and options.get("weights_only") != "True"
        is_unsafe |= name == "numpy.load" and options.get("allow_pickle") != "False"
        # without formats= Pillow passes PostScript to Ghostscript, for any file name
        is_unsafe |= name == "PIL.Image.open" and "formats" not in options
        if is_unsafe:
            unsafe.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return unsafe


@pytest.mark.parametrize(
    "line",
    [
        "eval('1')",
        "import os\nos.system('ls')",
        "from os import system as s\ns('ls')",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import pickle as p\np.load(f)",
        "import numpy as np\nnp.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "import zipfile\nzipfile.ZipFile(f).extractall()",
        "from shutil import unpack_archive\nunpack_archive(f)",
        "from PIL import Image\nImage.open(f)",
    ],
)
def test_scan_unsafe_line_is_reported(line):
    assert len(find_unsafe_calls(line)) == 1


@pytest.mark.slow
def test_package_source_has_no_unsafe_calls():
    kernels = Path(factorkit.__path__[0]) if (PACKAGE / "kernels").is_dir() else PACKAGE.parent / "kernels"
    files = sorted({*PACKAGE.rglob("*.py"), *kernels.rglob("*.py")})
    assert len(files) > 100
    calls = [
        f"{file.relative_to(PACKAGE.parent)}:{call}" for file in files for call in find_unsafe_calls(file.read_text())
    ]
    assert not calls, "\n".join(calls)


def test_viewer_default_host_is_this_machine():
    from factorkit.cli.main import parse
    from factorkit.nerfdiff.viewer import Viewer

    assert inspect.signature(Viewer).parameters["host"].default == "127.0.0.1"
    assert parse("view", ["runs/x"]).host == "127.0.0.1"
