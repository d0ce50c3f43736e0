"""Refusals in the form of OpenAI's API: a status and {"error": {message, type, param, code}}."""

import itertools
import json
import math
import reprlib
from typing import Any, TypedDict, cast

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "font-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# On every answer.
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "content-security-policy": _PAGE_POLICY,
}
MIB = 2**20
# An element of a list, by the list's field.
_ELEMENTS = {"messages": "message", "content": "part", "images": "image", "models": "model"}
# The longest part of a client's value that a message repeats.
_MAX_QUOTED = 64
_MAX_SPOKEN = 200
# It cuts before it quotes, as a value may be as long as a body.
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _MAX_QUOTED


def quoted(value: object) -> str:
    """A client's value, quoted and cut for a message."""
    text = _SHORT.repr(value)
    return text if len(text) <= _MAX_QUOTED else f"{text[: _MAX_QUOTED - 3]}..."


def spoken(path: str) -> str:
    """A field of a request in words: ``messages.0.content.1.text`` is "text of part 2 of message 1".

    `path` is what `ApiError.param` holds, for programs.
    """
    names = path.split(".")
    # A number with the field before it is an element; of other fields only the last one is named.
    words = [
        f"{_ELEMENTS.get(name, name)} {int(after) + 1}"
        for name, after in itertools.pairwise(names)
        if _is_place(after) and not _is_place(name)
    ]
    if not _is_place(names[-1]):
        words.append(names[-1])
    return " of ".join(reversed(words))[:_MAX_SPOKEN] or path[:_MAX_SPOKEN]


def _is_place(name: str) -> bool:
    return len(name) < 5 and name.isascii() and name.isdigit()


def in_bytes(number: int) -> str:
    """A number of bytes for a person, rounded up: what is past a limit never reads as the limit itself."""
    for size, unit in ((MIB, "MiB"), (1024, "KiB")):
        if number >= size:
            return f"{math.ceil(100 * number / size) / 100:g} {unit}"
    return f"{number} bytes"


class ErrorFields(TypedDict):
    """A refusal as it crosses from one process to another."""

    status: int
    message: str
    param: str | None
    code: str | None
    retry_after_s: float | None


class ErrorObject(TypedDict):
    """A refusal in the form of OpenAI's API."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of the answer to a refused request."""

    error: ErrorObject


class ApiError(Exception):
    """A refusal. The message is for the person who wrote the request; `param` names the field for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        allow: str = "",
    ) -> None:
        """`allow`: the methods that the route has, where another one was asked for."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s, self.allow = retry_after_s, allow

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def as_dict(self) -> ErrorFields:
        """Plain values, which cross from one process to another."""
        names = ("status", "message", "param", "code", "retry_after_s")
        return cast(ErrorFields, {name: getattr(self, name) for name in names})

    @classmethod
    def from_dict(cls, fields: ErrorFields) -> "ApiError":
        return cls(
            fields["status"],
            fields["message"],
            **{k: cast(Any, fields)[k] for k in ("param", "code", "retry_after_s")},
        )

    def body(self) -> ErrorBody:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.allow:
            headers["allow"] = self.allow
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def asgi_messages(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The answer as ASGI messages, for the proxy and for what stands before the routes."""
        body = json.dumps(self.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **SECURITY_HEADERS,
            **self.headers(),
        }
        if self.status in (408, 413):
            # The rest of the body is not read.
            headers["connection"] = "close"
        return (
            {
                "type": "http.response.start",
                "status": self.status,
                "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            },
            {"type": "http.response.body", "body": body},
        )


def bad_value(param: str, message: str) -> ApiError:
    """The refusal of a field's value."""
    return ApiError(400, f"{spoken(param)}: {message}", param=param, code="invalid_value")


def fault(request_id: str) -> ApiError:
    """The answer to an error that the client did not cause."""
    return ApiError(500, f"the service failed; its log has the reason under the request id {request_id}", code="fault")
