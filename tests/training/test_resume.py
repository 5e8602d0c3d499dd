"""A run that is interrupted, or killed, goes on under the same command and ends with the same parameters, bit for bit."""

import json
import os
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
from paramshare.training.config import Config, Data, Model, Schedule
from paramshare.training.data import Augment

config = Config(
    model=Model("swrn-16-1-1"), data=Data("digits", train_examples=128), augment=Augment(flip=True, pad_crop=1, cutout=2),
    schedule=Schedule("cosine"), epochs=16, batch_size=32, log_every=3,
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "config.py").write_text(CONFIG)
    return folder


def start(place: pathlib.Path, workdir: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "paramshare", "train", "config.py", "--workdir", workdir, "--data.data-dir", str(place / "data")]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(place / "cache")}
    return subprocess.Popen(command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=240)
    return process.returncode, said


def interrupt(place: pathlib.Path, workdir: str, with_signal: signal.Signals, after_steps: int) -> tuple[int, str]:
    """Starts a run, and sends a signal once its metrics have reached a step."""
    process = start(place, workdir)
    metrics = place / workdir / "metrics.jsonl"
    for _ in range(24000):
        reached = re.findall(r'"step": (\d+)', metrics.read_text()) if metrics.exists() else []
        if reached and int(reached[-1]) >= after_steps:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(with_signal)
    return finish(process)


def final(place: pathlib.Path, workdir: str):
    """The last state of a run, its result without its times, and its metrics."""
    run = prepare(stored_config(place / workdir), devices=jax.devices()[:1])
    with Checkpoints(place / workdir / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(jax.eval_shape(run.init))
    result = json.loads((place / workdir / "result.json").read_text())
    lines = [json.loads(line) for line in (place / workdir / "metrics.jsonl").read_text().splitlines()]
    return state, {k: v for k, v in result.items() if k not in ("seconds", "images_per_second")}, [x for x in lines if x["kind"] == "epoch"]


@pytest.fixture(scope="module")
def uninterrupted(place):
    code, said = finish(start(place, "whole"))
    assert code == 0, said
    return final(place, "whole")


def assert_same(found, expected):
    assert int(found[0].step) == int(expected[0].step) == 64
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(expected[0]), strict=True):
        # As bytes: not a number is not equal to itself, and 0 equals -0.
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    assert found[1] == expected[1]
    assert [line["epoch"] for line in found[2]] == list(range(1, 17))
    for line, wanted in zip(found[2], expected[2], strict=True):
        assert line.pop("kind") == wanted["kind"]
        assert line == pytest.approx({k: v for k, v in wanted.items() if k != "kind"}, rel=1e-9)


@pytest.mark.parametrize(("with_signal", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_saves_and_goes_on(place, uninterrupted, with_signal, code):
    workdir = with_signal.name
    returned, said = interrupt(place, workdir, with_signal, after_steps=9)
    assert returned == code, said
    message = [line for line in re.split(r"[\r\n]+", said) if line.startswith("paramshare: ")]
    assert message[0] == "paramshare: stopping after this step" and "Traceback" not in said
    assert len(message) == 2 and "the same command goes on from there" in message[1]
    assert not (place / workdir / "result.json").exists()
    assert finish(start(place, workdir))[0] == 0
    assert_same(final(place, workdir), uninterrupted)


def test_a_killed_run_goes_on_from_its_last_checkpoint(place, uninterrupted):
    returned, _ = interrupt(place, "killed", signal.SIGKILL, after_steps=9)
    assert returned == -signal.SIGKILL
    assert list((place / "killed" / "checkpoints").glob("[0-9]*")) and not (place / "killed" / "result.json").exists()
    # As if the kill had come in the middle of a line: it is dropped, not choked on.
    with (place / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    assert finish(start(place, "killed"))[0] == 0
    assert_same(final(place, "killed"), uninterrupted)


def test_a_finished_run_is_not_run_again(place, uninterrupted):
    before = (place / "whole" / "metrics.jsonl").read_bytes()
    began = time.monotonic()
    code, _ = finish(start(place, "whole"))
    assert code == 0 and time.monotonic() - began < 120
    assert (place / "whole" / "metrics.jsonl").read_bytes() == before
