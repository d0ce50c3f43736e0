"""A generator's sampling options as fields of a request.

A generator declares its options as a frozen dataclass. A field's name in the API is its metadata ``api``, or else its
own name. The replica describes the options in plain values, as a JSON schema does: ``type``, ``default``, and ``enum``
for a choice. The process that answers requests makes fields of the description. The replica makes the dataclass of the
values.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NotRequired, TypedDict, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import create_model

from mmcore.errors import OptionError
from serve.errors import ApiError, bad_value, quoted
from serve.parsing import Strict, check_text


class ToldOption(TypedDict):
    """An option in plain values; `enum` of a choice alone."""

    type: str
    default: Any
    enum: NotRequired[list[Any]]


# Descriptions of options, by their names in the API.
Told = dict[str, ToldOption]

_TYPES: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
_T = TypeVar("_T", bound=Strict)


def _api_names(options: Any) -> dict[str, str]:
    """The dataclass's name of each field by the API's."""
    return {field.metadata.get("api", field.name): field.name for field in dataclasses.fields(options)}


def tell(options: Any) -> Told:
    """The description of the sampling options. `options`: the generator's defaults.

    Raises TypeError for a field of a type that a request cannot have.
    """
    told: Told
    hints, told = get_type_hints(type(options)), {}
    for api, name in _api_names(options).items():
        hint = hints[name]
        if get_origin(hint) in (Union, types.UnionType):
            # A null stands for the default.
            (hint,) = [each for each in get_args(hint) if each is not type(None)]
        choices = list(get_args(hint)) if get_origin(hint) is Literal else []
        kind = type(choices[0]) if choices else hint
        if kind not in _TYPES:
            raise TypeError(f"{type(options).__name__}.{name}: a {hint} is no number, text or truth value")
        told[api] = cast(
            ToldOption,
            {"type": _TYPES[kind], "default": getattr(options, name), **({"enum": choices} if choices else {})},
        )
    return told


def with_options(request: type[_T], told: Told) -> type[_T]:
    """The type of a request that has these options as further fields."""
    return _with_options(request, json.dumps(told))


@lru_cache(maxsize=64)
def _with_options(request: type[_T], told: str) -> type[_T]:
    kinds = {name: kind for kind, name in _TYPES.items()}
    fields: dict[str, Any] = {}
    for name, each in json.loads(told).items():
        kind: Any = Literal[tuple(each["enum"])] if "enum" in each else kinds[each["type"]]
        fields[name] = (kind | None, None)
    return create_model(request.__name__, __base__=request, **fields)


def asked_options(request: Strict, told: Told, most: Mapping[str, float], max_chars: int) -> dict[str, Any]:
    """The options of a request, by the API's names, with the generator's defaults where it says nothing.

    Args:
        request: of `with_options`.
        most: the largest value of some numbers. Their smallest value is 1.
        max_chars: the length of a text.
    Raises ApiError for one past its limit.
    """
    values: dict[str, Any] = {}
    for name, each in told.items():
        asked = getattr(request, name)
        values[name] = value = each["default"] if asked is None else asked
        if value is None:
            continue
        if each["type"] == "number" and not math.isfinite(value):
            # JSON has no NaN, but 1e999 is read as infinity.
            raise bad_value(name, f"{value}; give a finite number")
        if name in most and not 1 <= value <= most[name]:
            raise bad_value(name, f"{quoted(value)}; give 1 to {most[name]:g}")
        if asked is not None and each["type"] == "string":
            check_text(value, max_chars, name)
    return values


def options_of(values: Mapping[str, Any], default: Any) -> Any:
    """The generator's dataclass of the values of `asked_options`. Raises ApiError for an unknown option."""
    names = _api_names(default)
    if unknown := next((name for name in values if name not in names), None):
        raise bad_value(unknown, f"this model has no such option; it has {', '.join(names)}")
    return dataclasses.replace(default, **{names[name]: value for name, value in values.items()})


def texts_of(values: Mapping[str, Any], default: Any) -> dict[str, str]:
    """The values that are free texts, which the model reads as it reads a prompt."""
    told = tell(default)
    return {
        name: value for name, value in values.items() if told[name]["type"] == "string" and "enum" not in told[name]
    }


def refusal_of(error: OptionError, default: Any) -> ApiError:
    """A generator's refusal of an option, with the option's name in the API."""
    names = {name: api for api, name in _api_names(default).items()}
    return bad_value(names.get(error.option, error.option), error.problem)


def png_text(options: Any) -> dict[str, str]:
    """The sampling options for a PNG's text, under the names of a sweep's images. Empty options are left out."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: str(value) for name, value in values.items() if value not in (None, "")}
