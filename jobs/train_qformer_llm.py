#!/usr/bin/env python
"""Train a bridge from a frozen image encoder to a frozen language model, which writes the captions.

Paper: row 4 of the report's Table 1; BLIP-2 of Li et al. 2023, https://arxiv.org/abs/2301.12597

    python jobs/train_qformer_llm.py --variant best --storage URI --encoder NAME --language-model NAME

Hardware: any. `llava` trains LLaVA-1.5's projection instead of a Q-Former; --bridge has two more. `llava-lora` then
trains the language model too: its --bridge-weights names the run of `llava`.
"""

from jobs.runtime.captioner_training import train_captioner
from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.trainer import RunSummary
from mmcore.captioners.qformer_llm import VARIANTS, LanguageCaptionerRecipe


def train(job: Job[LanguageCaptionerRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_captioner(job)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
