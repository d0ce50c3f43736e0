"""Server-sent events: the answer that holds a request's places until its end, and the form of an event."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from serve.errors import ApiError, fault
from serve.front import Front
from serve.metrics import logger
from serve.security import Receive, Scope, Send

# Seconds after which `KEEP_ALIVE` is sent while a stream has nothing to say.
_KEEP_ALIVE_S = 15.0
KEEP_ALIVE = b": alive\n\n"
"""A comment, so that nothing between here and the client closes the stream."""
DONE = b"data: [DONE]\n\n"
"""The end of a chat, as OpenAI's clients expect it."""


class EventStream(StreamingResponse):
    """Server-sent events. When they end, in whatever way, the request's places in the queue are freed."""

    def __init__(self, events: AsyncGenerator[bytes, None], held: contextlib.ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._events, self._held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._held.close()
            await self._events.aclose()


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event; without a name, as the chunks of a chat are."""
    return f"{f'event: {name}{chr(10)}' if name else ''}data: {json.dumps(data)}\n\n".encode()


async def until_done(waiting: asyncio.Future[Any], timeout_s: float, deadline: float) -> AsyncGenerator[bytes, None]:
    """Yield `KEEP_ALIVE` while `waiting` takes long. Raises ApiError 503 at `deadline`, in time.monotonic's seconds."""
    while not waiting.done():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise ApiError(503, f"no answer within {timeout_s:g} s", code="timeout")
        await asyncio.wait([waiting], timeout=min(left_s, _KEEP_ALIVE_S))
        if not waiting.done():
            yield KEEP_ALIVE


def broken_off(front: Front, error: Exception, line: dict[str, Any], model: str) -> bytes:
    """The event that ends a stream with an error, which is counted and logged in `line`. For an `except` block.

    The status was sent before. Without an event the client would take this for a good end.
    """
    if not isinstance(error, ApiError):
        request_id = line["request_id"]
        logger.exception("stream failed", extra={"fields": {"request_id": request_id, "model": model}})
        error = fault(request_id)
    line["error"] = error.code
    front.metrics.refused.labels(error.code or "other").inc()
    return event(error.body(), "error")
