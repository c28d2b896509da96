"""Checked configuration fields: a range or a set of names beside a field's type, and the one validator that reads them.

lr: Annotated[float, POSITIVE] = 1e-3"""

import math
import types
import typing
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar

from .runtime import UserError

T = TypeVar("T")


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


class NotEmpty:
    """A tuple with at least one value."""

    def problem(self, value: Any) -> str | None:
        return None if value else "give at least one value"


NOT_EMPTY = NotEmpty()


@dataclass(frozen=True, eq=False)
class OneOf:
    """The names in a registry, also those that are added to it later, and some others."""

    registry: Iterable[str]
    extra: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        names = [*self.registry, *self.extra]
        return None if value in names else f"choose one of {', '.join(names)}"


def check_fields(config: Any, prefix: str = "--") -> None:
    """Hold every field of a dataclass, and of the dataclasses in it, to its type, its `Bounds` and its `OneOf`. Raises
    UserError for the first value that does not fit, by the flag that sets it; by the field's name without `prefix`."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            check_fields(value, f"{prefix}{field.name}.")
        elif problem := find_problem(value, hints[field.name]):
            name = field.name.replace("_", "-") if prefix.startswith("--") else field.name
            raise UserError(f"{prefix}{name} is {value!r}: {problem}")


def find_problem(value: Any, hint: Any) -> str | None:
    """What is wrong with a value of this type, or None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        checks = [m for m in args[1:] if isinstance(m, Bounds | OneOf | NotEmpty)]
        return find_problem(value, args[0]) or next(filter(None, (c.problem(value) for c in checks)), None)
    if origin in (typing.Union, types.UnionType):
        problems = [find_problem(value, arg) for arg in args]
        return None if None in problems else problems[0]
    if origin is Literal:
        return None if value in args else f"choose one of {', '.join(map(str, args))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "give several values"
        items = args[:1] * len(value) if args[-1] is ... else args
        if len(items) != len(value):
            return f"give {len(items)} values"
        return next(filter(None, map(find_problem, value, items)), None)
    if hint is float:
        finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        return None if finite else "it must be a finite number"
    if hint is int:
        return None if isinstance(value, Integral) and not isinstance(value, bool) else "it must be a whole number"
    kinds = {str: "text", bool: "True or False"}
    return None if hint is Any or isinstance(value, hint) else f"it must be {kinds.get(hint, hint.__name__)}"


def from_record(cls: type[T], record: dict[str, Any], renamed: Mapping[str, str], obsolete: Container[str] = (),
        path: str = "") -> T:  # fmt: skip
    """An instance of the dataclass `cls` from a JSON object: lists become tuples, nested objects dataclasses.

    Where a field may hold one of several dataclasses, the first that has all keys of the object is used. `renamed` holds the
    new dotted name of each field that once had another, `obsolete` dotted names of fields that are dropped where `cls` lacks
    them. Raises ValueError for an unknown key, or for something else where an object is expected."""
    if not isinstance(record, dict):
        raise ValueError(f"{path or 'it'} is not an object")
    record = {renamed.get(path + key, path + key).removeprefix(path): value for key, value in record.items()}
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := [key for key in record if key not in names and path + key not in obsolete]:
        raise ValueError(f"unknown field {path}{unknown[0]}")
    hints = typing.get_type_hints(cls)

    def read(name: str, value: Any) -> Any:
        choices = [c for c in typing.get_args(hints[name]) or (hints[name],) if is_dataclass(c)]
        problems = []
        for choice in choices:
            try:
                return from_record(choice, value, renamed, obsolete, f"{path}{name}.")  # type: ignore[arg-type]
            except ValueError as e:
                problems.append(e)
        if problems:
            raise problems[0]
        return tuple(value) if isinstance(value, list) else value

    return cls(**{name: read(name, value) for name, value in record.items() if name in names})
