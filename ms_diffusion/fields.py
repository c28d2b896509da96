"""Checked configuration fields: a range or a set of names beside a field's type, and the one validator that reads them.

lr: Annotated[float, POSITIVE] = 1e-3"""

import itertools
import math
import os
import re
import sys
import types
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar

import numpy as np

from .runtime import UserError

T = TypeVar("T")
MOST_VALUES = 100  # of one field without an AtMost
LARGEST = 2**63 - 1  # of whole numbers, on the device and in NumPy


@dataclass(frozen=True)
class Bounds:
    """The range of a number, with or without its ends."""

    low: float = -float("inf")
    high: float = float("inf")
    low_open: bool = False
    high_open: bool = False

    def problem(self, value: Any) -> str | None:
        above = value > self.low if self.low_open else value >= self.low
        if above and (value < self.high if self.high_open else value <= self.high):
            return None
        if self.high == float("inf"):
            return f"it must be {'above' if self.low_open else 'at least'} {self.low:g}"
        return f"it must be in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}{')' if self.high_open else ']'}"


POSITIVE = Bounds(0, low_open=True)
NON_NEGATIVE = Bounds(0)
AT_LEAST_1 = Bounds(1)
FRACTION = Bounds(0, 1)
DEPTH = Bounds(1, 1000)  # of a network, in layers of a kind


class NotEmpty:
    """A tuple with at least one value."""

    def problem(self, value: Any) -> str | None:
        return None if value else "give at least one value"


NOT_EMPTY = NotEmpty()


@dataclass(frozen=True)
class AtMost:
    """A tuple with up to so many values."""

    values: int


class Colour:
    """A colour by its name or its numbers, as PIL and CSS have them."""

    def problem(self, value: Any) -> str | None:
        from PIL import ImageColor  # takes a moment to import

        try:
            opaque = len(ImageColor.getrgb(value)) == 3
        except ValueError:
            opaque = False
        return None if opaque else "write the name of a colour, such as white, or its red, green and blue as #rrggbb"


COLOUR = Colour()


@dataclass(frozen=True)
class Matches:
    """Text that a regular expression describes."""

    pattern: str

    def problem(self, value: Any) -> str | None:
        return None if re.fullmatch(self.pattern, value) else f"it must match {self.pattern}"


@dataclass(frozen=True, eq=False)
class OneOf:
    """The names in a registry, also those that are added to it later, and some others."""

    registry: Iterable[str]
    extra: tuple[str, ...] = ()
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Names that other libraries have, and what to write for them."""

    def problem(self, value: Any) -> str | None:
        names = [*self.registry, *self.extra]
        if value not in names and isinstance(value, str) and value in self.elsewhere:
            return f"here it is called {self.elsewhere[value]}"
        return None if value in names else f"choose one of {', '.join(names)}"


def check_fields(config: Any, prefix: str = "--") -> None:
    """Hold every field of a dataclass, and of the dataclasses in it, to its type, its `Bounds` and its `OneOf`. Raises
    UserError for the first value that does not fit, by the flag that sets it; by the field's name without `prefix`."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for each in fields(config):
        value = getattr(config, each.name)
        if is_dataclass(value):
            check_fields(value, f"{prefix}{each.name}.")
        elif problem := find_problem(value, hints[each.name]):
            name = each.name.replace("_", "-") if prefix.startswith("--") else each.name
            raise UserError(f"{prefix}{name} is {value!r:.200}: {problem}")


def find_problem(value: Any, hint: Any, most: int = MOST_VALUES) -> str | None:
    """What is wrong with a value of this type, or None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        checks = [m for m in args[1:] if isinstance(m, Bounds | OneOf | NotEmpty | Matches | Colour)]
        most = next((m.values for m in args[1:] if isinstance(m, AtMost)), most)
        return find_problem(value, args[0], most) or next(filter(None, (c.problem(value) for c in checks)), None)
    if origin in (typing.Union, types.UnionType):
        problems = [find_problem(value, arg) for arg in args]
        return None if None in problems else problems[0]
    if origin is Literal:
        return None if value in args else f"choose one of {', '.join(map(str, args))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "give several values"
        if len(value) > most:
            return f"give at most {most} values"
        items = args[:1] * len(value) if args[-1] is ... else args
        if len(items) != len(value):
            return f"give {len(items)} values"
        return next(filter(None, map(find_problem, value, items)), None)
    if origin is dict:
        if not isinstance(value, dict):
            return "it must be an object"
        pairs = itertools.chain.from_iterable(value.items())
        return next(filter(None, map(find_problem, pairs, itertools.cycle(args))), None)
    plain = value.item() if isinstance(value, np.generic) else value  # NumPy casts what it is compared with
    size: Any = abs(plain) if isinstance(plain, Real) and not isinstance(plain, bool) else math.inf
    if hint is float:
        return None if size <= sys.float_info.max else "it must be a finite number"
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return None if size <= LARGEST else "it must be below 2^63"
    if hint is str and isinstance(value, str):
        return None if can_be_path(value) else "it holds characters that no file's name can have"
    kinds = {str: "text", bool: "True or False", int: "a whole number"}
    fits = hint is Any or isinstance(value, hint) and hint is not int
    return None if fits else f"it must be {kinds.get(hint, hint.__name__)}"


def unfold(hint: Any) -> list[Any]:
    """A type, and all types, values and marks inside it; of a type variable, its bound."""
    inner = [hint.__bound__] if isinstance(hint, TypeVar) else typing.get_args(hint)
    return [hint, *(part for each in inner for part in unfold(each))]


def can_be_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeError:
        return False


def as_value(value: Any) -> Any:
    """A value as the fields of a dataclass hold it: a list, as JSON has and Python's users write, becomes a tuple."""
    return tuple(value) if isinstance(value, list) else value


def from_record(cls: type[T], record: dict[str, Any], obsolete: Container[str] = (), path: str = "") -> T:
    """An instance of the dataclass `cls` from a JSON object: lists become tuples, nested objects dataclasses.

    Where a field may hold one of several dataclasses, the first that has all keys of the object is used. `obsolete` holds
    dotted names of fields that are dropped where `cls` lacks them. Raises ValueError for an unknown key, or for something
    else where an object is expected. The values are not checked (`check_fields`)."""
    if not isinstance(record, dict):
        raise ValueError(f"{path or 'it'} is not an object")
    names = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    if unknown := [key for key in record if key not in names and path + key not in obsolete]:
        raise ValueError(f"unknown field {path}{unknown[0].encode('unicode_escape').decode():.100}")
    hints = typing.get_type_hints(cls)

    def read(name: str, value: Any) -> Any:
        args = typing.get_args(hints[name]) or (hints[name],)
        choices = [c for c in args if is_dataclass(c) and not (value is None and type(None) in args)]
        problems = []
        for choice in choices:
            try:
                return from_record(choice, value, obsolete, f"{path}{name}.")  # type: ignore[arg-type]
            except ValueError as e:
                problems.append(e)
        if problems:
            raise problems[0]
        return as_value(value)

    return cls(**{name: read(name, value) for name, value in record.items() if name in names})
