"""The registry: a data set in one file, names, fields, and JSON that remembers the set."""

import dataclasses
import runpy
from typing import Annotated

import numpy as np
import pydantic
import pytest

from paramshare.data import (
    AnyData,
    Coco,
    Curriculum,
    DataConfig,
    DataError,
    Dataset,
    Digits,
    Grids,
    Idx,
    InMemory,
    Tfds,
    data_config,
    from_arrays,
    register,
    registry,
    switch,
)
from paramshare.tasks.config import Fraction, checked_dataclass


@register("squares")
class Squares(DataConfig):
    """A data set in one file: grey squares, classified by whether they are bright."""

    name: str = "squares"
    validation: Fraction = 0.5
    """Fraction held out."""
    side: Annotated[int, pydantic.Field(ge=2)] = 4
    """Side of the images in pixels."""

    def load(self, seed: int = 0) -> Dataset:
        grey = np.arange(0, 256, 8, dtype=np.uint8)
        image = np.broadcast_to(grey[:, None, None, None], (32, self.side, self.side, 1))
        part = image, (grey > 127).astype(int)
        return from_arrays(part, part, name=self.name, validation=self.validation, seed=seed)


@checked_dataclass(DataError)
class Holder:
    """What a run's configuration does with it."""

    data: AnyData = Digits()


HOLDER = pydantic.TypeAdapter(Holder)


def test_a_registered_set_is_loaded_by_name():
    config = data_config("squares")
    assert config == Squares()
    data = config.load(seed=1)
    assert (data.name, data.input_shape, len(data.validation)) == ("squares", (4, 4, 1), 16)
    assert Squares(side=6).load().input_shape == (6, 6, 1)
    assert config.last_phase() is config


def test_a_set_has_only_its_own_fields():
    assert [field.name for field in dataclasses.fields(Squares)] == ["name", "validation", "side"]
    with pytest.raises(DataError, match="Squares: path: unexpected keyword argument"):
        Squares(path="x")  # pyright: ignore[reportCallIssue]
    with pytest.raises(DataError, match="side must be greater than or equal to 2, got 1"):
        Squares(side=1)


def test_fields_describe_themselves_inherited_ones_too():
    for config in (Squares, Coco, Digits, Idx, Tfds, Grids, InMemory):
        for name, field in config.__pydantic_fields__.items():  # pyright: ignore
            assert field.description, f"{config.__name__}.{name}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("digits", Digits()),
        ("idx", Idx()),
        ("coco", Coco()),
        ("coco/2017", Tfds("coco/2017")),
        ("grids", Grids()),
        ("cifar10", Tfds("cifar10")),
        ("no such set", Tfds("no such set")),  # refused when it is loaded
    ],
)
def test_names_have_configurations(name, expected):
    assert data_config(name) == expected


def test_switching_keeps_common_fields():
    config = Idx(path="/folder", validation=0.3, train_examples=7)
    assert switch(config, "mnist") == Tfds("mnist", validation=0.3, train_examples=7)
    for one, other in ((Tfds("cifar10"), "coco"), (Coco(), "cifar10")):
        assert switch(switch(one, other), one.name) == one  # neither states a size
    assert switch(config, "squares") == Squares(validation=0.3)
    assert switch(config, "idx") is config


@pytest.mark.parametrize(
    "config",
    [
        Squares(side=9),
        Idx(path="/folder"),
        Coco(path="/folder", task="pose", test="a.json", person_crop=False),
        Tfds("cifar10", image_size=8),
        InMemory("arrays of mine"),
        Grids(curriculum=Curriculum(windows=(3, 4))),
    ],
    ids=lambda config: config.name,
)
def test_json_remembers_the_set(config):
    text = HOLDER.dump_json(Holder(config))
    assert HOLDER.validate_json(text) == Holder(config)
    assert hash(HOLDER.validate_json(text)) == hash(Holder(config))


def test_json_of_an_unknown_set_or_value_is_refused():
    with pytest.raises(ValueError, match=r"data.kind is 'circles', which is not registered"):
        HOLDER.validate_json('{"data": {"kind": "circles", "name": "circles"}}')
    with pytest.raises(ValueError, match=r"validation must be less than 1, got 3"):
        HOLDER.validate_json('{"data": {"kind": "digits", "validation": 3}}')
    with pytest.raises(DataError, match="data must be an instance of DataConfig, got 'digits'"):
        Holder("digits")  # pyright: ignore[reportArgumentType]


SHADES = """
from paramshare.data import DataConfig, register

@register("shades")
class Shades(DataConfig):
    name: str = "shades"
    side: int = 4
"""


def test_json_names_the_file_that_registers_the_set(tmp_path, monkeypatch):
    file = tmp_path / "sets.py"
    file.write_text(SHADES)
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    first, second = (Holder(runpy.run_path(str(file))["Shades"](side=5)) for _ in range(2))
    text = HOLDER.dump_json(first)
    assert text == HOLDER.dump_json(second)  # the file may be loaded again

    del registry._CONFIGS["shades"]  # as in another process
    assert dataclasses.asdict(HOLDER.validate_json(text)) == dataclasses.asdict(first)
    file.write_text("")
    del registry._CONFIGS["shades"]
    with pytest.raises(ValueError, match=r"sets\.py does not register it; restore it"):
        HOLDER.validate_json(text)
    file.unlink()
    with pytest.raises(ValueError, match=r"sets\.py.* cannot be imported .*; restore it"):
        HOLDER.validate_json(text)


def test_a_set_that_is_not_registered_is_refused():
    @checked_dataclass(DataError)
    class Derived(Squares):
        """Its base class is registered."""

    with pytest.raises(DataError, match="class Derived is not registered; decorate it"):
        Holder(Derived())


def test_a_name_is_registered_once():
    with pytest.raises(DataError, match="'digits' is registered already"):

        @register("digits")
        class Others(DataConfig):
            pass


def test_arrays_are_not_stored_with_a_configuration():
    with pytest.raises(DataError, match=r"'mine' was passed as arrays .* pass it again"):
        InMemory("mine").load()
