#!/usr/bin/env python
"""Train Infinity: a tokenizer, images to bits of grids from coarse to fine and back.

Paper: Infinity, Han et al. 2024, https://arxiv.org/abs/2412.04431; binary spherical quantisation, Zhao et al. 2024,
https://arxiv.org/abs/2406.07548

    python jobs/train_infinity.py --variant shapes --stage tokenizer --storage URI

The runs of the tokenizer lie under STORAGE/runs/infinity_tokenizer.

Hardware, time and score: no variant has been run to its end.
"""

from jobs.runtime.autoencoder_training import train_autoencoder
from jobs.runtime.commandline import run
from jobs.runtime.job import parse_staged_job

# Stage -> its recipe. The last stage is that of a command without --stage.
STAGES = {"tokenizer": "infinity_tokenizer"}


def main() -> None:
    train_autoencoder(parse_staged_job(__file__, STAGES, __doc__ or ""))


if __name__ == "__main__":
    run(main)
