"""Imports only point down, and `import paramshare` stays light."""

import ast
import pathlib
import statistics
import subprocess
import sys
import time

import pytest

import paramshare

ROOT = pathlib.Path(paramshare.__file__).parent
FLOORS = ["schemes", "layout", "plan", "shared", "penalties", "models", "zoo", "analysis", "training", "cli"]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
HEAVY = ["tensorflow", "tensorflow_datasets", "grain", "orbax", "matplotlib", "sklearn", "tyro", "tqdm", "PIL", "tensorboardX"]


def floor(module: str) -> str:
    """paramshare.training.data.crop -> training; the package itself, above all -> ""."""
    return [*module.split("."), ""][1]


def imports(file: str) -> list[str]:
    """The modules of ours that a file imports, wherever in it."""
    found, package = [], ["paramshare", *file.split("/")[:-1]]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from paramshare import zoo` names a module, `from paramshare import share` does not.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "paramshare" else [module]
            found += [name if floor(name) in FLOORS else module for name in names]
    return [name for name in found if name.split(".")[0] == "paramshare"]


@pytest.mark.parametrize("file", [file for file in FILES if file not in ("__init__.py", "__main__.py")])
def test_imports_only_point_down(file):
    own = file.split("/")[0].removesuffix(".py")
    assert own in FLOORS, f"{file} stands on no floor; the floors are {FLOORS}"
    for module in imports(file):
        target = floor(module)
        assert target, f"{file} imports from the package's public face; import from the floor below"
        assert FLOORS.index(target) <= FLOORS.index(own), f"{file} imports {module}, which stands above it"
        if own == "models":
            assert target == "models", f"{file} imports {module}; models know nothing of sharing"


def test_the_walk_sees_imports():
    assert {floor(module) for module in imports("zoo/wide.py")} == {"models", "plan", "schemes", "zoo"}
    assert imports("models/wide_resnet.py") == ["paramshare.models.layers", "paramshare.models.looped"]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_heavy_is_imported():
    assert run(f"import sys, paramshare; print([name for name in {HEAVY} if name in sys.modules])") == "[]"
    # A name that no one imports would pass as well.
    assert run("import sys, flax.linen; print('flax' in sys.modules)") == "True"


def test_import_takes_little_longer_than_flax():
    """Processor time of the import alone, in pairs of processes; the median of the ratios, against a busy machine."""

    def seconds(module: str) -> float:
        return float(run(f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"))

    seconds("paramshare")  # so that all is compiled and in the file cache
    ratios = []
    start = time.monotonic()
    while len(ratios) < 3 or (statistics.median(ratios) > 1.5 and time.monotonic() - start < 60):
        ratios.append(seconds("paramshare") / seconds("flax.linen, optax"))
    assert statistics.median(ratios) < 1.5, ratios
