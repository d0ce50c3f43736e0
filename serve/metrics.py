"""Metrics for Prometheus, and one line of JSON in the log a request.

Neither holds prompts, captions or keys. A caller is shown by the first characters of the digest of the key.
"""

import json
import logging
import secrets
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serve.batching import Batched
from serve.errors import SECURITY_HEADERS, ApiError, fault
from serve.security import REQUEST_ID, App, Message, Receive, Scope, Send, logger

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Probes and browsers ask for these again and again. Only a refusal or a failure has a line.
_QUIET_ROUTES = ("/health", "/ready", "/", "/static/{name}")
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class ImageFacts(TypedDict):
    """Times of an image. `batch_size` is told of one image of each batch, `encode_s` of an image that was made."""

    queue_s: float
    model_s: float
    batch_size: int | None
    encode_s: NotRequired[float]


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


def configure_logging() -> None:
    """One JSON object a line on stderr, which Ray keeps in the replica's log."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JsonLines())
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Metrics:
    """Metrics in a registry of their own, so that two services in one process (tests) do not add up."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("mmcore_requests", "Requests", ["route", "method", "status"], registry=registry)
        self.seconds = Histogram(
            "mmcore_request_seconds", "Seconds to the end of the answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self.refused = Counter("mmcore_refused", "Requests refused, by the error's code", ["code"], registry=registry)
        self.in_flight = Gauge("mmcore_in_flight", "Requests at work, but health and the page", registry=registry)
        self.queue = Gauge("mmcore_queue_images", "Images admitted and not done", ["model"], registry=registry)
        self.batch_size = Histogram(
            "mmcore_batch_size", "Images made together", ["model"], buckets=_BATCH_SIZES, registry=registry
        )
        self.stage = Histogram(
            "mmcore_stage_seconds",
            "Seconds of an image: decode, queue (waiting for its batch), model (its batch), encode",
            ["model", "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("mmcore_images", "Images captioned or made", ["model"], registry=registry)

    def observe(self, model: str, facts: ImageFacts) -> None:
        """Count one image, with the `facts` of its replica."""
        self.images.labels(model).inc()
        for stage in ("queue", "model", "encode"):
            if facts.get(f"{stage}_s") is not None:
                self.stage.labels(model, stage).observe(cast(Mapping[str, float], facts)[f"{stage}_s"])
        if facts["batch_size"] is not None:
            self.batch_size.labels(model).observe(facts["batch_size"])

    def text(self) -> bytes:
        return generate_latest(self.registry)


def facts_of(batched: Batched[Any]) -> ImageFacts:
    return {"queue_s": batched.queue_s, "model_s": batched.model_s, "batch_size": batched.batch_size}


def note_slowest(line: dict[str, Any], facts: ImageFacts) -> None:
    """Keep the longest times of a request's images in what is logged of the request."""
    for name, value in facts.items():
        if name.endswith("_s"):
            line[name] = max(line.get(name, 0.0), round(cast(float, value), 4))


def _forget(error: BaseException | None) -> None:
    """Free what the request held.

    A refusal that came from a thread forms a cycle with its future. Its traceback would keep the body and the image,
    tens of megabytes, until Python collects such cycles.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


class Observe:
    """The outermost layer of the app. It times, counts and logs a request, and turns refusals into answers."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(REQUEST_ID)
        request_id = given.decode("ascii", "replace")[:64] if given else secrets.token_hex(16)
        # Routes add what they know of the request. `route` is the pattern and not the path, as strangers can make
        # any number of paths.
        facts: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "route": "other"}
        scope.setdefault("state", {})["facts"] = facts
        began, status = time.perf_counter(), 0

        async def finishing_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", []))
                names = {name.lower() for name, _ in headers}
                more = {name: value for name, value in SECURITY_HEADERS.items() if name.encode() not in names}
                if b"cache-control" not in names:
                    more["cache-control"] = "no-store"
                if given is None:
                    # Ray Serve's proxy gives every request an id and answers with it; without it this does.
                    more["x-request-id"] = request_id
                headers += [(name.encode(), value.encode()) for name, value in more.items()]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, finishing_send)
        except ApiError as error:
            self._refuse(facts, error)
            for message in error.asgi_messages():
                await finishing_send(message)
            _forget(error)
        except Exception:
            logger.exception("request failed", extra={"fields": facts})
            if status:
                raise
            answer = fault(request_id)
            self._refuse(facts, answer)
            for message in answer.asgi_messages():
                await finishing_send(message)
        finally:
            seconds = time.perf_counter() - began
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
            # 499: the client had gone before the answer.
            status = status or 499
            self._metrics.requests.labels(facts["route"], method, str(status)).inc()
            self._metrics.seconds.labels(facts["route"]).observe(seconds)
            if facts["route"] not in _QUIET_ROUTES or status >= 400:
                logger.info("request", extra={"fields": {**facts, "status": status, "seconds": round(seconds, 4)}})

    def _refuse(self, facts: dict[str, Any], error: ApiError) -> None:
        facts["error"] = error.code
        self._metrics.refused.labels(error.code or "other").inc()
