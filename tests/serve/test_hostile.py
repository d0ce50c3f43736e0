"""More than a hundred malicious requests: each is refused at once, at no cost and without any effect.

A dozen of them also go through Ray Serve (test_real_serve.py).
"""

import asyncio
import base64
import contextlib
import ctypes
import gc
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import AUTHORIZED, GENERATIONS, KEY, Served, chat, data_uri, picture, run, tries
from test_incoming_images import ADDRESSES, HOSTILE, OF_MANY_PARTS_IN_BASE64
from test_limits_and_schemas import BAD_CHATS, BAD_FIELDS, BAD_JSON

# Limits for this process's CPU time, as other programs may run too. Also for wall time beyond that of a refusal without
# a key, without time in which other programs ran: it shows whether a refusal waits. There are many tries, as cold
# caches can double the time.
MAX_CPU_S, MAX_ABOVE_TRIVIAL_S = 0.1, 0.1
MAX_MEMORY = 50 * 2**20
MIB = 2**20
CHAT, CAPTIONS, JOBS = "/v1/chat/completions", "/v1/captions", "/v1/jobs"
JSON = {**AUTHORIZED, "content-type": "application/json"}

ONE_PICTURE = data_uri(picture())
AUTHORIZATIONS = {
    "no key": None,
    "an empty key": "Bearer ",
    "a wrong key": "Bearer " + "x" * 30,
    "half a key": f"Bearer {KEY[:9]}",
    "a longer key": f"Bearer {KEY}x",
    "another scheme": f"Basic {KEY}",
    "a key alone": KEY,
    "a very long key": "Bearer " + "x" * 60_000,
    "two words": f"Bearer {KEY} {KEY}",
}
PATHS = [
    "/v1/../etc/passwd", "/static/..%2f..%2fetc%2fpasswd", "/static/%2e%2e", "/static/app.js%00.html", "/docs",
    "/v1/gallery/..%2f..%2fx", "/v1/jobs/..%2f..%2fpending", "/v1/jobs/" + "x" * 5000, "//evil.example/x",
    "/v1/jobs/job-0000000000-" + "0" * 32, "/redoc", "/.git/config", "/v1/models/x",
]  # fmt: skip
BAD_JOBS: list[Any] = [
    {}, {"request": 3}, {"request": {}}, {"request": {"prompt": "x"}, "priority": 1},
    {"request": {"prompt": "x", "n": 65}}, {"request": {"prompt": "x", "stream": True}},
    {"request": {"prompt": "x", "response_format": "url"}},
]  # fmt: skip
BAD_CAPTIONS: list[Any] = [
    {}, {"images": []}, {"images": "x"}, {"images": [3]}, {"images": [None]}, {"images": [ONE_PICTURE] * 17},
    {"images": [ONE_PICTURE], "beams": 3}, {"images": [ONE_PICTURE], "models": []},
    {"images": [ONE_PICTURE], "models": ["words"] * 2}, {"images": [ONE_PICTURE], "models": ["../words"]},
    {"images": [ONE_PICTURE], "models": "words"},
]  # fmt: skip
BAD_FORMS = [
    b"",
    b"--b",
    b"--b--",
    b"--b\r\n\r\nx\r\n--b--",
    b"--b\r\nContent-Disposition: x\r\n\r\n\r\n--b--",
    b"--b\r\n" + b"x" * 20_000,
    b"--b\r\n" + b"A: b\r\n" * 5000 + b"\r\nx\r\n--b--",
    b'--b\r\nContent-Disposition: form-data; name="images"; filename="../../x"\r\n\r\nx\r\n--b--',
    # One whole image, then the form breaks off.
    b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n' + picture() + b"\r\n--b\r\n",
]
LONG = 8_000_000

# A request: method, path, and arguments for httpx. `parts` is a body without a length.
Case = tuple[str, str, dict[str, Any]]


async def endless(part: bytes, number: int) -> AsyncIterator[bytes]:
    for _ in range(number):
        yield part


