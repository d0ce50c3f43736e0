"""A real Ray Serve on loopback, for what only the whole can show. The tests depend on each other, in this order."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import ROOT, end_group, free_port
from load import Load, overload
from real_service import BATCH_SIZE, LIMITS
from serving import (
    AUTHORIZED,
    GENERATIONS,
    HANG_S,
    KEY,
    chat,
    colour,
    colour_of,
    data_uri,
    events_of,
    picture,
    run,
    tries,
    until,
    wait_ready,
)
from test_hostile import (
    MAX_ABOVE_TRIVIAL_S,
    MAX_MEMORY,
    MIB,
    Case,
    Processes,
    cases,
    delays_of_threads,
    problems_of,
    seconds_held_up,
)

from serve import security

pytestmark = pytest.mark.process

CHAT = "/v1/chat/completions"
# Errors of a client that keeps writing while the connection is closed.
CLOSED_ON = (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError)


class Service:
    """The process and its child processes of Ray Serve."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, folder: Path, log: Path) -> None:
        self.process, self.folder, self.log = process, folder, log
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=AUTHORIZED, timeout=HANG_S, **options)

    @contextlib.contextmanager
    def held(self) -> Iterator[Path]:
        """Stop the generator's work after its first step until the returned file is removed."""
        hold = self.folder / "hold"
        hold.touch()
        try:
            yield hold
        finally:
            hold.unlink(missing_ok=True)

    def metric(self, name: str) -> float:
        with self.client() as client:
            text = client.get("/metrics").text
        # A front that has not counted anything yet has no such line.
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has this value."""
        deadline = time.monotonic() + HANG_S
        while (found := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} {found}"
            time.sleep(0.05)

    def processes(self, name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_ready(self) -> None:
        wait_ready(self.url, self.process, self.log)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, short_tmp: Path) -> Iterator[Service]:
    folder, port = tmp_path_factory.mktemp("service"), free_port()
    log = folder / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
    environment |= {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'serve'}",
        "RAY_TMPDIR": str(short_tmp),
        "SERVE_API_KEYS": KEY,
        # Read by the proxy itself.
        "SERVE_MAX_BODY_BYTES": str(LIMITS.max_body_bytes),
        "SERVE_BODY_TIMEOUT_S": str(LIMITS.body_timeout_s),
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "serve" / "real_service.py"), str(port), str(folder)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        found = Service(process, port, folder, log)
        found.wait_ready()
        yield found
    finally:
        end_group(process)


def ask_caption(client: httpx.Client) -> httpx.Response:
    return client.post(CHAT, json=chat(data_uri(picture("green"))))


def told_of(request_id: str, log: str) -> list[str]:
    """The log messages about a request, from every process."""
    lines = (line[line.index("{") :] for line in log.splitlines() if f'"request_id": "{request_id}"' in line)
    return [json.loads(line[: line.rindex("}") + 1])["message"] for line in lines]


def test_it_is_closed_and_it_answers(service: Service) -> None:
    assert httpx.get(f"{service.url}/v1/models").status_code == 401
    assert httpx.post(f"{service.url}{GENERATIONS}", json={"prompt": "x"}).json()["error"]["code"] == "missing_api_key"
    with service.client() as client:
        assert ask_caption(client).json()["choices"][0]["message"]["content"] == "a green picture"
        response = client.post(GENERATIONS, json={"prompt": "x", "n": 3, "seed": 1, "num_inference_steps": 2})
        rows = response.json()["data"]
        assert [colour(row["b64_json"]) for row in rows] == [colour_of("x", seed, 2) for seed in (1, 2, 3)]
        # The proxy assigns one id to each request and returns it once.
        assert len(response.headers.get_list("x-request-id")) == 1
        client.headers["x-request-id"] = "mine-1"
        assert ask_caption(client).headers.get_list("x-request-id") == ["mine-1"]
        assert client.post(GENERATIONS, json={"prompt": "x"}).headers.get_list("x-request-id") == ["mine-1"]
    # Ray forwards the lines of the processes with a delay.
    deadline = time.monotonic() + HANG_S
    while len(told_of("mine-1", service.log.read_text())) < 2:
        assert time.monotonic() < deadline, service.log.read_text()[-3000:]
        time.sleep(0.1)
    assert told_of("mine-1", service.log.read_text()) == ["request", "request"]
    # Ray Serve's own line of a request, or of a call between its processes, is not among them.
    assert not re.search(r"mine-1 -- (GET|POST|CALL) ", service.log.read_text())


def test_a_stream_arrives_step_by_step(service: Service) -> None:
    with service.client() as client, service.held() as hold:
        body = {"prompt": "x", "stream": True, "num_inference_steps": 8}
        with client.stream("POST", GENERATIONS, json=body) as response:
            text, parts = "", response.iter_text()
            # The model continues when its first step has arrived. A stream that is sent at its end only would never do
            # that.
            for part in parts:
                text += part
                if "event: progress" in text:
                    break
            assert "event: done" not in text
            hold.unlink()
            text += "".join(parts)
    names = [name for name, _ in events_of(text)]
    assert names[-1] == "done"
    assert names.count("progress") >= 4


HOSTILE_HERE = (
    "a wrong key", "a page of another site", "GET /v1/jobs/..%2f..%2fpending", "PUT /v1/images/generations",
    "json: nan", "a body of text/plain", "21 MiB, with its length", "a form without end", "a million values",
    "deep braces", "image, in a chat: png bomb", "image, in a form: animated gif", "form 8", "an address of 8 MB",
    "image, in a chat: jpeg of many scans", "image, in a form: png whose text is called exif",
    "image, in a chat: jpeg of small exif, 1 MB",
)  # fmt: skip
# These send more than is read. The service reads on for a while, so that the client gets its answer.
TOO_LONG_HERE = ("21 MiB, with its length", "a form without end", "an address of 8 MB")


def ask_hostile(service: Service, case: Case) -> tuple[httpx.Response | None, float]:
    """The answer, unless the connection was closed while the client wrote, and the wall seconds without those of other
    programs.
    """
    method, path, options = case
    parts, announced = options.get("parts"), int(options.get("headers", {}).get("content-length", 0))
    if announced:
        # A client that always sends what it announced, which httpx does not.
        options = {**options, "content": bytes(announced)}
    if parts:
        options = {"headers": options["headers"], "content": repeat(*parts)}
    at_work = [os.getpid(), *(process.pid for process in front_processes(service))]
    with httpx.Client(base_url=service.url, timeout=HANG_S) as client:
        # Connected. The first request is not measured.
        client.get("/-/healthz")
        prepared = client.build_request(method, path, **options)
        held_up, began = delays_of_threads(at_work), time.monotonic()
        response = None
        try:
            response = client.send(prepared)
        except CLOSED_ON:
            assert parts or len(options.get("content", b"")) > LIMITS.max_body_bytes
        wall_s = time.monotonic() - began
        return response, max(0.0, wall_s - seconds_held_up(held_up, delays_of_threads(at_work)))


def front_processes(service: Service) -> list[psutil.Process]:
    """The processes that clients can reach: Ray Serve's proxy and the app behind it."""
    found = [*service.processes("ProxyActor"), *service.processes("ServeReplica:mmcore:api")]
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("is_measured", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_hostile_requests_through_the_proxy(service: Service, is_measured: bool) -> None:
    """Each is refused without an effect, as quickly as a request without a key sent at the same time.

    Together they need no memory. The limits are measured, and a busy machine may break them.
    """
    hostile = cases()
    trivial: Case = ("POST", GENERATIONS, {"content": b"{}"})
    problems: list[str] = []
    with service.client() as client:
        # Everything that is loaded only once is now loaded.
        assert ask_caption(client).status_code == 200
        with Processes(front_processes(service)) as watch:
            for name in HOSTILE_HERE:
                above_s, most_s = float("inf"), MAX_ABOVE_TRIVIAL_S
                if name in TOO_LONG_HERE:
                    # The answer is there at once, but this client reads it only after it has written everything.
                    most_s += security._MAX_DRAIN_S
                for _ in tries():
                    response, wall_s = ask_hostile(service, hostile[name])
                    if not is_measured:
                        break
                    refused, trivial_s = ask_hostile(service, trivial)
                    assert refused is not None
                    assert refused.status_code == 401
                    above_s = min(above_s, wall_s - trivial_s)
                    if above_s <= most_s:
                        break
                # All at once, as each slow client takes a minute.
                assert above_s <= most_s or not is_measured, f"{name}: {above_s:.3f} s above one without key"
                if response is not None:
                    problems += [f"{name}: {problem}" for problem in problems_of(response)]
                    if len(response.headers.get_list("x-request-id")) != 1:
                        problems.append(f"{name}: not one id")
                    if response.headers["x-content-type-options"] != "nosniff":
                        problems.append(f"{name}: may be sniffed")
                if ask_caption(client).status_code != 200:
                    problems.append(f"{name}: the next one had no answer")
    print(f"hostile through the proxy: {watch.grown}, {watch.num_looks} looks")
    assert not problems, "\n".join(problems)
    assert max(watch.grown.values()) < MAX_MEMORY or not is_measured, watch.grown
    assert watch.num_connections, "the look at connections is blind"
    assert not watch.peers, watch.peers


def test_the_routes_of_the_proxy_are_nobodys(service: Service) -> None:
    with service.client() as client:
        for path in ("/-/routes", "/-/anything"):
            response = client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        assert client.get("/-/healthz").status_code == 200


def test_a_body_without_end_is_not_taken(service: Service) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(300):
            sent += 1
            yield bytes(MIB)

    for headers in ({}, {"content-length": str(300 * MIB)}):
        headers, sent = {**headers, "content-type": "application/json"}, 0
        with service.client() as client, contextlib.suppress(*CLOSED_ON):
            response = client.post("/v1/captions", content=endless(), headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
        # Data that is read after a refusal is dropped. After 64 MiB of it the connection is closed. Buffers hold some
        # more.
        print(f"{sent} MiB of the body were sent")
        assert sent < 150, "the whole body was taken"


def hang_up_while_waiting(service: Service, body: dict[str, Any]) -> None:
    async def main() -> None:
        async with httpx.AsyncClient(base_url=service.url, headers=AUTHORIZED, timeout=HANG_S) as client:
            asking = asyncio.ensure_future(client.post(GENERATIONS, json=body))
            await asyncio.to_thread(service.wait_for, 'mmcore_queue_images{model="shapes"}', BATCH_SIZE)
            asking.cancel()

    run(main())


def hang_up_in_the_stream(service: Service, body: dict[str, Any]) -> None:
    with service.client() as client, client.stream("POST", GENERATIONS, json={**body, "stream": True}) as response:
        text = ""
        for part in response.iter_text():
            # Leaving the block closes the connection while most of the stream is still to come.
            text += part
            if "event: progress" in text:
                return
    pytest.fail("the stream ended before a step was told")


@pytest.mark.parametrize("hang_up", [hang_up_while_waiting, hang_up_in_the_stream])
def test_who_hangs_up_gives_the_model_free(service: Service, hang_up: Callable[..., None]) -> None:
    # Held, that work never ends. A single step is not held. It runs when nobody wants the held work any more.
    with service.held(), service.client() as client:
        hang_up(service, {"prompt": "x", "n": BATCH_SIZE, "num_inference_steps": 200})
        assert client.post(GENERATIONS, json={"prompt": "y", "num_inference_steps": 1}).status_code == 200
        service.wait_for('mmcore_queue_images{model="shapes"}', 0)
        # The other one is this request.
        service.wait_for("mmcore_in_flight", 1)


def test_a_full_queue_refuses_at_once_and_is_worked_off_in_full_batches(service: Service) -> None:
    """The model is held until the refusals have arrived.

    Refusals wait for nothing, accepted requests wait only for the queue.
    """
    queued: list[int] = []

    async def ask_in_queue(client: httpx.AsyncClient, seed: int) -> str:
        body = {"prompt": "x", "seed": seed, "num_inference_steps": 8, "stream": True}
        async with client.stream("POST", GENERATIONS, json=body) as response:
            parts = response.aiter_text()
            # Its place, as reported by the model.
            text = await anext(parts)
            queued.append(seed)
            return text + "".join([part async for part in parts])

    async def main() -> tuple[list[httpx.Response], list[str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, headers=AUTHORIZED, limits=limits, timeout=HANG_S) as client:
            with service.held():
                inside = [asyncio.ensure_future(ask_in_queue(client, seed)) for seed in range(LIMITS.max_queue)]
                await until(lambda: len(queued) == LIMITS.max_queue)
                beyond = [client.post(GENERATIONS, json={"prompt": "x"}) for _ in range(50)]
                refused = await asyncio.gather(*beyond)
                assert not any(each.done() for each in inside)
            return refused, await asyncio.gather(*inside)

    num_batches = 'mmcore_batch_size_count{model="shapes"}'
    before = service.metric(num_batches)
    refused, answered = run(main())
    for response in refused:
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert [events_of(text)[-1][0] for text in answered] == ["done"] * LIMITS.max_queue
    # Rejected while the first batch ran, which began with the first requests.
    assert service.metric(num_batches) - before <= 1 + LIMITS.max_queue / BATCH_SIZE


@pytest.mark.nightly  # of seconds and of the answers in them
def test_ten_times_too_much(service: Service) -> None:
    """Every refusal is 429 and comes at once. Accepted requests are answered within the time of the queue."""
    # A client that pauses for seconds measures itself. In two of three tries it does not.
    too_slow: list[str] = []
    for _ in range(3):
        if not (found := overload(service)):
            return
        too_slow += found
    pytest.fail("\n".join(too_slow))


def test_a_killed_model_costs_nobody_his_answer(service: Service) -> None:
    """Calls to the killed process are sent again to its replacement."""
    (replica,) = service.processes("ServeReplica:mmcore:captioner-words")
    with Load(service.client, 4, ask_caption) as load:
        load.wait_for(40)
        replica.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        while not [
            each for each in service.processes("ServeReplica:mmcore:captioner-words") if each.pid != replica.pid
        ]:
            assert time.monotonic() - killed_at < HANG_S
            time.sleep(0.05)
        load.wait_for(40)
    print(load.told("killed model", killed_at))
    assert set(load.statuses()) == {200}, load.answers[-5:]


def test_a_killed_front_is_replaced_and_every_loss_is_told(service: Service) -> None:
    (replica,) = service.processes("ServeReplica:mmcore:api")
    with Load(service.client, 4, ask_caption) as load:
        load.wait_for(40)
        replica.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        load.wait_for(40)
    lost = [(status, text) for *_, status, text in load.answers if status != 200]
    print(load.told("killed front", killed_at))
    # At most the requests in flight, as a refusal in the usual form: the official clients retry.
    assert len(lost) <= 8, lost
    for status, text in lost:
        assert status == 503, (status, text)
        assert json.loads(text)["error"]["code"] == "request_lost"


@pytest.mark.nightly  # every process of the service is started anew
def test_a_new_version_under_load_loses_no_request(service: Service) -> None:
    service.wait_ready()
    before = {process.pid for process in service.processes("ServeReplica:mmcore")}
    with Load(service.client, 4, ask_caption) as load:
        load.wait_for(20)
        (service.folder / "redeploy").touch()
        deadline = time.monotonic() + 400
        while (service.folder / "redeploy").exists() or before & {
            process.pid for process in service.processes("ServeReplica:mmcore")
        }:
            assert time.monotonic() < deadline, service.log.read_text()[-3000:]
            time.sleep(0.2)
        load.wait_for(40)
    print(f"new version: {dict(load.statuses())}")
    assert set(load.statuses()) == {200}, [answer for answer in load.answers if answer[2] != 200][:5]
    texts = [json.loads(text)["choices"][0]["message"]["content"] for *_, text in load.answers]
    # Both versions answered, and the last answers are from the new one.
    assert set(texts) == {"a green picture", "the green picture"}
    assert texts[-1] == "the green picture"


def test_it_ends_when_what_it_began_is_finished(service: Service) -> None:
    body = {"prompt": "x", "num_inference_steps": 50, "n": BATCH_SIZE}
    answers: list[Any] = []

    def ask() -> None:
        with service.client() as client:
            answers.append(client.post(GENERATIONS, json=body))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    below = psutil.Process(service.process.pid).children(recursive=True)
    with service.client() as client, service.held():
        for thread in threads:
            thread.start()
        service.wait_for('mmcore_queue_images{model="shapes"}', 3 * BATCH_SIZE)
        job = client.post("/v1/jobs", json={"request": body}).json()["id"]
        service.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + HANG_S / 2
        while (refused := client.get("/v1/models")).status_code == 200:
            assert time.monotonic() < deadline, "it took new requests while it ended"
            time.sleep(0.05)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(HANG_S)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len(answers[0].json()["data"]) == BATCH_SIZE
    assert service.process.wait(HANG_S) == 0, service.log.read_text()[-3000:]
    # The job was running, or the next service will finish it.
    kept = service.folder / "kept"
    assert (kept / "pending" / f"{job}.json").exists() != (kept / "jobs" / job / "result.json").exists()
    _, alive = psutil.wait_procs(below, timeout=HANG_S)  # its agents check their parent from time to time
    assert not alive, "processes of Ray are left"
    told = service.log.read_text()
    assert "every request answered" in told
    assert "infinite retries" not in told
