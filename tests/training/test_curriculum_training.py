"""A curriculum: phases in the order of training, each validated on its own problems."""

import contextlib
import dataclasses
import itertools
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import pytest

from paramshare.data import ArraySource, Curriculum, DataError, Grids
from paramshare.data.sets.grids import fixed_set
from paramshare.errors import ParamshareError
from paramshare.models import ModelError
from paramshare.tasks import Augment
from paramshare.training import loop, program
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import (
    Config,
    ConfigError,
    Model,
    Optimizer,
    Penalty,
    Schedule,
    from_json,
    to_json,
)
from paramshare.training.derive import fine_tuning, training_inputs
from paramshare.training.loop import train
from paramshare.training.metrics import read_metrics
from paramshare.training.result import Evaluation, Result
from paramshare.training.run import Run, check_batch, prepare
from paramshare.training.signals import Interrupted
from paramshare.training.track import Track
from paramshare.zoo import create_model

ONE = jax.devices()[:1]
CURRICULUM = Curriculum(
    6, 0.1, (2, 5), 20, 9, far_windows=(6,), far_sizes=(8,), far_densities=(0.3,)
)
CONFIG = Config(  # 2 phases of 2 epochs of 2 steps
    model=Model("spathnet-3-2-2"),
    data=Grids(validation=0.25, curriculum=CURRICULUM),
    optimizer=Optimizer("adam", learning_rate=0.03, weight_decay=0.0),
    schedule=Schedule("constant"),
    penalty=Penalty(recurrence=0.01),
    epochs=4,
    batch_size=8,
    log_every=3,
)
KINDS = ["window 2", "window 5", "window 6", "size 8", "size 8, window 8", "density 0.3"]


def changed(**fields: Any) -> Config:
    """`CONFIG` with other fields of the curriculum, of the data, or of the configuration itself."""

    def those(part: Any) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(part)} & fields.keys()
        return {name: fields.pop(name) for name in names}

    curriculum = dataclasses.replace(CURRICULUM, **those(CURRICULUM))
    data = dataclasses.replace(CONFIG.data, curriculum=curriculum, **those(CONFIG.data))  # type: ignore
    return dataclasses.replace(CONFIG, data=data, **fields)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[pathlib.Path, Result, list[Any]]:
    """The workdir of a run, its result, and the sources it was evaluated on, in order."""
    workdir, seen = tmp_path_factory.mktemp("curriculum") / "run", []

    def make_evaluate(run):
        evaluate = original(run)

        def watched(variables, source, **options):
            seen.append(source)
            return evaluate(variables, source, **options)

        return watched

    original = loop.make_evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_evaluate", make_evaluate)
        result = train(CONFIG, workdir, devices=ONE, quiet=True)
    return workdir, result, seen


def arrays(source: Any) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


def same(source: Any, problems: tuple[np.ndarray, np.ndarray]) -> bool:
    return np.array_equal(source.input, problems[0]) and np.array_equal(source.label, problems[1])


# --- Which examples, when


def steps(runs: list[Run], start: int = 0) -> list[np.ndarray]:
    """The indices of every step."""
    return [inputs["index"] for inputs in program.inputs(runs, start)]


