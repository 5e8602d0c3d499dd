"""A shared detector trains, resumes, is evaluated and exported like any other network."""

from typing import Any

import jax
import numpy as np
import pytest

from paramshare.data import from_arrays
from paramshare.data.canvases import Drawing
from paramshare.tasks import Augment, Detection
from paramshare.training.config import Config, Model, Optimizer, Schedule
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.run import prepare
from paramshare.training.signals import Interrupted
from paramshare.training.workdir import stored_variables
from paramshare.transform.export import export

CONFIG = Config(
    model=Model("retinanet-resnet8-rpg-500-head4x1"),
    augment=Augment(flip=True, zoom=(0.8, 1.2)),
    optimizer=Optimizer("adam", 1e-3, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=2,
    batch_size=8,
    similarity_every=0,
)
ONE = jax.devices()[:1]


@pytest.fixture(scope="module")
def data():
    digits = np.random.default_rng(0).integers(64, 256, (4, 8, 8)).astype(np.uint8)
    drawing = Drawing(size=32, most=2, smallest=8, largest=14)
    parts = [
        drawing.draw(digits, np.arange(4), seed, range(n))[:2] for seed, n in ((0, 24), (1, 11))
    ]
    task = Detection(tuple("abcd"), max_boxes=2, score_threshold=0.01)
    return from_arrays(*parts, name="few", validation=0, task=task)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, equal_runs_share_programs):
    """The workdir of an uninterrupted run, its result and the run."""
    workdir = tmp_path_factory.mktemp("detection") / "run"
    result = train(CONFIG, workdir, data=data, devices=ONE, quiet=True)
    return workdir, result, prepare(CONFIG, data=data, devices=ONE)


def test_a_run_that_is_stopped_resumes_with_the_same_parameters(data, trained, tmp_path):
    whole, _ = stored_variables(trained[0], trained[2].shapes)
    options = {"data": data, "devices": ONE, "quiet": True}
    with pytest.raises(Interrupted, match="step 3 of 6"):
        train(CONFIG, tmp_path / "run", callbacks=[lambda moment: moment.stop()], **options)
    train(CONFIG, tmp_path / "run", **options)
    resumed, step = stored_variables(tmp_path / "run", trained[2].shapes)
    assert step == 6
    for actual, expected in zip(*map(jax.tree.leaves, (resumed, whole)), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_four_devices_find_what_one_finds(data, trained):
    """Eleven test images fill no batch."""
    workdir, result, run = trained
    variables, _ = stored_variables(workdir, run.shapes)
    spread = prepare(CONFIG, data=data, devices=jax.devices()[:4])
    actual = make_evaluate(spread)(variables, data.test)
    assert actual.count == 11
    assert actual.measures == pytest.approx(result.last.measures, rel=1e-5, nan_ok=True)
    assert actual.losses == pytest.approx(result.last.losses, rel=1e-5)


def test_the_exported_program_gives_the_outputs_and_the_boxes(data, trained, tmp_path):
    workdir, _, run = trained
    variables, _ = stored_variables(workdir, run.shapes)
    inputs = data.test.input[:3]

    def both(outputs: Any) -> Any:
        return {**outputs, **run.task.predict(outputs, data.input_shape)}

    expected = both(jax.jit(run.model.apply)(variables, run.data.normalise(inputs)))
    statistics = {"mean": data.mean, "std": data.std}
    export(run.model, variables, tmp_path / "out", inputs[:1], predict=both, **statistics)
    program = jax.export.deserialize(
        bytearray((tmp_path / "out" / "program.jaxexport").read_bytes())
    )
    stored = dict(np.load(tmp_path / "out" / "variables.npz"))
    actual: Any = program.call(stored, inputs)
    assert set(actual) == {"logits", "offsets", "anchors", "box", "score", "category"}
    assert np.count_nonzero(actual["score"]) > 10
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-4)
