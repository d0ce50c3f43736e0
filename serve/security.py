"""Keys, rates, and limits on bodies.

Keys are compared in constant time and kept as digests. The file of SERVE_API_KEYS_FILE is read again when it changes.
A key that is taken out of it stops working. If the file cannot be read, or is empty, none of its keys works.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from mmcore.errors import InputError
from serve.errors import ApiError, in_bytes
from serve.limits import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

KEYS, KEYS_FILE = "SERVE_API_KEYS", "SERVE_API_KEYS_FILE"
# Shorter ones can be guessed. `openssl rand -hex 32` makes one.
MIN_KEY_CHARS = 16
_SEND_IT = "send the header Authorization: Bearer KEY, once"
# What stands for the caller's key in logs and for the owner of a job.
_FINGERPRINT_CHARS = 12
OPEN = "open"
# Callers whose rate is remembered. The one whose last request is oldest is forgotten first.
_MAX_BUCKETS = 10_000
# So much of a refused body is still read, and for so long. A browser reads the answer only after it has sent all; if
# the connection closes before that, it sees a reset instead.
_MAX_DRAINED_BYTES = 64 * 2**20
_MAX_DRAIN_S = 2.0
REQUEST_ID = b"x-request-id"

logger = logging.getLogger("mmcore.serve")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Keys:
    """The keys of the service. With `open_to_all` none is needed."""

    def __init__(self, environment: Mapping[str, str], *, open_to_all: bool = False) -> None:
        """Raises InputError for no key, or a short one, unless the service is open to all."""
        self.open_to_all = open_to_all
        self._fixed = self._parse(environment.get(KEYS, "").replace(",", "\n"), KEYS)
        self._file = Path(environment[KEYS_FILE]) if environment.get(KEYS_FILE) else None
        self._seen: tuple[int, ...] | None = None
        self._from_file: list[bytes] = []
        if open_to_all:
            return
        if self._file is not None:
            try:
                # The state is noted before the file is read: a change in between is then seen the next time.
                self._seen = self._state()
                self._from_file = self._parse(self._file.read_text(), str(self._file))
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"{KEYS_FILE}={self._file}: cannot be read ({error})") from None
        if not self._fixed and not self._from_file:
            raise InputError(
                f"no key: write one a line into a file and export {KEYS_FILE}=FILE, or export {KEYS}=KEY[,KEY...] "
                "(`openssl rand -hex 32` makes one), or say open=true to serve whoever can reach the port"
            )

    @staticmethod
    def _parse(text: str, where: str) -> list[bytes]:
        lines = (line.strip() for line in text.splitlines())
        keys = [line for line in lines if line and not line.startswith("#")]
        if short := [key for key in keys if len(key) < MIN_KEY_CHARS]:
            raise InputError(
                f"{where}: a key of {len(short[0])} characters can be guessed; give at least {MIN_KEY_CHARS} "
                "(`openssl rand -hex 32` makes one)"
            )
        return [_digest(key.encode()) for key in keys]

    def _state(self) -> tuple[int, ...]:
        assert self._file is not None
        facts = self._file.stat()
        return facts.st_mtime_ns, facts.st_size, facts.st_ino

    def _digests(self) -> list[bytes]:
        if self._file is not None:
            try:
                state = self._state()
                if state != self._seen:
                    self._from_file = self._parse(self._file.read_text(), str(self._file))
                    self._seen = state
            except (OSError, UnicodeDecodeError, InputError) as error:
                if self._from_file:
                    logger.error("the file of keys cannot be used, none of its keys is valid now: %s", error)
                self._from_file, self._seen = [], None
        return self._fixed + self._from_file

    @property
    def several(self) -> bool:
        """Whether callers are told apart."""
        return not self.open_to_all and len(set(self._digests())) > 1

    def caller(self, headers: list[tuple[bytes, bytes]]) -> str:
        """A name for the caller, from which his key cannot be found. Raises ApiError 401."""
        if self.open_to_all:
            return OPEN
        given = [value for name, value in headers if name == b"authorization"]
        if not given:
            raise ApiError(401, f"no key was sent; {_SEND_IT}", code="missing_api_key")
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = _digest(key.strip())
        # Every key is compared to its end, so that the time tells nothing about a guess.
        known = [hmac.compare_digest(digest, each) for each in self._digests()]
        if scheme.lower() != b"bearer":
            raise ApiError(401, f"the key was not sent as it must be; {_SEND_IT}", code="invalid_api_key")
        if not any(known):
            raise ApiError(401, "this key is not one of the service's keys", code="invalid_api_key")
        return digest.hex()[:_FINGERPRINT_CHARS]


class RateLimit:
    """A bucket of tokens for each caller: `burst` at once, `per_minute` in the long run."""

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = per_minute / 60, burst, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Raises ApiError 429."""
        now = self._clock()
        tokens, before = self._buckets.pop(caller, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - before) * self._rate)
        allowed = tokens >= 1
        self._buckets[caller] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if not allowed:
            wait_s = (1 - tokens) / self._rate if self._rate else 3600.0
            raise ApiError(
                429,
                f"too many requests: one key may send {self._rate * 60:g} a minute, and {self._burst} at once",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )


