"""How a request is read: JSON with no surprises, and objects whose fields are all known. What is wrong is named."""

import json
import re
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serve.errors import ApiError, bad_value, quoted

# A body that means more values than this is an attack on the parser: images are few and long.
_MAX_JSON_VALUES = 2000
# Control characters but tab and line breaks, and halves of surrogate pairs, which no tokenizer can be given.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# Of what pydantic says, which repeats some values whole.
MAX_REASON = 300
_UNKNOWN = "unknown_field"
# Of unions of objects, by their `type`: they follow the number of a list's element.
_BRANCHES = ("image_url", "text")

_T = TypeVar("_T", bound=BaseModel)

UNREAD = "unread"
"""Marks a field, by ``Annotated``, that may be given and has no part in the answer, which names it."""


class Strict(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known(cls, value: Any) -> Any:
        """A null asks for nothing, as in OpenAI's schema, where most of what may be left out may be null too."""
        if not isinstance(value, dict):
            return value
        fields = cls.model_fields
        if unknown := next((name for name, each in value.items() if name not in fields and each is not None), None):
            # Said here and not by pydantic, whose error does not tell which object it was that has no such field.
            raise PydanticCustomError(_UNKNOWN, "unknown", {"field": unknown, "known": ", ".join(fields)})
        required = {name for name, field in fields.items() if field.is_required()}
        return {name: each for name, each in value.items() if each is not None or name in required}


def only(*values: Any, why: str) -> AfterValidator:
    """Of a field that can have no other values here than these; `why` tells a person so."""

    def check(value: Any) -> Any:
        # To Python 1 is True.
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            raise PydanticCustomError("unsupported_value", "{why}", {"why": why})
        return value

    return AfterValidator(check)


def unread_fields(asked: Any, path: str = "") -> list[str]:
    """Where the fields stand that a request gives and nobody reads."""
    found: list[str] = []
    if isinstance(asked, list):
        for index, each in enumerate(asked):
            found += unread_fields(each, f"{path}{index}.")
    elif isinstance(asked, Strict):
        for name, field in type(asked).model_fields.items():
            if name in asked.model_fields_set and UNREAD in field.metadata:
                found.append(path + name)
            else:
                found += unread_fields(getattr(asked, name), f"{path}{name}.")
    return found


def _has_more_marks(body: bytes | bytearray, most: int) -> bool:
    """Whether more than `most` values can be in a body. `find` leaps over an image in base64 ten times as fast as
    `count` goes through it."""
    found = 0
    for mark in (b",", b"[", b"{", b":"):
        place = body.find(mark)
        while place >= 0 and found <= most:
            found, place = found + 1, body.find(mark, place + 1)
    return found > most


def parse_json(body: bytes | bytearray) -> Any:
    """The value of a JSON body, with no number that JSON does not have and no key twice. Raises ApiError.

    A bytearray is emptied: beside a body of megabytes its text and its values take as much again.
    """

    def refuse_constant(name: str) -> Any:
        raise ApiError(400, f"{name} is no number of JSON", code="invalid_json")

    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ApiError(400, f"the field {quoted(twice)} stands there twice", param=twice[:64], code="invalid_json")
        return fields

    # Parsing holds the interpreter, and a body of nothing but commas would hold it for seconds.
    if _has_more_marks(body, _MAX_JSON_VALUES):
        raise ApiError(400, f"more than {_MAX_JSON_VALUES} values in the body", code="invalid_json")
    try:
        text = body.decode()
        if isinstance(body, bytearray):
            body.clear()
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twice)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is no UTF-8", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}", code="invalid_json") from None


def parse(kind: type[_T], value: Any, *where: str) -> _T:
    """Build a request that stands at `where` in the body. Raises ApiError that names the first field that is wrong."""
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # An unknown field first: it is often the cause of what else is wrong. Then the deepest: of the branches of a
        # union it is the one that was meant.
        detail = min(error.errors(include_url=False), key=lambda each: (each["type"] != _UNKNOWN, -len(each["loc"])))
        path = [*where, *_path(detail["loc"])]
        if detail["type"] == _UNKNOWN:
            name, known = detail["ctx"]["field"], detail["ctx"]["known"]
            owner = ".".join(path)[:200] or "the body"
            param = ".".join([*path, name])[:200]
            message = f"unknown or unsupported field {quoted(param)}; {owner} has {known}"
            raise ApiError(400, message, param=param, code=_UNKNOWN) from None
        param = ".".join(path)[:200]
        message = f"{param}: {detail['msg'][:1].lower()}{detail['msg'][1:MAX_REASON]}"
        if isinstance(detail["input"], str | int | float | bool | None):
            message += f", got {quoted(detail['input'])}"
        raise ApiError(400, message, param=param, code="invalid_value") from None


def _path(places: tuple[int | str, ...]) -> list[str]:
    """Without the branches of unions, which are no part of what the client knows."""
    path = [str(each) for i, each in enumerate(places) if not (each in _BRANCHES and isinstance(places[i - 1], int))]
    return [each for each in path if each != "str" and not each.startswith("list[")]


def check_text(text: str, max_chars: int, param: str) -> None:
    """Raise ApiError for a text that is longer, or that no tokenizer can be given."""
    if len(text) > max_chars:
        raise bad_value(param, f"{len(text)} characters; at most {max_chars}")
    if found := _UNPRINTABLE.search(text):
        raise bad_value(param, f"character U+{ord(found.group()):04X} at {found.start()} is none of a text")
