"""What the measurements share: a run to serve, the service as a process, clients, and one JSON object on stdout."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import platform
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image

from mmcore import checkpoint
from mmcore.captioners.cross_attention import VARIANTS
from mmcore.captioners.facts import CaptionerFacts
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder
from mmcore.run_files import TOKENIZER_ASSET, RunFile, write_model
from mmcore.storage import Storage
from mmcore.text import WordVocabulary

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
NAME = "bench"
_START_S = 300.0
_NUM_WORDS = 3000


def say(line: str) -> None:
    """Progress, on stderr: stdout holds the result alone."""
    print(line, file=sys.stderr, flush=True)


def read_bench(settings_type: type[T], description: str | None, command: str) -> T:
    """The settings of a measurement by the flags; a wrong flag ends the process with one line."""
    try:
        return read_settings(settings_type, description, command)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None


def _httpx() -> ModuleType:
    """The client, which is among the packages of the tests. Where it is missing, ends the process with one line."""
    try:
        import httpx
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise SystemExit(
            "error: measurements of the service need the package httpx; `make setup` installs it"
        ) from None
    return httpx


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and extremes."""
    return {
        "p50": round(statistics.median(values), 5),
        "p95": round(float(np.percentile(values, 95)), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
    }


def publish(bench: str, settings: Any, figures: dict[str, Any]) -> None:
    """Where and how it was measured, and the figures. `load` over the number of cores tells of a shared machine."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), model)
    facts = {
        "bench": bench,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{model}, {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "settings": dataclasses.asdict(settings),
    }
    print(json.dumps(facts | figures, indent=1))


def write_captioner(run: Storage, *, smoke: bool, encoder: str = SCRATCH) -> Storage:
    """A finished run of an untrained captioner of the report's size, or a tiny one; nothing is downloaded.

    Its captions are nonsense and end at the limit, as a caption of every image costs the same. `encoder`: the folder
    of a frozen one, instead of a small one of its own.
    """
    recipe = dataclasses.replace(
        VARIANTS["smoke" if smoke else "report"], encoder=encoder, image_size=32 if smoke else 96, dropout=0.0
    )
    words = [f"word{number}" for number in range(50 if smoke else _NUM_WORDS)]
    vocabulary = WordVocabulary(tuple(words), lowercase=True)
    facts = CaptionerFacts(vocabulary.token_ids, 0, 0)
    if encoder != SCRATCH:
        frozen = FrozenVisionEncoder(encoder, recipe.image_size)
        num_tokens, width = frozen.token_shape
        facts = CaptionerFacts(vocabulary.token_ids, num_tokens, width, frozen.fingerprint())
    torch.manual_seed(0)
    model = recipe.build(facts)
    for file, data in vocabulary.files().items():
        (run / "model" / TOKENIZER_ASSET).write(file, data)
    variant = "smoke" if smoke else "report"
    write_model(run, checkpoint.trainable_state(model), RunFile("resnet_captioner", variant, recipe, facts, ""))
    return run


def photographs(number: int, size: int = 224) -> list[bytes]:
    """JPEGs of smooth noise, about as large as those of Flickr8k at this size."""
    images = []
    for seed in range(number):
        noise = np.random.default_rng(seed).integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        images.append(buffer.getvalue())
    return images


@dataclasses.dataclass
class Endpoint:
    url: str
    headers: dict[str, str]

    def client(self) -> "httpx.Client":
        """One connection that is kept."""
        headers = {**self.headers, "content-type": "application/json"}
        client: httpx.Client = _httpx().Client(base_url=self.url, headers=headers, timeout=600)
        return client


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _process(command: list[str], url: str, environment: dict[str, str]) -> Iterator[None]:
    http = _httpx()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + _START_S
            while True:
                with contextlib.suppress(http.HTTPError):
                    if http.get(f"{url}/ready", timeout=10).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{command} does not answer:\n{log.read().decode(errors='replace')[-4000:]}")
                time.sleep(0.2)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def service(run: Storage, environment: dict[str, str]) -> Iterator[Endpoint]:
    """`python -m serve.control start` with one captioner, and rates that nobody reaches."""
    key, port = secrets.token_hex(16), _free_port()
    url = f"http://127.0.0.1:{port}"
    rates = {"SERVE_API_KEYS": key, "SERVE_RATE_PER_MINUTE": "10000000", "SERVE_RATE_BURST": "1000000"}
    command = [sys.executable, "-m", "serve.control", "start", f"captioner={NAME}:{run}", f"port={port}"]
    with _process(command, url, {**rates, **environment}):
        yield Endpoint(url, {"authorization": f"Bearer {key}"})


@contextlib.contextmanager
def one_at_a_time(run: Storage, *, num_beams: int, num_words: int, threads: int) -> Iterator[Endpoint]:
    """The FastAPI service of serve/bench/one_at_a_time.py."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    numbers = map(str, (port, num_beams, num_words, threads))
    with _process([sys.executable, "-m", "serve.bench.one_at_a_time", str(run), *numbers], url, {}):
        yield Endpoint(url, {})


def request(image: bytes) -> dict[str, Any]:
    uri = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}]}


def ask_all(endpoint: Endpoint, images: Sequence[bytes], concurrency: int) -> tuple[float, list[str]]:
    """Seconds until every image has its caption, with so many requests in flight at all times; and the captions."""
    http = _httpx()
    bodies = [json.dumps(request(image)).encode() for image in images]
    captions = [""] * len(images)
    numbers = iter(range(len(images)))

    async def work(client: "httpx.AsyncClient") -> None:
        for number in numbers:
            response = await client.post("/v1/chat/completions", content=bodies[number])
            response.raise_for_status()
            captions[number] = response.json()["choices"][0]["message"]["content"]

    async def main() -> float:
        limits = http.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {**endpoint.headers, "content-type": "application/json"}
        async with http.AsyncClient(base_url=endpoint.url, headers=headers, limits=limits, timeout=600) as client:
            began = time.perf_counter()
            await asyncio.gather(*(work(client) for _ in range(concurrency)))
            return time.perf_counter() - began

    return asyncio.run(main()), captions
