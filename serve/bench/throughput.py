"""Captions a second of the saturated service: against offline batches of the same model, and against one at a time.

Command: python -m serve.bench.throughput           (quiet machine; 2 CPU cores: about 15 minutes)
Targets: at least 90 % of the offline batches, with 100 ms of CPU and more an image and equal threads;
         at least 3 times FastAPI that takes one image after the other.

The model is a captioner of the report's size (6 layers of width 512) with random weights. Each step of its search reads
all weights, for one image as for sixteen, so it gains from batches. All sides caption the same images with the same
search, in turn, and captions must be equal. The clients run on the same machine. If --threads equals the number of
cores, clients, proxy and routes take CPU time from the model.
"""

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
    Endpoint,
    ask_all,
    one_at_a_time,
    photographs,
    publish,
    read_bench,
    say,
    service,
    spread,
    write_captioner,
)

OFFLINE_SHARE, ONE_AT_A_TIME_TIMES, MIN_CPU_S = 0.9, 3.0, 0.1


@dataclass(frozen=True)
class ThroughputBench:
    """How much is measured."""

    run: str | None = None
    """A finished run of a captioner, instead of the report's size with random weights."""
    images: int = 96
    """Images of one pass; one at a time captions a quarter of them."""
    passes: int = 3
    """Passes of each side, in turn."""
    batch_size: int = 16
    """Images captioned together, offline and by the service."""
    threads: int = 1
    """CPU threads of the model, on every side."""
    beams: int = 3
    """Beams of the search."""
    words: int = 30
    """Longest caption."""
    smoke: bool = False
    """Tiny sizes: shows that it runs and that the captions are equal, measures nothing."""


def measure(bench: ThroughputBench, folder: Path) -> dict[str, Any]:
    run = Storage(bench.run) if bench.run else write_captioner(Storage(str(folder)), smoke=bench.smoke)
    number, passes = (8, 1) if bench.smoke else (bench.images, bench.passes)
    images = photographs(number)
    torch.set_num_threads(bench.threads)
    captioner, options = open_captioner(run.uri).load(), SearchOptions(bench.beams, bench.words)
    settings = {
        "SERVE_CAPTION_BEAMS": str(bench.beams),
        "SERVE_CAPTION_WORDS": str(bench.words),
        "SERVE_MODEL_THREADS": str(bench.threads),
        "SERVE_CAPTIONER_BATCH_SIZE": str(bench.batch_size),
        "SERVE_MAX_QUEUE": str(max(64, 4 * bench.batch_size)),
    }
    captions: dict[str, list[str]] = {}
    cpu_s = [0.0]

    def offline() -> float:
        began, cpu = time.perf_counter(), time.process_time()
        captions["offline"] = []
        for start in range(0, number, bench.batch_size):
            part = images[start : start + bench.batch_size]
            pixels = pixels_from_bytes(part, captioner.image_size, ["image"] * len(part))
            captions["offline"] += captioner.caption(pixels, options)
        cpu_s.append((time.process_time() - cpu) / number)
        return number / (time.perf_counter() - began)

    def served(endpoint: Endpoint) -> float:
        # A batch is worked at while the next one gathers, and one is on its way.
        seconds, captions["served"] = ask_all(endpoint, images, 3 * bench.batch_size)
        return number / seconds

    def one_by_one(endpoint: Endpoint) -> float:
        part = images[: max(4, number // 4)]
        seconds, captions["one_at_a_time"] = ask_all(endpoint, part, bench.batch_size)
        return len(part) / seconds

    rates: dict[str, list[float]] = {"offline": [], "served": [], "one_at_a_time": []}
    plain = one_at_a_time(run, num_beams=bench.beams, num_words=bench.words, threads=bench.threads)
    with service(run, settings) as ours, plain as theirs:
        say("warm-up")
        ask_all(ours, images[: bench.batch_size], bench.batch_size)
        ask_all(theirs, images[:1], 1)
        for turn in range(passes):
            for name, rate in (("offline", offline()), ("served", served(ours)), ("one_at_a_time", one_by_one(theirs))):
                rates[name].append(rate)
                say(f"pass {turn + 1} of {passes}: {name} {rate:.4g} images/s")
    for name in ("served", "one_at_a_time"):
        differing = sum(a != b for a, b in zip(captions["offline"], captions[name], strict=False))
        # Random weights give many words about the same probability, and sums of other batches round differently.
        if differing > len(captions[name]) // 4:
            raise RuntimeError(f"{differing} of {len(captions[name])} captions of {name} differ from the offline ones")
    of_offline = [a / b for a, b in zip(rates["served"], rates["offline"], strict=True)]
    times = [a / b for a, b in zip(rates["served"], rates["one_at_a_time"], strict=True)]
    enough_work = cpu_s[-1] >= MIN_CPU_S
    return {
        "images_per_s": {name: spread(values) for name, values in rates.items()},
        "cpu_s_per_image": round(cpu_s[-1], 4),
        "of_offline": spread(of_offline),
        "of_offline_met": None if bench.smoke or not enough_work else spread(of_offline)["p50"] >= OFFLINE_SHARE,
        "times_one_at_a_time": spread(times),
        "times_one_at_a_time_met": None if bench.smoke else spread(times)["p50"] >= ONE_AT_A_TIME_TIMES,
    }


def main() -> None:
    bench = read_bench(ThroughputBench, __doc__, "python -m serve.bench.throughput")
    with tempfile.TemporaryDirectory(prefix="mmcore-bench-") as folder:
        publish("serve_throughput", bench, measure(bench, Path(folder)))


if __name__ == "__main__":
    main()
