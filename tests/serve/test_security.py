"""Keys, rates, and bodies that are refused while they are read."""

import asyncio
import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import KEY, error, request, run

from mmcore.errors import InputError
from serve import security
from serve.errors import ApiError
from serve.limits import Limits
from serve.security import OPEN, BodyLimit, Keys, RateLimit

MIB = 2**20


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


@pytest.mark.parametrize(
    ("headers", "code", "words"),
    [
        ({}, "missing_api_key", "no key was sent; send the header Authorization: Bearer KEY"),
        ({"authorization": "Bearer a-wrong-key-of-some-length"}, "invalid_api_key", "not one of the service's keys"),
        ({"authorization": f"Basic {KEY}"}, "invalid_api_key", "not sent as it must be"),
    ],
)
def test_a_wrong_key_is_told_from_a_missing_one(headers: dict[str, str], code: str, words: str) -> None:
    refused = error(request("GET", "/v1/models", headers=headers))
    assert refused["code"] == code
    assert words in refused["message"]
    assert KEY not in refused["message"]


def test_nothing_starts_without_a_key() -> None:
    with pytest.raises(InputError, match="open=true"):
        Keys({})
    with pytest.raises(InputError, match="open=true"):
        Keys({"SERVE_API_KEYS": " , "})
    assert Keys({}, open_to_all=True).caller([]) == OPEN


def test_keys_that_can_be_guessed_are_refused() -> None:
    with pytest.raises(InputError, match="a key of 5 characters"):
        Keys({"SERVE_API_KEYS": f"{KEY},short"})


@pytest.mark.parametrize(
    "headers",
    [
        [],
        bearer(""),
        bearer("wrong-key-wrong-key"),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(KEY.upper()),
        [(b"authorization", KEY.encode())],
        [(b"authorization", f"Basic {KEY}".encode())],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"x-api-key", KEY.encode())],
        bearer(KEY) * 2,
    ],
)
def test_without_the_key_nobody_comes_in(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(ApiError) as caught:
        Keys({"SERVE_API_KEYS": KEY}).caller(headers)
    assert caught.value.status == 401
    assert caught.value.headers()["www-authenticate"] == "Bearer"
    assert KEY not in caught.value.message


def test_callers_are_told_apart_and_their_keys_are_not_told() -> None:
    keys = Keys({"SERVE_API_KEYS": f"{KEY},{KEY}-another"})
    names = {keys.caller(bearer(KEY)), keys.caller(bearer(f"{KEY}-another"))}
    assert len(names) == 2
    assert not any(KEY in name or name in KEY for name in names)
    assert keys.caller([(b"authorization", f"bearer  {KEY} ".encode())]) in names


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or real(a, b))
    keys = Keys({"SERVE_API_KEYS": ",".join(f"{KEY}-{n}" for n in range(5))})
    keys.caller(bearer(f"{KEY}-0"))
    # The first key matches, and the others are compared all the same. Digests have equal lengths, keys do not.
    assert compared == [(32, 32)] * 5


def test_the_file_of_keys_is_read_again_when_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the page\n{KEY}\n\n")
    keys = Keys({"SERVE_API_KEYS_FILE": str(file)})
    assert keys.caller(bearer(KEY))

    def allowed(key: str) -> bool:
        try:
            return bool(keys.caller(bearer(key)))
        except ApiError:
            return False

    new = "another-key-9876543210"
    # As Kubernetes and careful editors do: another file with the same name.
    (tmp_path / "new").write_text(f"{KEY}\n{new}\n")
    os.replace(tmp_path / "new", file)
    assert allowed(KEY)
    assert allowed(new)
    file.write_text(f"{new}\n")
    assert not allowed(KEY), "a key that was taken out still works"
    assert allowed(new)
    # With an unusable file nobody gets access. When it is corrected, it works again.
    for broken in (b"", b"short\n", b"\xff\xfe\x00"):
        file.write_bytes(broken)
        assert not allowed(new)
    file.unlink()
    assert not allowed(new)
    file.write_text(f"{new}\n")
    assert allowed(new)


def test_a_key_taken_out_while_the_file_is_read_stops_working(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, new = tmp_path / "keys", "another-key-9876543210"
    file.write_text(f"{KEY}\n")
    read = Path.read_text

    def read_and_change(self: Path, *args: Any, **kwargs: Any) -> str:
        text = read(self, *args, **kwargs)
        if self == file:
            file.write_text(f"{new}\n{new}\n")
        return text

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_and_change)
        keys = Keys({"SERVE_API_KEYS_FILE": str(file)})
    with pytest.raises(ApiError):
        keys.caller(bearer(KEY))
    assert keys.caller(bearer(new))


def test_a_file_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Keys({"SERVE_API_KEYS_FILE": str(tmp_path / "none")})


def test_rates_are_counted_for_each_key() -> None:
    now = [0.0]
    limit = RateLimit(per_minute=60, burst=3, clock=lambda: now[0])
    for _ in range(3):
        limit.take("a")
    with pytest.raises(ApiError) as caught:
        limit.take("a")
    assert caught.value.status == 429
    assert caught.value.headers()["retry-after"] == "1"
    limit.take("b")
    now[0] = 1.0
    limit.take("a")
    with pytest.raises(ApiError):
        limit.take("a")
    # A long pause fills the bucket and no more.
    now[0] = 1000.0
    for _ in range(3):
        limit.take("a")
    with pytest.raises(ApiError):
        limit.take("a")


