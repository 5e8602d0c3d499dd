"""A run that an earlier version stored keeps loading.

`stored/run.zip` was written on 2026-11-27, with jax 0.10.2, by

    XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu \
        paramshare train config.py --workdir run
    python tests/training/test_stored.py run

where config.py is `CONFIG`; the newest checkpoint was left out. Later versions must read it; it is
not to be written again.
"""

import os
import pathlib
import sys
import zipfile

import jax
import pytest

from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import fit
from paramshare.training.result import Result
from paramshare.training.run import prepare
from paramshare.training.workdir import stored_config, stored_variables

STORED = pathlib.Path(__file__).parent / "stored" / "run.zip"
CONFIG = """
from paramshare.data import Digits
from paramshare.training.config import Config, Model, Optimizer, Schedule

config = Config(
    Model("resnet8-rpg-1000"), Digits(train_examples=128), optimizer=Optimizer(learning_rate=0.05),
    schedule=Schedule("cosine"), epochs=2, batch_size=64, ema=0.9, shard_banks=True,
)
"""


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    with zipfile.ZipFile(STORED) as archive:
        archive.extractall(tmp_path)
    return tmp_path / "run"


def test_it_is_evaluated_and_resumed(workdir):
    """On as many devices, since each has batch statistics of its own; losses up to rounding."""
    result = Result.read(workdir / "result.json")
    run = prepare(stored_config(workdir), devices=jax.devices()[:2])
    variables, step = stored_variables(workdir, run.shapes, "best")
    selected = make_evaluate(run)(variables, run.data.test)
    assert result.selected and step == result.steps
    assert selected.loss == pytest.approx(result.selected.test.loss, rel=1e-4)
    (workdir / "result.json").unlink()
    again = fit(run, workdir, quiet=True)  # the second epoch once more
    assert again.last.loss == pytest.approx(result.last.loss, rel=1e-3)
    assert again.ema and result.ema and again.ema.loss == pytest.approx(result.ema.loss, rel=1e-3)


if __name__ == "__main__":
    source = pathlib.Path(sys.argv[1])
    STORED.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(STORED, "w", zipfile.ZIP_DEFLATED) as stored:
        for file in sorted(source.rglob("*")):
            drawn = file.suffix in (".png", ".html")
            if file.is_file() and not drawn and f"checkpoints{os.sep}4" not in str(file):
                stored.write(file, pathlib.Path("run") / file.relative_to(source))
    print(f"{STORED}: {STORED.stat().st_size:,} bytes, {len(jax.devices())} devices")
