"""Grid problems as a builder of tensorflow-datasets: what is stored are the problems of `fixed_set`, and TensorFlow is not needed."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from paramshare.training.data import Curriculum, DataError, grids_builder, load
from paramshare.training.data.curriculum import fixed_set
from paramshare.training.data.grids import Grids
from paramshare.training.data.grids_builder import GridsConfig, ShortestPaths, config_name

SMALL = Grids(9, 12, window=6, density=0.2)


def small(name: str = "small", grids: Grids = SMALL, examples: int = 25, validations: int | None = None, tests: int = 10) -> GridsConfig:
    return GridsConfig(name, grids=grids, examples=examples, validations=validations, tests=tests)


def prepared(config: GridsConfig, data_dir) -> Any:
    builder = ShortestPaths(config=config, data_dir=data_dir)
    builder.download_and_prepare(file_format="array_record")
    return builder


def check(examples: Any, grids: Grids, part: Any, count: int) -> None:
    """Bit for bit, and in their order."""
    images, labels = fixed_set(grids, part, count)
    assert len(examples) == count
    for i in range(count):
        assert {key: array.dtype for key, array in examples[i].items()} == {"image": np.uint8, "label": np.uint8}
        np.testing.assert_array_equal(examples[i]["image"], images[i], strict=True)
        np.testing.assert_array_equal(examples[i]["label"], labels[i], strict=True)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_what_is_prepared_are_the_problems_of_fixed_set(tmp_path, monkeypatch, chunk):
    """Also where they are drawn in chunks that do not divide their number."""
    monkeypatch.setattr(grids_builder, "_CHUNK", chunk)
    config = small()
    builder = prepared(config, tmp_path)
    assert config.counts() == {"train": 25, "validation": 2, "test": 10}
    assert set(builder.info.splits) == set(config.counts())
    for part, count in config.counts().items():
        check(builder.as_data_source(split=part), SMALL, part, count)


def test_a_cell_is_stored_in_less_than_its_byte(tmp_path):
    """Plain tensors of TFDS's take a byte a cell and more: integers are stored as int64, in base 128."""
    builder = prepared(small(grids=Grids(), examples=40), tmp_path)
    assert builder.info.splits["train"].num_bytes < 40 * 32 * 32 * 3 / 4


def test_the_kinds_of_the_curriculum_are_configurations(tmp_path):
    kinds = Curriculum().kinds()
    assert list(ShortestPaths.builder_configs) == [config_name(kind) for kind in kinds]
    assert {"window_5", "window_25", "size_48", "size_64_window_64", "density_0.2"} <= set(ShortestPaths.builder_configs)
    for kind, grids in kinds.items():
        name = config_name(kind)
        builder: Any = tfds.builder(f"shortest_paths/{name}", data_dir=tmp_path)
        assert isinstance(builder, ShortestPaths) and builder.info.full_name == f"shortest_paths/{name}/1.0.0"
        config: Any = builder.builder_config
        assert (config.name, config.grids) == (name, grids)
        assert config.counts() == {"train": Curriculum().examples, "validation": 500, "test": Curriculum().tests}
        features: Any = builder.info.features
        assert {key: feature.shape for key, feature in features.items()} == {
            "image": (grids.height, grids.width, 2),
            "label": (grids.height, grids.width),
        }
        assert all(feature.np_dtype == np.uint8 for feature in features.values())
        assert builder.info.supervised_keys == ("image", "label")
        assert "1902.09701" in builder.info.citation and "1.0.0" in builder.release_notes


def test_window_5_comes_first(tmp_path):
    assert ShortestPaths(data_dir=tmp_path).info.full_name == "shortest_paths/window_5/1.0.0"


def test_examples_of_a_default_configuration(tmp_path):
    keys, examples = zip(*ShortestPaths(config="size_48", data_dir=tmp_path)._generate_examples("validation", 20), strict=True)
    assert keys == tuple(range(20))
    check(examples, Grids(48, 48, window=21), "validation", 20)


