"""How a request is read: plain JSON, and objects of which every field is known. A refusal names the wrong field."""

import difflib
import json
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serve.errors import ApiError, bad_value, quoted, spoken

# More values than this in one body attack the parser: images are few values, and long ones.
_MAX_JSON_VALUES = 2000
# Control characters but tab and line breaks, and halves of surrogate pairs, which no tokenizer can be given.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# The longest part of pydantic's message that is repeated: it holds some values whole.
MAX_REASON = 300
_UNKNOWN = "unknown_field"
# So alike that it is probably a slip of the pen.
TYPO = 0.75
# In the place of pydantic's messages, which speak of Python. They follow the field's name.
_FAULTS = {
    "missing": "is missing",
    "string_type": "must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "union_tag_not_found": "needs a type",
    "union_tag_invalid": "has an unknown type {tag!r}; known: {expected_tags}",
}
# The branches of unions of objects, by their `type`. In pydantic's paths they follow the number of a list's element.
_BRANCHES = ("image_url", "text")

_T = TypeVar("_T", bound=BaseModel)

UNREAD = "unread"
"""Marks a field, by ``Annotated``, that may be given and has no part in the answer, which names it."""
SOMETIMES_READ = "sometimes read"
"""Marks a field that only some models or requests read. Elsewhere it is like an `UNREAD` one."""


class Strict(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

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


@dataclass(frozen=True)
class Only(AfterValidator):
    """Marks a field that can have no other values here than these; `why` tells a person so."""

    values: tuple[Any, ...] = ()
    why: str = ""


def only(*values: Any, why: str) -> Only:
    """The mark of a field that takes these values alone, which it also checks."""

    def check(value: Any) -> Any:
        # To Python 1 is True.
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            raise PydanticCustomError("unsupported_value", "{why}", {"why": why})
        return value

    return Only(check, values, why)


def unread_fields(asked: Any, path: str = "") -> list[str]:
    """The places of the fields that a request gives and that are not read, or only sometimes."""
    found: list[str] = []
    if isinstance(asked, list):
        for index, each in enumerate(asked):
            found += unread_fields(each, f"{path}{index}.")
    elif isinstance(asked, Strict):
        for name, field in type(asked).model_fields.items():
            if name in asked.model_fields_set and (UNREAD in field.metadata or SOMETIMES_READ in field.metadata):
                found.append(path + name)
            else:
                found += unread_fields(getattr(asked, name), f"{path}{name}.")
    return found


def _has_more_marks(body: bytes | bytearray, most: int) -> bool:
    """Whether a body can hold more than `most` values. `find` is ten times as fast as `count` over an image."""
    found = 0
    for mark in (b",", b"[", b"{", b":"):
        place = body.find(mark)
        while place >= 0 and found <= most:
            found, place = found + 1, body.find(mark, place + 1)
    return found > most


def parse_json(body: bytes | bytearray) -> Any:
    """The value of a JSON body, with no number that JSON does not have and no key twice. Raises ApiError.

    A bytearray is emptied, as the text and the values of a large body take as much memory again.
    """

    def refuse_constant(name: str) -> Any:
        raise ApiError(400, f"{name} is not a number in JSON", code="invalid_json")

    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ApiError(400, f"the field {quoted(twice)} is given twice", param=twice[:64], code="invalid_json")
        return fields

    # Parsing holds the interpreter. A body of commas alone would hold it for seconds.
    if _has_more_marks(body, _MAX_JSON_VALUES):
        raise ApiError(400, f"more than {_MAX_JSON_VALUES} values in the body", code="invalid_json")
    try:
        text = body.decode()
        if isinstance(body, bytearray):
            body.clear()
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twice)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    except ValueError:
        # Python reads no whole number of more than 4300 digits.
        raise ApiError(400, "the body has a number of too many digits", code="invalid_json") from None


def parse(kind: type[_T], value: Any, *where: str) -> _T:
    """Build a request that stands at `where` in the body. Raises ApiError, which names the first wrong field."""
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # An unknown field comes first, as it often causes other errors. Then comes the deepest error: of a union's
        # branches it belongs to the one that was meant.
        detail = min(error.errors(include_url=False), key=lambda each: (each["type"] != _UNKNOWN, -len(each["loc"])))
        path = [*where, *_path(detail["loc"])]
        if detail["type"] == _UNKNOWN:
            name, known = detail["ctx"]["field"], detail["ctx"]["known"].split(", ")
            near = difflib.get_close_matches(name[:64], known, n=1, cutoff=TYPO)
            meant = f"; did you mean {near[0]!r}?" if near else ";"
            owner = f" in {spoken('.'.join(path))}" if path else ""
            message = f"unknown field {quoted(name)}{owner}{meant} its fields are {', '.join(known)}"
            raise ApiError(400, message, param=".".join([*path, name])[:200], code=_UNKNOWN) from None
        param = ".".join(path)[:200]
        if detail["type"] in _FAULTS:
            fault = f" {_FAULTS[detail['type']].format(**detail.get('ctx', {}))}"
        else:
            fault = f": {detail['msg'][:1].lower()}{detail['msg'][1:]}"
        message = f"{spoken(param)}{fault[:MAX_REASON]}"
        if isinstance(detail["input"], str | int | float | bool | None):
            message += f", got {quoted(detail['input'])}"
        raise ApiError(400, message, param=param, code="invalid_value") from None


def _path(places: tuple[int | str, ...]) -> list[str]:
    """pydantic's path without the branches of unions, which the client does not know."""
    path = [str(each) for i, each in enumerate(places) if not (each in _BRANCHES and isinstance(places[i - 1], int))]
    return [each for each in path if each != "str" and not each.startswith("list[")]


def check_text(text: str, max_chars: int, param: str) -> None:
    """Raise ApiError for a text that is too long, or has characters that no tokenizer takes."""
    if len(text) > max_chars:
        raise bad_value(param, f"{len(text)} characters; at most {max_chars}")
    if found := _UNPRINTABLE.search(text):
        raise bad_value(param, f"the character U+{ord(found.group()):04X} at {found.start()} cannot be in a text")
