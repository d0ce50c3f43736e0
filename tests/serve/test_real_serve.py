"""A real Ray Serve on loopback: what only the whole of it can show. The tests go on from one another, in this order."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from conftest import ROOT, end_group, free_port
from real_service import BATCH_SIZE, LIMITS, STEP_S, STEPS
from serving import AUTHORIZED, GENERATIONS, KEY, chat, colour, colour_of, data_uri, events_of, picture, wait_ready
from test_hostile import (
    MAX_ABOVE_TRIVIAL_S,
    MAX_MEMORY,
    MIB,
    TRIES,
    Case,
    Processes,
    cases,
    delays_of_threads,
    problems_of,
    seconds_held_up,
)

from serve import security

CHAT = "/v1/chat/completions"
# Of a batch, measured while ten times too many ask from this machine's own cores: a second, where it is not busy.
MAX_REFUSAL_BATCHES = 0.5
# So many that the model is what cannot follow: two images a second. Of a faster one ten times as many requests as it
# can do would be more than two busy cores can carry, whoever answers them.
OVERLOAD_STEPS = 40


class Service:
    """The process, and the processes of Ray Serve below it."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, folder: Path, log: Path) -> None:
        self.process, self.folder, self.log = process, folder, log
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=AUTHORIZED, timeout=60, **options)

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
        # Of the proxy, which reads them itself.
        "SERVE_MAX_BODY_BYTES": str(LIMITS.max_body_bytes),
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


class Load:
    """Clients that ask again and again; every answer is noted."""

    def __init__(self, service: Service, num_clients: int, ask: Callable[[httpx.Client], httpx.Response]) -> None:
        self.answers: list[tuple[float, float, int, str]] = []
        """Of each request: when it was asked and when answered, status (0: no answer), and the answer's text."""
        self._stop = threading.Event()

        def work() -> None:
            with service.client() as client:
                while not self._stop.is_set():
                    began = time.monotonic()
                    try:
                        response = ask(client)
                        answer = response.status_code, response.text
                    except httpx.HTTPError as error:
                        answer = 0, f"{type(error).__name__}: {error}"
                    self.answers.append((began, time.monotonic(), *answer))

        self._threads = [threading.Thread(target=work) for _ in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)

    def wait_for(self, number: int, timeout_s: float = 60) -> None:
        """Until so many more answers were good."""
        wanted = self.statuses()[200] + number
        deadline = time.monotonic() + timeout_s
        while self.statuses()[200] < wanted:
            assert time.monotonic() < deadline, self.statuses()
            time.sleep(0.02)

    def statuses(self) -> Counter[int]:
        return Counter(status for _, _, status, _ in list(self.answers))

    def told(self, what: str, killed_at: float) -> str:
        """The figures of a kill: answers, and how long no request that was asked after it had its answer."""
        gap = min(ended for began, ended, status, _ in self.answers if status == 200 and began > killed_at) - killed_at
        longest = max(ended - began for began, ended, status, _ in self.answers if status == 200)
        return f"{what}: {dict(self.statuses())}, answers again after {gap:.2f} s, the longest took {longest:.2f} s"


def ask_caption(client: httpx.Client) -> httpx.Response:
    return client.post(CHAT, json=chat(data_uri(picture("green"))))


def told_of(request_id: str, log: str) -> list[str]:
    """The messages about a request, of every process."""
    lines = (line[line.index("{") :] for line in log.splitlines() if f'"request_id": "{request_id}"' in line)
    return [json.loads(line[: line.rindex("}") + 1])["message"] for line in lines]


def test_it_is_closed_and_it_answers(service: Service) -> None:
    assert httpx.get(f"{service.url}/v1/models").status_code == 401
    assert httpx.post(f"{service.url}{GENERATIONS}", json={"prompt": "x"}).json()["error"]["code"] == "invalid_api_key"
    with service.client() as client:
        assert ask_caption(client).json()["choices"][0]["message"]["content"] == "a green picture"
        response = client.post(GENERATIONS, json={"prompt": "x", "n": 3, "seed": 1, "num_inference_steps": 2})
        rows = response.json()["data"]
        assert [colour(row["b64_json"]) for row in rows] == [colour_of("x", seed, 2) for seed in (1, 2, 3)]
        # The proxy gives each request an id, and answers with it once.
        assert len(response.headers.get_list("x-request-id")) == 1
        client.headers["x-request-id"] = "mine-1"
        assert ask_caption(client).headers.get_list("x-request-id") == ["mine-1"]
        assert client.post(GENERATIONS, json={"prompt": "x"}).headers.get_list("x-request-id") == ["mine-1"]
    # Of the front and of the models' processes. Ray brings their lines here, in its own time.
    deadline = time.monotonic() + 30
    while not {"request", "captioned", "generated"} <= set(told_of("mine-1", service.log.read_text())):
        assert time.monotonic() < deadline, service.log.read_text()[-3000:]
        time.sleep(0.1)


