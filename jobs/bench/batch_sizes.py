#!/usr/bin/env python
"""Measures how much generated images depend on the batch size.

Command: python jobs/bench/batch_sizes.py --run STORAGE/runs/ldm/NAME --prompts shapes-test --count 96

The same prompts and seeds are generated with each batch size. Every image is compared with its image of the first size.
In fp32, kernels may sum in another order for another batch size. Pixels then differ by a few steps of 1/255 at most.
Near the border of two codes of a VQ-VAE, a rounding error decides the code, and a whole patch differs. In an
autoregressive Transformer all later codes may differ too.

Prints one JSON object: the share of equal images, the share of different values, and the largest difference. It also
has the share of values that differ by more than 1/255.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jobs.bench.timing import publish, say
from jobs.runtime.commandline import run
from jobs.runtime.model_flags import parse_with_options
from mmcore.data.prompts import Prompt, read_prompts
from mmcore.errors import InputError
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.recipe import Generator
from mmcore.trained.generator import open_generator


@dataclass(frozen=True)
class BatchSizes:
    """Settings of the benchmark."""

    run: str
    """Finished run of a generator."""
    prompts: str = "shapes-test"
    """Prompts as in jobs/generate.py."""
    storage: str | None = None
    """Folder or s3://bucket/prefix with the prepared data of flickr8k:report-test or shapes-test."""
    count: int = 96
    """Images per batch size."""
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    """Batch sizes. The others are compared with the first one."""
    num_threads: int | None = None
    """CPU threads; by default PyTorch's choice."""


def generated(generator: Generator, prompts: list[Prompt], options: Any, batch_size: int) -> np.ndarray:
    """Images of `prompts`, uint8 (N, H, W, 3), generated in batches of `batch_size`. The last batch may be smaller."""
    images = []
    for at in range(0, len(prompts), batch_size):
        batch = prompts[at : at + batch_size]
        images.append(generator.generate([each.prompt for each in batch], [each.seed for each in batch], options))
    say(f"batches of {batch_size}: {len(prompts)} images")
    return np.concatenate(images)


def differences(images: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Differences between two sets of images, uint8 (N, H, W, 3)."""
    steps = np.abs(images.astype(np.int16) - others)
    per_image = steps.reshape(len(steps), -1).max(axis=1)
    return {
        "images_equal": float((per_image == 0).mean()),
        "images_within_1": float((per_image <= 1).mean()),
        "values_differing": float((steps > 0).mean()),
        "values_differing_by_more_than_1": float((steps > 1).mean()),
        "largest_difference": int(steps.max()),
    }


def measure(bench: BatchSizes, options: Any) -> dict[str, Any]:
    """Compare all batch sizes. `options`: the sampling options of the generator."""
    prompts = list(read_prompts(bench.prompts, storage=bench.storage, count=bench.count))
    generator = open_generator(bench.run).load("cuda" if torch.cuda.is_available() else "cpu")
    first, *others = bench.batch_sizes
    images = generated(generator, prompts, options, first)
    return {
        "resolution": generator.size[0],
        f"against batches of {first}": {
            f"batches of {size}": differences(images, generated(generator, prompts, options, size)) for size in others
        },
    }


def main() -> None:
    command = "python jobs/bench/batch_sizes.py"
    bench, options = parse_with_options(
        BatchSizes, open_generator, {"a diffusion": DiffusionOptions()}, __doc__ or "", command
    )
    if len(bench.batch_sizes) < 2 or min(bench.batch_sizes) < 1:
        raise InputError(f"--batch-sizes {' '.join(map(str, bench.batch_sizes))}: give two or more, each at least 1")
    if bench.num_threads is not None:
        torch.set_num_threads(bench.num_threads)
    settings = dataclasses.asdict(bench) | dataclasses.asdict(options)
    publish("batch_sizes", settings, lambda: measure(bench, options))


if __name__ == "__main__":
    run(main)
