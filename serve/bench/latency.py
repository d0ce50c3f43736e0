"""Latency that Ray Serve and our layer add over calling the model directly, at one request at a time.

Command: python -m serve.bench.latency              (quiet machine; 2 CPU cores: about 2 minutes)

Both sides use the same captioner, image and threads, in turn. One is a call in this process (decode, resize, caption).
The other is a request over HTTP through the proxy, the routes and the model's replica. The added latency is the
difference of the medians, and of the 95th percentiles. An empty Ray Serve deployment answers in about 4.4 ms on this
kind of machine.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmcore.captioners.search_options import SearchOptions
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from serve.bench.measuring import (
    ask_all,
    photographs,
    publish,
    read_bench,
    request,
    say,
    service,
    spread,
    write_captioner,
)


@dataclass(frozen=True)
class LatencyBench:
    """How much is measured."""

    run: str | None = None
    """A finished run of a captioner, instead of a small one with random weights."""
    requests: int = 300
    """Requests to each side."""
    threads: int = 1
    """CPU threads of the model, on both sides."""
    beams: int = 1
    """Beams of the search."""
    words: int = 10
    """Longest caption."""
    smoke: bool = False
    """A few requests: shows that it runs, measures nothing."""


def measure(bench: LatencyBench, folder: Path) -> dict[str, Any]:
    # A small model: what is added is the same, and is seen better.
    run = Storage(bench.run) if bench.run else write_captioner(Storage(str(folder)), smoke=True)
    number = 5 if bench.smoke else bench.requests
    images = photographs(min(number, 20))
    torch.set_num_threads(bench.threads)
    captioner, options = open_captioner(run.uri).load(), SearchOptions(bench.beams, bench.words)
    settings = {
        "SERVE_CAPTION_BEAMS": str(bench.beams),
        "SERVE_CAPTION_WORDS": str(bench.words),
        "SERVE_MODEL_THREADS": str(bench.threads),
    }
    times: dict[str, list[float]] = {"direct": [], "served": []}
    with service(run, settings) as endpoint, endpoint.client() as client:
        ask_all(endpoint, images, 1)
        for index in range(number):
            image = images[index % len(images)]
            began = time.perf_counter()
            (caption,) = captioner.caption(pixels_from_bytes([image], captioner.image_size, ["image"]), options)
            times["direct"].append(time.perf_counter() - began)
            body = json.dumps(request(image)).encode()
            began = time.perf_counter()
            response = client.post("/v1/chat/completions", content=body)
            times["served"].append(time.perf_counter() - began)
            served = response.raise_for_status().json()["choices"][0]["message"]["content"]
            if served != caption:
                raise RuntimeError(f"the service says {served!r} and the model {caption!r}")
            if index % 50 == 49:
                say(f"{index + 1} of {number}")
    spreads = {name: spread(values) for name, values in times.items()}
    added = {name: round(1000 * (spreads["served"][name] - spreads["direct"][name]), 2) for name in ("p50", "p95")}
    return {"seconds": spreads, "added_ms": added, "requests": number}


def main() -> None:
    bench = read_bench(LatencyBench, __doc__, "python -m serve.bench.latency")
    with tempfile.TemporaryDirectory(prefix="mmcore-bench-") as folder:
        publish("serve_latency", bench, measure(bench, Path(folder)))


if __name__ == "__main__":
    main()
