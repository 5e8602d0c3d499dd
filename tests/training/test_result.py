"""Results and facts come back from JSON as they were, or the file is named."""

import dataclasses
import json
import math

import numpy as np
import pytest

from paramshare.storage import StorageError
from paramshare.tasks import Curves, Measure
from paramshare.training.checkpoint import CheckpointError
from paramshare.training.result import Evaluation, Result, RunFacts, Selected

SCORE = Measure("accuracy", "accuracy", "acc", fraction_of_examples=True)
LAST = Evaluation(0.1, 355, {"accuracy": 352 / 355, "top5": 1.0}, {"cross_entropy": 0.1})
RESULT = Result(
    model="swrn-16-1-1",
    data="digits",
    counts={"banks": 2, "coefficients": 1, "private": 3, "trainable": 6},
    epochs=2,
    steps=4,
    score=SCORE,
    last=LAST,
    others={"far": LAST},
    selected=Selected(1, 0.5, LAST),
    seconds=1.5,
    images_per_second=10.0,
    devices="1 x cpu",
    jax="0.10",
)
FACTS = RunFacts("abc", 58, 6, 355, (8, 8, 1), {"num_classes": 10}, "classification", SCORE)


def test_curves_are_stored_without_points_that_are_not_finite(tmp_path):
    chart = Curves("Precision", "recall", {"cat": [(0.0, 1.0), (0.5, math.nan), (math.inf, 0.0)]})
    evaluation = Evaluation(0.1, 12, {"accuracy": 0.5}, curves=(chart,))
    evaluation.write(tmp_path / "test.json")
    assert Evaluation.read(tmp_path / "test.json") == evaluation
    assert chart.lines == {"cat": [(0.0, 1.0)]}
    assert "curves" not in Evaluation(0.1, 12, {"accuracy": 0.5}).as_json()


def test_what_is_written_comes_back(tmp_path):
    for stored in (RESULT, dataclasses.replace(RESULT, selected=None, others={}), FACTS):
        stored.write(tmp_path / "file")
        assert type(stored).read(tmp_path / "file") == stored
    assert (RESULT.last_score, RESULT.selected_score) == (352 / 355, 352 / 355)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    measures = {"accuracy": math.inf, "top5": -math.inf}
    last = Evaluation(math.nan, np.int64(3), measures)  # pyright: ignore[reportArgumentType]
    result = dataclasses.replace(RESULT, last=last)
    result.write(tmp_path / "file")

    def refuse(name: str):
        raise AssertionError(name)

    json.loads((tmp_path / "file").read_text(), parse_constant=refuse)
    json.dumps(result.as_json(), allow_nan=False)
    stored = Result.read(tmp_path / "file")
    assert math.isnan(stored.last.loss) and stored.last.measures == measures


def test_fields_that_a_file_lacks_take_their_defaults(tmp_path):
    fields = RESULT.as_json()
    for name in ("others", "selected", "images_per_second"):
        del fields[name]
    (tmp_path / "file").write_text(json.dumps(fields))
    stored = Result.read(tmp_path / "file")
    assert stored.others == {} and stored.selected is None and stored.last == LAST


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object, got list"),
        ('{"last": 3}', r"is damaged \(model: "),
        (json.dumps(RESULT.as_json() | {"seconds": "many"}), r"\(seconds: "),
        (json.dumps(RESULT.as_json() | {"epochs": "2"}), r"\(epochs: "),
        (json.dumps(RESULT.as_json() | {"epoch": 2}), r"\(epoch: "),
        (
            json.dumps(RESULT.as_json() | {"score": SCORE.__dict__ | {"colour": 1}}),
            r"\(score.colour: ",
        ),
        (json.dumps(RESULT.as_json() | {"score": {}}), r"\(score.name: "),
        (
            json.dumps(RESULT.as_json() | {"last": Evaluation(1, 2, {"f1": 0.5}).as_json()}),
            "'accuracy' is none of",
        ),
    ],
    ids=[
        "lost",
        "cut",
        "list",
        "fields",
        "type",
        "text",
        "unknown",
        "unknown below",
        "score",
        "measure",
    ],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"result\.json .*{message}.*remove it"):
        Result.read(tmp_path / "result.json")


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match="cannot be written"):
        RESULT.write(tmp_path / "none" / "result.json")


def test_how_a_score_is_described():
    assert LAST.describe(SCORE) == "99.15% (352 of 355 examples)"
    assert Evaluation(0.1, 12, {"accuracy": math.nan}).describe(SCORE) == "- (12 examples)"
    f1 = Evaluation(0.1, 12, {"f1": 0.5})
    assert f1.describe(Measure("f1", "F1 of cells", "f1")) == "50.00% (12 examples)"
    error = Measure("error", "negative error", "err", format_spec=".1f")
    assert Evaluation(0.1, 12, {"error": -3.25}).describe(error) == "-3.2 (12 examples)"


def test_differences_name_the_fact(tmp_path):
    assert FACTS.differences(FACTS) == []
    stored = dataclasses.replace(FACTS, test=12, input_shape=(9, 9, 1))
    assert FACTS.differences(stored) == ["test: 12 -> 355", "input_shape: [9, 9, 1] -> [8, 8, 1]"]
    facts = dataclasses.replace(FACTS, network_options={"sizes": (1, 2)})
    facts.write(tmp_path / "facts")
    assert facts.differences(RunFacts.read(tmp_path / "facts")) == []