@pytest.mark.parametrize(
    ("phases", "examples", "size", "epochs", "seed"),
    [(1, 9, 4, 3, 0), (2, 20, 8, 4, 0), (4, 10, 3, 8, 2)],
)
def test_every_epoch_visits_its_own_phase_and_no_example_twice(
    phases, examples, size, epochs, seed
):
    config = changed(
        windows=(2, 3, 4, 5)[:phases],
        examples=examples,
        batch_size=size,
        epochs=epochs,
        seed=seed,
    )
    run = prepare(config, devices=ONE)
    indices = np.array(steps([run]))
    assert run.steps_per_epoch == examples // size
    assert indices.shape == (run.steps, size) == (epochs * (examples // size), size)
    of_epochs = indices.reshape(epochs, -1)
    for epoch, visited in enumerate(of_epochs):
        phase = epoch // (epochs // phases)
        assert run.phase(epoch) == phase
        assert (visited // examples == phase).all()
        assert len(set(visited)) == len(visited) == examples // size * size
    for a, b in itertools.pairwise(of_epochs):  # each epoch has another order
        assert not np.array_equal(a % examples, b % examples)
    for start in (1, run.steps // 2 + 1, run.steps):  # of a run that is resumed
        np.testing.assert_array_equal(steps([run], start) or indices[:0], indices[start:])
    other = dataclasses.replace(run, config=dataclasses.replace(config, seed=seed + 1))
    both = np.array(steps([run, other]))  # of runs trained together, each by its seed
    np.testing.assert_array_equal(both, np.stack([indices, steps([other])], axis=-1))
    assert (both // examples == indices[..., None] // examples).all()
    assert not np.array_equal(both[..., 0], both[..., 1])


def test_fine_tuning_continues_on_the_last_phase():
    tuned = fine_tuning(CONFIG, 3)
    assert tuned.data == dataclasses.replace(
        CONFIG.data, curriculum=dataclasses.replace(CURRICULUM, windows=(5,))
    )
    assert tuned.epochs == 3
    whole, last = (prepare(config, devices=ONE).data for config in (CONFIG, tuned))
    assert (last.phases, len(last.train), last.phase_examples) == (1, 20, 20)
    train, held = arrays(whole.train), arrays(whole.validation)
    assert same(last.train, (train.input[20:], train.label[20:]))
    assert same(last.validation, (held.input[5:], held.label[5:]))
    assert same(last.test, (arrays(whole.test).input, arrays(whole.test).label))
    # Batch statistics are re-estimated on the last phase too.
    batches = list(training_inputs(prepare(CONFIG, devices=ONE), 9))
    np.testing.assert_array_equal(np.concatenate(batches), arrays(last.train).input[:16])


# --- A run


def test_every_line_has_its_phase_and_the_f1(ran):
    lines = read_metrics(ran[0] / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [(line["epoch"], line["phase"], line["step"]) for line in epochs] == [
        (1, 1, 2),
        (2, 1, 4),
        (3, 2, 6),
        (4, 2, 8),
    ]
    names = {"kind", "step", "epoch", "phase", "loss", "f1", "validation_loss", "validation_f1"}
    for line in epochs:
        assert set(line) == names
        assert 0 <= line["f1"] <= 1 and 0 <= line["validation_f1"] <= 1
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [2, 3, 4, 6, 8]
    assert all({"loss", "f1", "recurrence"} <= set(line) for line in steps)


def test_every_kind_is_tested_and_the_selected_epoch_is_of_the_last_phase(ran):
    workdir, result, _ = ran
    assert result == Result.read(workdir / "result.json")
    assert result.score.name == "f1" and list(result.others) == KINDS
    for test in (result.last, result.selected.test, *result.others.values()):
        measures = test.measures
        assert set(measures) == {"f1", "exact", "connected", "shortest"} and test.count == 9
        assert 0 <= measures["exact"] <= measures["shortest"] <= measures["connected"] <= 1
    assert result.last == result.others["window 5"]
    epochs = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "epoch"]
    best = max(epochs[2:], key=lambda line: line["validation_f1"])
    assert (result.selected.epoch, result.selected.validation) == (
        best["epoch"],
        best["validation_f1"],
    )


def test_validation_is_on_the_phases_own_problems(ran):
    seen, kinds = ran[2], CURRICULUM.kinds()
    run = prepare(CONFIG, devices=ONE)
    for phase in (0, 1):
        expected = fixed_set(kinds[KINDS[phase]], "validation", 5)
        assert same(run.data.of_phase("validation", phase), expected)
        assert all(same(source, expected) for source in seen[2 * phase : 2 * phase + 2])
    assert same(seen[4], fixed_set(kinds["window 5"], "test", 9))
    for source, kind in zip(seen[5:11], KINDS, strict=True):
        assert same(source, fixed_set(kinds[kind], "test", 9))


def test_without_validation_no_epoch_is_selected(tmp_path):
    config = changed(
        validation=0.0,
        epochs=2,
        batch_size=20,
        far_windows=(),
        far_sizes=(),
        far_densities=(),
        windows=(2, 3),
    )
    result = train(config, tmp_path / "run", devices=ONE, quiet=True)
    assert result.selected is None and list(result.others) == ["window 2", "window 3"]
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [line["phase"] for line in epochs] == [1, 2] and "validation_f1" not in epochs[0]


def test_an_epoch_of_an_early_phase_is_never_selected(tmp_path):
    """Its problems are easier. Nor is an epoch whose score is NaN."""
    run, scores = prepare(CONFIG, devices=ONE), iter((0.9, 0.8, np.nan, 0.5))
    with contextlib.ExitStack() as stack:
        track = Track(run, tmp_path, stack)
        state, progress = track.restore(0)
        track.start(state, progress)
        variables = state.variables
        for epoch in range(1, 5):
            track.add([{"loss": 1.0, "f1": 0.5, "finite": 1.0}])
            track.finish_epoch(
                epoch,
                2 * epoch,
                variables,
                None,
                lambda *_: Evaluation(1.0, 9, {"f1": next(scores)}),
            )
        progress = track.progress
        assert (progress.best_epoch, progress.best_score, track.best.latest) == (4, 0.5, 8)


def test_interrupted_in_any_phase_it_ends_with_the_same_parameters(ran, tmp_path, monkeypatch):
    """Bit for bit; stopped in the middle of an epoch of the first phase, and of the second."""
    for stop in (3, 5):
        monkeypatch.setattr(
            loop.Signals,
            "stop",
            lambda self, step, stop=stop: signal.SIGTERM if step == stop else 0,
        )
        with pytest.raises(Interrupted, match=f"interrupted at step {stop} of 8"):
            train(CONFIG, tmp_path / "run", devices=ONE, quiet=True)
    monkeypatch.undo()
    result = train(CONFIG, tmp_path / "run", devices=ONE, quiet=True)

    def final(workdir: pathlib.Path) -> Any:
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return checkpoints.restore(jax.eval_shape(prepare(CONFIG, devices=ONE).init))[0]

    states = final(tmp_path / "run"), final(ran[0])
    assert int(states[0].step) == 8
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    timeless = [
        dataclasses.replace(each, seconds=0.0, images_per_second=None, metrics="")
        for each in (result, ran[1])
    ]
    assert timeless[0] == timeless[1]
    epochs = [
        [line for line in read_metrics(place / "metrics.jsonl") if line["kind"] == "epoch"]
        for place in (tmp_path / "run", ran[0])
    ]
    for line, expected in zip(*epochs, strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=1e-9)  # sums in another order


def test_json_is_read_back_as_the_same_configuration():
    assert from_json(to_json(CONFIG)) == CONFIG


# --- What is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epochs": 5}, "epochs is 5; .* multiple of the 2 phases of data set 'grids'"),
        ({"epochs": 1}, "epochs is 1; .* 2 phases"),
        ({"augment": Augment(pad_crop=1)}, "augment.pad_crop is 1"),
        (
            {"model": Model("wrn-16-1"), "penalty": Penalty()},
            r"'wrn-16-1' with data set 'grids': .* one output per cell, shape \(6, 6\)",
        ),
        ({"model": Model("spathnet-3-2-2", num_classes=2)}, "model.num_classes is 2; .* None"),
        ({"windows": ()}, "windows"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_trained(fields, message):
    with pytest.raises((ConfigError, DataError, ParamshareError), match=message) as caught:
        prepare(changed(**fields), devices=ONE)
    assert "\n" not in str(caught.value)


def test_a_batch_comes_from_one_phase(tmp_path):
    with pytest.raises(ConfigError, match=r"batch_size is 24; .* 20 training examples of 'grids'"):
        train(changed(batch_size=24), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    check_batch(prepare(changed(batch_size=20)))


def test_a_path_net_gives_no_classes(digits):
    plain = create_model("pathnet-2-2", input_shape=(8, 8, 1))
    with pytest.raises(ConfigError, match="one output per class"):
        prepare(Config(), model=plain, data=digits, devices=ONE)
    with pytest.raises(ModelError):
        prepare(Config(model=Model("pathnet-2-2")), data=digits, devices=ONE)


def test_any_data_may_come_in_phases(digits):
    """Here digits, in two halves."""
    halves = dataclasses.replace(digits, phases=2)
    config = Config(model=Model("wrn-16-1"), epochs=2, batch_size=64)
    run = prepare(config, data=halves, devices=ONE)
    indices = steps([run])
    assert run.steps == 4
    assert all((index < 128).all() for index in indices[:2])
    assert all((index >= 128).all() for index in indices[2:])
