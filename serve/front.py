"""What all routes share: the models, the limits, the check of callers, and the reading of a request's JSON."""

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from serve.clients import Model
from serve.errors import ApiError, in_bytes, quoted
from serve.limits import Limits
from serve.metrics import Metrics
from serve.parsing import parse_json
from serve.queueing import CALLER, Admission
from serve.security import App, Keys, RateLimit, Receive, Scope, Send

Handler = Callable[[Request], Awaitable[Response]]

_METHOD_NOT_ALLOWED = 405
# Of a Host header: a name or an address, of which one with colons is in brackets, and maybe a port.
_HOST = re.compile(r"([^:\[\]]*|\[[^\[\]]*\])(?::\d*)?")


class Front:
    """One for each process that answers requests."""

    def __init__(
        self, models: list[Model], keys: Keys, limits: Limits, allowed_hosts: Collection[str] = frozenset()
    ) -> None:
        """`allowed_hosts`: names by which a service that is open to all may be reached."""
        self._allowed_hosts = {"localhost", *allowed_hosts}
        self.models = {model.name: model for model in models}
        self.keys, self.limits = keys, limits
        self.metrics = Metrics()
        self.admission = Admission(
            limits.max_queue, lambda model, held: self.metrics.queue.labels(model).set(held), limits.key_share
        )
        self.rate_limit = RateLimit(limits.rate_per_minute, limits.rate_burst)
        self.draining = False
        self.unanswered: list[str] = []
        """The ids of the requests in flight."""

    def counting(self, app: App) -> App:
        """`app`, with a count of the requests that `guarded` admits. Each counts until its answer is sent completely.

        The service ends when the count is 0. A handler returns before any byte is sent, and a stream has only begun by
        then. An answer counts as sent when Ray's proxy has it. A slow client loses what it has not read when the proxy
        itself ends.
        """

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            with contextlib.ExitStack() as until_sent:
                scope.setdefault("state", {})["until_sent"] = until_sent
                await app(scope, receive, send)

        return counted

    @property
    def in_flight(self) -> int:
        return len(self.unanswered)

    def _begin(self, request_id: str, until_sent: contextlib.ExitStack) -> None:
        def end() -> None:
            self.unanswered.remove(request_id)
            self.metrics.in_flight.set(self.in_flight)

        self.unanswered.append(request_id)
        self.metrics.in_flight.set(self.in_flight)
        until_sent.callback(end)

    def admit(self, request: Request) -> str:
        """The caller's name. Raises ApiError for a missing or wrong key, too many requests, and a foreign page."""
        caller = payer = self.keys.caller(request.scope["headers"])
        facts_of_request(request)["caller"] = caller
        if request.headers.get("sec-fetch-site") == "cross-site":
            # Without keys (open=true) any page that a user visits could send requests here.
            raise ApiError(403, "requests from pages of other sites are not taken", code="cross_site")
        if self.keys.open_to_all:
            self._check_host(request.headers.get("host", ""))
            payer = request.client.host if request.client else caller
        self.rate_limit.take(payer)
        if self.draining:
            message = "the service is ending; try again once it was started anew"
            raise ApiError(503, message, code="draining", retry_after_s=5.0)
        request.scope["state"]["caller"] = caller
        CALLER.set(caller if self.keys.several else "")
        return caller

    def _check_host(self, header: str) -> None:
        """Raises ApiError for a host name that is not one of ours.

        A foreign page can make its own name lead here (DNS rebinding), and a browser then takes it for the same site.
        That does not work with an address.
        """
        match = _HOST.fullmatch(header)
        host = match.group(1).strip("[]").lower() if match else ""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if host not in self._allowed_hosts:
                message = f"{quoted(header)} is not an allowed name of this service; start it with allowed_hosts=NAME"
                raise ApiError(403, message, code="unknown_host") from None

    async def guarded(self, handler: Handler, request: Request, query: Collection[str] = ()) -> Response:
        """The handler's answer, after the check of the caller and within the time limit. `query`: its known fields."""
        self.admit(request)
        self._begin(facts_of_request(request)["request_id"], request.scope["state"]["until_sent"])
        if unknown := sorted(set(request.query_params) - set(query)):
            known = f"the query takes {' and '.join(query)}" if query else "this route takes no query"
            message = f"unknown field {quoted(unknown[0])} in the query; {known}"
            raise ApiError(400, message, param=unknown[0][:64], code="unknown_field")
        try:
            async with asyncio.timeout(self.limits.request_timeout_s) as limit:
                return await handler(request)
        except TimeoutError:
            if not limit.expired():
                # Not this time limit but another one, such as a storage's. It is logged as a fault.
                raise
            raise ApiError(
                503, f"no answer within {self.limits.request_timeout_s:g} s", code="timeout", retry_after_s=30.0
            ) from None
        except ClientDisconnect:
            raise ApiError(400, "the body ended too early", code="body_incomplete") from None

    def no_route(self, request: Request, error: HTTPException, methods: Collection[str]) -> ApiError:
        """The refusal of an unknown route, or of one that has only other `methods`. Raises ApiError 401 first.

        Who has no key does not learn which routes there are.
        """
        self.admit(request)
        where = f"{request.method} {quoted(request.url.path)}"
        if error.status_code == _METHOD_NOT_ALLOWED:
            allow = ", ".join(sorted(methods))
            message = f"{where}: no such method; this route has {allow}"
            return ApiError(_METHOD_NOT_ALLOWED, message, code="method_not_allowed", allow=allow)
        return ApiError(404, f"{where}: no such route", code="not_found")

    async def json(self, request: Request, max_bytes: int, *, other: str = "") -> Any:
        """The body as JSON. Raises ApiError. `other`: the other form of body that this route takes."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            message = f"the body must be JSON (Content-Type: application/json){other and f' or {other}'}"
            raise ApiError(415, message, code="unsupported_media_type")
        body = bytearray()
        too_large = False
        async for part in request.stream():
            # The rest is read and thrown away; BodyLimit bounds it. See _answer_and_drain.
            if too_large := too_large or len(body) + len(part) > max_bytes:
                body.clear()
            else:
                body += part
        if too_large:
            message = f"the body has more than {in_bytes(max_bytes)}, the limit"
            raise ApiError(413, message, code="body_too_large")
        return parse_json(body)

    def named(self, name: str | None, kind: str, param: str = "model") -> Model:
        """The model of that name, by default the first of its kind. Raises ApiError."""
        names = [model.name for model in self.models.values() if model.kind == kind]
        if name is None and names:
            name = names[0]
        if name is None or name not in names:
            known = ", ".join(names) or "none"
            other = f" (it is a {self.models[name].kind})" if name in self.models else ""
            asked = "" if name is None else f" {quoted(name)}"
            raise ApiError(404, f"no {kind}{asked}{other}; known: {known}", param=param, code="model_not_found")
        return self.models[name]


def facts_of_request(request: Request) -> dict[str, Any]:
    """The fields of the request's line in the log; a route may add some."""
    return request.scope["state"]["facts"]
