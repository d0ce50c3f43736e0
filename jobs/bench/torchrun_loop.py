#!/usr/bin/env python
"""The training loop under plain torchrun, without Ray: the baseline of ray_train_overhead.py.

Command: torchrun --standalone --nproc-per-node 1 jobs/bench/torchrun_loop.py --recipe FILE --out FILE

Writes the history of the run like metrics.jsonl of the jobs, one JSON object per line.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.bench.inputs import synthetic_training
from jobs.runtime.commandline import run
from mmcore.captioners.cross_attention import CrossAttentionCaptionerRecipe
from mmcore.flags import read_settings
from mmcore.recipe import recipe_from_json
from mmcore.training import RunHooks, Training, write_history


@dataclass(frozen=True)
class Loop:
    """Settings of one run."""

    recipe: Path
    """JSON file of the recipe, from `mmcore.recipe.recipe_to_json`."""
    out: Path
    """File for the history."""
    num_train: int = 256
    """Images to train on, held in memory."""
    num_threads: int = 1
    """CPU threads per worker."""


def main() -> None:
    loop = read_settings(Loop, __doc__, "torchrun jobs/bench/torchrun_loop.py")
    torch.set_num_threads(loop.num_threads)
    recipe = recipe_from_json(CrossAttentionCaptionerRecipe, json.loads(loop.recipe.read_text()), str(loop.recipe))
    model, rows = synthetic_training(recipe, loop.num_train)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(model, rows, recipe.train, RunHooks(), workdir=Path(folder))
        training.run()
    if training.rank == 0:
        loop.out.write_bytes(write_history(training.state.history))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
