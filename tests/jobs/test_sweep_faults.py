"""A sweep to a failing S3: a proxy before the test server answers with errors, resets and truncated bodies."""

import http.client
import io
import itertools
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import botocore.exceptions
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_sweep
from conftest import HANG_S

from jobs.generate import GenerateSettings, generate
from jobs.runtime.image_blocks import plan_blocks, read_block
from mmcore import s3 as module
from mmcore import storage as storage_module
from mmcore.data.prepared import read_prepared
from mmcore.storage import Storage

pytest_plugins = ("sweep_fixtures",)

ERRORS = {
    503: b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
    500: b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>",
    409: b"<Error><Code>ConditionalRequestConflict</Code><Message>Try again.</Message></Error>",
}
FAULTS = ("503", "500", "reset before", "reset after", "truncated")


class FaultyProxy(ThreadingHTTPServer):
    """Forwards requests to `endpoint`. A share of `rate` fails, and `faults` counts the faults."""

    daemon_threads = True
    # Many connections are opened at once.
    request_queue_size = 128

    def __init__(self, endpoint: str, rate: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.rate = urlsplit(endpoint).netloc, rate
        self.random, self.lock = random.Random(0), threading.Lock()
        self.faults: Counter[str] = Counter()
        self.turns: dict[str, Iterator[str]] = {}
        self.num_requests = 0

    def draw(self, method: str) -> str:
        """The fault of the next request, or an empty string."""
        with self.lock:
            self.num_requests += 1
            if self.random.random() >= self.rate:
                return ""
            # Each kind in turn, so that few requests include every kind of fault.
            fault = next(self.turns.setdefault(method, itertools.cycle(FAULTS)))
            self.faults[f"{method} {fault}"] += 1
            return fault

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that closed their connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:
        """No log lines."""

    def _reset(self) -> None:
        # With this option closing sends a reset instead of a proper end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.target, timeout=HANG_S)
        try:
            headers = {
                name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")
            }
            upstream.request(self.command, self.path, body=body, headers=headers)
            response = upstream.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            upstream.close()

    def _send_half(self, length: int) -> None:
        """Half of a PUT reaches the server, whose header announced all of it."""
        half = self.rfile.read(length // 2)
        host, _, port = self.server.target.partition(":")
        with socket.create_connection((host, int(port)), timeout=HANG_S) as upstream:
            lines = [f"{self.command} {self.path} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in self.headers.items() if name.lower() != "expect"]
            upstream.sendall("\r\n".join([*lines, "", ""]).encode() + half)

    def do_GET(self) -> None:
        fault, length = self.server.draw(self.command), int(self.headers.get("Content-Length", 0))
        if fault == "truncated" and self.command == "PUT" and length:
            self._send_half(length)
            return self._reset()
        body = self.rfile.read(length)
        if fault == "reset before":
            return self._reset()
        if fault in map(str, ERRORS):
            status, headers, data = int(fault), [("Content-Type", "application/xml")], ERRORS[int(fault)]
        else:
            status, headers, data = self._forward(body)
            if fault == "reset after":
                return self._reset()
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        content_length = next((value for name, value in headers if name.lower() == "content-length"), len(data))
        self.send_header("Content-Length", str(content_length if self.command == "HEAD" else len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if fault == "truncated" else data)
        if fault == "truncated":
            self.wfile.flush()
            self._reset()

    do_PUT = do_HEAD = do_DELETE = do_POST = do_GET


@contextmanager
def faulty_proxy(endpoint: str, rate: float) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(endpoint, rate)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def write_prompts_as_data(storage: Storage, count: int, num_shards: int = 4) -> None:
    """The part of prepared data that `shapes-test` reads: `count` test images."""
    rows = [{"image_id": f"{n:06d}", "captions": [f"picture {n} of a dog"], "split": "test"} for n in range(count)]
    for shard in range(num_shards):
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows[shard::num_shards]), buffer)
        storage.write(f"data/shapes/part-{shard:05d}.parquet", buffer.getvalue())
    storage.write("data/shapes/_SUCCESS", b"{}")


def check_nothing_is_lost_or_doubled(proxy: FaultyProxy, place: str, run_folder: Path, count: int) -> None:
    # Read from the server directly, so that retries have no effect.
    tiny_sweep.check_complete(Storage(place) / "out", count)
    assert len(tiny_sweep.calls(run_folder)) == count // 25, "a fault of the storage cost a second generation"
    assert 0.5 * proxy.rate < sum(proxy.faults.values()) / proxy.num_requests < 1.6 * proxy.rate
    if proxy.rate >= 0.05:
        assert {f"PUT {fault}" for fault in FAULTS} <= set(proxy.faults)
    print(f"{proxy.num_requests} requests, {dict(proxy.faults)}")


def test_a_failing_storage_loses_and_doubles_nothing(without_ray, s3_server, tmp_path, monkeypatch):
    """In this process, where the pauses between attempts are short."""
    run_folder = tiny_sweep.write_run(tmp_path / "runs" / "tiny" / "a")
    write_prompts_as_data(Storage(s3_server), 150)
    monkeypatch.setattr(module, "_S3_THROTTLED_BACKOFF_S", 0.05)
    settings = GenerateSettings(
        str(run_folder), "shapes-test", f"{s3_server}/out", storage=s3_server, batch_size=25, num_threads=1
    )
    with monkeypatch.context() as patch, faulty_proxy(os.environ["AWS_ENDPOINT_URL"], 0.2) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        module.s3_client.cache_clear()
        generate(settings, worker_type=tiny_sweep.TinyWorker)
    module.s3_client.cache_clear()
    check_nothing_is_lost_or_doubled(proxy, s3_server, run_folder, 150)


@pytest.mark.soak
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
def test_a_failing_storage_costs_a_job_nothing(rate, s3_server, tmp_path, run_job):
    run_folder = tiny_sweep.write_run(tmp_path / "runs" / "tiny" / "a")
    write_prompts_as_data(Storage(s3_server), 1000)
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], rate) as proxy:
        command = ["tests/tiny_sweep.py", "--run", run_folder, "--out", f"{s3_server}/out", "--batch-size", "25"]
        command += ["--prompts", "shapes-test", "--storage", s3_server]
        run_job(*command, env={"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}"})
    check_nothing_is_lost_or_doubled(proxy, s3_server, run_folder, 1000)


