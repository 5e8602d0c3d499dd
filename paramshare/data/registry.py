"""The registry of data sets: a configuration dataclass for each, by name.

A data set is one file:

    @register("squares")
    class Squares(DataConfig):
        name: str = "squares"
        side: Annotated[int, pydantic.Field(ge=2)] = 8

        def load(self, seed: int = 0) -> Dataset:
            return from_arrays(...)

After the file is imported, `Config(data=Squares(side=16))` trains on it, and so does
`--data.name squares --data.side 16`. A string after a field describes it on the command line.

The JSON of a configuration also names the module or the file that registers its data set, unless
the set comes with the library. Reading the JSON imports that module, or runs that file.
"""

import dataclasses
import importlib
import json
import pathlib
import runpy
import sys
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

import pydantic

from paramshare.data.dataset import Dataset
from paramshare.data.error import DataError
from paramshare.errors import one_line
from paramshare.tasks.config import checked_dataclass, describe

T = TypeVar("T", bound="DataConfig")

_CONFIGS: dict[str, type["DataConfig"]] = {}
OTHERS = "tfds"  # the kind of all names that are not registered
PASSED = "arrays"  # the kind of what is passed to `train` in Python


@checked_dataclass(DataError)
class DataConfig:
    """Which data set, with its options. The base class of the dataclasses in the registry."""

    name: str
    """Name of the data set."""

    kind: ClassVar[str]
    """Name in the registry; `register` sets it."""
    defined_in: ClassVar[str | None]
    """Module or absolute path of the file that registers it; None for the library's own sets and
    those of a notebook. `register` sets it."""

    def load(self, seed: int = 0) -> Dataset:
        """Loads the data set.

        Args:
          seed: seed of what is random, such as which examples are held out for validation.

        Raises:
          DataError: if it cannot be loaded.
        """
        raise NotImplementedError

    def last_phase(self) -> "DataConfig":
        """The last phase of a curriculum alone; the same data set where there is none."""
        return self


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def register(kind: str) -> Callable[[type[T]], type[T]]:
    """A decorator that makes a checked, frozen dataclass of a `DataConfig` and registers it.

    Args:
      kind: the name that asks for it, the default of the field `name`.

    Raises:
      DataError: if the name is taken.
    """

    def decorate(cls: type[T]) -> type[T]:
        if kind in _CONFIGS and _CONFIGS[kind].__qualname__ != cls.__qualname__:
            raise DataError(f"the data set {kind!r} is registered already; choose another name")
        config_class = checked_dataclass(DataError)(cls)
        config_class.kind = kind
        config_class.defined_in = _origin(sys._getframe(1).f_globals)
        _CONFIGS[kind] = config_class
        return config_class

    return decorate


def names() -> list[str]:
    """The names of the registered data sets, those that can be loaded by name.

    Example:
      >>> import paramshare.data
      >>> "digits" in names()
      True
    """
    return sorted(set(_CONFIGS) - {OTHERS, PASSED})


def data_config(name: str) -> DataConfig:
    """The default configuration of a data set; one of tensorflow-datasets if it is not registered.

    Example:
      >>> import paramshare.data
      >>> data_config("digits").validation
      0.1
      >>> type(data_config("cifar10")).__name__
      'Tfds'
    """
    return _CONFIGS.get(name, _CONFIGS[OTHERS])(name=name)


def switch(config: DataConfig, name: str) -> DataConfig:
    """The configuration of another data set, with the values of the fields that both have.

    Example:
      >>> import paramshare.data
      >>> switch(paramshare.data.Digits(validation=0.2), "cifar10").validation
      0.2
    """
    if name == config.name:
        return config
    other = data_config(name)
    common = {field.name for field in dataclasses.fields(other)} - {"name"}
    return dataclasses.replace(
        other,
        **{
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name in common
        },
    )


def _origin(module: dict[str, Any]) -> str | None:
    """The name of a module in a package, else its file; from the module's globals."""
    spec, file = module.get("__spec__"), module.get("__file__")
    if spec is not None and "." in spec.name:
        return None if spec.name.startswith("paramshare.data.") else spec.name
    return file and str(pathlib.Path(file).absolute())


def _check_registered(config: DataConfig) -> None:
    if "kind" not in vars(type(config)):  # a base class may have one
        raise DataError(
            f"the data set class {type(config).__name__} is not registered; decorate it with "
            "@paramshare.data.register(NAME)"
        )


def _to_json(config: DataConfig) -> dict[str, Any]:
    _check_registered(config)
    fields = pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")
    origin = {"defined_in": config.defined_in} if config.defined_in else {}
    return {"kind": config.kind, **origin, **fields}


def _import(kind: str, origin: str) -> None:
    """Imports the module, or runs the file, that registers a data set."""
    remedy = "restore it, or import the module that registers the data set"
    try:
        if pathlib.Path(origin).is_absolute():
            runpy.run_path(origin)
        else:
            importlib.import_module(origin)
    except (Exception, SystemExit) as error:  # the file is the user's
        raise DataError(
            f"data.kind is {kind!r}, but {origin}, which registers it, cannot be imported "
            f"({one_line(error)}); {remedy}"
        ) from error
    if kind not in _CONFIGS:
        raise DataError(f"data.kind is {kind!r}, but {origin} does not register it; {remedy}")


def _from_json(value: Any) -> Any:
    if isinstance(value, DataConfig):
        _check_registered(value)
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    kind, origin = fields.pop("kind", None), fields.pop("defined_in", None)
    if kind not in _CONFIGS and isinstance(kind, str) and isinstance(origin, str):
        _import(kind, origin)
    if kind not in _CONFIGS:
        raise DataError(
            f"data.kind is {kind!r}, which is not registered; import the module that registers it"
        )
    try:
        # As JSON, which has no tuples: in Python a list would be refused.
        return pydantic.TypeAdapter(_CONFIGS[kind]).validate_json(json.dumps(fields))
    except pydantic.ValidationError as error:
        raise DataError(describe(error)) from None


AnyData = Annotated[
    DataConfig, pydantic.BeforeValidator(_from_json), pydantic.PlainSerializer(_to_json)
]
"""The type of a pydantic field that holds a `DataConfig`; its JSON remembers which one."""
