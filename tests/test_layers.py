"""The import rules between packages, and forbidden calls, checked in the source of every file."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mmcore", "jobs", "serve")
FORBIDDEN_IMPORTS = {"mmcore": {"ray", "jobs", "serve"}, "jobs": {"serve"}, "serve": {"jobs"}}
# In mmcore a package may import itself and later packages of this list, never one on the same line. The rest are files
# at the root.
ORDER = ({"trained"}, {"catalogue"}, {"captioners", "generators", "metrics"}, {"frozen", "data"})
MAX_LINES = 500

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Full names of all modules imported anywhere in the file, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and dotted(node.func) in {"importlib.import_module", "__import__"}:
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def dotted(node: ast.AST) -> str:
    """`a.b.c` for an expression of names and attributes, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def forbidden_imports(tree: ast.AST, path: str) -> set[str]:
    package = ".".join(Path(path).parts[:-1])
    forbidden = FORBIDDEN_IMPORTS[package.split(".")[0]] | {"torchvision"}
    return {module for module in imported_modules(tree, package) if module.split(".")[0] in forbidden}


# Ray's private interfaces, which may change. In each package only one file may use them.
PRIVATE = ("ray._private", "ray._raylet", "ray.autoscaler", "ray.core.generated")


def private_apis(tree: ast.AST) -> set[str]:
    """Ray's private modules that the file imports or uses by name."""
    named = imported_modules(tree, "") | {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in named if name.startswith("ray.") and (name.startswith(PRIVATE) or "._internal" in name)}


def upward_imports(tree: ast.AST, path: str) -> set[str]:
    """Imports of a file of mmcore from packages on the same line or above."""
    *_, package, name = Path(path).with_suffix("").parts
    levels = {each: level for level, packages in enumerate(ORDER) for each in packages}
    own = package if package in levels else name
    found = set()
    for module in imported_modules(tree, ".".join(Path(path).parts[:-1])):
        parts = module.split(".")
        if parts[0] == "mmcore" and len(parts) > 1 and parts[1] != own:
            # Packages that are not in the order count as the root.
            above = levels.get(parts[1], len(ORDER)) <= levels.get(own, len(ORDER))
            if above and (parts[1] in levels or own in levels):
                found.add(module)
    return found


