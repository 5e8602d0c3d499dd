"""Grid problems as a builder of tensorflow-datasets: those of `fixed_set`, without TensorFlow."""

from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from paramshare.data import Curriculum, DataError, Tfds
from paramshare.data.grid_problems import GridProblems
from paramshare.data.sets.builders import grids as builder_module
from paramshare.data.sets.builders.grids import GridsConfig, ShortestPaths, config_name
from paramshare.data.sets.grids import fixed_set

SMALL = GridProblems(9, 12, window=6, density=0.2)


def small(
    name: str = "small",
    problems: GridProblems = SMALL,
    examples: int = 25,
    validations: int | None = None,
    tests: int = 10,
) -> GridsConfig:
    return GridsConfig(
        name, problems=problems, examples=examples, validations=validations, tests=tests
    )


def prepared(config: GridsConfig, data_dir) -> Any:
    builder = ShortestPaths(config=config, data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    return builder


def check(examples: Any, problems: GridProblems, part: Any, count: int) -> None:
    """Bit for bit, and in their order."""
    images, labels = fixed_set(problems, part, count)
    assert len(examples) == count
    for i in range(count):
        assert {key: array.dtype for key, array in examples[i].items()} == {
            "image": np.uint8,
            "label": np.uint8,
        }
        np.testing.assert_array_equal(examples[i]["image"], images[i], strict=True)
        np.testing.assert_array_equal(examples[i]["label"], labels[i], strict=True)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_what_is_prepared_are_the_problems_of_fixed_set(tmp_path, monkeypatch, chunk):
    """Also where they are drawn in chunks that do not divide their number."""
    monkeypatch.setattr(builder_module, "_CHUNK", chunk)
    config = small()
    builder = prepared(config, tmp_path)
    assert config.counts() == {"train": 25, "validation": 2, "test": 10}
    assert set(builder.info.splits) == set(config.counts())
    for part, count in config.counts().items():
        check(builder.as_data_source(split=part), SMALL, part, count)


def test_a_cell_is_stored_in_less_than_its_byte(tmp_path):
    """Plain tensors take a byte a cell and more: integers are stored as int64, in base 128."""
    builder = prepared(small(problems=GridProblems(), examples=40), tmp_path)
    assert builder.info.splits["train"].num_bytes < 40 * 32 * 32 * 3 / 4


def test_the_kinds_of_the_curriculum_are_configurations(tmp_path):
    kinds = Curriculum().kinds()
    assert list(ShortestPaths.builder_configs) == [config_name(kind) for kind in kinds]
    assert {"window_5", "window_25", "size_48", "size_64_window_64", "density_0.2"} <= set(
        ShortestPaths.builder_configs
    )
    for kind, problems in kinds.items():
        name = config_name(kind)
        builder: Any = tfds.builder(f"shortest_paths/{name}", data_dir=tmp_path)
        assert (
            isinstance(builder, ShortestPaths)
            and builder.info.full_name == f"shortest_paths/{name}/1.0.0"
        )
        config: Any = builder.builder_config
        assert (config.name, config.problems) == (name, problems)
        assert config.counts() == {
            "train": Curriculum().examples,
            "validation": 500,
            "test": Curriculum().tests,
        }
        features: Any = builder.info.features
        assert {key: feature.shape for key, feature in features.items()} == {
            "image": (problems.height, problems.width, 2),
            "label": (problems.height, problems.width),
        }
        assert all(feature.np_dtype == np.uint8 for feature in features.values())
        assert builder.info.supervised_keys == ("image", "label")
        assert "1902.09701" in builder.info.citation and "1.0.0" in builder.release_notes


def test_window_5_comes_first(tmp_path):
    assert ShortestPaths(data_dir=tmp_path).info.full_name == "shortest_paths/window_5/1.0.0"


def test_examples_of_a_default_configuration(tmp_path):
    keys, examples = zip(
        *ShortestPaths(config="size_48", data_dir=tmp_path)._generate_examples("validation", 20),
        strict=True,
    )
    assert keys == tuple(range(20))
    check(examples, GridProblems(48, 48, window=21), "validation", 20)


@pytest.mark.parametrize(
    ("side", "count", "most"), [(8, 2500, 1000), (64, 1500, 1000), (1024, 9, 4), (3000, 3, 1)]
)
def test_problems_are_drawn_in_chunks_of_bounded_size(tmp_path, monkeypatch, side, count, most):
    drawn = []

    def draw(self, seed, indices):
        drawn.append(list(indices))
        return (np.zeros(len(indices)),) * 2

    monkeypatch.setattr(GridProblems, "draw", draw)
    examples = ShortestPaths(
        config=small(problems=GridProblems(side, side)), data_dir=tmp_path
    )._generate_examples("train", count)
    next(examples)
    assert len(drawn) == 1  # the next chunk when it is wanted
    assert len(list(examples)) == count - 1
    assert [number for numbers in drawn for number in numbers] == list(range(count)) and max(
        map(len, drawn)
    ) == most


def test_a_part_of_no_problems_is_left_out(tmp_path):
    builder = prepared(small(examples=0), tmp_path)
    assert {part: split.num_examples for part, split in builder.info.splits.items()} == {"test": 10}
    assert small(validations=0).counts()["validation"] == 0


def test_what_was_prepared_is_opened_by_its_name_alone(tmp_path):
    """Also a configuration of a user's, of which TFDS has no code."""
    prepared(small(), tmp_path)
    assert ShortestPaths(config=small(), data_dir=tmp_path).is_prepared()
    check(
        tfds.data_source("shortest_paths/small", data_dir=tmp_path, split="test"), SMALL, "test", 10
    )


@pytest.mark.parametrize(
    "other",
    [
        small(problems=GridProblems(9, 12, window=6, density=0.3)),
        small(tests=11),
        small(validations=3),
    ],
)
def test_other_problems_under_the_same_name_are_refused(tmp_path, other):
    """Their shapes are the same, so that they could be read by mistake."""
    prepared(small(), tmp_path)
    with pytest.raises(DataError, match="give the GridsConfig another name") as caught:
        ShortestPaths(config=other, data_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_preparing_tfrecord_needs_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(builder_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        DataError,
        match=r"needs TensorFlow, which is not installed; pass file_format=\"array_record\"",
    ) as caught:
        ShortestPaths(config=small(), data_dir=tmp_path).download_and_prepare()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*1.0.0*"))
    builder: Any = ShortestPaths(config=small(), data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    check(builder.as_data_source(split="train"), SMALL, "train", 25)
    ShortestPaths(config=small(), data_dir=tmp_path).download_and_prepare()  # there already


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a b"}, "name is 'a b'"),
        ({"name": ""}, "name is ''"),
        ({"name": ".."}, "name is '..'"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"problems": 5}, "problems is 5; it must be a GridProblems"),
        ({"examples": -1}, "examples is -1; it must be an integer, 0 or more"),
        ({"tests": 2.5}, "tests is 2.5"),
        ({"validations": True}, "validations is True"),
        ({"examples": 0, "tests": 0}, "has no problems"),
    ],
    ids=str,
)
def test_impossible_configurations(options, words):
    with pytest.raises(DataError, match=words) as caught:
        small(**options)
    assert "\n" not in str(caught.value)


def test_configurations_are_grids_configs_of_names_of_their_own(tmp_path):
    with pytest.raises(DataError, match="must be a name or a GridsConfig"):
        ShortestPaths(config=tfds.core.BuilderConfig("small"), data_dir=tmp_path)
    with pytest.raises(
        ValueError, match="Cannot name a custom BuilderConfig the same as an available"
    ):
        ShortestPaths(config=small("window_5"), data_dir=tmp_path)


def test_load_refuses_them_in_one_line():
    """Training draws "grids" itself: labels that are no class are not read from disk."""
    with (
        tfds.testing.mock_data(num_examples=2),
        pytest.raises(
            DataError,
            match=r"labels of 'shortest_paths/window_5' are uint8 of shape \(32, 32\)",
        ) as caught,
    ):
        Tfds("shortest_paths/window_5").load()
    assert "\n" not in str(caught.value)
