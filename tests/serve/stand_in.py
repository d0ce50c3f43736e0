"""A server on loopback with the service's API, without Ray or a model. Tests can make it slow or faulty.

`python tests/serve/stand_in.py` serves the page for manual work on it.
"""

import base64
import contextlib
import email.parser
import email.policy
import io
import json
import random
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from PIL import Image, ImageDraw, PngImagePlugin

from serve import openapi
from serve.limits import Limits

WEB = Path(__file__).resolve().parents[2] / "serve" / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The rest of the policy is in a <meta> of the page, where this directive is not allowed.
PAGE_HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
SIZE = 64


@dataclass(frozen=True)
class Failure:
    """The answer to one request instead of the usual one. `unread`: sent before the body was read, like a limit."""

    status: int
    message: str = ""
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    unread: bool = False


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    json: Any
    files: list[tuple[str, bytes]]


class Gone(Exception):
    """The client closed the connection."""


def shape_png(prompt: str, seed: int) -> bytes:
    """A picture that depends on the seed. Its text chunks hold the prompt and the seed."""
    chance = random.Random(seed)
    colour = lambda low, high: tuple(chance.randrange(low, high) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), colour(150, 255))
    draw = ImageDraw.Draw(image)
    x, y, r = chance.randrange(20, 44), chance.randrange(20, 44), chance.randrange(10, 20)
    (draw.ellipse if seed % 2 else draw.rectangle)((x - r, y - r, x + r, y + r), fill=colour(0, 200))
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("prompt", prompt)
    chunks.add_text("seed", str(seed))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def model(name: str, kind: str) -> dict[str, Any]:
    described = {"id": name, "object": "model", "owned_by": "mmcore", "kind": kind}
    if kind == "captioner":
        return {**described, "resolution": None, "defaults": {}}
    defaults = {"num_inference_steps": 8, "guidance_scale": 3.0, "negative_prompt": "", "size": f"{SIZE}x{SIZE}"}
    return {**described, "resolution": SIZE, "defaults": defaults, "limits": {"n": 8, "guidance_scale": 30}}


