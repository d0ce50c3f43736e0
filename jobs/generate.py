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
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, cast

import numpy as np
import ray
import torch
import tyro

from jobs.runtime.blocks import MAX_BLOCKS, Blocks, blocks_of_rows
from jobs.runtime.cluster import connect
from jobs.runtime.commandline import counted, say_next
from jobs.runtime.commandline import run as run_job
from jobs.runtime.image_size import parse_size
from jobs.runtime.image_sweep import COMMIT, BlockFacts, GenerateImages, ImageSettings
from jobs.runtime.lease import Lease
from jobs.runtime.model_flags import parse_with_options, with_run
from jobs.runtime.next_command import after_generating
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
from mmcore.data.manifest import IMAGES, MANIFEST, read_manifest
from mmcore.data.prompts import Prompt, Prompts, read_prompts
from mmcore.errors import InputError, OptionError
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.pipeline_options import PipelineOptions
from mmcore.recipe import Generator
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator
from mmcore.trained.pipeline import TrainedPipeline, names_pipeline

SUMMARY, SKIPPED_FILE = "summary.json", "skipped.txt"
# Skipped prompts that are printed; the file lists all.
_NUM_PRINTED = 20

# What `--batch-size auto` goes by. A CPU is busy with about this many pixels at once, and a larger batch only makes
# more to lose in a kill and blocks of minutes; on a GPU the widest activations of a U-Net and of a decoder to pixels
# take about so many bytes a pixel of the image, conditional and unconditional half together, in fp32.
_CPU_PIXELS = 4 * 64 * 64
_GPU_BYTES_PER_PIXEL = 8192
_MAX_BATCH = 64
# Of the prompts that are longer than the text encoder reads, so many are named in the summary, and of unknown words.
_NUM_NAMED = 5


@dataclass(frozen=True)
class GenerateSettings:
    """What to generate, with what, and where to."""

    run: str
    """The finished run of a generator: STORAGE/runs/RECIPE/NAME. Left out where --model is given."""
    prompts: str
    """File of prompts: .txt (one a line; blank lines are skipped), or .csv, .jsonl or .parquet with
    prompt[, image_id, seed, height, width]; or flickr8k:report-test, or shapes-test."""
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
    size: str | None = None
    """WIDTHxHEIGHT of the images, where the prompts give none; by default the generator's own."""
    model: str | None = None
    """Instead of --run, a text-to-image pipeline of diffusers: a folder with model_index.json, or a name on the hub. It
    loads from safetensors, and no code of the folder is run."""
    revision: str | None = None
    """Commit, branch or tag of a --model on the hub; by default its newest."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """LoRA adapter of --model, URI[:SCALE]: a .safetensors file, or a run of jobs/train_sdxl_lora.py. It may be given
    several times."""
    text_encoder: str | None = None
    """Folder or name of the frozen text encoder, if it is not where the run had it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes GPUs where the cluster has any; a resumed sweep keeps it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """bfloat16 is faster where the device has it, and its images depend a little more on the size of the batch. float16
    is for --model."""
    num_workers: int | None = None
    """Workers; by default one for each GPU, or for each machine."""
    skip_bad: bool = False
    """Go on without prompts that are bad, and list them. Without it the first one is an error."""
    num_threads: int | None = None
    """CPU threads of a worker, by default its share of the cores; a resumed sweep keeps it."""
    dry_run: bool = False
    """Say what would be read and written, and stop."""
    stall_timeout: float | None = None
    """Seconds without a finished block after which the job ends; by default it waits."""


class Resources(TypedDict):
    """Device, threads of a worker and batch of a sweep, which decide the last bits of its images."""

    device: str
    num_threads: int
    batch_size: int


class SweepSettings(TypedDict, total=False):
    """What the settings of a sweep hold beside the identity and the options of its generator."""

    count: int
    seed: int
    dtype: str
    resolution: int | str
    device: str
    num_threads: int
    batch_size: int


