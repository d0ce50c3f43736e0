#!/usr/bin/env python
"""Measures images per second of a sweep by Ray Data, against a plain loop that also writes PNGs, and with two workers.

Command: python jobs/bench/sweep_overhead.py                  (idle machine; 2 CPU cores: about 20 minutes)
         python jobs/bench/sweep_overhead.py --part workers   (about 15 minutes)
Target: at least 0.97 of the loop's speed, with 1,000 images of at least 100 ms each and equal threads.

Both generate the same images in the same batches. The generator is the pixel diffusion of `--variant` with random
weights. The number of DPM-Solver++ steps is set once in advance, so that an image takes the wanted time. The loop
writes the PNGs of each batch one by one to a local folder. The sweep is `jobs.generate.generate` with its manifest,
lease and atomic writes. Time is counted from the first batch to the last file, without start, loading and warm-up. Ray
is shut down while the loop runs.

By default there is a thread on every core. Whenever Ray's own processes run, all threads of a kernel wait. With one
thread less (`--num-threads`) they have a core of their own. docs/results.md has both figures.

`--part workers` compares two workers of one thread each with one worker of one thread.
"""

import dataclasses
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
import torch

from jobs.bench.timing import clock, interleaved, publish, say, verdict
from jobs.generate import GenerateSettings, generate
from jobs.runtime.commandline import run
from jobs.runtime.ray_private import cpus
from jobs.runtime.source import source_commit
from mmcore import checkpoint
from mmcore.data.prompts import SHAPES_TEST, read_prompts
from mmcore.flags import read_settings
from mmcore.frozen.text import PromptTokenizer
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.pixel_diffusion import VARIANTS
from mmcore.images import png_bytes
from mmcore.recipe import Generator
from mmcore.run_files import RunFile, write_model
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator

TARGET = 0.97


@dataclass(frozen=True)
class SweepBench:
    """Settings of the benchmark."""

    part: Literal["loop", "workers"] = "loop"
    """loop: the sweep against a plain loop. workers: two workers against one."""
    variant: Literal["shapes", "best", "smoke"] = "shapes"
    """Variant of the pixel diffusion."""
    pairs: int = 5
    """Number of pairs of runs."""
    count: int = 1000
    """Images per run."""
    batch_size: int = 8
    """Images per batch."""
    item_seconds: float = 0.1
    """Minimum seconds per image."""
    num_threads: int | None = None
    """CPU threads of sweep and loop for `--part loop`; by default the number of cores."""
    smoke: bool = False
    """Use tiny sizes, to test the script. The figures then mean nothing."""

    @property
    def threads(self) -> int:
        return 1 if self.part == "workers" else self.num_threads or cpus()


def write_random_run(folder: Path, bench: SweepBench) -> Storage:
    """Write a finished run of the pixel diffusion with random weights, which do not affect the speed."""
    recipe = VARIANTS["smoke" if bench.smoke else bench.variant]
    captions = [each.prompt for each in read_prompts(SHAPES_TEST, count=200)]
    tokenizer = PromptTokenizer.of_words(captions, recipe.text.max_tokens)
    shape = (3, recipe.image_size, recipe.image_size)
    torch.manual_seed(recipe.train.seed)
    storage = Storage(str(folder))
    for name, data in tokenizer.files().items():
        storage.write(f"model/tokenizer/{name}", data)
    facts = DiffusionFacts(tokenizer.inputs(), shape, recipe.image_size, text_fingerprint=tokenizer.fingerprint())
    weights = checkpoint.trainable_state(recipe.build(facts))
    write_model(storage, weights, RunFile("pixel_diffusion", bench.variant, recipe, facts, source_commit()))
    return storage


def make(generator: Generator, prompts: list[str], seeds: list[int], steps: int) -> Any:
    return generator.generate(prompts, seeds, DiffusionOptions(steps))


def steps_that_take(generator: Generator, bench: SweepBench) -> int:
    """The number of sampling steps with which an image of a full batch takes 1.1 · `item_seconds`."""
    prompts, seeds = ["a red circle"] * bench.batch_size, list(range(bench.batch_size))
    make(generator, prompts, seeds, 2)
    times = []
    for _ in range(3):
        start = clock()
        make(generator, prompts, seeds, 10)
        times.append(clock() - start)
    return max(1, math.ceil(1.1 * bench.item_seconds * bench.batch_size / (min(times) / 10)))


def loop(generator: Generator, bench: SweepBench, steps: int, folder: Path) -> float:
    """Images per second of a plain loop that writes PNGs."""
    prompts = read_prompts(SHAPES_TEST, count=bench.count)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    start = clock()
    for at in range(0, len(prompts), bench.batch_size):
        batch = prompts[at : at + bench.batch_size]
        images = make(generator, [each.prompt for each in batch], [each.seed for each in batch], steps)
        for each, image in zip(batch, images, strict=True):
            (folder / f"{each.image_id}.png").write_bytes(png_bytes(image, {"prompt": each.prompt}))
    return len(prompts) / (clock() - start)


def sweep(source: Storage, bench: SweepBench, steps: int, num_workers: int, out: Storage) -> float:
    """Images per second of a whole sweep, with a Ray started for it."""
    settings = GenerateSettings(
        run=source.uri,
        prompts=SHAPES_TEST,
        out=out.uri,
        count=bench.count,
        batch_size=bench.batch_size,
        num_workers=num_workers,
        num_threads=bench.threads,
    )
    try:
        return float(generate(settings, DiffusionOptions(steps))["images_per_s"])
    finally:
        ray.shutdown()
        out.delete_tree()


def measure(bench: SweepBench) -> dict[str, Any]:
    torch.set_num_threads(bench.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_random_run(folder / "run", bench)
        generator = open_generator(source.uri).load("cuda" if torch.cuda.is_available() else "cpu")
        steps = steps_that_take(generator, bench)
        say(f"{bench.pairs} pairs of {bench.count} images, {steps} steps, {bench.threads} threads a worker")
        number = 0

        def out() -> Storage:
            nonlocal number
            number += 1
            return Storage(str(folder / f"out-{number}"))

        if bench.part == "workers":
            two, one = (lambda: sweep(source, bench, steps, 2, out())), (lambda: sweep(source, bench, steps, 1, out()))
            figures = interleaved("images/s", {"two workers": two, "one worker": one}, bench.pairs)
            limits: dict[str, Any] = {}
        else:
            ways = {
                "sweep": lambda: sweep(source, bench, steps, 1, out()),
                "loop": lambda: loop(generator, bench, steps, folder / "loop"),
            }
            figures = interleaved("images/s", ways, bench.pairs)
            limits = verdict("target", figures["ratio"]["median"] >= TARGET, TARGET, bench.smoke)
    return {
        **limits,
        "steps": steps,
        "resolution": generator.size[0],
        "threads_per_worker": bench.threads,
        **figures,
    }


def main() -> None:
    bench = read_settings(SweepBench, __doc__, "python jobs/bench/sweep_overhead.py")
    publish("sweep", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
