"""Options that override the fields of a training configuration, such as `--epochs 3`."""

import argparse
import dataclasses
import difflib
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from paramshare.cli.errors import CommandError
from paramshare.cli.parsing import Parser

if TYPE_CHECKING:
    from paramshare.training.config import Config

SCALARS = (int, float, str, pathlib.Path)


def override(config: "Config", args: Sequence[str], file: str = "CONFIG") -> "Config":
    """Applies options to a configuration.

    Every field of the configuration has an option: `--epochs 3`, `--model.bfloat16` and
    `--model.no-bfloat16`, `--schedule.milestones 60 120` (without values for an empty tuple), and
    "None" where the field may be None. `--data.name` is applied first, because it decides which
    other options `--data.` has.

    Args:
      config: the configuration to start from.
      args: options and their values.
      file: the configuration's file, for error messages.

    Raises:
      CommandError: if there is no such option, or a value of another type.
      ConfigError: if a value is out of its range.
    """
    config, remaining = with_data_name(config, list(args), file)
    parser = Parser(prog=f"paramshare train {file}", add_help=False)
    add_options(parser, config)
    values, unknown = parser.parse_known_args(remaining)
    if unknown:
        _refuse(unknown[0], parser)
    return _replace(config, vars(values))


def overridden(config: "Config", args: Sequence[str]) -> set[str]:
    """The names of the fields that options set, such as {"optimizer.learning_rate"}."""
    parser = Parser(add_help=False)
    add_options(parser, config)
    return set(vars(parser.parse_known_args(list(args))[0]))


def add_options(parser: argparse.ArgumentParser, config: "Config") -> None:
    """Adds an option for every field of a configuration, grouped by section."""
    from paramshare.data.registry import names

    for title, about, fields in _sections(config):
        group = parser.add_argument_group(title, about)
        for field in fields:
            if field.path == "data.name":
                sets = f"{', '.join(names())}, or a name of tensorflow-datasets."
                field = dataclasses.replace(field, about=f"Data set: {sets}")
            field.add_to(group)


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of the configuration, and the options of `add_argument` for its values."""

    path: str
    value: Any
    about: str
    options: dict[str, Any]

    def add_to(self, group: Any) -> None:
        """Adds the option to a parser's group."""
        option, default = f"--{self.path.replace('_', '-')}", self.value
        if isinstance(default, tuple):
            default = " ".join(map(str, default)) or "none"
        about = f"{self.about} (default: {default})".strip().replace("%", "%%")
        names = [option]
        if self.options.get("action") is _Switch:
            section, dot, name = option.rpartition(".")
            names.append(f"{section}.no-{name}" if dot else f"--no-{option.removeprefix('--')}")
        group.add_argument(
            *names, dest=self.path, default=argparse.SUPPRESS, help=about, **self.options
        )


class _Switch(argparse.Action):
    """Sets True by its first option string, False by its second."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def with_data_name(config: "Config", args: list[str], file: str) -> tuple["Config", list[str]]:
    """Applies `--data.name`: changes the data set and keeps the fields that both sets have."""
    from paramshare.data.registry import switch

    parser = Parser(prog=f"paramshare train {file}", add_help=False)
    parser.add_argument("--data.name", dest="name")
    values, remaining = parser.parse_known_args(args)
    if values.name is not None:
        config = dataclasses.replace(config, data=switch(config.data, values.name))
    return config, remaining


def _refuse(option: str, parser: argparse.ArgumentParser) -> NoReturn:
    """Raises `CommandError` with the options of similar names."""
    if not option.startswith("-"):
        raise CommandError(
            f"unrecognised argument {option!r}; a configuration file comes first, "
            f"see `{parser.prog} --help`"
        )
    options = [text for action in parser._actions for text in action.option_strings]
    near = difflib.get_close_matches(option.partition("=")[0], options, n=2, cutoff=0.5)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    raise CommandError(f"no option {option!r}; {nearest}see `{parser.prog} --help`")


def _replace(config: Any, values: Mapping[str, Any]) -> Any:
    """The configuration with fields changed; `values` are by dotted name."""
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        name, _, below = path.partition(".")
        if below:
            nested.setdefault(name, {})[below] = value
        else:
            changes[name] = tuple(value) if isinstance(value, list) else value
    for name, below in nested.items():
        changes[name] = _replace(getattr(config, name), below)
    return dataclasses.replace(config, **changes)


def _sections(config: Any, prefix: str = "") -> Iterator[tuple[str, str, list[_Field]]]:
    """Name, description and fields of a configuration and of the configurations in it."""
    hints, fields, below = typing.get_type_hints(type(config)), [], []
    descriptions = getattr(type(config), "__pydantic_fields__", {})
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            below.append((path, value))
        elif (options := _value_options(hints[field.name])) is not None:
            about = getattr(descriptions.get(field.name), "description", None) or ""
            fields.append(_Field(path, value, " ".join(about.split()), options))
    about = " ".join((type(config).__doc__ or "").partition("\n\n")[0].split())
    yield prefix.rstrip(".") or "run", about, fields
    for path, value in below:
        yield from _sections(value, f"{path}.")


def _value_options(hint: Any) -> dict[str, Any] | None:
    """The options of `add_argument` for values of a type; None if there is no option for it."""
    kinds, optional = [hint], False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        optional = len(kinds) < len(typing.get_args(hint))
    if len(kinds) != 1:
        return None
    kind, arguments = kinds[0], typing.get_args(kinds[0])
    if kind is bool and not optional:
        return {"action": _Switch, "nargs": 0}
    if kind is bool:
        arguments = (True, False)
    if typing.get_origin(kind) is Literal or kind is bool:
        choices: dict[str, Any] = {str(choice): choice for choice in arguments}
        choices |= {"None": None} if optional else {}
        return {
            "type": lambda text: choices.get(text, text),
            "choices": list(choices.values()),
            "metavar": "{" + ",".join(choices) + "}",
        }
    if typing.get_origin(kind) is tuple:
        if arguments[0] not in SCALARS or len({*arguments} - {...}) != 1:
            return None
        count: Any = "*" if arguments[-1] is ... else len(arguments)
        return {"nargs": count} | _scalar(arguments[0], False)
    return _scalar(kind, optional) if kind in SCALARS else None


def _scalar(kind: type, optional: bool) -> dict[str, Any]:
    def convert(text: str) -> Any:
        return None if optional and text == "None" else kind(text)

    convert.__name__ = kind.__name__  # argparse names it in its message
    return {"type": convert, "metavar": kind.__name__.upper()}
