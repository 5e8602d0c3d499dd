"""The same command resumes an interrupted or killed run, with bit-identical results."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from paramshare.training.checkpoint import Checkpoints
from paramshare.training.run import prepare
from paramshare.training.workdir import stored_config

CONFIG = """
from paramshare.data import Curriculum, Grids
from paramshare.tasks import Augment
from paramshare.training.config import Config, Model, Schedule

curriculum = Curriculum(
    6, 0.1, (2, 4), 80, 3, far_windows=(), far_sizes=(), far_densities=()
)
config = Config(
    model=Model("spathnet-2-2-2"),
    data=Grids(curriculum=curriculum, validation=0.2),
    augment=Augment(flip=True),
    schedule=Schedule("cosine"),
    epochs=10,
    batch_size=16,
    log_every=3,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, environment) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "environment.json").write_text(json.dumps(environment()))
    (folder / "config.py").write_text(CONFIG)
    return folder


def start(place: pathlib.Path, workdir: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "paramshare", "train", "config.py", "--workdir", workdir],
        cwd=place,
        env=json.loads((place / "environment.json").read_text()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, output = process.communicate(timeout=240)
    return process.returncode, output


def interrupt(
    place: pathlib.Path, workdir: str, with_signal: signal.Signals, after_steps: int
) -> tuple[int, str]:
    """Starts or resumes a run, and sends a signal when it has taken some steps."""
    metrics = place / workdir / "metrics.jsonl"
    target = last_step(metrics) + after_steps
    process = start(place, workdir)
    for _ in range(24000):
        if last_step(metrics) >= target:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(with_signal)
    return finish(process)


def last_step(metrics: pathlib.Path) -> int:
    steps = re.findall(r'"step": (\d+)', metrics.read_text()) if metrics.exists() else []
    return int(steps[-1]) if steps else 0


def final(place: pathlib.Path, workdir: str):
    """The last state of a run, its result without its times, and its metrics."""
    run = prepare(stored_config(place / workdir), devices=jax.devices()[:1])
    with Checkpoints(place / workdir / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(run.shapes)
    result = json.loads((place / workdir / "result.json").read_text())
    lines = [
        json.loads(line) for line in (place / workdir / "metrics.jsonl").read_text().splitlines()
    ]
    changing = ("seconds", "images_per_second", "sha256")
    return (
        state,
        {name: value for name, value in result.items() if name not in changing},
        [x for x in lines if x["kind"] == "epoch"],
    )


@pytest.fixture(scope="module")
def uninterrupted(place):
    code, output = finish(start(place, "whole"))
    assert code == 0, output
    return final(place, "whole")


def assert_same(actual, expected):
    assert int(actual[0].step) == int(expected[0].step) == 50
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(actual[0]), jax.tree.leaves(expected[0]), strict=True
    ):
        # As bytes, because NaN is not equal to itself, and 0 equals -0.
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    assert actual[1] == expected[1]
    assert [line["epoch"] for line in actual[2]] == list(range(1, 11))
    for line, expected_line in zip(actual[2], expected[2], strict=True):
        assert line.pop("kind") == expected_line["kind"]
        assert line == pytest.approx(
            {k: v for k, v in expected_line.items() if k != "kind"}, rel=1e-9
        )


def test_a_run_that_is_interrupted_and_killed_ends_with_the_same_parameters(place, uninterrupted):
    """By SIGINT and SIGKILL; in test_processes by SIGTERM."""
    metrics = place / "run" / "metrics.jsonl"
    returned, output = interrupt(place, "run", signal.SIGINT, after_steps=6)
    assert returned == 130, output
    message = [line for line in re.split(r"[\r\n]+", output) if line.startswith("paramshare: ")]
    assert message[0] == "paramshare: stopping after this step" and "Traceback" not in output
    assert len(message) == 2 and "rerun the same command to resume" in message[1]
    assert not (place / "run" / "result.json").exists()
    returned, _ = interrupt(place, "run", signal.SIGKILL, after_steps=6)
    assert returned == -signal.SIGKILL
    assert list((place / "run" / "checkpoints").glob("[0-9]*"))
    assert not (place / "run" / "result.json").exists()
    # As if the kill had come in the middle of a line, which is then dropped.
    with metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    assert finish(start(place, "run"))[0] == 0
    assert_same(final(place, "run"), uninterrupted)
