"""The studies: what they train, measure, draw and write."""

import dataclasses
import json
import os
import pathlib
import runpy
import sys
from typing import Any

import jax
import numpy as np
import pytest

from paramshare import ParamshareError
from paramshare.cli import run_command
from paramshare.data.grid_problems import smallest_window
from paramshare.data.sets.grids import fixed_set
from paramshare.tasks import Measure
from paramshare.training.config import ConfigError, load_file
from paramshare.training.result import Evaluation, Result

pytestmark = pytest.mark.usefixtures("equal_runs_share_programs")

STUDIES = pathlib.Path(__file__).parents[1] / "experiments" / "studies"


@pytest.fixture(autouse=True)
def _lenient_promotion():
    # optax's schedules multiply integer steps with floats.
    with jax.numpy_dtype_promotion("standard"):
        yield


def study(name: str, monkeypatch, *args: Any) -> dict[str, Any]:
    """The globals of a study, ready for `main()`, as if it were run as a script."""
    script = STUDIES / f"{name}.py"
    monkeypatch.syspath_prepend(script.parent)
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # studies add an option for themselves
    return runpy.run_path(str(script))["main"].__globals__


GRIDS = """
from paramshare.data import Curriculum, Grids
from paramshare.training.config import Config, Model, Optimizer, Schedule

curriculum = Curriculum(
    6, 0.1, (2, 4), 16, 3, far_windows=(6,), far_sizes=(8,), far_densities=()
)
config = Config(
    model=Model("spathnet-3-2-3"),
    data=Grids(curriculum=curriculum),
    optimizer=Optimizer("adam", weight_decay=0.0),
    schedule=Schedule("constant"),
    epochs=2,
    batch_size=8,
    log_every=1,
)
"""


@pytest.fixture
def grids(tmp_path) -> pathlib.Path:
    (tmp_path / "config.py").write_text(GRIDS)
    return tmp_path / "config.py"


