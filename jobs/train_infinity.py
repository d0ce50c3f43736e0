#!/usr/bin/env python
"""Train Infinity: a tokenizer, images to bits of grids and back, and a Transformer that writes the bits.

Paper: Infinity, Han et al. 2024, https://arxiv.org/abs/2412.04431; binary spherical quantisation, Zhao et al. 2024,
https://arxiv.org/abs/2406.07548

    python jobs/train_infinity.py --variant shapes --num-workers 2 --storage URI
    python jobs/train_infinity.py --variant shapes --stage tokenizer --storage URI

Without --image-tokenizer the tokenizer of the variant is trained first, into the same storage and under the run's name.
The runs of the tokenizer lie under STORAGE/runs/infinity_tokenizer.

Hardware, time and score (docs/results.md): the tokenizer of shapes took 5 minutes for 3,000 steps on two workers of one
CPU thread. Its reconstructions have 99.3 % of the attributes of test scenes. The Transformer has not been run to its
end.
"""

from typing import Any

from jobs.runtime.autoencoder_training import train_autoencoder
from jobs.runtime.commandline import run
from jobs.runtime.infinity_training import train_infinity
from jobs.runtime.job import Job, parse_staged_job
from jobs.runtime.trainer import RunSummary

# Stage -> its recipe. The last stage is that of a command without --stage.
STAGES = {"tokenizer": "infinity_tokenizer", "transformer": "infinity"}


def train(job: Job[Any]) -> RunSummary:
    """Returns the run's summary."""
    return train_autoencoder(job) if job.recipe_name == STAGES["tokenizer"] else train_infinity(job)


def main() -> None:
    train(parse_staged_job(__file__, STAGES, __doc__ or ""))


if __name__ == "__main__":
    run(main)
