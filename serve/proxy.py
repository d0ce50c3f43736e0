"""Middlewares around Ray Serve's proxy: limits that hold before a body is read, and refusals in one form.

The proxy finds them by RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:proxy_middlewares in the environment in
which Ray was started. `python -m serve.control start` sets that variable. serve/app.py builds nothing without it, and
answers no request on a cluster that lacks it. The routes check the same limits again.
"""

import os
import re
import secrets
from collections.abc import Mapping

from starlette.middleware import Middleware

from mmcore.errors import InputError
from serve.errors import ApiError
from serve.limits import Limits
from serve.metrics import configure_logging, logger
from serve.security import REQUEST_ID, App, BodyLimit, Keys, Message, Receive, Scope, Send, answer

# Set in the environment of the program that starts Ray.
VARIABLE, VALUE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.proxy:proxy_middlewares"
# Headers by which a client would steer Ray Serve's proxy: its time limit, whether it notices a disconnect, and which
# replica it chooses. They are removed.
_STEERING_HEADERS = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"serve-session-id",
    b"x-session-id",
}
_GOOD_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
# Routes of the proxy itself. Only the health route is open; the others tell what else the cluster serves.
_OWN_ROUTES, _HEALTH = "/-/", "/-/healthz"
_NO_ROUTE = ApiError(404, "no such route", code="not_found")
# Ray Serve's proxy refuses these in plain text. Its 404 means that no application runs yet, or none any more, as ours
# takes every route.
_OF_RAY = {
    status: ApiError(answered, "the service does not answer now; try again", code="unavailable", retry_after_s=5.0)
    for status, answered in ((404, 503), (408, 408), (429, 429), (503, 503))
}
_LOST = ApiError(503, "the service lost this request; try again", code="request_lost", retry_after_s=1.0)


def check_guarded(environment: Mapping[str, str]) -> None:
    """Raises InputError for an environment by which Ray's proxy would not find these middlewares."""
    if (given := environment.get(VARIABLE, "")) != VALUE:
        raise InputError(
            f"{VARIABLE}={given}: export {VARIABLE}={VALUE}, here and where Ray is started (its proxy has nothing of a "
            "runtime_env); without it Ray's proxy reads bodies of any length into its memory"
        )


class ProxyGuard:
    """The outermost middleware.

    It gives each request its id and removes headers that steer the proxy. It answers in JSON where the proxy would
    answer in plain text or not at all. It logs the refusals that do not reach the routes.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A client's own id goes into every log line and back to the client.
        request_id = next((value for name, value in scope["headers"] if name.lower() == REQUEST_ID), b"")
        if not _GOOD_REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16).encode()
        dropped = {REQUEST_ID, *_STEERING_HEADERS}
        headers = [pair for pair in scope["headers"] if pair[0].lower().replace(b"_", b"-") not in dropped]
        headers.append((REQUEST_ID, request_id))
        gone = answered = replaced = False

        async def noting_receive() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or message["type"] == "http.disconnect"
            return message

        async def checking_send(message: Message) -> None:
            nonlocal answered, replaced
            if message["type"] == "http.response.start":
                answered, status = True, message["status"]
                there = {name.lower(): value for name, value in message.get("headers", [])}
                # The answer of an application has a length; other applications may run on that cluster.
                plain = there.get(b"content-type", b"").startswith(b"text/plain") and b"content-length" not in there
                if plain and status in _OF_RAY:
                    await answer(_OF_RAY[status], checking_send)
                    replaced = True
                elif REQUEST_ID not in there:
                    # A refusal of this file or of BodyLimit: the proxy puts an id on every other answer.
                    fields = {"request_id": request_id.decode(), "method": scope["method"], "status": status}
                    logger.info("refused by the proxy", extra={"fields": fields})
                    message = {**message, "headers": [*message.get("headers", []), (REQUEST_ID, request_id)]}
            if not replaced:
                await send(message)

        path = scope.get("path", "")
        if path.startswith(_OWN_ROUTES) and path != _HEALTH:
            await answer(_NO_ROUTE, checking_send)
            return
        await self._app({**scope, "headers": headers}, noting_receive, checking_send)
        if not answered and not gone:
            # The process that answers requests died during this one. The proxy then sends no answer.
            await answer(_LOST, checking_send)


class BodyBudgets:
    """Two `BodyLimit`s: one for bodies with a valid key, one for all others, which cannot fill the first.

    With several keys each one is bound to its share. A request without a key is not refused here, as the proxy does not
    know about `open`. The routes refuse it.
    """

    def __init__(self, app: App, limits: Limits, keys: Keys | None) -> None:
        """`keys`: None for a process without keys, where every body counts as one of the others."""
        self._keys, self._known, self._others = keys, BodyLimit(app, limits), BodyLimit(app, limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys is None or scope["type"] != "http":
            await self._others(scope, receive, send)
            return
        try:
            caller = self._keys.caller(scope["headers"])
        except ApiError:
            await self._others(scope, receive, send)
        else:
            await self._known(scope, receive, send, caller if self._keys.several else "")


def _keys() -> Keys | None:
    try:
        return Keys(os.environ)
    except InputError as error:
        # Ray's proxy must start without keys too: the service may be open, which its environment does not say.
        logger.info("the proxy knows no keys", extra={"fields": {"reason": str(error)}})
        return None


def proxy_middlewares() -> list[Middleware]:
    """The middlewares for Ray Serve's proxies, the outermost last."""
    configure_logging()
    limits = Limits.from_environment(os.environ)
    return [Middleware(BodyBudgets, limits=limits, keys=_keys()), Middleware(ProxyGuard)]
