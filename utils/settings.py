"""One frozen dataclass per entry point is the only definition of its parameters: name, type, default, bounds, help.

    @dataclass(frozen=True)
    class Settings:
        epochs: int = setting(10, "passes over the training split", minimum=1)

`parse` turns the command line that MLflow builds from the MLproject (`--epochs=10`) into such an object, or ends the
process with exit code 2 and one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

REQUIRED: Any = object()
"""Default of a parameter that the user has to give."""

_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

SettingsT = TypeVar("SettingsT")


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with what the command line needs to know about it.

    `minimum` and `maximum` are inclusive. `default=REQUIRED` makes the parameter mandatory.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def parse(cls: type[SettingsT], argv: Sequence[str] | None = None) -> SettingsT:
    """Read `--name=value` flags into `cls`; on bad input print one line to stderr and exit with code 2."""
    parser = _Parser(
        description=(cls.__doc__ or "").strip(),
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = typing.get_type_hints(cls)
    for field in _fields(cls):
        required = field.default is dataclasses.MISSING
        parser.add_argument(
            f"--{field.name}",
            type=_converter(field, types[field.name]),
            required=required,
            default=argparse.SUPPRESS if required else field.default,
            metavar="|".join(field.metadata["choices"] or ()) or types[field.name].__name__.upper(),
            help=field.metadata["help"] + (" (required)" if required else ""),
        )
    return cls(**vars(parser.parse_args(argv)))


def as_params(settings: Any) -> dict[str, str]:
    """The settings as the strings that `mlflow run` itself logs for the MLproject's defaults."""
    return {field.name: as_text(getattr(settings, field.name)) for field in _fields(type(settings))}


def as_text(value: str | int | float | bool) -> str:
    """Spell a value as a person writes it on the command line and in the MLproject."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _fields(cls: type) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)


def _converter(field: dataclasses.Field[Any], kind: type) -> Callable[[str], Any]:
    """A function from the flag's text to a checked value, raising argparse's error with what was wrong and allowed."""
    choices, minimum, maximum = (field.metadata[key] for key in ("choices", "minimum", "maximum"))

    def convert(text: str) -> Any:
        try:
            value = _BOOLS[text.lower()] if kind is bool else kind(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(f"expected {_TYPE_NAMES[kind]}, received '{text}'") from None
        if choices and value not in choices:
            raise argparse.ArgumentTypeError(f"received '{text}', allowed: {', '.join(choices)}")
        if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
            allowed = " and ".join(
                [f"at least {minimum}"] * (minimum is not None) + [f"at most {maximum}"] * (maximum is not None)
            )
            raise argparse.ArgumentTypeError(f"received {text}, allowed: {allowed}")
        return value

    return convert


_BOOLS = {"true": True, "false": False}


class _Parser(argparse.ArgumentParser):
    """argparse, with one-line errors that name every legal parameter when an unknown one was given."""

    def parse_args(self, argv: Any = None, namespace: Any = None) -> Any:
        known, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            names = [action.dest for action in self._actions if action.dest != "help"]
            given = unknown[0].split("=")[0].lstrip("-")
            close = difflib.get_close_matches(given, names, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            self.error(f"unknown parameter '{given}'{hint}; allowed: {', '.join(names)}")
        return known

    def error(self, message: str) -> NoReturn:
        print(f"error: {message.replace('argument --', '')}", file=sys.stderr)
        sys.exit(2)
