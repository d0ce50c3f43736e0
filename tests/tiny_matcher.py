"""Finished runs of untrained models that compare images and texts, on the data of `tiny.write_dataset`."""

import dataclasses
from pathlib import Path
from typing import Any

import tiny
import torch

from mmcore import checkpoint
from mmcore.captioners import contrastive, qformer_captioner
from mmcore.captioners.facts import CaptionerFacts, ContrastiveFacts
from mmcore.run_files import TOKENIZER_ASSET, RunFile, write_model
from mmcore.storage import Storage
from mmcore.text import WordVocabulary

WORDS = WordVocabulary.build(
    [text for row in range(40) for text in tiny.captions_of(row)], min_count=1, lowercase=False
)


def write_pair(folder: Path) -> str:
    """A run of a contrastive pair."""
    recipe = dataclasses.replace(contrastive.VARIANTS["smoke"], image_size=32, max_length=16)
    torch.manual_seed(0)
    facts = ContrastiveFacts(WORDS.token_ids, 4, 8)
    return _write(folder, "clip", recipe, facts, recipe.build(facts))


def write_qformer(folder: Path) -> str:
    """A run of a Q-Former. Its weights are larger than at the start, where all pairs are nearly alike.

    The bias puts the probabilities of the pairs on either side of 1/2.
    """
    recipe = dataclasses.replace(qformer_captioner.VARIANTS["smoke"], image_size=32, max_length=16)
    torch.manual_seed(0)
    facts = recipe.complete(CaptionerFacts(WORDS.token_ids, 16, recipe.width))
    model = recipe.build(facts)
    with torch.no_grad():
        for part in (model.qformer, model.heads):
            for name, weight in part.named_parameters():
                if "norm" not in name:
                    weight.mul_(4)
        model.heads.itm_head.bias.copy_(torch.tensor([-1.45, 1.45]))
    return _write(folder, "qformer", recipe, facts, model)


def _write(folder: Path, name: str, recipe: Any, facts: Any, model: torch.nn.Module) -> str:
    run = Storage(str(folder / "runs" / name / "tiny"))
    for file, data in WORDS.files().items():
        (run / "model" / TOKENIZER_ASSET).write(file, data)
    write_model(run, checkpoint.trainable_state(model), RunFile(name, "smoke", recipe, facts, ""))
    return run.uri
