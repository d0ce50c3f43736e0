#!/usr/bin/env python
"""Images per second of a sweep through Ray Data: against a plain loop that also writes PNGs, and with two workers.

Command: python jobs/bench/sweep_overhead.py                  (quiet machine; 2 CPU cores: about 20 minutes)
         python jobs/bench/sweep_overhead.py --part workers   (about 15 minutes)
Target: the sweep at least 0.97 of the loop's speed, at 1,000 images of at least 100 ms each and equal threads.

Both make the same images in the same batches with one generator: the pixel diffusion of `--variant`, of random weights,
with as many steps of DPM-Solver++ as take the wanted time (found once, before anything is compared). The loop writes
each batch's PNGs when it has made them, as one would: one after another, to a local folder. The sweep is
`jobs.generate.generate` with its manifest, its lease and files that are either whole or not there. Time is counted
from the first batch to the last file, so that starting, loading and warming up are left out of both; Ray is shut down
while the loop runs.

By default there is a thread on every core, and whenever Ray's own processes run, all threads of a kernel wait. With
a thread less (`--num-threads`) a core is left for them. docs/results.md has the figures of both.

`--part workers`: two workers of one thread each against one worker of one thread.
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
import tyro

from jobs.bench.timing import clock, interleaved, publish, say, verdict
from jobs.generate import GenerateSettings, generate
from jobs.runtime.commandline import run
from jobs.runtime.ray_private import cpus
from jobs.runtime.source import source_commit
from mmcore import checkpoint
from mmcore.data.prompts import SHAPES_TEST, read_prompts
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
    """How much is measured."""

    part: Literal["loop", "workers"] = "loop"
    """loop: the sweep against a plain loop; workers: two workers against one."""
    variant: Literal["shapes", "best", "smoke"] = "shapes"
    """Variant of the pixel diffusion."""
    pairs: int = 5
    """Pairs of runs."""
    count: int = 1000
    """Images a run."""
    batch_size: int = 8
    """Images made together."""
    item_seconds: float = 0.1
    """What an image has to take at least."""
    num_threads: int | None = None
    """CPU threads of `--part loop`, of both; by default the cores."""
    smoke: bool = False
    """Tiny sizes: shows that it runs, measures nothing."""

    @property
    def threads(self) -> int:
        return 1 if self.part == "workers" else self.num_threads or cpus()


def write_random_run(folder: Path, bench: SweepBench) -> Storage:
    """A finished run of the pixel diffusion without training: its speed does not depend on the weights."""
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
    """So many steps of the sampler that an image of a full batch takes `item_seconds` and a tenth more."""
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
    """Images per second of a whole sweep, through a Ray of its own."""
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
    bench = tyro.cli(SweepBench, description=__doc__, prog="python jobs/bench/sweep_overhead.py")
    publish("sweep", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