class PromptsCutOfAll(TypedDict, total=False):
    """How many prompts of a sweep are longer than the text encoder reads; nothing where no block says it."""

    max_tokens: int
    num_prompts_cut: int
    prompts_cut: list[str]
    negative_prompt_is_cut: bool


class UnknownOfAll(TypedDict, total=False):
    """How many prompts of a sweep have words that the text encoder does not know; nothing where no block says it."""

    num_prompts_unknown: int
    unknown_words: list[str]


class SecondsPerImage(TypedDict):
    """How long an image took."""

    median: float
    p95: float
    mean: float


class SweepSummary(SweepSettings, PromptsCutOfAll, UnknownOfAll, total=False):
    """How fast a finished sweep was, and its settings: ``summary.json``. A dry run has `num_rows` alone."""

    num_rows: int
    num_images: int
    images_per_s: float
    seconds_per_image: SecondsPerImage
    worked_s: float
    num_worker_starts: int
    load_s: float
    warmup_s: float
    devices: list[str]
    commits: list[str]


def auto_batch_size(device: str, size: tuple[int, int], num_images: int, gpu_bytes: int = 0) -> int:
    """A power of two that suits the device and the height and width, and is no larger than one worker's `num_images`
    need."""
    pixels = _CPU_PIXELS if device == "cpu" else gpu_bytes // 2 // _GPU_BYTES_PER_PIXEL
    fitting = min(_MAX_BATCH, max(1, pixels // math.prod(size)))
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


def _asked_size(settings: GenerateSettings, generator: Generator) -> tuple[int, int]:
    """Height and width of the images whose prompts give none."""
    if settings.size is None:
        return generator.size
    size = parse_size(settings.size)
    if size is None:
        raise InputError(f"--size {settings.size}: write WIDTHxHEIGHT, such as 64x64")
    return size


def _check_sizes(
    generator: Generator, options: Any, prompts: Prompts, source: str, skipped: list[str] | None
) -> Prompts:
    """Refuse the sizes of rows that the generator cannot make, before machines are started for it.

    With a list `skipped` such rows are left out and told there.
    """
    reasons: dict[tuple[int, int] | None, str] = {}
    for prompt_size, prompt in prompts.sizes.items():
        if prompt_size is None:
            continue
        try:
            generator.check(options, prompt_size)
        except OptionError as error:
            if skipped is None:
                raise InputError(f"{source}: image_id {prompt.image_id!r}: {error.option} {error.problem}") from None
            reasons[prompt_size] = f"{error.option} {error.problem}"
    if not reasons or skipped is None:
        return prompts
    skipped += [
        f"{source}: image_id {prompt.image_id!r}: {reasons[prompt.size]}"
        for prompt in prompts
        if prompt.size in reasons
    ]
    left = Prompts.of(prompt for prompt in prompts if prompt.size not in reasons)
    if not len(left):
        raise InputError(f"{source}: not one good prompt is left")
    return left


def _list_skipped(out: Storage, skipped: list[str]) -> None:
    for line in skipped[:_NUM_PRINTED]:
        print(f"skipped: {line}")
    out.write(SKIPPED_FILE, "".join(f"{line}\n" for line in skipped).encode())
    print(f"generate: {len(skipped):,} prompts skipped, all in {out}/{SKIPPED_FILE}", flush=True)


def _largest(size: tuple[int, int], prompts: Prompts) -> tuple[int, int]:
    return max((asked or size for asked in prompts.sizes), key=math.prod)


def _resolved(settings: GenerateSettings, size: tuple[int, int], num_images: int) -> Resources:
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
        batch_size = auto_batch_size(device, size, -(-num_images // num_workers), gpu_bytes)
    num_threads = settings.num_threads
    if num_threads is None:
        with Watchdog("generate: ask the machines for their CPUs", settings.stall_timeout):
            machines = machine_cpus(device)
        # Of the smallest machine: the threads decide the last bits of an image, so all workers have equally many.
        num_threads = max(1, min(machines) // -(-num_workers // len(machines)))
    return {"device": device, "num_threads": num_threads, "batch_size": batch_size}


def _kept(settings: GenerateSettings, there: Mapping[str, object]) -> Resources:
    """Device, threads and batch as they were given, or as the sweep began with them."""
    given = {"device": settings.device, "num_threads": settings.num_threads, "batch_size": settings.batch_size}
    return cast(Resources, {name: there[name] if value in (None, "auto") else value for name, value in given.items()})


def _blocks(prompts: Prompts, batch_size: int) -> Blocks:
    """A block is a batch, or as many batches as keep the manifest at `MAX_BLOCKS` files."""
    batches_per_block = -(-len(prompts) // (batch_size * MAX_BLOCKS))
    names = [field.name for field in dataclasses.fields(Prompt)]
    if set(prompts.sizes) == {None}:
        # As sweeps were planned that knew no sizes, whose digests are of what is here.
        names = [name for name in names if name not in ("height", "width")]
    return blocks_of_rows({name: prompts.column(name) for name in names}, batch_size * batches_per_block)


def generate(
    settings: GenerateSettings, options: Any = None, worker_type: type[GenerateImages] = GenerateImages
) -> SweepSummary:
    """Make the images that are not there yet. Returns the summary, which OUT/summary.json holds too.

    `options`: of the generator, by default its own. Raises InputError for settings other than those that OUT was begun
    with, and while another run works on OUT.
    """
    _check(settings)
    out = output_storage(settings.out, "--out")
    generator = worker_type.open(settings.run, text_encoder=settings.text_encoder, loras=settings.lora)
    if settings.dtype == "float16" and not isinstance(generator, TrainedPipeline):
        raise InputError("--dtype float16: is for pipelines of diffusers; a run computes in float32 or bfloat16")
    options, size = generator.options if options is None else options, _asked_size(settings, generator)
    generator.check(options, size)
    skipped: list[str] | None = [] if settings.skip_bad else None
    prompts = read_prompts(
        settings.prompts, storage=settings.storage, seed=settings.seed, count=settings.count, skipped=skipped
    )
    prompts = _check_sizes(generator, options, prompts, settings.prompts, skipped)
    is_model = names_pipeline(settings.run)
    source = settings.run if is_model else Storage(settings.run).uri
    print(f"generate: {counted(len(prompts), 'image')} of {settings.prompts} by {source} -> {out}", flush=True)
    plan = read_plan(out, MANIFEST)
    done = committed_blocks(out, MANIFEST)
    if settings.dry_run:
        begun = "not begun" if plan is None else f"{len(done)} of {plan['num_blocks']} blocks are done"
        reads = source if is_model else f"{source}/model"
        print(f"reads:  {reads}, {settings.prompts}\nwrites: {out}/{IMAGES}, {out}/{MANIFEST} ({begun})")
        if skipped:
            print(f"skipped: {len(skipped):,} prompts, {skipped[0]} the first")
        return {"num_rows": len(prompts)}
    height, width = size
    wanted: dict[str, Any] = {
        # A run that was trained anew under the same name is another one.
        **generator.identity(),
        "count": len(prompts),
        "seed": settings.seed,
        **dataclasses.asdict(options),
        "dtype": settings.dtype,
        # One number where it says all, as in the sweeps that knew squares alone.
        "resolution": width if width == height else f"{width}x{height}",
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
            wanted |= _resolved(settings, _largest(size, prompts), len(prompts))
        image_settings = ImageSettings(
            options=options,
            size=size,
            batch_size=wanted["batch_size"],
            device=wanted["device"],
            dtype=settings.dtype,
            run=source,
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
            worker_kwargs={"generator": generator, "out": out, "image_settings": image_settings},
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
            if skipped:
                _list_skipped(out, skipped)
    summary: SweepSummary = json.loads(out.read(SUMMARY))
    _say(summary, options, out / IMAGES)
    return summary


def _say(summary: SweepSummary, options: Any, images: Storage) -> None:
    """Print what is to be known of the prompts, and last where the images are and how fast they were made."""
    # Absent in the summaries of earlier versions.
    if summary.get("num_prompts_cut"):
        print(
            f"generate: longer than the {summary['max_tokens']} tokens that the text encoder reads, so that their ends "
            f"were cut off: {counted(summary['num_prompts_cut'], 'prompt')}, {', '.join(summary['prompts_cut'])}"
            f"{', ...' if summary['num_prompts_cut'] > len(summary['prompts_cut']) else ''}",
            flush=True,
        )
    if num_unknown := summary.get("num_prompts_unknown"):
        print(
            f"generate: {counted(num_unknown, 'prompt')} {'has' if num_unknown == 1 else 'have'} words that the run's "
            f"text encoder does not know and cannot draw, such as {', '.join(summary['unknown_words'])}",
            flush=True,
        )
    if summary.get("negative_prompt_is_cut"):
        print(f"generate: the negative prompt is longer than {summary['max_tokens']} tokens: its end was cut off")
    how = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(options).items() if value not in ("", None))
    print(
        f"generate: {counted(summary['num_images'], 'image')} in {images}, {summary['images_per_s']:.3g} images/s, "
        f"beside {summary['load_s']:.1f} s of loading and {summary['warmup_s']:.1f} s of warm-up; {how}, "
        f"{summary['dtype']}, {', '.join(summary['devices'])}",
        flush=True,
    )


def _prompts_cut(blocks: Sequence[BlockFacts]) -> PromptsCutOfAll:
    """What the blocks say of prompts that are longer than the text encoder reads. Those of earlier versions say
    nothing, and are not counted."""
    saying = [block for block in blocks if "max_tokens" in block]
    if not saying:
        return {}
    return {
        "max_tokens": saying[0]["max_tokens"],
        "num_prompts_cut": sum(block["num_prompts_cut"] for block in saying),
        "prompts_cut": [image_id for block in saying for image_id in block["prompts_cut"]][:_NUM_NAMED],
        "negative_prompt_is_cut": any(block["negative_prompt_is_cut"] for block in saying),
    }


def _unknown(blocks: Sequence[BlockFacts]) -> UnknownOfAll:
    """What the blocks say of words that the text encoder does not know. Those of earlier versions say nothing."""
    saying = [block for block in blocks if "unknown_words" in block]
    if not saying:
        return {}
    return {
        "num_prompts_unknown": sum(block["num_prompts_unknown"] for block in saying),
        "unknown_words": sorted({word for block in saying for word in block["unknown_words"]})[:_NUM_NAMED],
    }


def summarise(out: Storage) -> SweepSummary:
    """The speed of a finished sweep, from its manifest alone.

    ``images_per_s`` counts the time in which any worker was active, from its first batch to its last write. Pauses
    between batches count. Start, loading, warm-up and work lost in kills do not.
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
        **_prompts_cut(cast(Sequence[BlockFacts], blocks)),
        **_unknown(cast(Sequence[BlockFacts], blocks)),
        **cast(SweepSettings, plan["settings"]),
        # A sweep may be resumed at another commit; its first blocks may be of a time when they did not say which.
        "commits": sorted({block.get(COMMIT, plan[COMMIT]) for block in blocks}),
    }


def main() -> None:
    command = "python jobs/generate.py"
    families = {
        "a diffusion": DiffusionOptions(),
        "a Transformer over codes": AutoregressiveOptions(),
        "Infinity": InfinityOptions(),
        "a pipeline of diffusers": PipelineOptions(),
    }
    settings, options = parse_with_options(
        GenerateSettings, open_generator, families, __doc__ or "", command, with_run(sys.argv[1:])
    )
    generate(settings, options)
    if not settings.dry_run and settings.model is None:
        say_next(after_generating(settings.run, settings.prompts, settings.out))


if __name__ == "__main__":
    run_job(main)
