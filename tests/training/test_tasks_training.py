"""Detection, pose and several tasks: resumed, stopped, evaluated on several devices, exported.

The networks are not the point, so they have one layer.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paramshare.data import Canvases, from_arrays
from paramshare.data.canvases import Drawing
from paramshare.models.anchors import anchors as anchor_grid
from paramshare.tasks import Detection
from paramshare.tasks.keypoints import SIGMAS
from paramshare.training.config import Config, Optimizer, Schedule
from paramshare.training.evaluation import NonFinite, make_evaluate
from paramshare.training.loop import train
from paramshare.training.run import prepare
from paramshare.training.signals import Interrupted
from paramshare.training.workdir import stored_variables
from paramshare.transform.export import export

CONFIG = Config(
    optimizer=Optimizer("adam", 1e-3, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=2,
    batch_size=4,
    similarity_every=0,
)
ONE = jax.devices()[:1]


class Heatmaps(nn.Module):
    """Of two stages, each place a weighted sum of the pixels of its row."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        rows = x[:, ::4].reshape(x.shape[0], 4, -1)
        y = nn.Dense(2 * 4 * len(SIGMAS))(rows)
        return y.reshape(x.shape[0], 4, 2, 4, len(SIGMAS)).transpose(0, 2, 1, 3, 4)


class Boxes(nn.Module):
    """Logits of four classes, and offsets, of nine anchors at every eighth pixel."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        y = nn.Dense(9 * 8)(x[:, ::8, ::8]).reshape(x.shape[0], -1, 8)
        anchors = anchor_grid(x.shape[1] // 8, x.shape[2] // 8, stride=8)
        anchors = jnp.broadcast_to(anchors, (x.shape[0], *anchors.shape))
        return {"logits": y[..., :4], "offsets": y[..., 4:], "anchors": anchors}


class Outputs(nn.Module):
    """Of three tasks, from all pixels."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        flat = x.reshape(x.shape[0], -1)
        return {name: nn.Dense(n)(flat) for name, n in (("angle", 1), ("digit", 10), ("place", 2))}


@pytest.fixture(scope="module", params=["detection", "pose", "several"])
def trained(request, coco, tmp_path_factory, equal_runs_share_programs):
    """The data set, the network, the workdir of an uninterrupted run, and its result."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "pose":
        coco.make(folder, train=coco.standing(12, SIGMAS), test=coco.standing(5, SIGMAS))
        data, model = coco.load(folder, task="pose", validation=0), Heatmaps()
    elif request.param == "detection":
        digits = np.random.default_rng(0).integers(64, 256, (4, 8, 8)).astype(np.uint8)
        drawing = Drawing(size=32, most=2, smallest=8, largest=14)
        parts = [
            drawing.draw(digits, np.arange(4), seed, range(count))[:2]
            for seed, count in ((0, 12), (1, 5))
        ]
        task = Detection(tuple("abcd"), max_boxes=2)
        data, model = from_arrays(*parts, name="few", validation=0, task=task), Boxes()
    else:
        drawing = Drawing(size=14, most=1, smallest=8, largest=8, turn=60)
        config = Canvases(task="several", examples=12, tests=5, validation=0, drawing=drawing)
        data, model = config.load(), Outputs()
    options = {"data": data, "model": model, "devices": ONE, "quiet": True}
    return data, model, folder / "run", train(CONFIG, folder / "run", **options)


def test_a_run_that_is_stopped_resumes_with_the_same_parameters(trained, tmp_path):
    data, model, workdir, result = trained
    options = {"data": data, "model": model, "devices": ONE, "quiet": True}
    with pytest.raises(Interrupted):
        train(CONFIG, tmp_path / "run", callbacks=[lambda moment: moment.stop()], **options)
    again = train(CONFIG, tmp_path / "run", **options)
    assert again.last.measures == pytest.approx(result.last.measures, rel=0, abs=0, nan_ok=True)
    shapes = prepare(CONFIG, data=data, model=model, devices=ONE).shapes
    whole, resumed = (stored_variables(x, shapes)[0] for x in (workdir, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_four_devices_measure_what_one_does(trained):
    """Five test examples fill no batch; poses are averaged over mirror images."""
    data, model, workdir, result = trained
    run = prepare(CONFIG, data=data, model=model, devices=jax.devices()[:4])
    variables, _ = stored_variables(workdir, run.shapes)
    actual = make_evaluate(run)(variables, data.test)
    assert actual.count == 5
    assert actual.measures == pytest.approx(result.last.measures, rel=1e-5, nan_ok=True)
    assert actual.losses == pytest.approx(result.last.losses, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(trained, tmp_path):
    data, model, _, _ = trained
    config = dataclasses.replace(CONFIG, optimizer=Optimizer("sgd", 1e38, weight_decay=0.0))
    with pytest.raises(NonFinite):
        train(config, tmp_path / "run", data=data, model=model, devices=ONE, quiet=True)


def test_the_exported_program_gives_the_predictions(trained, tmp_path):
    data, model, workdir, _ = trained
    run = prepare(CONFIG, data=data, model=model, devices=ONE)
    variables, _ = stored_variables(workdir, run.shapes)
    inputs = jnp.stack([data.test[i]["input"] for i in range(3)])

    def predict(outputs: Any) -> Any:
        return run.task.predict(outputs, data.input_shape)

    options = {"mean": data.mean, "std": data.std, "predict": predict}
    export(model, variables, tmp_path / "out", inputs[:1], **options)
    content = (tmp_path / "out" / "program.jaxexport").read_bytes()
    stored = dict(np.load(tmp_path / "out" / "variables.npz"))
    actual: Any = jax.export.deserialize(bytearray(content)).call(stored, inputs)
    expected = predict(jax.jit(model.apply)(variables, run.data.normalise(inputs)))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(expected)
    }
    assert set(actual) == set(flat)
    for name, value in flat.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-4, atol=1e-4)
