"""How a diffusion model on pixels is trained: its samples are the images themselves."""

import dataclasses
from typing import Any

from jobs.runtime.diffusion_training import check_sampling, describe, diffusion_setup
from jobs.runtime.features import cached_pixels
from jobs.runtime.generator_training import GeneratorKind, train_generator
from jobs.runtime.job import Job
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded
from mmcore.data.columns import TensorSpec
from mmcore.data.prepared import CaptionTable
from mmcore.frozen.text import TextInputs
from mmcore.generators.facts import DiffusionFacts


def train_pixel_diffusion(job: Job[Any]) -> RunSummary:
    """Make what is missing (Shapes, pixels, the frozen encoder's hidden states), then train. Returns the summary."""
    kind = GeneratorKind(_facts, describe, _encode, _columns, diffusion_setup, check=check_sampling)
    return train_generator(job, kind)


def _facts(job: Job[Any], inputs: TextInputs) -> DiffusionFacts:
    size = job.recipe.image_size
    return DiffusionFacts(inputs, (3, size, size), size)


def _encode(job: Job[Any], table: CaptionTable, facts: DiffusionFacts) -> Encoded[Any, DiffusionFacts]:
    return Encoded(job, dataclasses.replace(facts, columns=(cached_pixels(job).folder.name,)))


def _columns(job: Job[Any], facts: DiffusionFacts) -> dict[str, TensorSpec]:
    return {"pixels": TensorSpec("uint8", (job.recipe.image_size, job.recipe.image_size, 3))}
