"""The documents: examples run, commands exist, links lead somewhere; notebooks run."""

import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable

import jax
import pytest

from paramshare.cli import override
from paramshare.cli.parsing import Parser
from paramshare.cli.train import add_own_options
from paramshare.training.config import load_file

TOP = pathlib.Path(__file__).parents[1]
DOCUMENTS = [*TOP.glob("*.md"), *TOP.glob("experiments/**/*.md"), *TOP.glob("notebooks/*.md")]
NOTEBOOKS = sorted((TOP / "notebooks").glob("*.py"))


@pytest.fixture
def run(environment, tmp_path) -> Callable[..., str]:
    """Runs Python with arguments in an empty folder, and returns what it prints."""

    def run(*command: str) -> str:
        env = environment()
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def blocks(document: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)


def test_the_readme_is_short_and_its_example_runs(run):
    assert len((TOP / "README.md").read_text().splitlines()) <= 120
    (example,) = blocks(TOP / "README.md", "python")
    assert len(example.strip().splitlines()) <= 10
    assert "Soft(templates=2)" in run("-c", example)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


def test_ci_runs_the_readmes_second_block():
    first, second, *_ = blocks(TOP / "README.md", "sh")
    assert "pytest" in second
    assert first.startswith('pip install ".[train]" && paramshare train experiments/recipes/')
    awk = re.search(r"awk '(.*)' README.md", (TOP / ".ci" / "run").read_text())
    assert awk is not None
    command = ["awk", awk[1], "README.md"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=True)
    assert done.stdout == second


def test_commands_name_files_and_options_that_exist():
    """Every `paramshare train RECIPE --options` of the documents is a legal configuration."""
    text = "\n".join(document.read_text().replace("\\\n", " ") for document in DOCUMENTS)
    commands = re.findall(r"paramshare train (experiments/\S+) ([^`#\n]*)", text)
    assert len(commands) > 4
    for recipe, options in commands:
        parser = Parser()
        add_own_options(parser)
        own, overrides = parser.parse_known_args(shlex.split(options))
        assert own.workdir
        override(load_file(TOP / recipe), overrides).check()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[notebook.stem for notebook in NOTEBOOKS])
def test_notebooks_convert_and_run(notebook, tmp_path, monkeypatch):
    """With reduced data (they read NOTEBOOK_QUICK), under the settings that users have."""
    import jupytext
    from matplotlib import pyplot

    cells = jupytext.read(notebook).cells
    assert cells[0].cell_type == "markdown" and not any(cell.get("outputs") for cell in cells)
    monkeypatch.setenv("NOTEBOOK_QUICK", "1")
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("agg")
    lenient = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with lenient[0], lenient[1], warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pictures cannot be shown
        runpy.run_path(str(notebook), run_name="__main__")
    pyplot.close("all")
