#!/usr/bin/env python
"""Generate any number of images from prompts with a trained generator: resumable, each image exactly once.

    python jobs/generate.py --run URI --prompts FILE --out URI --guidance 3
    python jobs/generate.py --run URI --prompts shapes-test --count 300 --out URI
    python jobs/generate.py --run URI --prompts flickr8k:report-test --storage URI --count 1000 --out URI

Writes OUT/images/{image_id}.png and OUT/manifest/*.parquet, the truth about which images there are; OUT/sweep.json
says what the sweep is, and OUT/summary.json, written last, how fast it was. Run it again to go on.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import torch
import tyro

from jobs.runtime.blocks import MAX_BLOCKS, Blocks, blocks_of_rows
from jobs.runtime.cluster import connect
from jobs.runtime.commandline import run as run_job
from jobs.runtime.lease import Lease
from jobs.runtime.source import output_storage, source_commit
from jobs.runtime.sweep import (
    SWEEP,
    check_plan,
    committed_blocks,
    machine_cpus,
    num_workers_and_gpus,
    plan_of,
    read_plan,
    run_sweep,
)
from jobs.runtime.watchdog import Watchdog
from mmcore.catalogue import read_model_file
from mmcore.data.manifest import BLOCK, IMAGES, MANIFEST, read_manifest
from mmcore.data.parquet import NUM_IO_THREADS
from mmcore.data.prompts import Prompt, read_prompts
from mmcore.device import device_name
from mmcore.errors import InputError
from mmcore.generators.diffusion import SamplerName
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.images import decode_image, png_bytes, read_png_text
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator

SUMMARY = "summary.json"
# The text chunks of an image that say what it is of; `commit` stands beside them and may change between resumes.
COMMIT = "commit"

# What `--batch-size auto` goes by. A CPU is busy with about this many pixels at once, and a larger batch only makes
# more to lose in a kill and blocks of minutes; on a GPU the widest activations of a U-Net and of a decoder to pixels
# take about so many bytes a pixel of the image, conditional and unconditional half together, in fp32.
_CPU_PIXELS = 4 * 64 * 64
_GPU_BYTES_PER_PIXEL = 8192
_MAX_BATCH = 64
# How far an image found under its key may be from the one made again, in 255ths: in the mean, and what share of its
# values by more than one step. One CPU repeats itself to the bit and another kind of it rounds otherwise, by a step at
# most; but of latents between two codes of a VQ-VAE the last bit decides a patch. A GPU's kernels add in another order,
# so that there the mean alone counts. Without AVX2, one of 24 images of a VQ-VAE of 32² differed, by a step; between
# images of two prompts at least 72 % of the values did by more.
_ADOPT_MEAN, _ADOPT_PATCHES = 2.0, 0.25


@dataclass(frozen=True)
class GenerateSettings:
    """What to generate, with what, and where to."""

    run: str
    """The finished run of a generator: STORAGE/runs/RECIPE/NAME."""
    prompts: str
    """File of prompts: .txt (one a line), .csv, .jsonl or .parquet with prompt[, image_id, seed]; or
    flickr8k:report-test, or shapes-test."""
    out: str
    """Folder or s3://bucket/prefix for the images."""
    storage: str | None = None
    """Folder or s3://bucket/prefix with the prepared data of flickr8k:report-test or shapes-test; shapes-test without
    it is as many scenes as --count says."""
    count: int | None = None
    """Images to make, from the first prompt on; by default one for each prompt."""
    batch_size: int | Literal["auto"] = "auto"
    """Images made together; auto goes by the device and the resolution, and a resumed sweep keeps it."""
    seed: int = 0
    """The seed of an image is derived from this number and its image_id, unless the prompts give one."""
    steps: int = 25
    """Steps of the sampler."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 leaves it out and takes half the time."""
    sampler: SamplerName = "dpmsolver++"
    """Sampler of the diffusion; ddim and ddpm need more steps, and ddim a divisor of the 1,000 timesteps."""
    negative_prompt: str = ""
    """What the guidance leads away from; by default the empty text."""
    text_encoder: str | None = None
    """Folder or name of the frozen text encoder, if it is not where the run had it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has any; a resumed sweep keeps it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster where the device has it, and its images depend a little more on the size of the batch."""
    num_workers: int | None = None
    """Workers; by default one for each GPU, or for each machine."""
    num_threads: int | None = None
    """CPU threads of a worker, by default its share of the cores; a resumed sweep keeps it."""
    dry_run: bool = False
    """Say what would be read and written, and stop."""
    stall_timeout: float | None = None
    """Seconds without a finished block after which the job ends; by default it waits."""


