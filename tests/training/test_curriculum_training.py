"""A curriculum: phases in the order of training, each validated on its own problems; and every command takes it."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import pytest

from paramshare.cli import main
from paramshare.training import loop
from paramshare.training.checkpoint import Checkpoints
from paramshare.training.config import Config, ConfigError, Data, Model, from_json, load_file, to_json
from paramshare.training.data import ArraySource, Augment, Curriculum, DataError
from paramshare.training.data.curriculum import fixed_set
from paramshare.training.derive import fine_tuning, trained, training_images
from paramshare.training.loop import Interrupted, train
from paramshare.training.metrics import read_metrics
from paramshare.training.run import Run, check_batch, prepare
from paramshare.training.track import Track
from paramshare.zoo import create_model

CONFIG = """
from paramshare.training.config import Config, Data, Model, Optimizer, Penalty, Schedule
from paramshare.training.data import Curriculum

config = Config(
    model=Model("spathnet-3-2-2"),
    data=Data("grids", curriculum=Curriculum(6, 0.1, (2, 5), 20, 9, far_windows=(6,), far_sizes=(8,), far_densities=(0.3,))),
    optimizer=Optimizer("adam", learning_rate=0.03, weight_decay=0.0), schedule=Schedule("constant"), penalty=Penalty(recurrence=0.01),
    epochs=4, batch_size=8, log_every=3,
)
"""  # 2 phases of 2 epochs of 2 steps
KINDS = ["window 2", "window 5", "window 6", "size 8", "size 8, window 8", "density 0.3"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("curriculum") / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def curriculum(file) -> Config:
    return load_file(file)


@pytest.fixture(scope="module")
def ran(file) -> tuple[pathlib.Path, list[Any]]:
    """The workdir of a run by the command, and what it was evaluated on, in order."""
    workdir, seen = file.parent / "run", []

    def make_evaluate(run):
        evaluate = loop_evaluate(run)
        return lambda variables, source: (seen.append(source), evaluate(variables, source))[1]

    loop_evaluate = loop.make_evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_evaluate", make_evaluate)
        assert main(["train", str(file), "--workdir", str(workdir), "--data.validation", "0.25"]) == 0
    return workdir, seen


def changed(config: Config, **fields) -> Config:
    """With other fields of the data, of the curriculum, or of the configuration itself."""

    def those(part: Any) -> dict[str, Any]:
        return {field.name: fields.pop(field.name) for field in dataclasses.fields(part) if field.name in fields}

    curriculum = dataclasses.replace(config.data.curriculum, **those(config.data.curriculum))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, curriculum=curriculum, **those(config.data)), **fields)


def held(source: Any) -> ArraySource:
    assert isinstance(source, ArraySource)
    return source


def same(source: Any, problems: tuple[np.ndarray, np.ndarray]) -> bool:
    return np.array_equal(source.image, problems[0]) and np.array_equal(source.label, problems[1])


# --- Which examples, when


def steps(runs: list[Run], start: int = 0) -> list[np.ndarray]:
    """The indices of every step."""
    return [inputs["index"] for inputs in loop._inputs(runs, start)]


@pytest.mark.parametrize(
    ("phases", "examples", "size", "epochs", "seed"), [(1, 9, 4, 3, 0), (2, 20, 8, 4, 0), (3, 7, 7, 6, 1), (4, 10, 3, 8, 2)]
)
def test_every_epoch_visits_its_own_phase_and_no_example_twice(curriculum, phases, examples, size, epochs, seed):
    config = changed(curriculum, windows=(2, 3, 4, 5)[:phases], examples=examples, batch_size=size, epochs=epochs, seed=seed)
    run = prepare(config, devices=jax.devices()[:1])
    indices = np.array(steps([run]))
    assert run.steps_per_epoch == examples // size and indices.shape == (run.steps, size) == (epochs * (examples // size), size)
    of_epochs = indices.reshape(epochs, -1)
    for epoch, visited in enumerate(of_epochs):
        phase = epoch // (epochs // phases)
        assert run.phase(epoch) == phase
        assert (visited // examples == phase).all() and len(set(visited)) == len(visited) == examples // size * size
    assert all(not np.array_equal(a % examples, b % examples) for a, b in itertools.pairwise(of_epochs))  # in another order
    for start in (1, run.steps // 2 + 1, run.steps):  # a run that is resumed
        np.testing.assert_array_equal(steps([run], start) or indices[:0], indices[start:])
    other = dataclasses.replace(run, config=dataclasses.replace(config, seed=seed + 1))
    both = np.array(steps([run, other]))  # of networks trained together, each by its own seed
    np.testing.assert_array_equal(both, np.stack([indices, steps([other])], axis=-1))
    assert (both // examples == indices[..., None] // examples).all() and not np.array_equal(both[..., 0], both[..., 1])


def test_fine_tuning_goes_on_with_the_last_phase(curriculum):
    tuned = fine_tuning(curriculum, 3)
    assert tuned.data.curriculum == dataclasses.replace(curriculum.data.curriculum, windows=(5,)) and tuned.epochs == 3
    whole, last = (prepare(config, devices=jax.devices()[:1]).data for config in (curriculum, tuned))
    assert (last.phases, len(last.train), last.phase_examples) == (1, 20, 20)
    assert same(last.train, (held(whole.train).image[20:], held(whole.train).label[20:]))
    assert same(last.validation, (held(whole.validation).image[2:], held(whole.validation).label[2:]))
    assert same(last.test, (held(whole.test).image, held(whole.test).label))
    # And so are the images that batch statistics are fitted to.
    batches = list(training_images(prepare(curriculum, devices=jax.devices()[:1]), 9))
    np.testing.assert_array_equal(np.concatenate(batches), held(last.train).image[:16])
    others = dataclasses.replace(curriculum, data=Data("digits", curriculum=curriculum.data.curriculum))
    assert fine_tuning(others).data == others.data


# --- A run


def test_every_line_tells_its_phase_and_the_f1(ran):
    lines = read_metrics(ran[0] / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert [(line["epoch"], line["phase"], line["step"]) for line in epochs] == [(1, 1, 2), (2, 1, 4), (3, 2, 6), (4, 2, 8)]
    for line in epochs:
        assert set(line) == {"kind", "step", "epoch", "phase", "loss", "f1", "validation_loss", "validation_f1"}
        assert 0 <= line["f1"] <= 1 and 0 <= line["validation_f1"] <= 1
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [2, 3, 4, 6, 8] and all({"loss", "f1", "recurrence"} <= set(line) for line in steps)


def test_every_kind_is_tested_and_the_epoch_chosen_is_of_the_last_phase(ran):
    workdir, _ = ran
    result = json.loads((workdir / "result.json").read_text())
    assert result["score"] == "f1" and list(result["last"]["others"]) == KINDS
    for test in (result["last"]["test"], result["selected"]["test"], *result["last"]["others"].values()):
        assert set(test) == {"loss", "f1", "exact", "connected", "shortest", "count"} and test["count"] == 9
        assert 0 <= test["shortest"] <= test["connected"] <= 1 and 0 <= test["exact"] <= test["shortest"]
    assert result["last"]["test"] == result["last"]["others"]["window 5"]
    epochs = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "epoch"]
    best = max(epochs[2:], key=lambda line: line["validation_f1"])
    assert (result["selected"]["epoch"], result["selected"]["validation_f1"]) == (best["epoch"], best["validation_f1"])


def test_validation_is_on_the_phases_own_problems(curriculum, ran):
    _, seen = ran
    kinds = curriculum.data.curriculum.kinds()
    run = prepare(changed(curriculum, validation=0.25), devices=jax.devices()[:1])
    for phase in (0, 1):
        wanted = fixed_set(kinds[KINDS[phase]], "validation", 5)
        assert same(run.data.of_phase("validation", phase), wanted)
        assert all(same(source, wanted) for source in seen[2 * phase : 2 * phase + 2])
    assert same(seen[4], fixed_set(kinds["window 5"], "test", 9))
    assert all(same(source, fixed_set(kinds[kind], "test", 9)) for kind, source in zip(KINDS, seen[5:11], strict=True))
    plain = dataclasses.replace(run.data, phases=1)
    assert plain.of_phase("validation", 0) is plain.validation


def test_without_validation_no_epoch_is_chosen(curriculum, tmp_path):
    config = changed(curriculum, validation=0.0, epochs=2, batch_size=20, far_windows=(), far_sizes=(), far_densities=(), windows=(2, 3))
    result = train(config, tmp_path / "run", quiet=True)
    assert result["selected"] is None and list(result["last"]["others"]) == ["window 2", "window 3"]
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "epoch"]
    assert [line["phase"] for line in lines] == [1, 2] and "validation_f1" not in lines[0]


def test_an_epoch_of_an_early_phase_is_never_chosen(curriculum, tmp_path):
    """Its problems are easier."""
    run, scores = prepare(curriculum, devices=jax.devices()[:1]), iter((0.9, 0.8, 0.3, 0.5))
    with contextlib.ExitStack() as stack:
        track = Track(run, tmp_path, stack)
        variables = track.start().variables
        for epoch in range(1, 5):
            track.add([{"loss": 1.0, "f1": 0.5}])
            track.finish_epoch(epoch, 2 * epoch, variables, lambda *_: {"loss": 1.0, "f1": next(scores)})
        assert (track.progress.best_epoch, track.progress.best_score, track.best.latest) == (4, 0.5, 8)


def test_interrupted_in_any_phase_it_ends_with_the_same_parameters(ran, curriculum, tmp_path, monkeypatch):
    """Bit for bit; stopped in the middle of an epoch of the first phase, and again of the second."""
    config = changed(curriculum, validation=0.25)
    for stop in (3, 5):
        monkeypatch.setattr(loop._Signals, "stop", lambda self, step, stop=stop: signal.SIGTERM if step == stop else 0)
        with pytest.raises(Interrupted, match=f"interrupted at step {stop} of 8"):
            train(config, tmp_path / "run", quiet=True)
    monkeypatch.undo()
    result = train(config, tmp_path / "run", quiet=True)

    def final(workdir: pathlib.Path) -> Any:
        run = prepare(config)
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            return checkpoints.restore(jax.eval_shape(run.init))[0]

    states = final(tmp_path / "run"), final(ran[0])
    assert int(states[0].step) == 8
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)
    timeless = {name: value for name, value in result.items() if name not in ("seconds", "images_per_second")}
    assert timeless == {name: json.loads((ran[0] / "result.json").read_text())[name] for name in timeless}
    epochs = [[line for line in read_metrics(place / "metrics.jsonl") if line["kind"] == "epoch"] for place in (tmp_path / "run", ran[0])]
    for line, wanted in zip(*epochs, strict=True):
        assert line.pop("kind") == wanted["kind"]
        assert line == pytest.approx({name: value for name, value in wanted.items() if name != "kind"}, rel=1e-9)  # sums in another order


# --- Commands


def told(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_configuration_survives_storing(curriculum):
    assert from_json(to_json(curriculum)) == curriculum


def test_training_tells_every_test_set(ran, capsys):
    said = told(capsys, "train", "--workdir", ran[0])
    result = json.loads((ran[0] / "result.json").read_text())
    assert f"test F1        {result['last']['test']['f1']:.2%} (9 images) after the last epoch" in said
    assert f"at epoch {result['selected']['epoch']}, chosen by validation ({result['selected']['validation_f1']:.2%} there)" in said
    for kind, test in result["last"]["others"].items():
        assert f"  {kind:<23} f1 {test['f1']:.2%}, exact {test['exact']:.2%}, connected" in said
    for name in ("learning_curves.png", "similarity.png", "similarity_over_training.png"):
        assert (ran[0] / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("checkpoint", "key"), [("last", "last"), ("best", "selected")])
def test_eval_finds_what_training_reported(ran, capsys, checkpoint, key):
    found = json.loads(told(capsys, "eval", ran[0], "--checkpoint", checkpoint))
    wanted = json.loads((ran[0] / "result.json").read_text())[key]["test"]
    assert {name: found[name] for name in wanted} == wanted and found["data"] == "grids"
    if checkpoint == "last":
        assert json.loads(told(capsys, "eval", ran[0], "--split", "validation"))["count"] == 10  # of both phases


def test_summary_report_and_similarity(ran, capsys):
    assert "spathnet-3-2-2, images of 6x6x2" in told(capsys, "summary", ran[0])
    page = (ran[0] / "report.html").read_text()
    result = json.loads((ran[0] / "result.json").read_text())
    assert f"{result['last']['test']['f1']:.2%}" in page and "test F1 after the last epoch, 9 images" in page
    assert ">F1</" in page and "ccuracy" not in page and "<h1>spathnet-3-2-2 on grids</h1>" in page
    (ran[0] / "report.html").unlink()
    told(capsys, "report", ran[0])
    assert (ran[0] / "report.html").read_text() == page
    said = json.loads(told(capsys, "similarity", ran[0], "--json"))
    assert said["banks"]["layers"]["layers"] == ["layer1", "layer2", "layer3"] and said["epoch"] == 4


def test_folding_makes_a_run_that_is_tuned_on_the_last_phase(ran, capsys, tmp_path):
    arguments = ("fold", ran[0], "--threshold", "0.001", "--reestimate", "2", "--fine-tune", "1")
    said = told(capsys, *arguments, "--output", tmp_path / "folded")
    run, _, step = trained(tmp_path / "folded")
    assert step == 2 and run.config.data.curriculum.windows == (5,) and run.config.penalty.recurrence == 0
    result = json.loads((tmp_path / "folded" / "result.json").read_text())
    before = json.loads((ran[0] / "result.json").read_text())["last"]["test"]
    assert f"trainable, test F1 {before['f1']:.2%}, loss {before['loss']:.4f}" in said and "1 epochs" not in said
    assert f"fine-tuned     {run.model.layout.trainable:,} trainable, test F1 {result['last']['test']['f1']:.2%}" in said  # type: ignore[attr-defined]
    assert list(result["last"]["others"]) == KINDS[1:]


# --- What cannot be


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"epochs": 5}, "epochs is 5, which 2 phases of data set 'grids' cannot share evenly"),
        ({"epochs": 1}, "epochs is 1, which 2 phases"),
        ({"augment": Augment(flip=True)}, "but data set 'grids' has a label for each place; leave augment out"),
        ({"augment": Augment(pad_crop=1)}, "leave augment out"),
        (
            {"model": Model("wrn-16-1")},
            r"'wrn-16-1' gives \(1, 1\) for one image of data set 'grids'; one number a cell is wanted, \(1, 6, 6\)",
        ),
        ({"model": Model("spathnet-3-2-2", num_classes=2)}, "model.num_classes is 2, but data set 'grids' has 1 classes"),
        ({"path": "somewhere"}, "data set 'grids' is drawn as its curriculum says, but path is '.*somewhere'; leave it out"),
        ({"train_examples": 5}, "but train_examples is 5; leave it out"),
        ({"image_size": 8}, "but image_size is 8; leave it out"),
        ({"data_dir": "here"}, "but data_dir is 'here'; leave it out"),
        ({"windows": ()}, "a window or more"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_trained(curriculum, fields, said):
    with pytest.raises((ConfigError, DataError), match=said) as caught:
        prepare(changed(curriculum, **fields), devices=jax.devices()[:1])
    assert "\n" not in str(caught.value)


def test_a_batch_comes_out_of_one_phase(curriculum, tmp_path):
    config = changed(curriculum, batch_size=24)
    with pytest.raises(ConfigError, match="batch_size 24 is larger than the 20 training images of 'grids'"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    check_batch(prepare(changed(curriculum, batch_size=20)))


def test_a_path_net_gives_no_classes(digits):
    plain = create_model("pathnet-2-2", input_shape=(8, 8, 1))
    with pytest.raises(ConfigError, match="one number a class is wanted"):
        prepare(Config(), model=plain, data=digits, devices=jax.devices()[:1])


def test_curricula_of_ones_own(curriculum, digits, tmp_path):
    """Any images may come in phases; here digits, the halves one behind the other."""
    assert isinstance(digits.train, ArraySource)
    halves = dataclasses.replace(digits, phases=2)
    run = prepare(Config(model=Model("wrn-16-1"), epochs=2, batch_size=64), data=halves, devices=jax.devices()[:1])
    indices = steps([run])
    assert run.steps == 4 and all((index < 128).all() for index in indices[:2]) and all((index >= 128).all() for index in indices[2:])
    assert Curriculum() == Config().data.curriculum  # and what it says is of no account