def test_a_stream_arrives_step_by_step(service: Service) -> None:
    times = []
    with service.client() as client:
        body = {"prompt": "x", "stream": True, "num_inference_steps": STEPS}
        with client.stream("POST", GENERATIONS, json=body) as response:
            text = ""
            for part in response.iter_text():
                text += part
                times.append(time.monotonic())
    names = [name for name, _ in events_of(text)]
    assert names[-1] == "done"
    assert names.count("progress") >= STEPS / 2
    # Not all at once at the end.
    assert times[-1] - times[0] > STEPS * STEP_S / 2


HOSTILE_HERE = (
    "a wrong key", "a page of another site", "GET /v1/jobs/..%2f..%2fpending", "PUT /v1/images/generations",
    "json: nan", "a body of text/plain", "21 MiB, with its length", "a form without end", "a million values",
    "deep braces", "image, in a chat: png bomb", "image, in a form: animated gif", "form 8", "an address of 8 MB",
    "image, in a chat: jpeg of many scans", "image, in a form: png whose text is called exif",
    "image, in a chat: jpeg of small exif, 1 MB",
)  # fmt: skip
# Of these more is sent than is read: it is taken off the line for a while, so that the client finds its answer.
TOO_LONG_HERE = ("21 MiB, with its length", "a form without end", "an address of 8 MB")


def ask_hostile(service: Service, case: Case) -> tuple[httpx.Response | None, float]:
    """The answer, if the connection was not closed on who went on writing, and the seconds on the wall, without those
    in which other programs had the processor."""
    method, path, options = case
    parts, announced = options.get("parts"), int(options.get("headers", {}).get("content-length", 0))
    if announced:
        # A client that keeps its word: httpx sends no other.
        options = {**options, "content": bytes(announced)}
    if parts:
        options = {"headers": options["headers"], "content": repeat(*parts)}
    at_work = [os.getpid(), *(process.pid for process in front_processes(service))]
    with httpx.Client(base_url=service.url, timeout=60) as client:
        # The connection is there; what is asked first is not counted.
        client.get("/-/healthz")
        prepared = client.build_request(method, path, **options)
        held_up, began = delays_of_threads(at_work), time.monotonic()
        response = None
        try:
            response = client.send(prepared)
        except (httpx.WriteError, httpx.RemoteProtocolError):
            # A client that goes on writing may find the connection closed before it reads the answer.
            assert parts or len(options.get("content", b"")) > LIMITS.max_body_bytes
        wall_s = time.monotonic() - began
        return response, max(0.0, wall_s - seconds_held_up(held_up, delays_of_threads(at_work)))


def front_processes(service: Service) -> list[psutil.Process]:
    """Those that strangers reach: Ray Serve's proxy, and the app behind it."""
    found = [*service.processes("ProxyActor"), *service.processes("ServeReplica:mmcore:api")]
    assert len(found) >= 2
    return found


def test_hostile_requests_through_the_proxy(service: Service) -> None:
    """Each is refused, at once (as quickly as one without a key that is asked beside it), and all of them together
    cost no memory and reach nobody."""
    hostile = cases()
    trivial: Case = ("POST", GENERATIONS, {"content": b"{}"})
    problems: list[str] = []
    with service.client() as client:
        # What is only loaded once is loaded.
        assert ask_caption(client).status_code == 200
        with Processes(front_processes(service)) as watch:
            for name in HOSTILE_HERE:
                above_s, most_s = float("inf"), MAX_ABOVE_TRIVIAL_S
                if name in TOO_LONG_HERE:
                    # The answer is there at once, but this client reads it only when it has written everything.
                    most_s += security._MAX_DRAIN_S
                for _ in range(TRIES):
                    response, wall_s = ask_hostile(service, hostile[name])
                    refused, trivial_s = ask_hostile(service, trivial)
                    assert refused is not None
                    assert refused.status_code == 401
                    above_s = min(above_s, wall_s - trivial_s)
                    if above_s <= most_s:
                        break
                if above_s > most_s:
                    problems.append(f"{name}: {above_s:.3f} s longer than a refusal for want of a key")
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
    assert max(watch.grown.values()) < MAX_MEMORY, watch.grown
    assert watch.num_connections, "the look at connections is blind"
    assert not watch.peers, watch.peers


