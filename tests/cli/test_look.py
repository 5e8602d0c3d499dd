"""`paramshare models`, `summary`, `--version`, and how errors become exit codes."""

import importlib
import json
import os
import subprocess
import sys

import jax
import pytest

import paramshare
from paramshare.cli import bench as bench_command
from paramshare.cli import main, run_command
from paramshare.errors import ParamshareError
from paramshare.ops import xla
from paramshare.training import bench as training
from paramshare.training.derive import load_run
from paramshare.training.evaluation import NonFinite
from paramshare.training.signals import Interrupted


class OwnError(ParamshareError):
    """An error class that no list names."""


def fail(error: BaseException):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OwnError("two\nlines"), 2),
        (NonFinite("the loss"), 1),
        (Interrupted("saved", 15), 143),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 2),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), 2),
        (OSError(28, "No space left on device"), 2),
    ],
    ids=lambda value: str(value),
)
def test_errors_become_one_line_and_an_exit_code(capsys, error, code):
    assert run_command(fail(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith("paramshare: ") and printed.count("\n") == 1


def test_our_own_mistakes_are_raised():
    with pytest.raises(KeyError):
        run_command(fail(KeyError("a")))
    with pytest.raises(RuntimeError):
        run_command(fail(RuntimeError("a")))
    with pytest.raises(AssertionError):
        run_command(fail(AssertionError()))
    with pytest.raises(ModuleNotFoundError):
        run_command(lambda: importlib.import_module("paramshare.no_such_module") and 0)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_without_devices(environment, platform):
    run = [sys.executable, "-m", "paramshare", "summary", "wrn-16-1"]
    variables = environment(1, JAX_PLATFORMS=platform)
    done = subprocess.run(run, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"JAX_PLATFORMS is {platform!r}: unset it" in done.stderr


def test_a_missing_dependency_names_the_extra(capsys):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    assert run_command(lambda: missing("orbax.checkpoint")) == 2
    printed = capsys.readouterr().err
    assert 'orbax is not installed; run: pip install "paramshare[train]"' in printed
    with pytest.raises(ModuleNotFoundError):  # the user's own module
        run_command(lambda: missing("no_such_module"))


def test_models_and_summary(command):
    assert "swrn-28-10-2" in command("models", "swrn-28-*")
    printed = command("summary", "swrn-28-10-2")
    assert "17,125,630" in printed and "Soft(templates=2)" in printed
    summary = json.loads(command("summary", "swrn-28-10-2", "--num-classes", 100, "--json"))
    assert summary["counts"]["trainable"] == 17_183_320
    torchvision = json.loads(command("summary", "mobilenetv2", "--form", "torchvision", "--json"))
    assert torchvision["counts"]["trainable"] == 3_504_872


def test_a_summary_of_a_run_needs_no_data_set(command, refused, small_run, monkeypatch):
    run, *_ = load_run(small_run)
    data = type(run.config.data)
    monkeypatch.setattr(data, "load", lambda *args: pytest.fail("the data set is loaded"))
    counts = json.loads(command("summary", small_run, "--json"))["counts"]
    assert counts["trainable"] == run.model.layout.trainable
    assert "leave out --stem" in refused("summary", small_run, "--stem", "cifar")
    assert "leave out --stem" in refused("summary", small_run, "--stem", "")


def test_bad_arguments(refused):
    assert "invalid choice: 'trian'" in refused("trian")
    assert "COMMAND" in refused()
    assert "unrecognised argument '--jsn'" in refused("summary", "wrn-16-1", "--jsn")
    assert "no model matches 'x*'" in refused("models", "x*")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"paramshare {paramshare.__version__}\n"


def test_the_command_takes_convolutions_off_ynnpack_for_itself_alone(monkeypatch, capsys):
    """A process that calls `main` with arguments is another program."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(xla, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert os.environ["XLA_FLAGS"] == ""
    monkeypatch.setattr(sys, "argv", ["paramshare", "--version"])
    with pytest.raises(SystemExit):
        main()
    known = (0, 10) <= jax.__version_info__[:2] < (0, 13)
    assert os.environ["XLA_FLAGS"] == (xla.WITHOUT_CONVOLUTIONS if known else "")


def test_bench_offers_what_there_is():
    assert bench_command.WHATS == training.WHATS


def test_bench_prints_a_table_or_json(capsys):
    words = ["bench", "resnet8-rpg-100", "--input-shape", "8", "8", "3", "--rounds", "1"]
    assert main([*words, "--what", "forward", "--batch-size", "2"]) == 0
    head, columns, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("forward: batch 2, images 8x8x3, compute float32, rounds 1")
    assert columns.split()[:2] == ["program", "ms"] and len(rows) == 2
    assert main([*words, "--what", "generation", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert [x["name"] for x in result["timings"]][-1].startswith("copy of ")
    for wrong, message in (
        (["--rounds", "0"], "0 rounds"),
        (["--what", "forward", "--devices", "1"], "--devices is 1, but concerns training steps"),
        (["--what", "generation", "--mapping", "pmap"], "--mapping is pmap, but concerns"),
        (["--what", "generation", "--bfloat16"], "--bfloat16 does not concern generation"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["bench", "retinanet-resnet8-head4x1", "--input-shape", "32", "32", "3"]) == 2
    assert "measure forward" in capsys.readouterr().err
