#!/usr/bin/env python
"""Measures decoded captions per second: greedy decoding with a cache against decoding without, for the same weights.

Command: python jobs/bench/decode_captions.py              (idle machine; 2 CPU cores: about 3 minutes)
Target: a ratio of at least 20 with the report's sizes. All captions must be equal up to the first end token.

Ours is `mmcore.captioners.decoding.greedy`, as in jobs/caption.py. Keys and values are cached. Finished captions leave
the batch, and the batch ends with its longest caption.

The report's decoding runs `torch.nn.TransformerDecoder` on the whole prefix in each of 50 steps, also after the end
token. Both use the same weights, batches, limit of 50 words, and fp32. Both start from image tokens, so the encoder's
time is not counted.

Weights affect the speed only by the lengths of the captions. Without --run the weights are random, except for the row
of the end token in the output layer. That row is fitted by least squares, so that caption lengths follow Flickr8k's.
Each image has a random wanted length, which its tokens contain. The lengths that result are printed. Captions of a
trained captioner vary less in length, so our batches would end earlier.

For a trained run: --run STORAGE/runs/resnet_captioner/NAME --storage URI [--encoder FOLDER]
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.bench import inputs
from jobs.bench.report_way import MAX_LENGTH, ReportCaptioner
from jobs.bench.timing import clock, interleaved, publish, say, verdict
from jobs.runtime.commandline import run
from mmcore.captioners.caption_decoder import CaptionDecoder
from mmcore.captioners.cross_attention import (
    VARIANTS,
    CrossAttentionCaptioner,
    CrossAttentionCaptionerRecipe,
)
from mmcore.captioners.decoding import greedy
from mmcore.captioners.facts import CaptionerFacts
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.seeding import derive_seed, generator
from mmcore.storage import Storage
from mmcore.text import BOS_ID, EOS_ID, PAD_ID, UNK_ID, TokenIds
from mmcore.trained.captioner import open_captioner

TARGET = 20.0
# Increase of the end token's logit per word, and the distance in words from the wanted end within which the fit has to
# be accurate. The best logit of other words varies by some tenths. With 4 and 4, 128 captions end 0.1 words off on
# average.
_END_SLOPE, _END_NEAR = 4.0, 4.0
# If the logits of two words are closer than this, rounding may choose either word.
_TIE = 1e-3


@dataclass(frozen=True)
class DecodeBench:
    """Settings of the benchmark."""

    run: str | None = None
    """Finished run of the captioner, instead of the report's sizes with random weights."""
    storage: str | None = None
    """Storage with prepared data. With --run, the first images of its dataset are captioned."""
    encoder: str | None = None
    """Name or folder of the run's frozen encoder, if it differs from the one in recipe.json."""
    pairs: int = 5
    """Number of pairs: one pass of each decoding over all images."""
    num_images: int = 64
    """Images per pass."""
    batch_size: int = 64
    """Images per batch, for both."""
    smoke: bool = False
    """Use tiny sizes, to test the script and that captions are equal. The figures then mean nothing."""


@torch.inference_mode()
def fit_lengths(decoder: CaptionDecoder, memory_BLD: Tensor, lengths_B: Tensor, token_ids: TokenIds) -> None:
    """Set the end token's row of the output layer so that greedy captions end after about `lengths_B` words.

    The row is a weighted least-squares fit of "words so far minus wanted words" to the decoder's last hidden states.
    The hidden states are those of the captions without an end. The words before the end do not depend on the row.
    """
    hidden: list[Tensor] = []
    highest: list[Tensor] = []

    def watch(module: torch.nn.Module, arguments: tuple[Tensor], logits_BV: Tensor) -> None:
        hidden.append(arguments[0].double())
        highest.append(logits_BV[:, UNK_ID + 1 :].max(dim=-1).values.double())

    decoder.output.bias[EOS_ID] = -torch.inf
    decoder.output.weight[EOS_ID] = 0.0
    handle = decoder.output.register_forward_hook(watch)
    greedy(decoder, memory_BLD, MAX_LENGTH, token_ids)
    handle.remove()
    x_TBD, highest_TB = torch.stack(hidden), torch.stack(highest)
    words_T1 = torch.arange(MAX_LENGTH, device=x_TBD.device, dtype=torch.float64)[:, None]
    # The end token's logit exceeds the others half a word before the wanted end.
    past_TB = words_T1 - lengths_B + 0.5
    # Far from the end only the sign matters, so the weight is small there.
    weight_X1 = (torch.exp(-((past_TB / _END_NEAR) ** 2)) + 1e-3).flatten()[:, None]
    inputs_XD = torch.cat([x_TBD, torch.ones_like(x_TBD[..., :1])], dim=-1).flatten(0, 1)
    wanted_X1 = (highest_TB + _END_SLOPE * past_TB).flatten()[:, None]
    # Solve the normal equations with a small ridge term for stability.
    gram_DD = inputs_XD.T @ (weight_X1 * inputs_XD)
    gram_DD.diagonal().add_(1e-6 * gram_DD.diagonal().mean())
    row_D = torch.linalg.solve(gram_DD, inputs_XD.T @ (weight_X1 * wanted_X1)).squeeze(1)
    decoder.output.weight[EOS_ID] = row_D[:-1].to(decoder.output.weight.dtype)
    decoder.output.bias[EOS_ID] = row_D[-1].to(decoder.output.weight.dtype)