@pytest.mark.parametrize(("side", "count", "most"), [(8, 2500, 1000), (64, 1500, 1000), (1024, 9, 4), (3000, 3, 1)])
def test_problems_are_drawn_in_chunks_of_bounded_size(tmp_path, monkeypatch, side, count, most):
    drawn = []

    def draw(self, seed, indices):
        drawn.append(list(indices))
        return (np.zeros(len(indices)),) * 2

    monkeypatch.setattr(Grids, "draw", draw)
    examples = ShortestPaths(config=small(grids=Grids(side, side)), data_dir=tmp_path)._generate_examples("train", count)
    next(examples)
    assert len(drawn) == 1  # the next chunk when it is wanted
    assert len(list(examples)) == count - 1
    assert [number for numbers in drawn for number in numbers] == list(range(count)) and max(map(len, drawn)) == most


def test_a_part_of_no_problems_is_left_out(tmp_path):
    builder = prepared(small(examples=0), tmp_path)
    assert {part: split.num_examples for part, split in builder.info.splits.items()} == {"test": 10}
    assert small(validations=0).counts()["validation"] == 0


def test_what_was_prepared_is_opened_by_its_name_alone(tmp_path):
    """Also a configuration of a user's, of which TFDS has no code."""
    prepared(small(), tmp_path)
    assert ShortestPaths(config=small(), data_dir=tmp_path).is_prepared()
    check(tfds.data_source("shortest_paths/small", data_dir=tmp_path, split="test"), SMALL, "test", 10)


@pytest.mark.parametrize("other", [small(grids=Grids(9, 12, window=6, density=0.3)), small(tests=11), small(validations=3)])
def test_other_problems_under_the_same_name_are_told(tmp_path, other):
    """They would be read for those that were asked for: shapes are the same."""
    prepared(small(), tmp_path)
    with pytest.raises(DataError, match="give the GridsConfig another name") as told:
        ShortestPaths(config=other, data_dir=tmp_path)
    assert "\n" not in str(told.value)


def test_preparing_tfrecord_without_tensorflow_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(grids_builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs TensorFlow, and that is not installed; pass file_format=\"array_record\"") as told:
        ShortestPaths(config=small(), data_dir=tmp_path).download_and_prepare()
    assert "\n" not in str(told.value)
    assert not list(tmp_path.rglob("*1.0.0*"))
    builder: Any = ShortestPaths(config=small(), data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    check(builder.as_data_source(split="train"), SMALL, "train", 25)
    ShortestPaths(config=small(), data_dir=tmp_path).download_and_prepare()  # there already


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "a b"}, "name='a b'"),
        ({"name": ""}, "name=''"),
        ({"name": ".."}, "name='..'"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"grids": 5}, "grids=5 is no kind of problem; pass a Grids"),
        ({"examples": -1}, "examples=-1; pass an integer, 0 or more"),
        ({"tests": 2.5}, "tests=2.5"),
        ({"validations": True}, "validations=True"),
        ({"examples": 0, "tests": 0}, "holds no problem"),
    ],
    ids=str,
)
def test_impossible_configurations(options, words):
    with pytest.raises(DataError, match=words) as told:
        small(**options)
    assert "\n" not in str(told.value)


def test_configurations_are_grids_configs_of_names_of_their_own(tmp_path):
    with pytest.raises(DataError, match="pass a name or a GridsConfig"):
        ShortestPaths(config=tfds.core.BuilderConfig("small"), data_dir=tmp_path)
    with pytest.raises(ValueError, match="Cannot name a custom BuilderConfig the same as an available"):
        ShortestPaths(config=small("window_5"), data_dir=tmp_path)


def test_load_refuses_them_in_one_line():
    """Training asks for "grids": labels that are no class are not read from disk."""
    with (
        tfds.testing.mock_data(num_examples=2),
        pytest.raises(DataError, match=r"labels of 'shortest_paths/window_5' are uint8 of shape \(32, 32\); one integer is wanted") as told,
    ):
        load("shortest_paths/window_5")
    assert "\n" not in str(told.value)


def test_importing_the_module_registers_the_set_and_the_package_does_without():
    program = """if True:
        import sys, paramshare.training.data
        print("tensorflow_datasets" in sys.modules)
        import paramshare.training.data.grids_builder, tensorflow_datasets
        print("shortest_paths" in tensorflow_datasets.list_builders(with_community_datasets=False), "tensorflow" in sys.modules)
    """
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert told == ["False", "True", "False"]