@dataclass(frozen=True)
class ImageSettings:
    """What decides an image beside its prompt and seed, and what is said of it."""

    steps: int
    guidance: float
    sampler: SamplerName
    negative_prompt: str
    batch_size: int
    device: str
    dtype: Literal["float32", "bfloat16"]
    run: str
    commit: str

    def text(self, prompt: Prompt) -> dict[str, str]:
        """The text chunks of the image of `prompt`."""
        chunks = {"prompt": prompt.prompt, "seed": str(prompt.seed), "steps": str(self.steps)}
        chunks |= {"guidance": repr(self.guidance), "sampler": self.sampler, "run": self.run, COMMIT: self.commit}
        return chunks | ({"negative_prompt": self.negative_prompt} if self.negative_prompt else {})


@dataclass(frozen=True)
class Generated:
    """The images of one block: uint8 (N, H, W, 3), when they were begun (seconds since 1970) and how long they took."""

    prompts: list[Prompt]
    images: np.ndarray
    began: float
    seconds: float


class GenerateImages:
    """Holds the generator on a worker: a call generates one block, beside which `write` writes the one before."""

    def __init__(self, run: Storage, out: Storage, image_settings: ImageSettings, text_encoder: str | None) -> None:
        self.out, self.settings = out, image_settings
        start = time.perf_counter()
        self.generator = self.load(run, text_encoder)
        loaded = time.perf_counter()
        # Of the full batch, as kernels are chosen and memory is taken by its shape; two steps show them all; one
        # does of ddim, which may not take two where it takes the steps that were asked for.
        warm_up = [Prompt("", "", 0)] * image_settings.batch_size
        self.generate(warm_up, 1 if image_settings.sampler == "ddim" else min(2, image_settings.steps))
        self.facts = {
            "worker": uuid.uuid4().hex,
            COMMIT: image_settings.commit,
            "load_s": loaded - start,
            "warmup_s": time.perf_counter() - loaded,
            "dtype": image_settings.dtype,
            "device": device_name(image_settings.device),
        }
        self.writers = ThreadPoolExecutor(NUM_IO_THREADS)

    def load(self, run: Storage, text_encoder: str | None) -> Any:
        dtype = getattr(torch, self.settings.dtype)
        return open_generator(run.uri, text_encoder=text_encoder).load(self.settings.device, dtype)

    def generate(self, prompts: Sequence[Prompt], steps: int) -> np.ndarray:
        """uint8 (B, H, W, 3) of at most a batch; fewer are filled up to one, so that every image is made alike."""
        settings = self.settings
        batch = [*prompts, *[prompts[-1]] * (settings.batch_size - len(prompts))]
        try:
            images = self.generator.generate(
                [each.prompt for each in batch],
                [each.seed for each in batch],
                DiffusionOptions(steps, settings.guidance, settings.sampler, settings.negative_prompt),
            )
        except torch.OutOfMemoryError:
            raise InputError(
                f"--batch-size {settings.batch_size}: the GPU's memory is too small for it; give a smaller one and "
                "another --out"
            ) from None
        return images[: len(prompts)]

    def __call__(self, rows: dict[str, list[Any]]) -> Generated:
        prompts = [Prompt(*row) for row in zip(rows["image_id"], rows["prompt"], rows["seed"], strict=True)]
        batch_size, steps = self.settings.batch_size, self.settings.steps
        began, start = time.time(), time.perf_counter()
        batches = [self.generate(prompts[at : at + batch_size], steps) for at in range(0, len(prompts), batch_size)]
        return Generated(prompts, np.concatenate(batches), began, time.perf_counter() - start)

    def write(self, made: Generated) -> pa.Table:
        """Write the images; returns their rows of the manifest."""
        prompts, steps, seconds = made.prompts, self.settings.steps, made.seconds
        digests = list(self.writers.map(self.put, prompts, made.images))
        columns: dict[str, Any] = {
            "image_id": [each.image_id for each in prompts],
            "key": [image_key(each) for each in prompts],
            "sha256": digests,
            "prompt": [each.prompt for each in prompts],
            "seed": pa.array([each.seed for each in prompts], pa.int64()),
            "steps": pa.array([steps] * len(prompts), pa.int64()),
            "guidance": pa.array([self.settings.guidance] * len(prompts), pa.float64()),
            "sampler": [self.settings.sampler] * len(prompts),
            "dtype": [self.facts["dtype"]] * len(prompts),
            "device": [self.facts["device"]] * len(prompts),
            "seconds": pa.array([seconds / len(prompts)] * len(prompts), pa.float64()),
        }
        facts = {**self.facts, "began": made.began, "ended": time.time()}
        return pa.table(columns).replace_schema_metadata({BLOCK: json.dumps(facts)})

    def put(self, prompt: Prompt, image: np.ndarray) -> str:
        """Create the image's object, or adopt the one that a run before this one left there; returns its SHA-256."""
        text, key = self.settings.text(prompt), image_key(prompt)
        data = png_bytes(image, text)
        if not self.out.create(key, data):
            there = self.out.read(key)
            if there != data:
                self._check_same(f"{self.out}/{key}", there, image, text)
            data = there
        return hashlib.sha256(data).hexdigest()

    def _check_same(self, place: str, there: bytes, image: np.ndarray, text: dict[str, str]) -> None:
        pixels, found = np.asarray(decode_image(there, name=place)), read_png_text(there, name=place)
        differing = [name for name in sorted({*text, *found} - {COMMIT}) if text.get(name) != found.get(name)]
        if differing:
            reason = f"{differing[0]} is {found.get(differing[0])!r} and not {text.get(differing[0])!r}"
        elif pixels.shape != image.shape:
            reason = f"it is {pixels.shape[1]} x {pixels.shape[0]} pixels and not {image.shape[1]} x {image.shape[0]}"
        else:
            difference = np.abs(pixels.astype(np.int16) - image)
            largest, mean = int(difference.max()), float(difference.mean())
            patches = _ADOPT_PATCHES if self.generator.decides_by_code else 0.0
            on_gpu = self.settings.device == "cuda"
            if mean <= _ADOPT_MEAN and (on_gpu or float((difference > 1).mean()) <= patches):
                return
            reason = f"its pixels differ by {mean:.3g} of 255 in the mean and {largest} at most"
        raise InputError(f"{place}: another image is there already: {reason}; remove it, or give another --out")


