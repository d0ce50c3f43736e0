"""Fake models and the service around them, in one process or behind a real Ray Serve."""

import asyncio
import base64
import contextlib
import hashlib
import io
import itertools
import json
import logging
import subprocess
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from PIL import Image

from mmcore.errors import InputError, OptionError
from mmcore.storage import Storage
from serve.captioner import Captioner
from serve.clients import Model
from serve.generator import Generator
from serve.image_jobs import Jobs
from serve.limits import Limits
from serve.routes import Service
from serve.schemas import GenerateWork
from serve.security import Keys, logger

KEY = "a-key-for-the-tests-0123456789"
GENERATIONS = "/v1/images/generations"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
SIZE = 16
# Only ends a test that hangs. No awaited event takes this long.
HANG_S = 300.0
TIMESTEPS = 240  # timesteps of the fake generator's training: the maximum, although the limits allow 250
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}


def opened() -> threading.Event:
    event = threading.Event()
    event.set()
    return event


@dataclass(frozen=True)
class FakeOptions:
    """The options of a diffusion, without its import time."""

    steps: int = field(default=4, metadata={"api": "num_inference_steps"})
    guidance: float = field(default=3.0, metadata={"api": "guidance_scale"})
    sampler: Literal["dpmsolver++", "ddim"] = "dpmsolver++"
    negative_prompt: str = ""


class FakeGenerator:
    """Images of one colour that depends on prompt, seed and settings.

    While `gate` is closed, work stops between two steps. Work of a single step does not stop.
    """

    max_tokens = 1000
    options: Any = FakeOptions()

    def __init__(self, step_s: float = 0.0, resolution: int = SIZE, gate: Any = None) -> None:
        self.size, self.step_s = (resolution, resolution), step_s
        self.gate = gate or opened()
        self.batches: list[list[tuple[str, str | None, int]]] = []
        self.num_steps = 0
        self.threads: set[int] = set()

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [len(prompt.split()) for prompt in prompts]

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        return [[word for word in prompt.split() if word == "zebra"] for prompt in prompts]

    def check(self, options: Any, size: tuple[int, int]) -> None:
        if size != self.size:
            raise OptionError("size", f"{size[1]}x{size[0]}: this model makes images of {self.size[1]}x{self.size[0]}")
        if options.steps > TIMESTEPS:
            raise OptionError("steps", f"{options.steps}; give 1 to {TIMESTEPS}")
        if options.guidance == 1 and options.negative_prompt:
            raise OptionError("negative_prompt", "has no effect without guidance")

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: Any,
        *,
        size: tuple[int, int],
        on_step: Callable[[int, int], None],
    ) -> np.ndarray:
        negative, steps = options.negative_prompt or None, options.steps
        self.batches.append([(prompt, negative, seed) for prompt, seed in zip(prompts, seeds, strict=True)])
        self.threads.add(threading.get_ident())
        for step in range(1, steps + 1):
            if step > 1:
                wait_at(self.gate, partial(on_step, step - 1, steps))
            time.sleep(self.step_s)
            self.num_steps += 1
            on_step(step, steps)
        colours = [colour_of(*pair, steps, options.guidance, negative) for pair in zip(prompts, seeds, strict=True)]
        return np.stack([np.full((*size, 3), colour, np.uint8) for colour in colours])


def wait_at(gate: Any, still_here: Callable[[], None]) -> None:
    """Wait until the gate is open. `still_here` is called repeatedly, as it ends work that nobody waits for."""
    # Longer than the time-outs of those who wait behind it: a gate that opens by itself would let them pass.
    deadline = time.monotonic() + 2 * HANG_S
    while not gate.wait(0.02):
        assert time.monotonic() < deadline, "nobody opened the gate"
        still_here()


def wanted(prompt: str = "x", seeds: tuple[int, ...] = (1,), steps: int = 4, guidance: float = 3.0) -> GenerateWork:
    return GenerateWork(prompt, seeds, {"num_inference_steps": steps, "guidance_scale": guidance})