@pytest.mark.nightly  # the retry quota lasts for this many requests
def test_a_storage_that_fails_one_time_in_five_never_wears_out(s3_server, monkeypatch):
    """boto3's own retries share a quota that is used up by then."""
    monkeypatch.setattr(module, "_S3_THROTTLED_BACKOFF_S", 0.05)
    count = 1500
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], 0.2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        module.s3_client.cache_clear()
        try:
            storage = Storage(s3_server)
            with ThreadPoolExecutor(16) as threads:
                created = list(threads.map(lambda n: storage.create(f"{n}.bin", bytes([n % 256])), range(count)))
        finally:
            module.s3_client.cache_clear()
    assert all(created), "an object of ours, whose answer was lost, was taken for somebody else's"
    assert sum(proxy.faults.values()) > 0.15 * count


@pytest.mark.parametrize(
    ("faults", "stored_before", "ours"),
    [
        (["409"], None, True),
        (["409"], b"theirs", False),
        # Nothing was lost: the object is from another writer, although its bytes are the same.
        (["409"], b"ours", False),
        (["reset after", "409"], None, True),
        (["reset after", "409", "409"], None, True),
        (["reset before", "409"], b"theirs", False),
    ],
)
def test_what_conflicts_with_its_own_lost_answer_is_still_ours(faults, stored_before, ours, s3_server, monkeypatch):
    monkeypatch.setattr(storage_module, "_CONFLICT_PAUSE_S", 0.01)
    storage = Storage(s3_server)
    if stored_before is not None:
        storage.write("a.bin", stored_before)
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        module.s3_client.cache_clear()
        script = iter(faults)
        monkeypatch.setattr(proxy, "draw", lambda method: next(script, ""))
        try:
            assert storage.create("a.bin", b"ours") == ours
        finally:
            module.s3_client.cache_clear()
    assert next(script, None) is None, "a fault did not happen"


def test_an_error_that_stays_is_not_waited_for(s3_server, monkeypatch):
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        module.s3_client.cache_clear()
        try:
            with pytest.raises(FileNotFoundError):
                Storage(s3_server).read("nowhere.bin")
            assert proxy.num_requests == 1
            with pytest.raises(botocore.exceptions.ClientError, match="NoSuchBucket"):
                Storage("s3://no-such-bucket-here/a").write("a.bin", b"a")
            assert proxy.num_requests == 2
            monkeypatch.setattr(module, "_S3_BACKOFF_S", 0.0)
            monkeypatch.setattr(proxy, "draw", lambda method: "500")
            with pytest.raises(botocore.exceptions.ClientError, match="InternalError"):
                Storage(s3_server).write("a.bin", b"a")
        finally:
            module.s3_client.cache_clear()


def test_half_an_answer_is_read_again(s3_server, monkeypatch):
    storage = Storage(s3_server)
    storage.write("a.bin", bytes(range(256)) * 40)
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        module.s3_client.cache_clear()
        faults = iter(["truncated", "truncated", "", "truncated", "reset before", "503"])
        monkeypatch.setattr(proxy, "draw", lambda method: next(faults, ""))
        try:
            assert storage.read("a.bin") == bytes(range(256)) * 40
            assert storage.read("a.bin") == bytes(range(256)) * 40
        finally:
            module.s3_client.cache_clear()


def test_prepared_data_is_read_through_many_faults(s3_server, monkeypatch):
    """More faults in a row than pyarrow's own requests tolerate."""
    write_prompts_as_data(Storage(s3_server), 8)
    monkeypatch.setattr(module, "_S3_MAX_BACKOFF_S", 0.05)
    with faulty_proxy(os.environ["AWS_ENDPOINT_URL"], 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        module.s3_client.cache_clear()
        faults = itertools.cycle(["reset before", "503", "500", "503", "reset after", "500", ""])
        monkeypatch.setattr(proxy, "draw", lambda method: next(faults))
        try:
            table = read_prepared(s3_server, "shapes", ["image_id", "captions", "split"])
            blocks = plan_blocks_of_images(Storage(s3_server))
        finally:
            module.s3_client.cache_clear()
    assert sorted(table["image_id"].to_pylist()) == [f"{n:06d}" for n in range(8)]
    assert blocks == [f"{n:06d}" for n in range(8)]


def plan_blocks_of_images(storage: Storage) -> list[str]:
    """The image_ids of a folder of shards, as planned by a sweep and as read by it."""
    buffer = io.BytesIO()
    ids = [f"{n:06d}" for n in range(8)]
    pq.write_table(pa.table({"image_id": ids, "image": [b"x"] * 8}), buffer)
    storage.write("images/part-00000.parquet", buffer.getvalue())
    blocks = plan_blocks(storage / "images", rows_per_block=3)
    assert blocks.source is not None
    return [image_id for item in blocks.items for image_id in read_block(blocks.source, item)["image_id"]]
