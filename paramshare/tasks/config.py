"""Configuration dataclasses: checked types and ranges, errors in one line."""

import dataclasses
import re
from collections.abc import Callable
from typing import Annotated, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass

from paramshare.errors import ParamshareError

T = TypeVar("T")

FIELDS = pydantic.ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)
"""How fields are read: no conversions but int to float, descriptions from attribute docstrings."""

Count = Annotated[int, pydantic.Field(ge=1, lt=2**31)]
"""An integer, 1 or more."""
Natural = Annotated[int, pydantic.Field(ge=0, lt=2**31)]
"""An integer, 0 or more."""
Fraction = Annotated[float, pydantic.Field(ge=0, lt=1)]
"""A number in [0, 1)."""


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def checked_dataclass(error: type[ParamshareError]) -> Callable[[type[T]], type[T]]:
    """A decorator that makes a frozen pydantic dataclass, whose bad values raise `error`.

    Ranges are annotations (`Count`, `Fraction`, `Annotated[int, pydantic.Field(ge=2)]`). A
    `__post_init__` that raises a `ValueError` checks fields against each other. An attribute
    docstring describes its field on the command line. `describe` and pydantic's `TypeAdapter` serve
    those who read such a dataclass from JSON.

    Args:
      error: raised by the constructor and by `dataclasses.replace`, with the text of `describe`.

    Example:
      >>> from paramshare.errors import ParamshareError
      >>> @checked_dataclass(ParamshareError)
      ... class Bread:
      ...     slices: Count = 1
      >>> Bread(0)
      Traceback (most recent call last):
      ...
      paramshare.errors.ParamshareError: Bread: slices must be greater than or equal to 1, got 0
    """

    def decorate(cls: type[T]) -> type[T]:
        checked = dataclass(frozen=True, config=FIELDS)(cls)
        _inherit_descriptions(checked)
        initialise = checked.__init__
        names = [field.name for field in dataclasses.fields(checked)]  # pyright: ignore

        def __init__(self, *args, **kwargs) -> None:
            named = dict(zip(names, args, strict=False))  # so that errors name the field
            try:
                initialise(self, *args[len(named) :], **named, **kwargs)
            except pydantic.ValidationError as reason:
                raise error(describe(reason)) from None

        __init__.__wrapped__ = initialise  # for `inspect.signature`
        checked.__init__ = __init__
        return checked  # pyright: ignore[reportReturnType]

    return decorate


def describe(error: pydantic.ValidationError) -> str:
    """The first problem of a failed validation in one line: class, field, what is allowed, value.

    Example:
      >>> try:
      ...     pydantic.TypeAdapter(int).validate_python("one", strict=True)
      ... except pydantic.ValidationError as reason:
      ...     describe(reason)
      "int: must be a valid integer, got 'one'"
    """
    first = error.errors()[0]
    if first["type"] == "value_error":  # raised by `__post_init__` or a validator
        return str(first["ctx"]["error"])  # pyright: ignore[reportTypedDictNotRequiredAccess]
    field = ".".join(map(str, first["loc"]))
    text = re.sub(r"^\w+ should", "must", first["msg"])
    if first["type"].startswith(("missing", "unexpected")):
        return f"{error.title}: {field}: {text.lower()}"
    return f"{error.title}: {field} {text}, got {first['input']!r}".replace(":  ", ": ")


def _inherit_descriptions(cls: type) -> None:
    """pydantic reads the attribute docstrings of a class itself only, not those of its bases."""
    for name, field in cls.__pydantic_fields__.items():  # pyright: ignore
        for base in cls.__mro__[1:]:
            inherited = getattr(base, "__pydantic_fields__", {}).get(name)
            if field.description is None and inherited is not None:
                field.description = inherited.description
