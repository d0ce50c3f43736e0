#!/usr/bin/env python
"""Measures captions per second of a language model: our search against ``generate`` of transformers.

Command: python jobs/bench/language_generation.py --run STORAGE/runs/qformer_llm/NAME --storage URI
         (idle machine; 2 CPU cores: 2 minutes, with five beams 5 minutes)
Target: a ratio of at least 1.5 at a batch of 16.

Both have the same weights, prompt, image tokens, ends and penalties, and both begin at the image tokens. Ours reads the
prompt once, and an image once for all of its beams. Captions that ended leave the batch. ``generate`` goes on until the
last caption of a batch has ended.

Ours also computes products by oneDNN where that stays in fp32 (`mmcore.device.fast_products`). `--same-products` gives
``generate`` those too.

Beams are compared without penalties. ``generate`` applies that of repetition to log-probabilities, ours to logits.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jobs.bench import inputs
from jobs.bench.timing import clock, interleaved, publish, say, verdict
from jobs.runtime.commandline import run
from mmcore.captioners.decoding import beam_search, greedy
from mmcore.captioners.search_options import LanguageSearchOptions
from mmcore.device import fast_products
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.frozen.caption_writer import CaptionWriter
from mmcore.frozen.language import SCRATCH, FrozenLanguageModel
from mmcore.seeding import generator
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from mmcore.trained.image_encoder import image_inputs

TARGET = 1.5


@dataclass(frozen=True)
class GenerationBench:
    """Settings of the benchmark."""

    run: str | None = None
    """Finished run of train_qformer_llm.py."""
    storage: str | None = None
    """Storage with prepared data. The first images of the run's dataset are captioned."""
    encoder: str | None = None
    """Name or folder of the run's frozen encoder, if it differs from the one in recipe.json."""
    pairs: int = 5
    """Number of pairs: one pass of each over all images."""
    num_images: int = 16
    """Images per pass."""
    batch_size: int = 16
    """Images per batch, for both."""
    num_beams: int = 1
    """Beams of the search; 1 is greedy."""
    same_products: bool = False
    """Let transformers compute its matrix products as ours does."""
    attention: Literal["eager", "sdpa"] = "eager"
    """Implementation of attention in transformers."""
    smoke: bool = False
    """Use a tiny model and random image tokens, to test the script. The figures then mean nothing."""


def measured(bench: GenerationBench) -> tuple[FrozenLanguageModel, str, Tensor]:
    """Language model, prompt and image tokens (B, Q, W)."""
    if bench.run is None or bench.storage is None:
        model = FrozenLanguageModel.from_name(SCRATCH)
        return model, "say:", torch.randn(bench.num_images, 4, model.width, generator=generator(0, "tokens"))
    captioner: Any = open_captioner(bench.run, encoder=bench.encoder).load()
    data, names, _ = inputs.prepared_images(Storage(bench.storage), captioner.recipe.dataset, bench.num_images)
    prompt, tokens = captioner.recipe.prompt, []
    for start in range(0, len(data), bench.batch_size):
        pixels = inputs.prepared_pixels(data[start : start + 16], names[start : start + 16], captioner.image_size)
        images = image_inputs(pixels, captioner.encoder, "cpu")
        with torch.inference_mode():
            tokens.append(captioner.model.image_tokens(images, prompt))
    return captioner.model.language_model, prompt, torch.cat(tokens)


def ours(
    model: FrozenLanguageModel, prompt: str, options: LanguageSearchOptions
) -> Callable[[Tensor], list[list[int]]]:
    """The search of `LanguageCaptioner.caption`."""

    def caption(image_BQW: Tensor) -> list[list[int]]:
        ids = model.prefix_ids(prompt)
        writer = CaptionWriter(model, ids, options.repetition_penalty)
        tokens = model.tokenizer.token_ids
        if options.num_beams == 1:
            return greedy(writer, image_BQW, options.max_length, tokens, closing_V=writer.closing_V)
        return beam_search(writer, image_BQW, options.max_length, tokens, options.num_beams, options.length_penalty)

    return torch.inference_mode()(caption)


def by_transformers(
    model: FrozenLanguageModel, prompt: str, options: LanguageSearchOptions, attention: str
) -> Callable[[Tensor], list[list[int]]]:
    """``generate`` with the same search, ends and silent tokens."""
    theirs = copy.deepcopy(model.model)
    theirs.set_attn_implementation(attention)
    tokens, closing = model.tokenizer.token_ids, set(model.tokenizer.sentence_end_ids())
    ends = {tokens.eos_id, *model.end_ids}
    unknown = range(tokens.size, theirs.config.vocab_size)
    embed = theirs.get_input_embeddings()

    def caption(image_BQW: Tensor) -> list[list[int]]:
        prefix_BPW = embed(torch.tensor(model.prefix_ids(prompt))).expand(len(image_BQW), -1, -1)
        embeddings = torch.cat([prefix_BPW, image_BQW], dim=1)
        made = theirs.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.long),
            max_new_tokens=options.max_length,
            num_beams=options.num_beams,
            length_penalty=options.length_penalty,
            do_sample=False,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=[*ends, *closing],
            suppress_tokens=[*(each for each in tokens.silent_ids if each not in ends), *unknown],
            pad_token_id=tokens.eos_id,
        )
        return [_up_to_end(row, ends, closing) for row in made.tolist()]

    return torch.inference_mode()(caption)


def _up_to_end(row: list[int], ends: set[int], closing: set[int]) -> list[int]:
    caption: list[int] = []
    for token in row:
        if token in ends:
            break
        caption.append(token)
        if token in closing:
            break
    return caption


def measure(bench: GenerationBench) -> dict[str, Any]:
    model, prompt, image_BQW = measured(bench)
    options = LanguageSearchOptions(num_beams=bench.num_beams)
    if bench.num_beams > 1:
        options = dataclasses.replace(options, repetition_penalty=1.0, length_penalty=0.0)
    ways = {
        "ours": ours(model, prompt, options),
        "transformers": by_transformers(model, prompt, options, bench.attention),
    }
    captions: dict[str, list[list[int]]] = {}

    def timed(name: str) -> float:
        wants = bench.same_products and name == "transformers"
        products = fast_products() if wants else contextlib.nullcontext()
        started = clock()
        with products:
            captions[name] = [ids for batch in image_BQW.split(bench.batch_size) for ids in ways[name](batch)]
        return len(image_BQW) / (clock() - started)

    say("warm-up")
    for name in ways:
        ways[name](image_BQW[: bench.batch_size])
    figures = interleaved("captions/s", {name: functools.partial(timed, name) for name in ways}, bench.pairs)
    equal = sum(mine == theirs for mine, theirs in zip(*captions.values(), strict=True))
    lengths = np.array([len(ids) for ids in captions["ours"]])
    return (
        verdict("target", figures["ratio"]["median"] >= TARGET, TARGET, bench.smoke)
        | {
            "prompt_tokens": len(model.prefix_ids(prompt)),
            "image_tokens": image_BQW.shape[1],
            "max_length": options.max_length,
            "captions": len(lengths),
            "captions_equal": equal,
        }
        | {"tokens_per_caption": {"mean": round(float(lengths.mean()), 2), "max": int(lengths.max())}}
        | figures
    )


def main() -> None:
    bench = read_settings(GenerationBench, __doc__, "python jobs/bench/language_generation.py")
    if not bench.smoke and (bench.run is None or bench.storage is None):
        raise InputError("--run and --storage are missing; give a finished run and the storage of its images")
    publish("language_generation", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