def image_key(prompt: Prompt) -> str:
    return f"{IMAGES}/{prompt.image_id}.png"


def auto_batch_size(device: str, resolution: int, num_images: int, gpu_bytes: int = 0) -> int:
    """A power of two that suits the device, and is no larger than one worker's `num_images` need."""
    pixels = _CPU_PIXELS if device == "cpu" else gpu_bytes // 2 // _GPU_BYTES_PER_PIXEL
    fitting = min(_MAX_BATCH, max(1, pixels // resolution**2))
    needed = 1 << max(0, num_images - 1).bit_length()
    return min(1 << (fitting.bit_length() - 1), needed)


@ray.remote(num_cpus=0)
def _gpu_bytes() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def _check(settings: GenerateSettings) -> None:
    for name in ("batch_size", "num_workers", "num_threads"):
        value = getattr(settings, name)
        if isinstance(value, int) and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def _resolved(settings: GenerateSettings, resolution: int, num_images: int) -> dict[str, Any]:
    """Device, threads and batch of a new sweep, as they were given or as the cluster has them."""
    connect()
    device = settings.device
    if device == "auto":
        device = "cuda" if num_workers_and_gpus()[1] else "cpu"
    num_workers = settings.num_workers or num_workers_and_gpus(device)[0]
    batch_size = settings.batch_size
    if batch_size == "auto":
        gpu_bytes = 0
        if device == "cuda":
            with Watchdog("generate: ask for the memory of a GPU", settings.stall_timeout):
                gpu_bytes = ray.get(_gpu_bytes.options(num_gpus=1).remote())
        batch_size = auto_batch_size(device, resolution, -(-num_images // num_workers), gpu_bytes)
    num_threads = settings.num_threads
    if num_threads is None:
        with Watchdog("generate: ask the machines for their CPUs", settings.stall_timeout):
            machines = machine_cpus(device)
        # Of the smallest machine: the threads decide the last bits of an image, so all workers have equally many.
        num_threads = max(1, min(machines) // -(-num_workers // len(machines)))
    return {"device": device, "num_threads": num_threads, "batch_size": batch_size}


def _kept(settings: GenerateSettings, there: dict[str, Any]) -> dict[str, Any]:
    """Device, threads and batch as they were given, or as the sweep began with them."""
    given = {"device": settings.device, "num_threads": settings.num_threads, "batch_size": settings.batch_size}
    return {name: there[name] if value in (None, "auto") else value for name, value in given.items()}


def _blocks(prompts: list[Prompt], batch_size: int) -> Blocks:
    """A block is a batch, or as many batches as keep the manifest at `MAX_BLOCKS` files."""
    batches_per_block = -(-len(prompts) // (batch_size * MAX_BLOCKS))
    columns = {field.name: [getattr(each, field.name) for each in prompts] for field in dataclasses.fields(Prompt)}
    return blocks_of_rows(columns, batch_size * batches_per_block)


def generate(settings: GenerateSettings, worker_type: type[GenerateImages] = GenerateImages) -> dict[str, Any]:
    """Make the images that are not there yet. Returns the summary, which OUT/summary.json holds too.

    Raises InputError for settings other than those that OUT was begun with, and while another run works on OUT.
    """
    _check(settings)
    run, out = Storage(settings.run), output_storage(settings.out, "--out")
    file = read_model_file(run, "generator")
    generator: Any = open_generator(run.uri, text_encoder=settings.text_encoder)
    sampling = DiffusionOptions(settings.steps, settings.guidance, settings.sampler, settings.negative_prompt)
    generator.check(sampling, generator.size)
    resolution, text_encoder = generator.size[0], generator.text_name
    prompts = read_prompts(settings.prompts, storage=settings.storage, seed=settings.seed, count=settings.count)
    print(f"generate: {len(prompts)} images of {settings.prompts} by {run} -> {out}", flush=True)
    plan = read_plan(out, MANIFEST)
    done = committed_blocks(out, MANIFEST)
    if settings.dry_run:
        begun = "not begun" if plan is None else f"{len(done)} of {plan['num_blocks']} blocks are done"
        print(f"reads:  {run}/model, {settings.prompts}\nwrites: {out}/{IMAGES}, {out}/{MANIFEST} ({begun})")
        return {"num_rows": len(prompts)}
    wanted: dict[str, Any] = {
        "run": run.uri,
        # A run that was trained anew under the same name is another one.
        "weights_sha256": file.weights_sha256,
        "count": len(prompts),
        "seed": settings.seed,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "sampler": settings.sampler,
        "negative_prompt": settings.negative_prompt,
        "dtype": settings.dtype,
        "resolution": resolution,
    }
    if plan is not None:
        if "batch_size" not in plan["settings"]:
            raise InputError(f"{out}: holds a sweep of another job; give another --out")
        wanted |= _kept(settings, plan["settings"])
        # Before the lease is asked for: whoever gives other settings is told of them.
        check_plan(out, plan, plan_of(wanted, _blocks(prompts, wanted["batch_size"])))
    finished = plan is not None and len(done) == plan["num_blocks"]
    with contextlib.nullcontext() if finished else Lease(out, f"the sweep {out}"):
        if plan is None:
            wanted |= _resolved(settings, resolution, len(prompts))
        image_settings = ImageSettings(
            **{field.name: wanted[field.name] for field in dataclasses.fields(ImageSettings) if field.name != COMMIT},
            commit=source_commit(),
        )
        if plan is not None and not finished and plan[COMMIT] != image_settings.commit:
            print(
                f"generate: begun at commit {plan[COMMIT]}, going on at {image_settings.commit}: {SUMMARY} lists both",
                flush=True,
            )
        run_sweep(
            what="generate",
            out=out,
            settings=wanted,
            blocks=_blocks(prompts, wanted["batch_size"]),
            worker_type=worker_type,
            worker_kwargs={
                "run": run,
                "out": out,
                "image_settings": image_settings,
                "text_encoder": text_encoder,
            },
            stall_timeout_s=settings.stall_timeout,
            num_threads=wanted["num_threads"],
            parts=MANIFEST,
            plan_facts={COMMIT: image_settings.commit, "prompts": settings.prompts},
            device=wanted["device"],
            num_workers=settings.num_workers,
        )
        if not out.exists(SUMMARY):
            out.write(SUMMARY, (json.dumps(summarise(out), indent=1) + "\n").encode())
        if not finished:  # only who holds the lease is alone here
            out.remove_temporary()
    summary = json.loads(out.read(SUMMARY))
    each = summary["seconds_per_image"]
    print(
        f"generate: {summary['num_images']} images, {summary['images_per_s']:.3g} images/s; {each['median']:.3g} s an "
        f"image (p95 {each['p95']:.3g} s), beside {summary['load_s']:.1f} s of loading and {summary['warmup_s']:.1f} s "
        f"of warm-up; {settings.steps} steps, {summary['dtype']}, {', '.join(summary['devices'])}",
        flush=True,
    )
    return summary


def summarise(out: Storage) -> dict[str, Any]:
    """How fast a finished sweep was, from its manifest alone.

    ``images_per_s`` counts the time in which any worker was at work, from its first batch to its last write: with the
    pauses between batches, without starting, loading, warming up and what was lost in kills.
    """
    table, blocks = read_manifest(out)
    seconds = table["seconds"].to_numpy()
    windows: dict[str, tuple[float, float]] = {}
    for block in blocks:
        began, ended = windows.get(block["worker"], (math.inf, 0.0))
        windows[block["worker"]] = min(began, block["began"]), max(ended, block["ended"])
    worked_s, until = 0.0, 0.0
    for began, ended in sorted(windows.values()):
        worked_s += max(0.0, ended - max(began, until))
        until = max(until, ended)
    plan = json.loads(out.read(SWEEP))
    return {
        "num_images": len(table),
        "images_per_s": len(table) / worked_s,
        "seconds_per_image": {
            "median": float(np.median(seconds)),
            "p95": float(np.percentile(seconds, 95)),
            "mean": float(seconds.mean()),
        },
        "worked_s": worked_s,
        "num_worker_starts": len(windows),
        "load_s": max(block["load_s"] for block in blocks),
        "warmup_s": max(block["warmup_s"] for block in blocks),
        "devices": sorted({block["device"] for block in blocks}),
        **plan["settings"],
        # A sweep may be resumed at another commit; its first blocks may be of a time when they did not say which.
        "commits": sorted({block.get(COMMIT, plan[COMMIT]) for block in blocks}),
    }


def main() -> None:
    generate(tyro.cli(GenerateSettings, description=__doc__, prog="python jobs/generate.py"))


if __name__ == "__main__":
    run_job(main)
