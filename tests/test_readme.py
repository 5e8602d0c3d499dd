"""What the README shows runs, and the notebooks do."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

TOP = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.py"))


def run(*command: str, cwd: pathlib.Path, **env: str) -> str:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "MPLBACKEND": "agg"} | env
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_readmes_example_runs_and_takes_ten_lines(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (TOP / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) <= 10
    assert "Soft(templates=1)" in run("-c", blocks[0], cwd=tmp_path)


def test_links_of_the_documents_lead_somewhere():
    for document in [*TOP.glob("*.md"), *(TOP / "experiments" / "results").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("http") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_ci_runs_the_readmes_second_block():
    shell = re.findall(r"^```sh\n(.*?)^```", (TOP / "README.md").read_text(), re.M | re.S)
    assert "pytest" in shell[1] and shell[0].startswith("pip install . && paramshare train experiments/quickstart.py --workdir ")
    awk = re.search(r"awk '(.*)' README.md", (TOP / ".ci" / "run").read_text())
    assert awk is not None
    taken = subprocess.run(["awk", awk[1], "README.md"], cwd=TOP, capture_output=True, text=True, check=True).stdout
    assert taken == shell[1]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS])
def test_notebooks_convert_and_run(notebook, tmp_path):
    import jupytext

    cells = jupytext.read(notebook).cells
    assert cells[0].cell_type == "markdown" and not any(cell.get("outputs") for cell in cells)
    quick = {"SHORTEST_PATHS_QUICK": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if "shortest" in notebook.stem else {}
    run("-W", "ignore::UserWarning:__main__", str(notebook), cwd=tmp_path, **quick)