def test_the_routes_of_the_proxy_are_nobodys(service: Service) -> None:
    with service.client() as client:
        for path in ("/-/routes", "/-/anything"):
            response = client.get(path)
            assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")
        assert client.get("/-/healthz").status_code == 200


def test_a_body_without_end_stays_out_of_every_process(service: Service) -> None:
    processes = [process for name in ("ProxyActor", "ServeReplica") for process in service.processes(name)]
    assert len(processes) >= 4
    before = {process.pid: process.memory_info().rss for process in processes}

    def endless() -> Iterator[bytes]:
        for _ in range(300):
            yield bytes(MIB)

    for headers in ({}, {"content-length": str(300 * MIB)}):
        headers = {**headers, "content-type": "application/json"}
        with service.client() as client, contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
            # A client that goes on writing may find the connection closed before it reads the answer.
            response = client.post("/v1/captions", content=endless(), headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"
    for process in processes:
        grown = process.memory_info().rss - before[process.pid]
        assert grown < 50 * MIB, f"{' '.join(process.cmdline())[:80]}: {grown / MIB:.0f} MiB more"


def hang_up_while_waiting(client: httpx.Client, body: dict[str, Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post(GENERATIONS, json=body, timeout=1.0)


def hang_up_in_the_stream(client: httpx.Client, body: dict[str, Any]) -> None:
    with client.stream("POST", GENERATIONS, json={**body, "stream": True}) as response:
        for part in response.iter_text():
            # Leaving the block closes the connection, with most of the stream still to come.
            if "progress" in part:
                return
    pytest.fail("the stream ended before a step was told")


@pytest.mark.parametrize("hang_up", [hang_up_while_waiting, hang_up_in_the_stream])
def test_who_hangs_up_gives_the_model_free(service: Service, hang_up: Callable[..., None]) -> None:
    with service.client() as client:
        # What a step takes here and now: on a busy machine a sleep takes longer than it says.
        began = time.monotonic()
        assert client.post(GENERATIONS, json={"prompt": "z", "num_inference_steps": 20}).status_code == 200
        full_s = 200 / 20 * (time.monotonic() - began)
        hang_up(client, {"prompt": "x", "n": BATCH_SIZE, "num_inference_steps": 200})
    with service.client() as client:
        began = time.monotonic()
        assert client.post(GENERATIONS, json={"prompt": "y", "num_inference_steps": 1}).status_code == 200
        assert time.monotonic() - began < full_s / 2, "it waited for work that nobody wanted any more"
        metrics = client.get("/metrics").text
        assert 'mmcore_queue_images{model="shapes"} 0.0' in metrics
        # The other one is this request.
        assert "mmcore_in_flight 1.0" in metrics


def batches_of(service: Service) -> tuple[float, float]:
    """Seconds of the generator's model, summed over the images of all batches, and how many images."""
    with service.client() as client:
        text = client.get("/metrics").text
    names = (f'mmcore_stage_seconds_{what}{{model="shapes",stage="model"}}' for what in ("sum", "count"))
    total, count = (float(next(line.split()[-1] for line in text.splitlines() if line.startswith(n))) for n in names)
    return total, count


def test_ten_times_too_much(service: Service) -> None:
    """An open stream of requests at ten times what the model can do: every refusal is 429, and who is let in is
    answered within the time that the queue takes."""
    capacity = BATCH_SIZE / (OVERLOAD_STEPS * STEP_S)
    seconds, rate = 8.0, 10 * capacity
    answers: list[tuple[int, float, Any]] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(number / rate)
        began = time.monotonic()
        body = {"prompt": f"p{number}", "seed": number, "num_inference_steps": OVERLOAD_STEPS}
        response = await client.post(GENERATIONS, json=body)
        answers.append((response.status_code, time.monotonic() - began, response))

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, headers=AUTHORIZED, limits=limits, timeout=60) as client:
            await asyncio.gather(*(ask(client, number) for number in range(int(rate * seconds))))

    before = batches_of(service)
    asyncio.run(main())
    after = batches_of(service)
    statuses = Counter(status for status, _, _ in answers)
    assert set(statuses) == {200, 429}, statuses
    for status, _, response in answers:
        if status == 429:
            assert response.json()["error"]["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
    accepted = sorted(taken for status, taken, _ in answers if status == 200)
    refused = sorted(taken for status, taken, _ in answers if status == 429)
    batch_s = (after[0] - before[0]) / (after[1] - before[1])
    # At least what the model can do, or it was idle beside a queue.
    assert len(accepted) > BATCH_SIZE / batch_s * seconds * 0.7
    # The whole queue before one, the batch that is at work, and the time of one for the way there and back.
    p99, refusal_p99 = accepted[int(len(accepted) * 0.99)], refused[int(len(refused) * 0.99)]
    bound = (LIMITS.max_queue / BATCH_SIZE + 2) * batch_s
    print(
        f"overload: {dict(statuses)}, accepted p50 {statistics.median(accepted):.2f} s, p99 {p99:.2f} s, "
        f"refused p50 {statistics.median(refused):.3f} s, p99 {refusal_p99:.3f} s, batch {batch_s:.2f} s, {bound=:.2f}"
    )
    assert p99 < bound
    # Who is refused is told so at once, and not when the queue is empty. A busy machine slows both down alike.
    assert refusal_p99 < MAX_REFUSAL_BATCHES * batch_s


def test_a_killed_model_costs_nobody_his_answer(service: Service) -> None:
    """What it was at is asked again of the one that takes its place."""
    (replica,) = service.processes("ServeReplica:mmcore:captioner-words")
    with Load(service, 4, ask_caption) as load:
        load.wait_for(40)
        replica.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        while not [
            each for each in service.processes("ServeReplica:mmcore:captioner-words") if each.pid != replica.pid
        ]:
            assert time.monotonic() - killed_at < 60
            time.sleep(0.05)
        load.wait_for(40)
    print(load.told("killed model", killed_at))
    assert set(load.statuses()) == {200}, load.answers[-5:]


def test_a_killed_front_is_replaced_and_every_loss_is_told(service: Service) -> None:
    (replica,) = service.processes("ServeReplica:mmcore:api")
    with Load(service, 4, ask_caption) as load:
        load.wait_for(40)
        replica.send_signal(signal.SIGKILL)
        killed_at = time.monotonic()
        load.wait_for(40, timeout_s=120)
    lost = [(status, text) for *_, status, text in load.answers if status != 200]
    print(load.told("killed front", killed_at))
    # At most what was in flight, and in the form of every refusal: the official clients ask again.
    assert len(lost) <= 8, lost
    for status, text in lost:
        assert status == 503, (status, text)
        assert json.loads(text)["error"]["code"] == "request_lost"


def test_a_new_version_under_load_loses_no_request(service: Service) -> None:
    service.wait_ready()
    before = {process.pid for process in service.processes("ServeReplica:mmcore")}
    with Load(service, 4, ask_caption) as load:
        load.wait_for(20)
        (service.folder / "redeploy").touch()
        deadline = time.monotonic() + 150
        while (service.folder / "redeploy").exists() or before & {
            process.pid for process in service.processes("ServeReplica:mmcore")
        }:
            assert time.monotonic() < deadline, service.log.read_text()[-3000:]
            time.sleep(0.2)
        load.wait_for(40)
    print(f"new version: {dict(load.statuses())}")
    assert set(load.statuses()) == {200}, [answer for answer in load.answers if answer[2] != 200][:5]
    texts = [json.loads(text)["choices"][0]["message"]["content"] for *_, text in load.answers]
    # Both versions answered, and the new one has the last word.
    assert set(texts) == {"a green picture", "the green picture"}
    assert texts[-1] == "the green picture"


def test_it_ends_when_what_it_began_is_finished(service: Service) -> None:
    body = {"prompt": "x", "num_inference_steps": 50, "n": BATCH_SIZE}
    seconds = 50 * STEP_S
    answers: list[Any] = []

    def ask() -> None:
        with service.client() as client:
            answers.append(client.post(GENERATIONS, json=body))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    below = psutil.Process(service.process.pid).children(recursive=True)
    for thread in threads:
        thread.start()
    with service.client() as client:
        deadline = time.monotonic() + 20
        while f'mmcore_queue_images{{model="shapes"}} {3 * BATCH_SIZE}.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job = client.post("/v1/jobs", json={"request": body}).json()["id"]
        service.process.send_signal(signal.SIGTERM)
        told_at = time.monotonic()
        refused = None
        while time.monotonic() - told_at < seconds and refused is None:
            response = client.get("/v1/models")
            refused = response if response.status_code == 503 else None
            time.sleep(0.05)
        assert refused is not None, "it took new requests while it ended"
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len(answers[0].json()["data"]) == BATCH_SIZE
    assert service.process.wait(90) == 0, service.log.read_text()[-3000:]
    # The job was at work, or stays to be done by the next service.
    kept = service.folder / "kept"
    assert (kept / "pending" / f"{job}.json").exists() != (kept / "jobs" / job / "result.json").exists()
    _, alive = psutil.wait_procs(below, timeout=60)  # its agents look for their parent now and then
    assert not alive, "processes of Ray are left"
    assert "every request answered" in service.log.read_text()