def cases() -> dict[str, Case]:
    table: dict[str, Case] = {}

    def add(name: str, method: str, path: str, **options: Any) -> None:
        assert name not in table, name
        options.setdefault("headers", JSON)
        table[name] = (method, path, options)

    # authentication
    for name, value in AUTHORIZATIONS.items():
        headers = {"content-type": "application/json"} | ({"authorization": value} if value is not None else {})
        add(name, "POST", GENERATIONS, headers=headers, content=b'{"prompt": "x"}')
    add("a key in the address", "GET", f"/v1/models?key={KEY}", headers={})
    add("a key in a cookie", "GET", "/v1/models", headers={"cookie": f"key={KEY}"})
    add("a page of another site", "POST", GENERATIONS, headers={**JSON, "sec-fetch-site": "cross-site"}, content=b"{}")
    add("metrics without a key", "GET", "/metrics", headers={})

    # path
    for path in PATHS:
        add(f"GET {path[:40]}", "GET", path)
    for method in ("PUT", "PATCH", "TRACE", "DELETE", "OPTIONS", "GET", "BREW"):
        add(f"{method} {GENERATIONS}", method, GENERATIONS)

    # JSON
    for name, (body, _) in BAD_JSON.items():
        add(f"json: {name}", "POST", GENERATIONS, content=body)
    for body in (b"[]", b"3", b"null", b'"x"'):
        add(f"json: {body!r}", "POST", JOBS, content=body)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml", "multipart/form-data", ""):
        headers = {**AUTHORIZED, "content-type": kind}
        add(f"a body of {kind or 'no type'}", "POST", GENERATIONS, headers=headers, content=b"prompt=x")

    # size
    add(
        "21 MiB, with its length", "POST", CAPTIONS, content=bytes(1), headers={**JSON, "content-length": str(21 * MIB)}
    )
    add("a length beyond all", "POST", CHAT, content=b"{}", headers={**JSON, "content-length": "9" * 17})
    add("a length that is none", "POST", CHAT, content=b"{}", headers={**JSON, "content-length": "-1"})
    add("without end", "POST", CAPTIONS, parts=(b"x" * MIB, 1000))
    add("a prompt without end", "POST", GENERATIONS, parts=(b'{"prompt": "' + b"x" * 65_536, 1000))
    add("a form without end", "POST", CAPTIONS, parts=(b"x" * MIB, 1000),
        headers={**AUTHORIZED, "content-type": "multipart/form-data; boundary=b"})  # fmt: skip
    add("a million values", "POST", CAPTIONS, content=b'{"images": [' + b"0," * 1_000_000 + b"0]}")
    add("deep braces", "POST", CHAT, content=b'{"a":' * 900 + b"1" + b"}" * 900)
    add("a megabyte of braces", "POST", CHAT, content=b"{" * MIB)

    # fields of the route
    for number, (fields, param, _) in enumerate(BAD_FIELDS):
        body = json.dumps({"prompt": "x", **fields}).encode()
        add(f"field {number}: {param}", "POST", GENERATIONS, content=body)
    for number, (body_of_chat, param, _) in enumerate(BAD_CHATS):
        add(f"chat {number}: {param}", "POST", CHAT, content=json.dumps(body_of_chat).encode())
    for number, job in enumerate(BAD_JOBS):
        add(f"job {number}", "POST", JOBS, content=json.dumps(job).encode())
    for number, asked in enumerate(BAD_CAPTIONS):
        add(f"captions {number}", "POST", CAPTIONS, content=json.dumps(asked).encode())

    # image data and addresses
    for uri in ADDRESSES:
        add(f"address {uri}", "POST", CHAT, content=json.dumps(chat(uri)).encode())
    for name, (data, _) in HOSTILE.items():
        in_base64 = OF_MANY_PARTS_IN_BASE64.get(name, data)
        add(f"image, in a chat: {name}", "POST", CHAT, content=json.dumps(chat(data_uri(in_base64))).encode())
        files = [("images", ("x.png", data, "image/png"))]
        add(f"image, in a form: {name}", "POST", CAPTIONS, files=files, headers=AUTHORIZED)
    add("an address of 8 MB", "POST", CHAT, content=json.dumps(chat("http://" + "x" * LONG)).encode())
    for name, kind in {"type": "x" * LONG, "list for a type": ["x" * LONG], "dict for a type": {"x" * LONG: 1}}.items():
        long_type = {"messages": [{"role": "user", "content": [{"type": kind}]}]}
        add(f"a {name} of 8 MB", "POST", CHAT, content=json.dumps(long_type).encode())
    add("a field of 8 MB", "POST", CHAT, content=json.dumps({"x" * LONG: 1}).encode())
    padding = data_uri(b"\x89PNG\r\n\x1a\n" + bytes(7 * MIB))
    add("an image of 7 MiB", "POST", CHAT, content=json.dumps(chat(padding)).encode())
    wrong = "data:image/png;base64," + "!" * 1000
    add("base64 that is none", "POST", CHAT, content=json.dumps(chat(wrong)).encode())
    twice = base64.b64encode(base64.b64encode(picture())).decode()
    add("base64 of base64", "POST", CHAT, content=json.dumps(chat(f"data:image/png;base64,{twice}")).encode())
    for number, form in enumerate(BAD_FORMS):
        headers = {**AUTHORIZED, "content-type": "multipart/form-data; boundary=b"}
        add(f"form {number}", "POST", CAPTIONS, content=form, headers=headers)
    headers = {**AUTHORIZED, "content-type": "multipart/form-data; boundary=b; charset=unicode_escape"}
    surrogate = BAD_FORMS[-1][:-5].replace(b'"x"', rb'"\ud800"') + b"--b--\r\n"
    add("a form in a charset of its own", "POST", CAPTIONS, content=surrogate, headers=headers)
    many = [("images", (f"{i}", b"x", "image/png")) for i in range(500)]
    add("a form of 500 files", "POST", CAPTIONS, files=many, headers=AUTHORIZED)
    return table