def synthetic_model(
    bench: DecodeBench, recipe: CrossAttentionCaptionerRecipe, device: str
) -> tuple[CrossAttentionCaptioner, Tensor]:
    """The report's sizes with random weights, and image tokens (B, L, D) that contain the wanted caption length."""
    seed = recipe.train.seed
    torch.manual_seed(derive_seed(seed, "weights"))
    vocabulary = inputs.synthetic_vocabulary(inputs.NUM_VOCABULARY["report"], recipe.lowercase)
    facts = CaptionerFacts(vocabulary.token_ids, inputs.IMAGE_TOKENS, inputs.ENCODER_WIDTH)
    model = recipe.build(facts).eval().to(device)
    lengths_B = torch.from_numpy(inputs.caption_lengths(bench.num_images, seed)).to(device)
    shape = (bench.num_images, inputs.IMAGE_TOKENS, inputs.ENCODER_WIDTH)
    tokens_BLE = torch.randn(shape, generator=generator(seed, "tokens")).to(device)
    direction_E = torch.randn(inputs.ENCODER_WIDTH, generator=generator(seed, "direction")).to(device)
    scaled_B = (lengths_B - lengths_B.double().mean()) / lengths_B.double().std()
    with torch.inference_mode():
        memory_BLD = model.memory(tokens_BLE + scaled_B.float()[:, None, None] * direction_E)
    fit_lengths(model.decoder, memory_BLD, lengths_B, model.token_ids)
    return model, memory_BLD


def trained_model(bench: DecodeBench, run: str, storage: str, device: str) -> tuple[CrossAttentionCaptioner, Tensor]:
    """The trained model, and the projected tokens (B, L, D) of the first images of its dataset."""
    captioner: Any = open_captioner(run, encoder=bench.encoder).load(device)
    model = captioner.model
    data, names, _ = inputs.prepared_images(Storage(storage), captioner.recipe.dataset, bench.num_images)
    pixels = inputs.prepared_pixels(data, names, captioner.recipe.image_size)
    parts = []
    for start in range(0, len(pixels), bench.batch_size):
        part = pixels[start : start + bench.batch_size]
        images = torch.from_numpy(part).to(device) if captioner.encoder is None else captioner.encoder(part)
        with torch.inference_mode():
            parts.append(model.memory(images))
    return model, torch.cat(parts)


def up_to_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS_ID)] if EOS_ID in ids else ids


@torch.inference_mode()
def count_ties(report: ReportCaptioner, memory_BLD: Tensor, ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Number of captions that differ by rounding: at the first different word the two best logits are nearly equal.

    Raises RuntimeError for any other difference.
    """
    ties = 0
    for image, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine == other:
            continue
        differing = (place for place, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b)
        same = next(differing, min(len(mine), len(other)))
        prefix = torch.tensor([[BOS_ID, *mine[:same]]], device=memory_BLD.device)
        logits_V = report(prefix, memory_BLD[image : image + 1])[0, -1]
        logits_V[[PAD_ID, BOS_ID, UNK_ID]] = -torch.inf
        best, second = logits_V.topk(2).values.tolist()
        if best - second > _TIE:
            raise RuntimeError(f"image {image}: the captions differ from word {same + 1} on: {mine} and {other}")
        ties += 1
    return ties


def measure(bench: DecodeBench) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if bench.run is None:
        recipe = inputs.tiny(VARIANTS["report"]) if bench.smoke else VARIANTS["report"]
        model, memory_BLD = synthetic_model(bench, recipe, device)
    else:
        assert bench.storage is not None
        model, memory_BLD = trained_model(bench, bench.run, bench.storage, device)
    recipe = model.recipe
    report = ReportCaptioner(recipe, model.token_ids.size, 1).to(device).eval()
    report.load_decoder(model.decoder)
    batches = memory_BLD.split(bench.batch_size)
    max_length = min(MAX_LENGTH, recipe.max_length)
    captions: dict[str, list[list[int]]] = {}

    def ours() -> float:
        started = clock()
        captions["ours"] = [
            ids for batch in batches for ids in greedy(model.decoder, batch, max_length, model.token_ids)
        ]
        return len(memory_BLD) / (clock() - started)

    def theirs() -> float:
        started = clock()
        ids_by_batch = [report.greedy(batch, max_length).tolist() for batch in batches]
        seconds = clock() - started
        captions["report"] = [up_to_end(ids) for batch in ids_by_batch for ids in batch]
        return len(memory_BLD) / seconds

    say("warm-up")
    ours()
    report.greedy(batches[0], 5)
    figures = interleaved("captions/s", {"ours": ours, "report": theirs}, bench.pairs)
    ties = count_ties(report, memory_BLD, captions["ours"], captions["report"])
    lengths = np.array([len(ids) for ids in captions["ours"]])
    return (
        verdict("target", figures["ratio"]["median"] >= TARGET, TARGET, bench.smoke)
        | {
            "sizes": {name: getattr(recipe, name) for name in ("width", "num_layers", "num_heads", "ffn_width")},
            "vocabulary": model.token_ids.size,
            "max_length": max_length,
            "precision": "fp32",
            "captions": len(lengths),
            "captions_equal": len(lengths) - ties,
            "captions_that_differ_by_rounding": ties,
            "words_per_caption": {
                "mean": round(float(lengths.mean()), 2),
                "min": int(lengths.min()),
                "max": int(lengths.max()),
                "cut_at_max_length": int((lengths == max_length).sum()),
            },
        }
        | figures
    )


def main() -> None:
    bench = read_settings(DecodeBench, __doc__, "python jobs/bench/decode_captions.py")
    if bench.run is not None and bench.storage is None:
        raise InputError("--run needs images to caption; give --storage URI with prepared data too")
    if bench.run is None and (bench.storage or bench.encoder):
        raise InputError("--storage and --encoder have no effect without a trained run; give --run URI too")
    publish("decode_captions", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
