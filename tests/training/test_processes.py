"""Two processes of two devices each train as one process of four does."""

import contextlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

PROGRAM = """
import json, sys
import jax
process, processes, epochs = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[6])
port, workdir, mapping = sys.argv[3:6]
if processes > 1:
    jax.distributed.initialize(f"localhost:{port}", processes, process)
import flax.linen as nn
from sklearn.datasets import load_digits
from paramshare import Plan, Rule, Soft, share
from paramshare.data import from_arrays
from paramshare.tasks import Augment
from paramshare.training.config import Config, Optimizer, Schedule
from paramshare.training.loop import train
from paramshare.training.signals import Interrupted
from paramshare.training.state import AXIS

class Small(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for i in range(3):
            x = nn.Conv(8, (3, 3), use_bias=False, name=f"conv{i}")(x)
            axis_name = None if self.is_initializing() else AXIS
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, axis_name=axis_name)(x))
        return nn.Dense(10)(x.mean((1, 2)))

x = jax.ShapeDtypeStruct((1, 8, 8, 1), "float32")
network = share(Small(), Plan(Rule("conv[12]/kernel", Soft(1))), x)
digits = load_digits()
image, label = (digits.images * 15).astype("uint8")[..., None], digits.target
test = (image[163:234], label[163:234])
data = from_arrays((image[:163], label[:163]), test, validation=0.2)
config = Config(
    augment=Augment(pad_crop=1), epochs=epochs, batch_size=64, log_every=1, mapping=mapping,
    optimizer=Optimizer(learning_rate=0.05), schedule=Schedule("constant"),
)
assert jax.device_count() == 4 and jax.process_count() == processes
try:
    result = train(config, workdir, model=network, data=data, quiet=True)
    print(json.dumps(result.last.as_json()))
except Interrupted as stop:
    print(stop)
"""


def start(place, name: str, mapping: str, processes: int, epochs: int) -> list[subprocess.Popen]:
    folder, environment = place
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [str(processes), str(port), str(folder / name), mapping, str(epochs)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(i), *arguments],
            env=environment(4 // processes),
            stdout=-1,
            stderr=-1,
            text=True,
        )
        for i in range(processes)
    ]


def lines_of(place, name: str, kind: str) -> list[dict]:
    lines = (place[0] / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def losses(place, name: str) -> list[float]:
    """Of the four steps, then of two validations."""
    steps, epochs = lines_of(place, name, "train"), lines_of(place, name, "epoch")
    assert [line["step"] for line in steps[:4]] == [1, 2, 3, 4]  # one process wrote each, once
    return [line["loss"] for line in steps[:4]] + [x["validation_loss"] for x in epochs[:2]]


@pytest.fixture(scope="module")
def place(tmp_path_factory, environment):
    return tmp_path_factory.mktemp("processes"), environment


@pytest.fixture(scope="module")
def alone(place):
    """The losses of one process."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", ["", "0", "1", "", str(place[0] / "one"), "pmap", "2"])
        exec(PROGRAM, {"__name__": "program"})
    assert json.loads(out.getvalue().splitlines()[-1])["count"] == 71
    return losses(place, "one")


def test_a_signal_to_one_process_stops_both_after_the_same_step(place, alone):
    """With `shard_map`; `cli/test_distributed` has `pmap`, and runs that end by themselves."""
    started = start(place, "stopped", "shard_map", 2, epochs=2000)
    metrics = place[0] / "stopped" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and '"epoch": 2,' in metrics.read_text():
            break
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    steps = {
        re.findall(r"interrupted at step (\d+) of 4000; state saved", out)[0] for out, _ in outputs
    }
    assert len(steps) == 1
    assert (place[0] / "stopped" / "checkpoints" / steps.pop()).is_dir()
    np.testing.assert_allclose(losses(place, "stopped"), alone, rtol=1e-4)
