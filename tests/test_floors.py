"""The structure of the package: imports point down and are light, names stay in their place."""

import ast
import pathlib
import re
import statistics
import subprocess
import sys
import time

import pytest

import paramshare

ROOT = pathlib.Path(paramshare.__file__).parent
FLOORS = [
    *(
        "errors",
        "storage",
        "ops",
        "schemes",
        "models",
        "parameters",
        "partitioning",
        "layout",
        "groups",
        "budget",
        "rule",
        "plan",
        "shared",
    ),
    *(
        "penalties",
        "zoo",
        "measure",
        "transform",
        "nnx",
        "tasks",
        "data",
        "training",
        "report",
        "cli",
    ),
]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
HEAVY = [
    *("tensorflow", "tensorflow_datasets", "grain", "orbax", "matplotlib", "sklearn"),
    *("pydantic", "jinja2", "tqdm", "PIL", "tensorboardX", "flax.nnx"),
]


def floor(module: str) -> str:
    """paramshare.data.crop -> data; the package itself, which is above all floors -> ""."""
    return [*module.split("."), ""][1]


def imports(file: str) -> list[str]:
    """The modules of the package that a file imports, anywhere in it."""
    modules, package = [], ["paramshare", *file.split("/")[:-1]]
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from paramshare import zoo` names a module, `from paramshare import share` does not.
            names = [module]
            if module == "paramshare":
                names = [f"{module}.{alias.name}" for alias in node.names]
            modules += [name if floor(name) in FLOORS else module for name in names]
    return [name for name in modules if name.split(".")[0] == "paramshare"]


@pytest.mark.parametrize("home", FLOORS)
def test_imports_point_down(home):
    files = [file for file in FILES if file.split("/")[0].removesuffix(".py") == home]
    assert files
    for file in files:
        for module in imports(file):
            target = floor(module)
            assert target, f"{file} imports from the public face; import from the floor below"
            assert FLOORS.index(target) <= FLOORS.index(home), f"{file} imports {module}, above it"
            if home == "models":
                assert target in ("models", "ops", "errors"), f"{file} imports {module}"


def test_every_file_stands_on_a_floor():
    homes = {file.split("/")[0].removesuffix(".py") for file in FILES}
    assert homes - set(FLOORS) == {"__init__", "__main__"}
    # The walk sees imports.
    assert {floor(name) for name in imports("zoo/wide.py")} >= {"models", "plan", "schemes"}
    assert "paramshare.models.layers" in imports("models/wide_resnet.py")


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        (r'"(templates|filters|kernels|unique)"', ("schemes",)),  # keys of single schemes
        (r'"(accuracy|f1|top5)"', ("tasks",)),  # measures of single tasks
        (r'"(grids|digits|idx)"', ("data",)),  # names of single data sets
        (r"isinstance\([^)]*\b(Soft|FilterBasis|Ring|Repeat)\b", ("transform/factorise",)),
    ],
)
def test_no_floor_knows_what_belongs_to_one_scheme_task_or_data_set(pattern, homes):
    hits = []
    for file in FILES:
        code = re.sub(r'"""(.|\n)*?"""', "", (ROOT / file).read_text())  # examples may name them
        hits += [file for line in code.splitlines() if re.search(pattern, line.partition("  #")[0])]
    assert {file for file in hits if not file.startswith(homes)} == set()


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_heavy_is_imported():
    code = f"import sys, paramshare; print([n for n in {HEAVY} if n in sys.modules])"
    assert run(code) == "[]"
    # Every name in the list is a module that exists; otherwise the test could not fail.
    assert run("import sys, flax.linen; print('flax' in sys.modules)") == "True"


def test_import_takes_little_longer_than_flax():
    """CPU time of the import alone, in pairs of processes; the median of as many as it takes."""

    def seconds(module: str) -> float:
        clock = "time.process_time()"
        return float(run(f"import time; t = {clock}; import {module}; print({clock} - t)"))

    seconds("paramshare")  # so that everything is compiled and in the file cache
    ratios = []
    start = time.monotonic()
    while not ratios or (statistics.median(ratios) > 1.5 and time.monotonic() - start < 60):
        ratios.append(seconds("paramshare") / seconds("flax.linen, optax"))
    assert statistics.median(ratios) < 1.5, ratios
