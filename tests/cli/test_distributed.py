"""`paramshare train --distributed`, the command itself, in processes that Slurm seems to start."""

import contextlib
import dataclasses
import json
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest

from paramshare.training.config import load_file
from paramshare.training.loop import train

CONFIG = """from paramshare.data import Curriculum, Grids
from paramshare.training.config import *
data = Grids(curriculum=Curriculum(6, 0.1, (4,), 80, 7, (), (), ()))
schedule = Schedule("cosine")
config = Config(Model("spathnet-2-2-2"), data, epochs=1, batch_size=16, schedule=schedule)
"""

FAULT = """
import os
if os.environ["SLURM_PROCID"] == "1":
    from paramshare.training.track import Track

    def fail(*args):
        raise ZeroDivisionError("only here")

    Track.write_line = fail
"""


@contextlib.contextmanager
def starter(folder, environment):
    """Starts processes of one device each; words of their own follow the command."""
    (folder / "config.py").write_text(CONFIG)
    started: list[subprocess.Popen] = []

    def begin(*own: list[str], count: int = 0) -> list[subprocess.Popen]:
        job = free_job()
        for process, words in enumerate(own):
            slurm = {
                "SLURM_JOB_ID": job,
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count or len(own)),
                "SLURM_PROCID": str(process),
                "SLURM_LOCALID": str(process),
            }
            command = ["train", "config.py", "--workdir", "run", "--distributed", *words]
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "paramshare", *command],
                    cwd=folder,
                    env=environment(1, **slurm),
                    stdout=-1,
                    stderr=-1,
                    text=True,
                )
            )
        return started

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def start(tmp_path, environment):
    with starter(tmp_path, environment) as begin:
        yield begin


@pytest.fixture(scope="module", autouse=True)
def lonely(tmp_path_factory, environment):
    """A process of two, the only one; it waits for the other while the tests before its own run."""
    with starter(tmp_path_factory.mktemp("lonely"), environment) as begin:
        yield begin(["--init-timeout", "3"], count=2)[0]


def free_job() -> str:
    """A job number whose port, which JAX derives from it, is free."""
    while True:
        job = random.randrange(4096)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 65535 - 4095 + job)):
                return str(job)


def end(process: subprocess.Popen) -> tuple[int, str, list[str]]:
    """Exit code, standard output, and the lines of standard error without progress bars."""
    output, error = process.communicate(timeout=120)
    lines = error.replace("\r", "\n").splitlines()
    return process.returncode, output, [x for x in lines if x.strip() and "img/s" not in x]


def test_two_processes_train_as_one_and_the_first_writes_the_result(start, tmp_path):
    first, second = map(end, start(*[["--shard-banks"]] * 2))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "report         run/report.html" in first[1] and "report" not in second[1]
    assert not first[2] and not second[2] and not second[1]
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["devices"].startswith("2 x") and result["last"]["count"] == 7
    config = dataclasses.replace(load_file(tmp_path / "config.py"), shard_banks=True)
    with jax.numpy_dtype_promotion("standard"):  # of optax's schedule
        alone = train(config, tmp_path / "alone", devices=jax.devices()[:2], quiet=True)
    assert result["last"]["loss"] == pytest.approx(alone.last.loss, rel=1e-3)
    assert result["counts"] == alone.counts
    assert (tmp_path / "run/report.html").is_file()
    parts = tmp_path.glob("run/checkpoints/*/state/ocdbt.process_*")
    assert {part.name[-1] for part in parts} == {"0", "1"}  # each has written its own


def test_processes_that_differ_end_with_the_same_line(start, tmp_path):
    """`test_agreement` has other differences, and what fails in one process alone."""
    ends = [end(process) for process in start([], ["--seed", "1"])]
    assert [code for code, _, _ in ends] == [2, 2]
    for _, _, lines in ends:
        assert len(lines) == 1
        assert "the processes disagree: seed is 0 in process 0 and 1 in process 1;" in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_process_that_is_lost_ends_the_others_with_one_line(start, tmp_path):
    processes = start(*[["--epochs", "5000", "--heartbeat-timeout", "5"]] * 2)
    metrics = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or '"epoch": 1,' not in metrics.read_text():
        assert time.monotonic() < deadline and processes[0].poll() is None
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGKILL)  # its child dies with it
    code, _, lines = end(processes[0])
    assert code == 4, lines
    assert len(lines) == 1 and lines[0].startswith("paramshare: another process was lost")


def test_an_error_in_one_process_ends_both(start, tmp_path):
    """Without waiting at its exit for the other, which waits for it in the next step."""
    with (tmp_path / "config.py").open("a") as file:
        file.write(FAULT)
    processes = start(*[["--heartbeat-timeout", "5", "--log-every", "2"]] * 2)
    (code, _, lines), (other, _, fault) = map(end, processes)
    assert (code, other) == (4, 1), (lines, fault)
    assert len(lines) == 1 and lines[0].startswith("paramshare: another process was lost")
    assert fault[0].startswith("Traceback") and fault[-1] == "ZeroDivisionError: only here"


def test_a_process_that_never_comes_is_one_line(lonely):
    code, _, lines = end(lonely)
    assert code == 4 and len(lines) == 1
    assert "another process did not arrive in time, or the coordinator's port" in lines[0]