class Watch:
    """Connections and name look-ups of this process, from Python's audit hooks."""

    def __init__(self) -> None:
        self.active, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.active and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            self.seen.append(f"{event} {arguments[1:]}")


class Memory:
    """The peak memory of this process during the block, sampled all the time, also within a request."""

    def __enter__(self) -> "Memory":
        self._process, self._done, self.num_looks = psutil.Process(), threading.Event(), 0
        gc.collect()
        self.mark()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, self._process.memory_info().rss)
            self.num_looks += 1

    def mark(self) -> None:
        """Free unused memory now, and not during the measurement."""
        ctypes.CDLL(None).malloc_trim(0)
        self.before = self.most = self._process.memory_info().rss

    @property
    def thread_id(self) -> int | None:
        return self._thread.native_id

    @property
    def now(self) -> int:
        return int(self._process.memory_info().rss)

    @property
    def grown(self) -> int:
        return self.most - self.before


class Processes:
    """The peak memory of processes during the block, and their connections beyond this machine.

    It samples twenty times a second, so a shorter connection may be missed.
    """

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes, self._done = processes, threading.Event()
        self._own = {"127.0.0.1", "::1"} | {each.address for found in psutil.net_if_addrs().values() for each in found}
        self.peers: set[str] = set()
        self.num_looks = self.num_connections = 0

    def __enter__(self) -> "Processes":
        self._before = {process: process.memory_info().rss for process in self._processes}
        self._most = dict(self._before)
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        done = False
        while not done:
            # One more sample at the end, even if this thread had no processor.
            done = self._done.wait(0.05)
            self.num_looks += 1
            for process in self._processes:
                self._most[process] = max(self._most[process], process.memory_info().rss)
                for connection in process.net_connections("inet"):
                    if connection.raddr:
                        self.num_connections += 1
                        # A dual-stack socket shows 127.0.0.1 as ::ffff:127.0.0.1.
                        if connection.raddr.ip.removeprefix("::ffff:") not in self._own:
                            self.peers.add(f"{process.name()} -> {connection.raddr.ip}")

    @property
    def grown(self) -> dict[str, int]:
        """Bytes of memory per process."""
        return {
            f"{' '.join(process.cmdline())[:60]} ({process.pid})": most - self._before[process]
            for process, most in self._most.items()
        }