class BodyLimit:
    """Counts a body while it is read, and stops at the limit. It holds no body itself.

    It stands before the routes, and before Ray Serve's proxy (serve/proxy.py). That proxy alone would read a body of
    any length into its memory.
    """

    def __init__(self, app: App, limits: Limits) -> None:
        self._app, self._limits = app, limits
        self.held_bytes = 0
        self._held_by: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send, caller: str = "") -> None:
        """`caller` may hold no more than a share of all bodies. A single body always fits."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limits = self._limits
        most = limits.max_body_bytes
        too_large = ApiError(413, f"the body has more than {in_bytes(most)}, the limit", code="body_too_large")
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if lengths and (len(set(lengths)) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 18):
            wrong = "the header Content-Length is not one whole number"
            await answer(ApiError(400, wrong, code="invalid_header"), send)
            return
        if lengths and int(lengths[0]) > most:
            await _answer_and_drain(too_large, receive, send)
            return
        refusal: ApiError | None = None
        read, complete, answered = 0, False, False
        deadline = time.monotonic() + limits.body_timeout_s

        async def bounded_receive() -> Message:
            nonlocal refusal, read, complete
            if refusal is not None:
                return {"type": "http.disconnect"}
            if complete:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                late = f"the body did not arrive within {limits.body_timeout_s:g} s"
                refusal = ApiError(408, late, code="body_timeout")
                return {"type": "http.disconnect"}
            if message["type"] != "http.request":
                return message
            size = len(message.get("body", b""))
            read, self.held_bytes = read + size, self.held_bytes + size
            self._held_by[caller] += size
            own = self._held_by[caller]
            past_share = caller and own > read and own > limits.key_share * limits.max_bodies_bytes
            complete = not message.get("more_body", False)
            if read > most:
                refusal = too_large
            # A request without a body (/health, /ready, the page) takes no room and is never refused here.
            elif size and (past_share or self.held_bytes > limits.max_bodies_bytes):
                refusal = ApiError(
                    429, "too many large bodies at once; try again", code="bodies_full", retry_after_s=1.0
                )
            return message if refusal is None else {"type": "http.disconnect"}

        async def noting_send(message: Message) -> None:
            nonlocal answered
            answered = answered or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, bounded_receive, noting_send)
        except Exception:
            # The body ended by this refusal, so an error that the routes make of it does not matter.
            if refusal is None:
                raise
        finally:
            self.held_bytes -= read
            self._held_by[caller] -= read
        if refusal is too_large and not answered:
            await _answer_and_drain(refusal, receive, send)
        elif refusal is not None and not answered:
            await answer(refusal, send)


async def answer(error: ApiError, send: Send) -> None:
    for message in error.asgi_messages():
        await send(message)


async def _answer_and_drain(error: ApiError, receive: Receive, send: Send) -> None:
    """Answer at once, read and throw away the rest of the body, and then let the connection close."""
    start, answer = error.asgi_messages()
    await send(start)
    await send({**answer, "more_body": True})
    left, more = _MAX_DRAINED_BYTES, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_MAX_DRAIN_S):
            while left > 0 and more:
                message = await receive()
                left -= len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})