def colour_of(
    prompt: str, seed: int, steps: int = 4, guidance: float = 3.0, negative: str | None = None
) -> tuple[int, int, int]:
    digest = hashlib.sha256(f"{prompt}|{seed}|{steps}|{guidance}|{negative}".encode()).digest()
    return digest[0], digest[1], digest[2]


@dataclass(frozen=True)
class FakeSearch:
    num_beams: int = field(default=3, metadata={"caps": "beams"})
    max_length: int = field(default=30, metadata={"caps": "words"})


class FakeCaptioner:
    """Names the colour of an image. A batch does not finish while `gate` is closed."""

    options: Any = FakeSearch()
    takes_prompt = False

    def __init__(self, prefix: str = "a", batch_s: float = 0.0, resolution: int = SIZE) -> None:
        self.image_size, self.prefix, self.batch_s = resolution, prefix, batch_s
        self.gate = opened()
        self.batches: list[int] = []
        self.num_beams: set[int] = set()
        self.num_threads: set[int] = set()

    def caption(
        self,
        pixels: np.ndarray,
        options: FakeSearch,
        prompts: Sequence[str] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[str]:
        """A prompt is said again before the picture. One beam tells each word."""
        assert pixels.shape[1:] == (self.image_size, self.image_size, 3)
        assert prompts is None or self.takes_prompt
        if prompts is not None and "refuse" in prompts:
            raise InputError("the prompt leaves no room for a caption; give a shorter one")
        said = [""] * len(pixels) if prompts is None else [f"{prompt}: " for prompt in prompts]
        self.batches.append(len(pixels))
        self.num_beams.add(options.num_beams)
        self.num_threads.add(torch.get_num_threads())
        time.sleep(self.batch_s)
        wait_at(self.gate, lambda: None)
        means = pixels.reshape(len(pixels), -1, 3).mean(axis=1)
        names = [min(COLOURS, key=lambda name: np.abs(np.subtract(COLOURS[name], mean)).sum()) for mean in means]
        captions = [f"{text}{self.prefix} {name} picture" for text, name in zip(said, names, strict=True)]
        words = [caption.split()[: options.max_length] for caption in captions]
        if on_text is not None and options.num_beams == 1:
            for step in range(1, options.max_length + 1):
                for image, each in enumerate(words):
                    if step <= len(each):
                        on_text(image, " ".join(each[:step]))
        return [" ".join(each) for each in words]


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(buffer, format, **options)
    return buffer.getvalue()


def write_sweep(folder: Path, images: dict[str, bytes]) -> None:
    """A sweep in the form of jobs/generate.py: image i has the prompt ``p{i}`` and the seed i."""
    (folder / "manifest").mkdir()
    (folder / "images").mkdir()
    for image_id, data in images.items():
        (folder / "images" / f"{image_id}.png").write_bytes(data)
    columns: dict[str, list[Any]] = {
        "image_id": list(images),
        "key": [f"images/{image_id}.png" for image_id in images],
        "prompt": [f"p{i}" for i in range(len(images))],
        "seed": list(range(len(images))),
    }
    table = pa.table(columns).replace_schema_metadata({"block": "{}"})
    pq.write_table(table, folder / "manifest" / "part-000000.parquet")


def data_uri(data: bytes, media: str = "image/png") -> str:
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def chat(uri: str, **fields: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": uri}}]
    return {"model": "words", "messages": [{"role": "user", "content": content}], **fields}


class InProcess:
    """Calls the object directly, so that its tests need no cluster."""

    def __init__(self, target: Any) -> None:
        self.target = target

    async def call(self, method: str, *args: Any) -> Any:
        return await getattr(self.target, method)(*args)

    async def stream(self, method: str, *args: Any) -> AsyncGenerator[Any, None]:
        events = getattr(self.target, method)(*args)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()


class Served:
    """The service in this process, with one or two captioners and a generator."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        step_s: float = 0.0,
        storage: Storage | None = None,
        jobs_storage: Storage | None = None,
        gallery: Storage | None = None,
        keys: Keys | None = None,
        allowed_hosts: Sequence[str] = (),
        web: Path | None = None,
    ) -> None:
        # The rate limit must not count a test that polls.
        self.limits = limits or Limits(rate_burst=1_000_000)
        self.fake_generator, self.fake_captioner = FakeGenerator(step_s), FakeCaptioner()
        self.other_captioner = FakeCaptioner("some", resolution=8)
        self.generator = Generator("shapes", lambda device: self.fake_generator, self.limits)
        self.captioner = Captioner("words", lambda device: self.fake_captioner, self.limits)
        self.other = Captioner("others", lambda device: self.other_captioner, self.limits)
        kept = jobs_storage or storage
        self.jobs = Jobs({"shapes": self.generator}, kept.uri if kept else None, self.limits, InProcess)
        self.service = Service(
            models=[
                Model("words", "captioner", InProcess(self.captioner)),
                Model("others", "captioner", InProcess(self.other)),
                Model("shapes", "generator", InProcess(self.generator)),
            ],
            keys=keys or Keys({"SERVE_API_KEYS": KEY}),
            limits=self.limits,
            jobs=InProcess(self.jobs),
            gallery=gallery,
            storage=storage,
            allowed_hosts=allowed_hosts,
            **({"web": web} if web else {}),
        )
        self.app = self.service.app()

    @asynccontextmanager
    async def client(self, headers: dict[str, str] | None = None) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://service", headers=AUTHORIZED if headers is None else headers
        ) as client:
            try:
                yield client
            finally:
                await self.close()

    async def at_rest(self) -> None:
        """Wait until the generator is idle."""
        await until(lambda: self.generator.batcher._heard_at is None)

    async def close(self) -> None:
        """Cancel work when the event loop ends. Unfinished jobs stay pending, as at the end of a process."""
        self.fake_generator.gate.set()
        self.fake_captioner.gate.set()
        tasks = [job.task for job in self.jobs._jobs.values() if job.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in (self.generator, self.captioner, self.other):
            replica.batcher.close()


@contextlib.contextmanager
def listening(served: Served) -> Iterator[str]:
    """Run the app behind uvicorn in a thread. Returns its address."""
    server = uvicorn.Server(uvicorn.Config(served.app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + HANG_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def log_records() -> Iterator[list[logging.LogRecord]]:
    """The log records of the service during the block, each once."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.005)


def tries(least: int = 10, patience_s: float = 60.0) -> Iterator[int]:
    """Retry a test of a short duration, as other programs may take the processor at any single try."""
    deadline = time.monotonic() + patience_s
    for number in itertools.count():
        if number >= least and time.monotonic() > deadline:
            return
        yield number


def run(test: Coroutine[Any, Any, Any], timeout_s: float = HANG_S) -> Any:
    """Run a test's coroutine in its own event loop."""

    async def bounded() -> Any:
        return await asyncio.wait_for(test, timeout_s)

    return asyncio.run(bounded())


def wait_ready(url: str, process: "subprocess.Popen[bytes]", log: Path, timeout_s: float = HANG_S) -> None:
    """Wait until a service in another process has loaded its models. Fails if it ended or the time is up."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"it is not ready; exit code {process.poll()}\n{log.read_text()[-5000:]}")
        time.sleep(0.1)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Server-sent events by name."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n", 1)
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def colour(b64: str) -> tuple[int, ...]:
    """The colour of an image of the fake generator."""
    image = Image.open(io.BytesIO(base64.b64decode(b64)))
    assert image.size == (SIZE, SIZE)
    pixel = image.getpixel((3, 3))
    assert isinstance(pixel, tuple)
    return pixel


def request(method: str, path: str, served: Served | None = None, **options: Any) -> httpx.Response:
    """Send one request to a new service."""

    async def main() -> httpx.Response:
        async with (served or Served()).client(options.pop("headers", None)) as client:
            return await client.request(method, path, **options)

    return run(main())


def post(path: str, body: Any, served: Served | None = None) -> httpx.Response:
    return request("POST", path, served, json=body)


def error(response: httpx.Response) -> dict[str, Any]:
    """The error of a refusal, in OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]
