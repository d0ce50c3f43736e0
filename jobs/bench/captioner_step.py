#!/usr/bin/env python
"""Measures trained captions per second: our training loop against the report's, for the same decoder.

Command: python jobs/bench/captioner_step.py              (idle machine; 2 CPU cores: about 3 minutes)
Target: a ratio of at least 10 with the report's sizes. The sizes of `best` are measured too.

Ours is `mmcore.training.Training`, the loop of jobs/train_resnet_captioner.py. It reads image tokens from the cache of
the frozen encoder. The five captions of an image share its tokens. Words are packed without padding. It uses bf16 if
the device supports it, and a fused optimiser. Each variant has its own schedule, gradient clipping and EMA.

The report's loop runs the frozen encoder in every step, in fp32. A step has 24 images with one caption each, padded to
50 tokens. It trains `torch.nn.TransformerDecoder` of the same sizes in a plain loop with Adam. Its images are decoded
in advance. The report also reads and decodes JPEGs in every step; that time is not counted.

Encoding once is a part of our training. `ratio_with_encoding` includes its time, divided by the variant's number of
epochs. `best` encodes each image twice, as it is and mirrored. The time is measured in the same run.

By default the data are synthetic: ResNet-18 with random weights, random pixels, random words, and captions of
Flickr8k's lengths. For real data give --storage URI (data of `jobs/prepare.py`) and --encoder FOLDER (a vision model).
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from jobs.bench import inputs
from jobs.bench.report_way import MAX_LENGTH, ReportCaptioner
from jobs.bench.timing import clock, publish, ratio_with_encoding, training_in_turn, verdict
from jobs.runtime.commandline import run
from mmcore.captioners.caption_rows import CaptionRows
from mmcore.captioners.cross_attention import VARIANTS, CrossAttentionCaptionerRecipe
from mmcore.captioners.facts import CaptionerFacts
from mmcore.data.prepared import read_captions
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.frozen.vision import FrozenVisionEncoder
from mmcore.seeding import permutation
from mmcore.storage import Storage
from mmcore.text import PAD_ID, WordVocabulary

TARGET = 10.0
Variant = Literal["report", "best"]


@dataclass(frozen=True)
class TrainBench:
    """Settings of the benchmark."""

    variants: tuple[Variant, ...] = ("report", "best")
    """Variants to measure. The target is for `report`."""
    pairs: int = 6
    """Number of pairs: a block of our steps and a block of the report's."""
    our_steps: int = 8
    """Steps per block of our loop."""
    report_steps: int = 3
    """Steps per block of the report's loop."""
    warmup_steps: int = 3
    """Steps of each loop before the first block."""
    our_batch: int = 32
    """Images per step of our loop, with five captions each."""
    report_batch: int = 24
    """Images per step of the report's loop, with one caption each."""
    num_images: int = 256
    """Images to draw from. They do not affect the time."""
    storage: str | None = None
    """Storage with prepared real data, instead of synthetic data."""
    encoder: str | None = None
    """Name or folder of a frozen vision encoder, instead of ResNet-18 with random weights."""
    smoke: bool = False
    """Use tiny sizes, to test the script. The figures then mean nothing."""


@dataclass(frozen=True)
class Data:
    """Images in memory, decoded and encoded, with five captions each."""

    pixels: np.ndarray  # uint8 (B, P, P, 3)
    features: np.ndarray  # fp16 (B, L, E)
    captions: list[list[str]]
    vocabulary: WordVocabulary
    encode_seconds: float  # of one image


def load_data(
    bench: TrainBench, recipe: CrossAttentionCaptionerRecipe, num_words: int, encoder: FrozenVisionEncoder
) -> Data:
    seed = recipe.train.seed
    if bench.storage is None:
        vocabulary = inputs.synthetic_vocabulary(num_words, recipe.lowercase)
        captions = inputs.synthetic_captions(vocabulary, bench.num_images, seed)
        pixels = inputs.synthetic_pixels(bench.num_images, recipe.image_size, seed)
    else:
        storage = Storage(bench.storage)
        words = recipe.build_tokenizer(read_captions(storage, recipe.dataset, recipe.split))
        assert isinstance(words, WordVocabulary)
        vocabulary = words
        data, names, captions = inputs.prepared_images(storage, recipe.dataset, bench.num_images)
        pixels = inputs.prepared_pixels(data, names, recipe.image_size)
    inputs.encode(encoder, pixels[: bench.our_batch])  # warm-up
    started = clock()
    features = inputs.encode(encoder, pixels)
    return Data(pixels, features, captions, vocabulary, (clock() - started) / len(pixels))