def unsafe_calls(tree: ast.AST) -> list[str]:
    """Calls that unpickle external data or run code that comes with weights."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}

        def says(name: str, wanted: bool, keywords: dict[str | None, ast.expr] = keywords) -> bool:
            value = keywords.get(name)
            return isinstance(value, ast.Constant) and value.value is wanted

        module, _, function = called.rpartition(".")
        if function in {"load", "loads", "Unpickler"} and module in {
            "pickle", "cloudpickle", "ray.cloudpickle", "dill", "joblib", "marshal",
        }:  # fmt: skip
            found.append(f"line {node.lineno}: {called}")
        if called == "torch.load" and not says("weights_only", True):
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        # The default None lets transformers ask on a terminal whether to run code that comes with the weights.
        loads = isinstance(node.func, ast.Attribute) and node.func.attr in {"from_pretrained", "from_config"}
        if (loads or "trust_remote_code" in keywords) and not says("trust_remote_code", False):
            found.append(f"line {node.lineno}: without trust_remote_code=False")
        if "allow_pickle" in keywords and not says("allow_pickle", False):
            found.append(f"line {node.lineno}: allow_pickle")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in {"pickle", "cloudpickle", "dill", "joblib"}:
            found.append(f"line {node.lineno}: from {node.module} import ...")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_layers_and_safety(path):
    tree = ast.parse(path.read_text())
    assert not forbidden_imports(tree, name_of(path))
    assert not unsafe_calls(tree)
    assert path.parts[len(ROOT.parts)] != "mmcore" or not upward_imports(tree, name_of(path))
    assert path.name == "ray_private.py" or not private_apis(tree)


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name_of)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_there_are_sources_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"mmcore", "jobs"}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mmcore/x.py", "import ray.data"),
        ("mmcore/data/x.py", "def f():\n    from ray import train"),
        ("mmcore/x.py", "from jobs import cluster"),
        ("mmcore/x.py", "import importlib\nimportlib.import_module('ray')"),
        ("mmcore/data/x.py", "import torchvision.ops"),
        ("jobs/x.py", "from serve.app import build"),
        ("jobs/bench/x.py", "import serve"),
        ("serve/x.py", "from jobs.runtime.features import rows"),
    ],
)
def test_the_check_of_imports_finds(path, source):
    assert forbidden_imports(ast.parse(source), path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mmcore/storage.py", "import mmcore.data.parquet"),
        ("mmcore/rows.py", "from mmcore import catalogue"),
        ("mmcore/data/x.py", "from mmcore.frozen.text import NO_TEXT"),
        ("mmcore/frozen/x.py", "def f():\n    from mmcore.data import columns"),
        ("mmcore/generators/x.py", "from mmcore.captioners.decoding import greedy"),
        ("mmcore/metrics/x.py", "from mmcore.trained.generator import open_generator"),
        ("mmcore/captioners/x.py", "from mmcore.catalogue import read_model_file"),
        ("mmcore/catalogue.py", "from mmcore.trained import generator"),
    ],
)
def test_the_check_of_the_order_finds(path, source):
    assert upward_imports(ast.parse(source), path)


def test_the_check_of_the_order_accepts_what_is_below():
    below = "from mmcore import checkpoint, generators\nimport mmcore.catalogue\nfrom mmcore.data import pixels"
    assert not upward_imports(ast.parse(below), "mmcore/trained/x.py")
    assert not upward_imports(ast.parse("from mmcore.errors import InputError"), "mmcore/storage.py")
    assert not upward_imports(ast.parse("from mmcore.generators import vqvae"), "mmcore/generators/x.py")


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(f)",
        "import pickle\npickle.loads(data)",
        "from pickle import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(name)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=None)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusted)",
        "choose(config).from_pretrained(name)",
        "AutoModel.from_config(config)",
        "pipeline(task, model, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_of_unsafe_calls_finds(source):
    assert unsafe_calls(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    ["import ray\nray._private.state.actors()", "from ray._raylet import Config", "import ray.train.v2._internal.x"],
)
def test_the_check_of_private_apis_finds(source):
    assert private_apis(ast.parse(source))


def test_the_checks_accept_what_is_right():
    good = (
        "import ray\ntorch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)\nfrom . import cluster\n"
        "AutoModel.from_pretrained(name, trust_remote_code=False)"
    )
    assert not unsafe_calls(ast.parse(good))
    assert not private_apis(ast.parse(good))
    assert not forbidden_imports(ast.parse(good), "jobs/x.py")


# Runs in a new interpreter. Counts what our own files read from the environment while they are imported, and running
# threads and processes afterwards.
IMPORT_ALL = """
import importlib, json, multiprocessing, os, sys, threading
root, modules = sys.argv[1], sys.argv[2:]
sys.path.insert(0, root)
import psutil
# Libraries may start threads of their own when they are imported; load them first.
import ray, ray.data, ray.train, torch
reads = []

class Recorder(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith("<frozen "):  # os and the Mapping below os.environ
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(root + os.sep) and "site-packages" not in frame.f_code.co_filename:
            reads.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {key}")
        return super().__getitem__(key)

os.environ.__class__ = Recorder
threads = set(threading.enumerate())
failed = {}
for module in modules:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed[module] = repr(error)
print(json.dumps({"reads": reads, "failed": failed, "ray": ray.is_initialized(),
    "threads": [t.name for t in threading.enumerate() if t not in threads],
    "children": [child.name() for child in psutil.Process().children()]}))
"""


def import_all(root: Path, modules: list[str], cwd: Path, program: str = IMPORT_ALL) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", program, str(root), *modules],
        capture_output=True, text=True, timeout=300, cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # One line only: no module printed anything.
    return json.loads(done.stdout)


@pytest.mark.process
def test_importing_every_module_does_nothing(tmp_path):
    modules = []
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    nothing = {"reads": [], "failed": {}, "ray": False, "threads": [], "children": []}
    assert import_all(ROOT, modules, tmp_path) == nothing
    assert not list(tmp_path.iterdir())


@pytest.mark.process
def test_the_check_of_importing_finds(tmp_path):
    module = tmp_path / "loud.py"
    module.write_text(
        "import os, subprocess, threading, time\n"
        "A = os.environ.get('A')\nB = os.getenv('B')\nC = 'C' in os.environ\n"
        "threading.Thread(target=time.sleep, args=(30,), daemon=True, name='mine').start()\n"
        "D = subprocess.Popen(['sleep', '5'], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)\n"
    )
    # It needs none of the libraries that take seconds to import.
    found = import_all(
        tmp_path, ["loud"], tmp_path, IMPORT_ALL.replace("import ray, ray.data, ray.train, torch", "import ray")
    )
    assert [read.split()[-1] for read in found["reads"]] == ["A", "B", "C"]
    assert found["threads"] == ["mine"]
    assert found["children"] == ["sleep"]
