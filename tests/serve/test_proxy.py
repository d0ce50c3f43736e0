"""The layers around Ray Serve's proxy: its routes and messages, headers that control it, and processes that die."""

import asyncio
import json
from typing import Any

import pytest
from serving import AUTHORIZED, KEY, log_records, run
from test_security import Body, reader

from serve.errors import SECURITY_HEADERS
from serve.limits import Limits
from serve.proxy import BodyBudgets, ProxyGuard, proxy_middlewares
from serve.security import Keys


def asked(app: Any, path: str = "/v1/models", headers: Any = (), parts: tuple[bytes, ...] = (b"",)) -> Body:
    """One request through the guard only."""
    body = Body(list(parts))
    body.scope |= {"path": path, "headers": list(headers)}
    run(ProxyGuard(app)(body.scope, body.receive, body.send))
    return body


def headers_of(body: Body) -> dict[str, str]:
    pairs = [(name.decode().lower(), value.decode()) for name, value in body.sent[0]["headers"]]
    assert len(pairs) == len(dict(pairs)), f"a header stands there twice: {pairs}"
    return dict(pairs)


def says(status: int, text: bytes, kind: bytes = b"text/plain; charset=utf-8", *more: tuple[bytes, bytes]) -> Any:
    """Like Ray's proxy, which adds an id to its answers."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", kind), (b"x-request-id", dict(scope["headers"])[b"x-request-id"]), *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    return app


def test_headers_that_would_steer_the_proxy_are_taken_out() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    steering = [
        (b"X-Request-Timeout-Seconds", b"0"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"serve_multiplexed_model_id", b"x"),
        (b"serve-multiplexed-model-id", b"x"),
        (b"x-session-id", b"x"),
        (b"x-request-id", b"bad id\x01"),
        (b"authorization", b"Bearer x"),
    ]
    asked(app, headers=steering)
    (authorization, (name, made)) = seen
    assert authorization == (b"authorization", b"Bearer x")
    assert (name, len(made)) == (b"x-request-id", 32)
    seen.clear()
    asked(app, headers=[(b"X-Request-Id", b"good-id.1")])
    assert seen == [(b"x-request-id", b"good-id.1")]


def test_a_process_that_died_is_answered_for() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    body = asked(silent, parts=(b"x",))
    assert (body.status, body.error["code"]) == (503, "request_lost")
    assert headers_of(body)["retry-after"] == "1"


@pytest.mark.parametrize("path", ["/-/routes", "/-/", "/-/anything", "/-/healthz/x"])
def test_the_routes_of_the_proxy_are_nobodys(path: str) -> None:
    body = asked(says(200, b'{"/": "mmcore", "/payroll": "other"}', b"application/json"), path)
    assert (body.status, body.error["code"]) == (404, "not_found")
    assert len(body.sent) == 2


def test_the_health_of_the_proxy_is_everybodys() -> None:
    body = asked(says(200, b"success"), "/-/healthz")
    assert (body.status, body.sent[1]["body"]) == (200, b"success")


@pytest.mark.parametrize(("status", "answered"), [(404, 503), (408, 408), (429, 429), (503, 503)])
def test_what_the_proxy_says_in_plain_text_becomes_json(status: int, answered: int) -> None:
    """Without a route there is no application, before the first deployment and after the last one.

    The answer says to retry.
    """
    body = asked(says(status, b"Path '/x' not found. Ping http://.../-/routes for available routes."))
    assert (body.status, body.error["code"]) == (answered, "unavailable")
    assert headers_of(body).items() >= {"content-type": "application/json", "retry-after": "5"}.items()
    assert set(body.error) == {"message", "type", "param", "code"}
    assert len(body.sent) == 2, "Ray's own words follow"


def test_the_words_of_rays_proxy_are_told_by_its_own_making() -> None:
    from ray.serve._private.http_util import convert_object_to_asgi_messages

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in convert_object_to_asgi_messages("Path '/x' not found.", 404):
            await send(message)

    assert asked(app).status == 503


def test_answers_of_an_application_are_left_as_they_are() -> None:
    for status, kind in ((200, b"text/plain"), (404, b"text/html"), (503, b"application/json"), (500, b"text/plain")):
        body = asked(says(status, b"{}", kind))
        assert (body.status, body.sent[1]["body"]) == (status, b"{}")
        assert set(headers_of(body)) == {"content-type", "x-request-id"}
    # From another application on that cluster, which has its own 404.
    body = asked(says(404, b"Not Found", b"text/plain; charset=utf-8", (b"content-length", b"9")), "/payroll/x")
    assert (body.status, body.sent[1]["body"]) == (404, b"Not Found")


def test_refusals_of_the_proxy_have_every_header_and_a_line_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.http_util import _apply_middlewares, validate_http_proxy_callback_return

    monkeypatch.setenv("SERVE_MAX_BODY_BYTES", "1000")
    monkeypatch.setenv("SERVE_MAX_JSON_BYTES", "1000")
    # With Ray's own middleware innermost, in Ray's order.
    app = _apply_middlewares(reader, validate_http_proxy_callback_return(proxy_middlewares()))
    # The guard is outermost, so it sees whatever the others do.
    assert isinstance(app, ProxyGuard)
    for parts, status in (([b"x" * 600, b"x" * 600], 413), ([b"x" * 600], 200)):
        body = Body(parts)
        body.scope |= {"path": "/x", "headers": [(b"x-request-id", b"mine-1")]}
        with log_records() as records:
            run(app(body.scope, body.receive, body.send))
        assert body.status == status
        assert headers_of(body)["x-request-id"] == "mine-1"
        logged = [record.fields for record in records]  # type: ignore[attr-defined]
        if status == 200:
            assert not logged
            continue
        assert json.loads(body.sent[1]["body"])["error"]["code"] == "body_too_large"
        assert headers_of(body).items() >= SECURITY_HEADERS.items()
        assert logged == [{"request_id": "mine-1", "method": "POST", "status": 413}]


@pytest.mark.parametrize("authorization", [None, "Bearer a-guess-of-a-stranger"])
def test_strangers_fill_nothing_but_their_own_budget(authorization: str | None) -> None:
    limits = Limits(max_body_bytes=1000, max_json_bytes=1000, max_image_bytes=1000, max_bodies_bytes=1500)
    keys = Keys({"SERVE_API_KEYS": KEY})
    strange = [(b"authorization", authorization.encode())] if authorization else []
    known = [(name.encode(), value.encode()) for name, value in AUTHORIZED.items()]

    async def main() -> list[int]:
        at_work, go = asyncio.Event(), asyncio.Event()

        async def held(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            at_work.set()
            await go.wait()
            await send({"type": "http.response.start", "status": 401, "headers": []})

        app = BodyBudgets(lambda *each: (held if not at_work.is_set() else reader)(*each), limits, keys)
        statuses = []
        filling = Body([b"x" * 900])
        filling.scope["headers"] = strange
        first = asyncio.ensure_future(app(filling.scope, filling.receive, filling.send))
        await at_work.wait()
        for headers in (strange, known):
            body = Body([b"x" * 900])
            body.scope["headers"] = headers
            await app(body.scope, body.receive, body.send)
            statuses.append(body.status)
        go.set()
        await first
        return statuses

    assert run(main()) == [429, 200]


@pytest.mark.parametrize(
    ("keys", "share", "sizes", "other"),
    [
        (f"{KEY},{KEY}-other", "0.5", [200, 429], 200),
        (f"{KEY},{KEY}-other", "1", [200, 200], 200),
        # A client without others may use all of it, and so may a single body.
        (KEY, "0.5", [200, 200], 200),
        (f"{KEY},{KEY}-other", "0.1", [200, 429], 200),
    ],
)
def test_bodies_of_one_key_leave_room_for_the_others(keys: str, share: str, sizes: list[int], other: int) -> None:
    environment = {"SERVE_MAX_BODY_BYTES": "1000", "SERVE_MAX_BODIES_BYTES": "2000", "SERVE_KEY_SHARE": share}

    async def main() -> None:
        go = asyncio.Event()

        async def held(scope: Any, receive: Any, send: Any) -> None:
            while (message := await receive())["type"] == "http.request" and message["more_body"]:
                pass
            if message["type"] == "http.request":
                await go.wait()
                await send({"type": "http.response.start", "status": 200, "headers": []})

        app = BodyBudgets(held, Limits.from_environment(environment), Keys({"SERVE_API_KEYS": keys}))
        bodies = [Body([b"x" * 600]) for _ in range(3)]
        for body, key in zip(bodies, (KEY, KEY, keys.split(",")[-1]), strict=True):
            body.scope["headers"] = [(b"authorization", f"Bearer {key}".encode())]
        asked = [asyncio.ensure_future(app(body.scope, body.receive, body.send)) for body in bodies]
        await asyncio.sleep(0.1)
        go.set()
        await asyncio.gather(*asked)
        assert [body.status for body in bodies] == [*sizes, other]
        assert app._known.held_bytes == 0
        assert not any(app._known._held_by.values())

    run(main())


def test_a_proxy_without_keys_starts_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERVE_API_KEYS", "SERVE_API_KEYS_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert len(proxy_middlewares()) == 2