class StandIn:
    """The server, with everything that a test sets or reads."""

    def __init__(self, port: int = 0) -> None:
        self.server = _Server(("127.0.0.1", port), type("Bound", (_Handler,), {"stand_in": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        self.closed = False
        self.key: str | None = None
        self.models = [model("resnet", "captioner"), model("qformer", "captioner"), model("shapes64", "generator")]
        self.captions = {"resnet": "a dog runs over grass", "qformer": "a brown dog runs on a green lawn"}
        self.caption_errors: dict[str, Any] = {}  # captioners that fail, by name
        self.sweep: list[dict[str, Any]] | None = []
        self.failures: dict[str, list[Failure]] = {}  # path -> answers to the next requests
        self.requests: list[Request] = []
        self.disconnects = 0
        self.queue: list[int] = []  # places in the queue that are reported before the first step
        self.seconds_per_step = 0.0
        self.cut: str | None = None  # at the last step: "broken" connection, "ended" stream, or an error message
        self.piece_bytes: int | None = None  # the stream arrives in pieces of this size
        self.line_end = "\n"
        self._held: set[str] = set()
        self._go = threading.Event()
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def hold(self, *points: str) -> None:
        """Wait at these points until `release`: "models", "captions", "generations", "step 3", "gallery", "swept"."""
        self._go.clear()
        self._held = set(points)

    def release(self) -> None:
        self._held = set()
        self._go.set()

    def close(self) -> None:
        self.closed = True  # also for open connections
        self.release()
        self.server.shutdown()
        self.server.server_close()

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections not yet accepted; one above it would be retried seconds later

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A closed tab resets its connections, which is no error. All other errors are printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    stand_in: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """No log lines."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        stand_in = self.stand_in
        if stand_in.closed:
            self.close_connection = True
            return
        address = urlsplit(self.path)
        path = unquote(address.path)
        planned = stand_in.failures.get(path)
        failure = planned.pop(0) if planned else None
        if failure and failure.unread:
            self.close_connection = True
            self._fail(failure)
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parsed, files = self._parsed(body)
        headers = {name.lower(): value for name, value in self.headers.items()}
        stand_in.requests.append(Request(self.command, path, parse_qs(address.query), headers, parsed, files))
        try:
            if failure:
                self._fail(failure)
            elif not path.startswith("/v1/") and path != "/openapi.json":
                self._file(path)
            elif stand_in.key and headers.get("authorization") != f"Bearer {stand_in.key}":
                self._fail(Failure(401, "wrong or missing key"))
            else:
                self._api(path, parse_qs(address.query), parsed, files)
        except (Gone, ConnectionError):
            stand_in.disconnects += 1
            self.close_connection = True

    def _parsed(self, body: bytes) -> tuple[Any, list[tuple[str, bytes]]]:
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("application/json"):
            return json.loads(body), []
        if not kind.startswith("multipart/"):
            return None, []
        whole = f"Content-Type: {kind}\r\n\r\n".encode() + body
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(whole)
        parts = message.iter_parts()
        return None, [(part.get_filename() or "", part.get_payload(decode=True)) for part in parts]  # type: ignore[misc]

    def _api(self, path: str, query: dict[str, list[str]], asked: Any, files: list[tuple[str, bytes]]) -> None:
        stand_in = self.stand_in
        if path == "/openapi.json":
            self._json(200, openapi.document({}, Limits(), open_routes=("/", "/health")))
        elif path == "/v1/models":
            self._wait("models")
            self._json(200, {"object": "list", "data": stand_in.models})
        elif path == "/v1/captions":
            self._wait("captions")
            names = [name for name, _ in files]
            told = {"captions": stand_in.captions}
            if stand_in.caption_errors:
                told["errors"] = stand_in.caption_errors
            data = [{"index": i, **told, "file_name": name} for i, name in enumerate(names)]
            self._json(200, {"data": data})
        elif path == "/v1/images/generations":
            self._wait("generations")
            self._stream(asked)
        elif path.startswith("/v1/gallery") and stand_in.sweep is None:
            self._fail(Failure(404, "this service was started without gallery=URI"))
        elif path == "/v1/gallery":
            self._wait("gallery")
            assert stand_in.sweep is not None
            first, limit = int(query.get("cursor", ["0"])[0]), int(query["limit"][0])
            last = first + limit
            more = str(last) if last < len(stand_in.sweep) else None
            self._json(200, {"data": stand_in.sweep[first:last], "next": more})
        elif path.startswith("/v1/gallery/"):
            self._wait("swept")
            assert stand_in.sweep is not None
            row = next(row for row in stand_in.sweep if row["image_id"] == path.removeprefix("/v1/gallery/"))
            self._send(200, shape_png(row["prompt"], row["seed"]), {"Content-Type": "image/png"})
        else:
            self._fail(Failure(404, f"no route {path}"))

    def _wait(self, point: str) -> None:
        """Wait while the test holds this point. Raises Gone if the client leaves first."""
        while point in self.stand_in._held and not self.stand_in._go.wait(0.02):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
                raise Gone

    def _stream(self, asked: dict[str, Any]) -> None:
        stand_in = self.stand_in
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for position in stand_in.queue:
            self._event("queued", {"position": position})
            self._wait(f"queue {position}")
        total = asked.get("num_inference_steps", 8)
        for step in range(1, total + 1):
            self._wait(f"step {step}")
            time.sleep(stand_in.seconds_per_step)
            self._event("progress", {"step": step, "total": total})
        if stand_in.cut == "broken":
            raise Gone
        if stand_in.cut not in (None, "ended"):
            error = {"message": stand_in.cut, "type": "server_error", "param": None, "code": None}
            self._event("error", {"error": error})
        elif stand_in.cut is None:
            first = asked.get("seed", 1000)
            images = [(first + index, shape_png(asked["prompt"], first + index)) for index in range(asked["n"])]
            data = [
                {"b64_json": base64.b64encode(image).decode(), "seed": seed, "revised_prompt": None}
                for seed, image in images
            ]
            for image in data:  # for OpenAI's clients; the page takes all of them from the last event
                self._event("image_generation.completed", {"type": "image_generation.completed", **image})
            words = [word for word in asked["prompt"].split() if word == "zebra"]
            self._event("done", {"created": 0, "data": data, "model": asked["model"], "unknown_words": words})
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, name: str, data: Any) -> None:
        end = self.stand_in.line_end
        text = f": a comment{end}event: {name}{end}data: {json.dumps(data, ensure_ascii=False)}{end}{end}".encode()
        size = self.stand_in.piece_bytes or len(text)
        for start in range(0, len(text), size):
            piece = text[start : start + size]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.flush()

    def _file(self, path: str) -> None:
        file = WEB / (path.removeprefix("/static/") if path != "/" else "index.html")
        if not file.is_file() or file.suffix not in TYPES:
            self._fail(Failure(404, f"no route {path}"))
            return
        self._send(200, file.read_bytes(), {"Content-Type": TYPES[file.suffix], **PAGE_HEADERS})

    def _fail(self, failure: Failure) -> None:
        error = {"message": failure.message, "type": "invalid_request_error", "param": failure.param, "code": None}
        body = json.dumps({"error": error}, ensure_ascii=False).encode() if failure.body is None else failure.body
        self._send(failure.status, body, {"Content-Type": "application/json", **failure.headers})

    def _json(self, status: int, data: Any) -> None:
        self._send(status, json.dumps(data, ensure_ascii=False).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def sweep_rows(num_images: int) -> list[dict[str, Any]]:
    """Rows of a gallery, as the service lists them."""
    colours = ("red", "blue", "green", "yellow")
    return [
        {
            "image_id": f"image {index:03}",
            "prompt": f"a {colours[index % 4]} circle above a {colours[(index + 1) % 4]} square",
            "seed": 7000 + index,
            "url": f"/v1/gallery/image%20{index:03}",
        }
        for index in range(num_images)
    ]


@contextlib.contextmanager
def standing_in(port: int = 0) -> Iterator[StandIn]:
    stand_in = StandIn(port)
    try:
        yield stand_in
    finally:
        stand_in.close()


if __name__ == "__main__":
    with standing_in(8123) as by_hand:
        by_hand.sweep, by_hand.seconds_per_step, by_hand.queue = sweep_rows(60), 0.5, [2, 1]
        print(f"{by_hand.url}, until Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
