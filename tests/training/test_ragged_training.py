"""A task of one's own trains through the ordinary loop: pytrees, two losses, average precision."""

import dataclasses

import jax
import pytest

from paramshare.data import eval_batches
from paramshare.tasks import Augment, TaskError
from paramshare.training.config import Config, ConfigError, Optimizer, Schedule
from paramshare.training.evaluation import make_evaluate
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics
from paramshare.training.run import prepare
from paramshare.training.workdir import stored_facts, stored_variables

CONFIG = Config(
    augment=Augment(flip=True),
    optimizer=Optimizer("adam", 0.01, weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=12,
    batch_size=32,
    log_every=2,
)


@pytest.fixture(scope="module")
def ran(ragged, tmp_path_factory):
    """The workdir, the result and the run."""
    workdir, data, model = (
        tmp_path_factory.mktemp("ragged") / "run",
        ragged.dataset(),
        ragged.BoxNet(),
    )
    devices = jax.devices()[:4]
    result = train(CONFIG, workdir, model=model, data=data, devices=devices, quiet=True)
    return workdir, result, prepare(CONFIG, model=model, data=data, devices=devices)


def test_it_learns_and_reports_the_tasks_own_score(ran):
    workdir, result, _ = ran
    assert result.score.name == "average_precision" and result.score.short == "AP"
    assert stored_facts(workdir).task == "boxes"
    lines = [x for x in read_metrics(workdir / "metrics.jsonl") if x["kind"] == "epoch"]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert result.last_score > lines[0]["validation_average_precision"]
    scores = [line["validation_average_precision"] for line in lines]
    assert result.selected.validation == max(scores)
    assert result.selected.epoch == 1 + scores.index(max(scores))
    assert set(result.last.measures) == {"average_precision", "overlap"}


def test_losses_are_reported_by_name_and_add_up(ran):
    workdir, result, _ = ran
    for line in read_metrics(workdir / "metrics.jsonl"):
        if line["kind"] in ("train", "epoch"):
            parts = line["loss/box"] + line["loss/confidence"]
            assert line["loss"] == pytest.approx(parts, rel=1e-6)
            assert "average_precision" not in line  # no batch has it
    assert set(result.last.losses) == {"box", "confidence"}
    assert result.last.loss == pytest.approx(sum(result.last.losses.values()), rel=1e-12)


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 64), (4, 12)])
def test_the_measure_is_that_of_the_whole_set_in_order(ran, devices, batch_size):
    """64 test examples in batches of 64, and of 12 on four devices, the last one filled up."""
    workdir, result, run = ran
    variables, _ = stored_variables(workdir, run.shapes)
    whole = next(eval_batches(run.data.test, len(run.data.test)))
    outputs = run.model.apply(variables, run.data.normalise(whole["input"]))
    statistics = run.task.statistics(outputs, whole["input"], whole["label"])
    expected = run.task.reduce(jax.device_get(statistics))
    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    spread = prepare(config, model=run.model, data=run.data, devices=jax.devices()[:devices])
    actual = make_evaluate(spread)(variables, run.data.test)
    assert actual.count == 64
    assert actual.measures == pytest.approx(expected, rel=1e-5)
    assert actual.measures == pytest.approx(result.last.measures, rel=1e-5)


def test_outputs_and_options_that_do_not_fit_the_task_are_refused(ran, ragged):
    run = ran[2]
    with pytest.raises(ConfigError, match=r"'BoxNet' with data set 'boxes': .* each slot"):
        prepare(CONFIG, model=ragged.BoxNet(most=2), data=run.data)
    with pytest.raises(TaskError, match=r"label_smoothing is 0\.1"):
        smoothed = dataclasses.replace(CONFIG, label_smoothing=0.1)
        prepare(smoothed, model=run.model, data=run.data)
