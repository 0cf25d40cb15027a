"""What is never done with files and words from outside: no code is run from them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import factorkit

PACKAGE = Path(factorkit.__file__).parent
RUNS_CODE = {
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
UNPACKS = {"extract", "extractall", "unpack_archive"}


def offences(source: str) -> list[str]:
    """What a file does that would run code from a file, as `line: what`."""
    tree, known, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                alias.asname or alias.name.split(".")[0]: alias.asname and alias.name or alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = ast.unparse(node.func).partition(".")
        name = ".".join(filter(None, [known.get(head, head), rest]))
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        bad = name in RUNS_CODE or name.rpartition(".")[2] in UNPACKS
        bad |= options.get("shell", "False") != "False" or options.get("allow_pickle", "False") != "False"
        bad |= name == "torch.load" and options.get("weights_only") != "True"
        bad |= name == "numpy.load" and options.get("allow_pickle") != "False"
        # without formats= Pillow hands PostScript to Ghostscript, whatever the file is called
        bad |= name == "PIL.Image.open" and "formats" not in options
        if bad:
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


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
        "from PIL import Image\nImage.open(f)",
    ],
)
def test_the_scan_sees(line):
    assert len(offences(line)) == 1


def test_no_code_from_files_is_run_anywhere_in_the_package():
    kernels = Path(factorkit.__path__[0]) if (PACKAGE / "kernels").is_dir() else PACKAGE.parent / "kernels"
    files = sorted({*PACKAGE.rglob("*.py"), *kernels.rglob("*.py")})
    assert len(files) > 100
    found = [f"{file.relative_to(PACKAGE.parent)}:{what}" for file in files for what in offences(file.read_text())]
    assert not found, "\n".join(found)


def test_viewer_serves_this_machine_alone_unless_told_otherwise():
    from factorkit.cli.main import parse
    from factorkit.nerfdiff.viewer import Viewer

    assert inspect.signature(Viewer).parameters["host"].default == "127.0.0.1"
    assert parse("view", ["runs/x"]).host == "127.0.0.1"