def test_networks_are_compared_on_any_task(grids, tmp_path, monkeypatch, capsys):
    """One command for a task without accuracy; rerun, it reads the finished runs."""
    out = tmp_path / "out"
    args = (grids, "--models", "pathnet-2-2", "--seeds", "0", "1", "--out", out)
    study("compare", monkeypatch, *args)["main"]()
    text = (out / "table.md").read_text()
    assert (
        "test F1, last epoch, mean of 2 seeds" in text and text.strip() in capsys.readouterr().out
    )
    results = [json.loads((out / f"pathnet-2-2-seed{i}/result.json").read_text()) for i in (0, 1)]
    scores = [result["last"]["measures"]["f1"] for result in results]
    assert f"{np.mean(scores):.2%} ({np.std(scores, ddof=1):.2%})" in text
    before = (out / "pathnet-2-2-seed0" / "metrics.jsonl").stat().st_mtime_ns
    study("compare", monkeypatch, *args)["main"]()
    assert (out / "pathnet-2-2-seed0" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_networks_are_folded_on_any_task(grids, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = (grids, "--model", "spathnet-2-2-1", "--seeds", "0", "--out", out, "--thresholds", "0.9")
    study("folding", monkeypatch, *args)["main"]()
    records = json.loads((out / "folding.json").read_text())
    assert [record["fold"] for record in records] == ["not folded", "0.9", "period 2"] * 2
    for record in records[1::3]:  # one template: one kernel, and what is computed stays the same
        assert record["banks"][0]["groups"] == [0, 0] and "tuned" in record
        assert record["after"] == pytest.approx(record["before"], abs=1e-6)
    assert "F1 before" in (out / "table.md").read_text()


ROTATED = """
from paramshare.data import RotatedDigits
from paramshare.training.config import Config, Model

config = Config(model=Model("rotnet"), data=RotatedDigits(examples=4, tests=2))
"""


def test_gains_of_rotated_digits_are_shared_out(tmp_path, monkeypatch, capsys):
    """Scores of networks that are not trained here; the tables and the picture are real."""
    (tmp_path / "config.py").write_text(ROTATED)
    out = tmp_path / "out"
    out.mkdir()
    args = (tmp_path / "config.py", "--groups", "4", "--arms", "repeat", "--out", out)
    module = study("rotated_digits", monkeypatch, *args, "--seeds", "0", "1", "2")
    scores = {
        "rotnet": (0.80, 0.81, 0.82),
        "rotnet-c4": (0.90, 0.91, 0.91),
        "rotnet-c4-repeat": (0.84, 0.85, 0.85),
    }
    trained, accuracy = {}, Measure("accuracy", "accuracy", "acc")

    def run(configs: Any, seeds: Any, folder: pathlib.Path) -> Any:
        assert folder == out and list(seeds) == [0, 1, 2]
        trained.update({name: config.model.name for name, config in configs.items()})

        def result(name: str, score: float) -> Result:
            last = Evaluation(0.1, 100, {"accuracy": score})
            return Result(name, "rotated_digits", {"trainable": 5}, 1, 2, accuracy, last)

        return {name: [result(name, score) for score in scores[name]] for name in configs}

    monkeypatch.setattr(module["sweep"], "run", run)
    module["main"]()
    assert trained == {name: name for name in scores}
    text = (out / "table.md").read_text()
    assert "| plain baseline | `rotnet` | 5 | 81.00% ± 2.48% | 80.00%, 81.00%, 82.00% |" in text
    gain, own = [0.10, 0.10, 0.09], [0.04, 0.04, 0.03]
    low, high = module["fieller"](own, gain)
    assert f"| {np.mean(own) / np.mean(gain):.2f} ({low:.2f} to {high:.2f}) |" in text
    where = "inside" if low <= 0.4 <= high else "above" if high < 0.4 else "below"
    assert f"up to 0.40: C4: {where} the interval." in text
    assert module["verdict"]([0.1, 0.11], [0.2, 0.1]).startswith("not decided")
    assert module["verdict"]([0.01] * 3, [0.5, 0.51, 0.5]) == "above the interval"
    for picture in ("rotated_digits", "digits"):
        assert (out / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    assert text.strip() in capsys.readouterr().out
    shown = module["shown"]
    assert shown([0.02], [0.04]) == "0.50 (one seed: no interval)"
    assert shown([0.02, 0.03], [-0.04, -0.05]) == "there is no gain to share"
    assert "not significant" in shown([0.20, 0.21, 0.19], [0.01, -0.01, 0.02])


def test_intervals_of_ratios_cover_as_often_as_they_say(monkeypatch):
    """For normal values with a common part, as differences from one baseline have."""
    fieller = study("rotated_digits", monkeypatch)["fieller"]
    rng = np.random.default_rng(0)
    hits, trials = 0, 2000
    for baseline, first, second in rng.normal(0, 0.3, (trials, 3, 5)):
        limits = fieller(1 + first - baseline, 3 + second - baseline)
        hits += limits is None or limits[0] <= 1 / 3 <= limits[1]
    assert abs(hits / trials - 0.95) < 0.015  # three standard errors
    assert fieller([1.0, 2.0], [0.1, -0.1]) is None  # the gain may be 0: any ratio may be


def test_unknown_arms_of_rotated_digits_are_refused(tmp_path, monkeypatch):
    (tmp_path / "config.py").write_text(ROTATED)
    args = (tmp_path / "config.py", "--arms", "gan", "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match="--arms has gan; the arms are repeat"):
        study("rotated_digits", monkeypatch, *args)["main"]()
    for option, message in (
        (("--groups", "4", "5"), "must be c4, c8 or c16; got c5"),
        (("--seeds", "0", "0"), "give every seed once"),
    ):
        wrong = study("rotated_digits", monkeypatch, args[0], *option, *args[-2:])
        with pytest.raises(ParamshareError, match=message):
            wrong["main"]()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.validation", "0"], "needs a validation after each epoch"),
        (["--data.curriculum.far-windows"], "at least one far window"),
        (["--data.name", "digits"], "needs a path net on grids"),
        (["--arms", "gan"], "the arms are cnn, scnn3, scnn3r, loop1"),
        (["--processes", "0"], "must be 1 or more"),
    ],
    ids=str,
)
def test_bad_comparisons_are_refused_before_training(
    options, message, grids, tmp_path, monkeypatch
):
    main = study("shortest_paths_compare", monkeypatch, grids, "--out", tmp_path / "out", *options)
    with pytest.raises(ConfigError, match=message):
        main["main"]()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_shortest_paths_are_compared(grids, tmp_path, monkeypatch):
    """What is measured of every arm, its tables and pictures; finished runs are not repeated."""
    out = tmp_path / "out"

    def compare(*names: str, seeds: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        options = ["--arms", *names, "--seeds", *seeds, "--optimizer.learning-rate", "0.02"]
        module = study("shortest_paths_compare", monkeypatch, grids, "--out", out, *options)
        arms = module["arms"](3)
        # One template for all layers folds for certain, as others do after long training.
        arms["scnn1"] = dataclasses.replace(arms["scnn1"], recurrence=0.01)
        monkeypatch.setitem(module, "arms", lambda depth: arms)
        monkeypatch.setitem(module, "MORE", (1.0, 2.0))
        assert run_command(module["main"]) == 0
        for picture in ("curves", "grids", "reach"):
            assert (out / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
            (out / f"{picture}.png").unlink()
        return json.loads((out / "measured.json").read_text()), module

    records, module = compare("loop1", "scnn3r", "scnn1", seeds="0")
    by_arm = {record["arm"]: record for record in records}
    kernel, private = 9 * 2 * 2, 2 * 2 + 3 * 2 * 2 + 2 + 1
    assert {name: record["trainable"] for name, record in by_arm.items()} == {
        "loop1": kernel + private,
        "scnn3r": 3 * kernel + 3 * 3 + private,
        "scnn1": kernel + 3 + private,
    }
    # Test sets of the curriculum, and their problems with points farther apart than in training.
    kinds = load_file(grids).data.curriculum.kinds()  # pyright: ignore[reportAttributeAccessIssue]
    beyond = [
        f"{kind}, beyond"
        for kind, problems in kinds.items()
        if (smallest_window(fixed_set(problems, "test", 3)[0]) > 4).any()
    ]
    assert beyond
    for record in records:
        assert list(record["tests"]) == [*kinds, *beyond]
        assert [line["phase"] for line in record["epochs"]] == [1, 2]
        assert [step for step, _ in record["steps"]] == [1, 2, 3, 4]
        assert [epoch for epoch, _ in record["similar"]] == [0, 1, 2]
    # Only one template folds after so few steps. The fold changes nothing that is computed.
    assert "tests" not in by_arm["scnn3r"]["fold"] and "fold" not in by_arm["loop1"]
    assert [name for name in by_arm if "longer" in by_arm[name]] == ["loop1", "scnn1"]
    fold, longer = by_arm["scnn1"]["fold"], by_arm["loop1"]["longer"]
    assert (fold["groups"], fold["period"]) == ([0, 0, 0], 1)
    # A loop at its trained depth gives the results of training; deeper ones try all of `HOW`.
    assert [(entry["depth"], entry["how"]) for entry in longer[::2]] == [
        (3, "middle"),
        (6, "middle"),
        (6, "stretch"),
        (6, "last"),
    ]
    for arm, tests in (("scnn1", fold["tests"]), ("loop1", longer[0]["tests"])):
        for kind, test in tests.items():
            expected = by_arm[arm]["tests"][kind]["f1"]
            assert test["f1"] == pytest.approx(expected, abs=1e-6), (arm, kind)
    text = (out / "table.md").read_text()
    deeper, usual = (entry["tests"]["size 8, window 8"]["f1"] for entry in (longer[-1], longer[1]))
    for part in (f"{deeper - usual:+.3f} ± nan)", "Folding at similarity .9", "learning-rate 0.02"):
        assert part in text

    # Differences from a CNN of the same seed; here the loop takes its name.
    pair = [by_arm["loop1"] | {"arm": "cnn"}, by_arm["scnn3r"]]
    against = module["tables"](pair, {"cnn": "CNN", "scnn3r": "SCNN"})
    one, other = ([x["validation"] for x in by_arm[n]["epochs"]] for n in ("scnn3r", "loop1"))
    gains = [a - b for a, b in zip(one, other, strict=True)]  # one epoch per phase
    row = " | ".join(f"{gain:+.3f} ± nan" for gain in [*gains, gains[1]])
    title = "Validation F1 over all epochs of each phase, difference from the CNN of the same seed:"
    assert against.split(title)[1].split("\n\n")[1].splitlines()[2] == f"| SCNN | {row} |"

    # Two seeds: the finished run is read and the other one trained. The interval is Student's.
    metrics = out / "scnn3r-seed0" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    both, _ = compare("scnn3r", seeds="01")
    assert metrics.stat().st_mtime_ns == before and both[0] == by_arm["scnn3r"]
    f1 = [record["tests"]["window 6"]["f1"] for record in both]
    half = abs(f1[1] - f1[0]) / 2 * 12.7062  # quantile of one degree of freedom
    assert f"{np.mean(f1):.3f} ± {half:.3f} |" in (out / "table.md").read_text()