def delays_of_threads(processes: Iterable[int | str], but: int | None = None) -> dict[str, int]:
    """How long each thread of these processes but one was ready without a processor, in ns, from Linux (schedstat)."""
    waited_ns = {}
    for process in processes:
        for thread in Path(f"/proc/{process}/task").glob("*"):
            if thread.name != str(but):
                with contextlib.suppress(OSError):
                    waited_ns[thread.name] = int((thread / "schedstat").read_text().split()[1])
    return waited_ns


def seconds_held_up(before: dict[str, int], after: dict[str, int]) -> float:
    """The longest time of any thread. A sum would count the same time several times."""
    return max((after[thread] - before.get(thread, 0) for thread in after), default=0) / 1e9


async def ask(client: httpx.AsyncClient, case: Case, but: int | None = None) -> tuple[httpx.Response, float, float]:
    """The answer, its CPU seconds in this process, and its wall seconds without delays by others."""
    method, path, options = case
    if "parts" in options:
        options = {**options, "content": endless(*options["parts"])}
        del options["parts"]
    prepared = client.build_request(method, path, **options)
    held_up = delays_of_threads(["self"], but)
    began, cpu = time.perf_counter(), time.process_time()
    response = await client.send(prepared)
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - began
    return response, cpu_s, max(0.0, wall_s - seconds_held_up(held_up, delays_of_threads(["self"], but)))


async def times_of_refusal(
    client: httpx.AsyncClient, case: Case, but: int | None = None, at_most: Iterable[int] | None = None
) -> tuple[httpx.Response, float, float]:
    """The first answer, its CPU seconds, and its wall seconds beyond those of a refusal without a key.

    Times are the best of at most `at_most` tries. One try is enough if it is quick.
    """
    trivial = "POST", GENERATIONS, {"content": b"{}"}
    first, cpu_s, above_s = None, float("inf"), float("inf")
    for _ in tries() if at_most is None else at_most:
        response, its_cpu_s, its_wall_s = await ask(client, case, but)
        first = first or response
        cpu_s, above_s = min(cpu_s, its_cpu_s), min(above_s, its_wall_s - (await ask(client, trivial, but))[2])
        if cpu_s <= MAX_CPU_S and above_s <= MAX_ABOVE_TRIVIAL_S:
            break
    assert first is not None
    return first, cpu_s, above_s


def problems_of(response: httpx.Response) -> list[str]:
    """The problems of a refusal of a malicious request."""
    if not 400 <= response.status_code < 500:
        return [f"status {response.status_code} {response.text[:200]}"]
    if response.headers["content-type"] != "application/json":
        return [f"answers with {response.headers['content-type']}"]
    found = []
    if set(response.json().get("error", {})) != {"message", "type", "param", "code"}:
        found.append(f"no error in JSON: {response.text[:200]}")
    if KEY in response.text or "Traceback" in response.text or "site-packages" in response.text:
        found.append(f"tells too much: {response.text[:200]}")
    if len(response.text) > 2000:
        found.append(f"answers with {len(response.text)} characters")
    return found