class ReportTraining:
    """The report's loop: each step encodes images, pads captions, and updates with PyTorch's default Adam."""

    def __init__(
        self, recipe: CrossAttentionCaptionerRecipe, data: Data, encoder: FrozenVisionEncoder, batch: int
    ) -> None:
        self.data, self.encoder, self.batch, self.device = data, encoder, batch, encoder.device
        torch.manual_seed(recipe.train.seed)
        model = ReportCaptioner(recipe, len(data.vocabulary), data.features.shape[-1])
        self.model = model.to(self.device).train()
        train = recipe.train
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay)
        self.input_ids = torch.full((len(data.captions), MAX_LENGTH), PAD_ID)
        for row, captions in enumerate(data.captions):
            ids = data.vocabulary.encode(captions[0], MAX_LENGTH)
            self.input_ids[row, : len(ids)] = torch.tensor(ids)
        self.step = 0

    def captions_per_s(self, num_steps: int) -> float:
        started = clock()
        for _ in range(num_steps):
            rows = permutation(len(self.input_ids), 0, self.step)[: self.batch]
            # A clone, as autograd does not accept tensors made in inference mode.
            tokens_BLE = self.encoder(self.data.pixels[rows]).clone()
            loss = self.model.loss(tokens_BLE, self.input_ids[torch.from_numpy(rows)].to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            loss.item()
            self.step += 1
        return num_steps * self.batch / (clock() - started)


def measure_variant(bench: TrainBench, variant: Variant, encoder: FrozenVisionEncoder) -> dict[str, Any]:
    """Measure both loops with the sizes of `variant`."""
    published = VARIANTS[variant]
    recipe = dataclasses.replace(
        inputs.tiny(published) if bench.smoke else published,
        captions_per_image=inputs.CAPTIONS_PER_IMAGE,
        train=dataclasses.replace(published.train, batch_size=bench.our_batch),
    )
    data = load_data(bench, recipe, inputs.NUM_VOCABULARY[variant], encoder)
    report = ReportTraining(recipe, data, encoder, bench.report_batch)
    report.captions_per_s(bench.warmup_steps)
    rows: CaptionRows = inputs.caption_rows(
        recipe, data.vocabulary, inputs.caption_table(data.captions, bench.our_batch), data.features
    )
    torch.manual_seed(recipe.train.seed)
    model = recipe.build(CaptionerFacts(data.vocabulary.token_ids, *data.features.shape[1:]))
    figures = training_in_turn(
        variant,
        "captions/s",
        (model, rows, recipe.train),
        lambda: report.captions_per_s(bench.report_steps),
        pairs=bench.pairs,
        our_steps=bench.our_steps,
        warmup_steps=bench.warmup_steps,
        items_per_step=bench.our_batch * recipe.captions_per_image,
    )
    views = 2 if recipe.flip else 1
    encode_seconds = views * data.encode_seconds / (published.train.num_epochs * recipe.captions_per_image)
    return figures | {
        "ratio_with_encoding": ratio_with_encoding(figures, encode_seconds),
        "encoded_images_per_s": round(1 / data.encode_seconds, 2),
        "words_per_caption": round(float(np.mean([len(c.split()) for row in data.captions for c in row])), 2),
        "vocabulary": len(data.vocabulary),
        "parameters": {
            "ours": sum(p.numel() for p in model.parameters()),
            "report": sum(p.numel() for p in report.model.parameters()),
        },
    }


def measure(bench: TrainBench) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if bench.encoder is None:
            inputs.write_random_resnet18(Path(folder))
        image_size = inputs.tiny(VARIANTS["report"]).image_size if bench.smoke else VARIANTS["report"].image_size
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = FrozenVisionEncoder(bench.encoder or folder, image_size, device)
    figures: dict[str, Any] = {variant: measure_variant(bench, variant, encoder) for variant in bench.variants}
    if "report" not in figures:
        return figures
    return verdict("target", figures["report"]["ratio"]["median"] >= TARGET, TARGET, bench.smoke) | figures


def main() -> None:
    bench = read_settings(TrainBench, __doc__, "python jobs/bench/captioner_step.py")
    if bench.storage is not None and bench.encoder is None:
        raise InputError("--storage needs an encoder for its images; give --encoder FOLDER too")
    if bench.num_images < 2 * bench.our_batch:
        raise InputError(f"--num-images {bench.num_images}: at least twice --our-batch {bench.our_batch} are needed")
    publish("train_captioner", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
