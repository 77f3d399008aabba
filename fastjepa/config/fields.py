"""Keys of a config, with a type, a range and a sentence each, and the strict reading of their values."""

import dataclasses
import datetime
import difflib
import itertools
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from fastjepa.errors import ConfigError


class ValueCheck(NamedTuple):
    """A condition that a key's value must meet, and the words for it."""

    holds: Callable[[Any], bool]
    words: str  # after "must be"
    names: Collection[str] = ()  # among which a misspelt value is looked up


is_positive = ValueCheck(lambda v: v > 0, "greater than 0")
is_not_negative = ValueCheck(lambda v: v >= 0, "0 or greater")
is_not_negative_pair = ValueCheck(lambda v: min(v) >= 0, "two numbers, 0 or greater")
is_share = ValueCheck(lambda v: 0 < v <= 1, "in (0, 1]")
is_share_or_zero = ValueCheck(lambda v: 0 <= v <= 1, "in [0, 1]")
is_share_range = ValueCheck(lambda v: 0 < v[0] <= v[1] <= 1, "two rising numbers in (0, 1]")
is_positive_range = ValueCheck(lambda v: 0 < v[0] <= v[1], "two rising numbers greater than 0")


def is_momentum_schedule(value: tuple) -> bool:
    """Return whether a value is two momenta, or knots (share of the run, momentum) with strictly rising shares."""
    momenta = [knot[1] if isinstance(knot, tuple) else knot for knot in value]
    shares = [knot[0] for knot in value if isinstance(knot, tuple)] or [0, 1]
    rising = all(a < b for a, b in itertools.pairwise(shares))
    return bool(value) and rising and all(0 <= number <= 1 for number in (*shares, *momenta))


is_momentum_range_or_knots = ValueCheck(
    is_momentum_schedule,
    "two numbers in [0, 1], or one or more knots [share of the run, momentum], both in [0, 1], whose shares rise from each to "
    "the next",
)


def is_one_of(names: Collection[str]) -> ValueCheck:
    """Return the check that a value is one of some names."""
    return ValueCheck(lambda v: v in names, "one of " + ", ".join(names), names)


def config_key(default: Any, doc: str, check: ValueCheck | None = None, unsupported: str = "") -> Any:
    """Return a config field; `unsupported` is the sentence raised when the value differs from the default."""
    return dataclasses.field(default=default, metadata={"doc": doc, "check": check, "unsupported": unsupported})


def read_section(cls: type, section: str, values: Mapping[str, Any], where: str) -> Any:
    """Build a section of the config and check it key by key; ConfigError names the first key that is wrong."""
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    built = {}
    for name, value in values.items():
        label = f"{where}: {section}.{name}"
        if name not in fields:
            raise ConfigError(f"{label}: unknown key{did_you_mean(str(name), fields)}")
        built[name] = value = coerce_value(hints[name], value, label)
        check, unsupported = fields[name].metadata["check"], fields[name].metadata["unsupported"]
        if check and value is not None and not check.holds(value):
            close = did_you_mean(str(value), check.names) if check.names else ""
            raise ConfigError(f"{label}: {value!r} must be {check.words}{close}")
        if unsupported and value != fields[name].default:
            raise ConfigError(f"{label}: {value!r} is not supported: {unsupported}")
    return cls(**built)


def coerce_value(hint: Any, value: Any, label: str) -> Any:
    """Return `value` as the annotated type, or raise ConfigError; YAML reads 1e-3 as a string and (1, 2) as a list."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return coerce_value(option, value, label)
            except ConfigError:
                continue
    elif typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint) and not isinstance(value, bool):
            return value
        allowed = [str(option) for option in typing.get_args(hint)]
        raise ConfigError(f"{label}: {value!r} must be {' or '.join(allowed)}{did_you_mean(str(value), allowed)}")
    elif typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if isinstance(value, list | tuple) and (items[-1] is Ellipsis or len(value) == len(items)):
            return tuple(coerce_value(items[0], item, label) for item in value)
    elif hint is types.NoneType:
        if value is None:
            return None
    elif hint is float:
        try:
            number = math.nan if isinstance(value, bool | None) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is hint:
        return value
    unquoted = hint in (str, str | None) and isinstance(value, bool | int | float | list | dict | datetime.date)
    quotes = "; YAML reads text as something else where it is not in quotes" if unquoted else ""
    raise ConfigError(f"{label}: {value!r} must be {type_name(hint)}{quotes}")


def type_name(hint: Any) -> str:
    """Return a type in plain words: "a whole number or null", "[text, text]"."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return f"a list of {type_name(items[0])}" if items[-1] is Ellipsis else f"[{', '.join(type_name(i) for i in items)}]"
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", types.NoneType: "null"}
    return names.get(hint, str(hint))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: the closest of `names`, or all of them."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(names)}"


def with_lists(value: Any) -> Any:
    """Return a value with lists in place of its tuples, at any depth."""
    return [with_lists(item) for item in value] if isinstance(value, tuple) else value