@pytest.mark.parametrize("is_measured", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_hostile_requests(is_measured: bool) -> None:
    """None takes time or memory. The limits are measured, and a busy machine may break them."""
    served = Served()  # the first request of its process, as the images of the table are not
    table = cases()
    assert len(table) >= 100
    # All come from one key, faster than the rate limit, which another test covers.
    served.service.front.rate_limit.take = lambda caller: None  # type: ignore[method-assign]
    watch, memory = Watch(), Memory()
    slowest, largest, kept = 0.0, 0, 0
    problems: list[str] = []

    async def main() -> None:
        nonlocal slowest, largest, kept
        async with served.client(headers={}) as client:
            # Everything that is loaded only once is now loaded.
            await client.post(CHAT, json=chat(data_uri(picture())), headers=AUTHORIZED)
            with memory:
                before = memory.before
                watch.active = True
                for name, case in table.items():
                    if not is_measured:
                        response, *_ = await ask(client, case)
                        problems.extend(f"{name}: {problem}" for problem in problems_of(response))
                        continue
                    memory.mark()
                    response, cpu_s, above_s = await times_of_refusal(client, case, memory.thread_id)
                    slowest, largest = max(slowest, above_s), max(largest, memory.grown)
                    kept = max(kept, memory.now - before)
                    # All at once, as each slow client takes a minute.
                    assert cpu_s <= MAX_CPU_S, f"{name}: {cpu_s:.3f} s of the processor"
                    assert above_s <= MAX_ABOVE_TRIVIAL_S, f"{name}: {above_s:.3f} s longer than a trivial refusal"
                    problems.extend(f"{name}: {problem}" for problem in problems_of(response))
                watch.active = False
            # It still serves valid requests.
            good = await client.post(CHAT, json=chat(data_uri(picture("blue"))), headers=AUTHORIZED)
            assert good.json()["choices"][0]["message"]["content"] == "a blue picture"

    run(main(), timeout_s=500)
    print(
        f"{len(table)} hostile requests: at most {slowest:.3f} s; {largest / MIB:.1f} MiB within one, "
        f"{kept / MIB:.1f} MiB kept behind one"
    )
    assert not problems, "\n".join(problems)
    assert largest < MAX_MEMORY, f"{largest / MIB:.0f} MiB more within a request"
    assert kept < MAX_MEMORY, f"{kept / MIB:.0f} MiB more behind a request than before all of them"
    assert not watch.seen, watch.seen
    assert served.fake_captioner.batches == [1, 1], "a hostile request reached the model"
    assert not served.fake_generator.batches
    assert not any(served.service.front.admission.held.values())
    assert served.service.front.in_flight == 0


@pytest.mark.nightly  # in addition to the limits above
def test_the_memory_that_is_watched_is_that_within_a_request() -> None:
    """Otherwise the check above could miss everything."""
    with Memory() as memory:
        for _ in range(3):
            filled = bytearray(b"x") * (100 * MIB)
            # One sample may have begun before.
            enough = memory.num_looks + 2
            while memory.num_looks < enough:
                time.sleep(0.005)
            del filled
    assert memory.grown > 90 * MIB, f"{memory.before / MIB:.0f} MiB before, at most {memory.most / MIB:.0f}"


def test_the_watch_sees_connections() -> None:
    """Otherwise the check above could miss everything."""
    import socket

    watch = Watch()
    watch.active = True
    with contextlib.suppress(OSError), socket.socket() as probe:
        probe.settimeout(0.1)
        probe.connect(("127.0.0.1", 9))
    watch.active = False
    assert any("socket.connect" in event for event in watch.seen)


@pytest.mark.nightly  # in addition to the limits above
def test_a_refusal_that_waits_is_noticed() -> None:
    """Otherwise the check above could miss everything."""
    served = Served()
    served.service.front.rate_limit.take = lambda caller: time.sleep(1.0)  # type: ignore[method-assign]

    async def main() -> float:
        above_s = 0.0
        async with served.client(headers={}) as client:
            case = "POST", GENERATIONS, {"headers": JSON, "content": b'{"prompt": 3}'}
            for _ in tries():
                # Once each: on a stalled machine the trivial refusal that is subtracted takes a second too.
                above_s = (await times_of_refusal(client, case, at_most=[1]))[2]
                if above_s > MAX_ABOVE_TRIVIAL_S:
                    break
        return above_s

    assert run(main()) > MAX_ABOVE_TRIVIAL_S


def test_a_hundred_of_them_at_once_are_refused_as_well() -> None:
    served = Served()
    served.service.front.rate_limit.take = lambda caller: None  # type: ignore[method-assign]
    body = json.dumps(chat(data_uri(HOSTILE["png bomb"][0]))).encode()

    async def main() -> list[int]:
        async with served.client(headers=JSON) as client:
            responses = await asyncio.gather(*(client.post(CHAT, content=body) for _ in range(100)))
            return [response.status_code for response in responses]

    statuses = run(main())
    # Requests beyond the queue are refused without a look at them.
    assert set(statuses) <= {400, 429}
    assert statuses.count(400) >= served.limits.max_queue