class Body:
    """An ASGI request with a body in parts, and its answer."""

    def __init__(self, parts: list[bytes], *, length: int | None = None, pause_s: float = 0.0) -> None:
        self.parts, self.pause_s = list(parts), pause_s
        headers = [] if length is None else [(b"content-length", str(length).encode())]
        self.scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        self.num_read = self.num_read_before_answer = 0
        self.sent: list[Any] = []

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(self.pause_s)
        if not self.parts:
            await asyncio.sleep(3600)
        self.num_read += 1
        return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts)}

    async def send(self, message: Any) -> None:
        if not self.sent:
            self.num_read_before_answer = self.num_read
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.sent[1]["body"])["error"]


async def reader(scope: Any, receive: Any, send: Any) -> None:
    """Reads its whole body, like a careless route or Ray Serve's proxy."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


LIMITS = Limits.from_environment(
    {"SERVE_MAX_BODY_BYTES": "1000", "SERVE_MAX_BODIES_BYTES": "1500", "SERVE_BODY_TIMEOUT_S": "3600"}
)


def test_a_body_that_says_its_length_is_refused_unread() -> None:
    body = Body([b"x" * 1001], length=1001)
    run(BodyLimit(reader, LIMITS)(body.scope, body.receive, body.send))
    assert (body.status, body.error["code"], body.num_read_before_answer) == (413, "body_too_large", 0)


@pytest.mark.parametrize("length", [None, 10])
def test_a_body_is_counted_whatever_it_says(length: int | None) -> None:
    body = Body([b"x" * 100] * 1000, length=length)
    limit = BodyLimit(reader, LIMITS)
    run(limit(body.scope, body.receive, body.send))
    assert (body.status, body.error["code"]) == (413, "body_too_large")
    assert body.num_read_before_answer == 11, "it was read on after the limit"
    assert limit.held_bytes == 0


@pytest.mark.parametrize("length", [None, 200 * MIB])
def test_what_is_left_of_a_refused_body_is_taken_and_thrown_away(
    length: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser reads the answer only when it has sent everything, but the service does not read for ever."""
    monkeypatch.setattr(security, "_MAX_DRAIN_S", 3600.0)
    few = Body([b"x" * 400] * 50, length=20_000)
    run(BodyLimit(reader, LIMITS)(few.scope, few.receive, few.send))
    assert (few.status, few.parts) == (413, [])
    assert [message.get("more_body") for message in few.sent] == [None, True, None]
    many = Body([bytes(MIB)] * 200, length=length)
    run(BodyLimit(reader, LIMITS)(many.scope, many.receive, many.send))
    assert many.status == 413
    assert 60 <= many.num_read <= 70
    # A client that sends nothing is not waited for after this time.
    monkeypatch.setattr(security, "_MAX_DRAIN_S", 0.5)
    silent = Body([b"x" * 2000], length=2001)
    silent.parts.clear()
    run(BodyLimit(reader, LIMITS)(silent.scope, silent.receive, silent.send))
    assert silent.status == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 30, " 5", ""])
def test_lengths_that_are_none(length: str) -> None:
    body = Body([b"x"])
    body.scope["headers"] = [(b"content-length", length.encode())]
    run(BodyLimit(reader, LIMITS)(body.scope, body.receive, body.send))
    assert (body.status, body.num_read) == (400, 0)


def test_a_body_within_the_limit_passes() -> None:
    body = Body([b"x" * 500, b"x" * 500], length=1000)
    run(BodyLimit(reader, LIMITS)(body.scope, body.receive, body.send))
    assert body.status == 200
    assert body.sent[1]["body"] == b"1000"


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    body = Body([b"x"] * 100, pause_s=0.03)
    limits = dataclasses.replace(LIMITS, body_timeout_s=0.2)
    run(BodyLimit(reader, limits)(body.scope, body.receive, body.send))
    assert (body.status, body.error["code"]) == (408, "body_timeout")
    assert body.num_read < 10


def test_all_bodies_together_are_bounded() -> None:
    limit = BodyLimit(reader, LIMITS)
    # Without a pause the parts come in turn.
    bodies = [Body([b"x" * 450, b"x" * 450]) for _ in range(4)]

    async def main() -> None:
        await asyncio.gather(*(limit(body.scope, body.receive, body.send) for body in bodies))

    run(main())
    statuses = [body.status for body in bodies]
    assert 429 in statuses
    assert 200 in statuses
    assert set(statuses) == {200, 429}
    assert limit.held_bytes == 0


def test_what_has_no_body_passes_however_full_it_is() -> None:
    """Bodies sent to /health, /ready and the page must not block these for others."""
    app = BodyLimit(reader, LIMITS)
    app.held_bytes = LIMITS.max_bodies_bytes + 1
    for parts, length, status in (([b""], None, 200), ([b""], 0, 200), ([b"", b""], None, 200), ([b"x"], 1, 429)):
        body = Body(parts, length=length)
        run(app(body.scope, body.receive, body.send))
        assert body.status == status, parts


def test_waiting_for_the_answer_has_no_time_limit_of_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(security, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        now[0] += LIMITS.body_timeout_s + 1
        with pytest.raises(TimeoutError):
            # A disconnect is checked long after the body has arrived.
            await asyncio.wait_for(receive(), 0.4)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    body = Body([b"x"])
    run(BodyLimit(slow, LIMITS)(body.scope, body.receive, body.send))
    assert body.status == 200
