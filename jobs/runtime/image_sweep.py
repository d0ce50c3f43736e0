"""The worker of a sweep of images: generates one block after another, and writes each image once."""

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, TypedDict

import numpy as np
import pyarrow as pa
import torch

from jobs.runtime.blocks import Columns
from mmcore.data.manifest import BLOCK, IMAGES, manifest_table
from mmcore.data.parquet import NUM_IO_THREADS
from mmcore.data.prompts import Prompt
from mmcore.device import device_name
from mmcore.errors import InputError
from mmcore.images import decode_image, png_bytes, read_png_text
from mmcore.recipe import Generator
from mmcore.storage import Storage
from mmcore.trained.generator import open_generator

# The text chunks of an image that say what it is of; `commit` stands beside them and may change between resumes.
COMMIT: Final = "commit"

# An image that is found under its key is adopted if it is near enough to the one made again. Both limits hold on a CPU:
# of the mean difference, in 255ths, and of the share of values that differ by more than one step.
# One CPU repeats itself to the bit. Another kind of CPU rounds otherwise, by a step at most: without AVX2, one of 24
# images of a VQ-VAE of 32² differed so. The second limit is therefore 0. It is larger where the last bit of a latent
# decides a code and with it a patch. Between images of two prompts at least 72 % of the values differed by more.
# A GPU's kernels add in another order, so that the mean alone counts there.
# Of 8,192 codes that a Transformer drew, none differed. One that differs changes those after it: the image is refused.
_ADOPT_MEAN, _ADOPT_PATCHES = 2.0, 0.25
# Of the prompts of a block that are longer than the text encoder reads, so many are named, and of the unknown words.
_NUM_NAMED = 3


class WorkerFacts(TypedDict):
    """What a worker is and runs on, and how many seconds it loaded and warmed up."""

    worker: str
    commit: str
    load_s: float
    warmup_s: float
    dtype: str
    device: str
    max_tokens: int
    negative_prompt_is_cut: bool


class PromptsCut(TypedDict):
    """How many prompts of a block are longer than the text encoder reads, and the first of them."""

    num_prompts_cut: int
    prompts_cut: list[str]


class UnknownWords(TypedDict):
    """How many prompts of a block have words that the text encoder does not know, and some of these words."""

    num_prompts_unknown: int
    unknown_words: list[str]


class BlockFacts(WorkerFacts, PromptsCut, UnknownWords):
    """What the manifest says of a block: of its worker, and when it was begun and ended (seconds since 1970)."""

    began: float
    ended: float


@dataclass(frozen=True)
class ImageSettings:
    """What decides an image beside its prompt and seed, and what is said of it."""

    options: Any
    """Of the generator."""
    size: tuple[int, int]
    """Height and width of the images whose prompts give none."""
    batch_size: int
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    run: str
    commit: str

    def text(self, prompt: Prompt) -> dict[str, str]:
        """The text chunks of the image of `prompt`."""
        options = {
            name: str(value) for name, value in dataclasses.asdict(self.options).items() if value not in ("", None)
        }
        return {"prompt": prompt.prompt, "seed": str(prompt.seed), **options, "run": self.run, COMMIT: self.commit}

    def size_of(self, prompt: Prompt) -> tuple[int, int]:
        return prompt.size or self.size


@dataclass(frozen=True)
class Generated:
    """The images of one block, each uint8 (H, W, 3), the seconds that each took, and when the block was begun (seconds
    since 1970)."""

    prompts: list[Prompt]
    images: list[np.ndarray]
    seconds: list[float]
    began: float


class GenerateImages:
    """Holds the generator on a worker: a call generates one block, beside which `write` writes the one before."""

    open = staticmethod(open_generator)

    def __init__(self, generator: Generator, out: Storage, image_settings: ImageSettings) -> None:
        self.out, self.settings = out, image_settings
        start = time.perf_counter()
        self.generator = generator.load(image_settings.device, getattr(torch, image_settings.dtype))
        loaded = time.perf_counter()
        # Of the full batch, as kernels are chosen and memory is taken by its shape.
        warm_up = [Prompt("", "", 0)] * image_settings.batch_size
        self.generate(warm_up, image_settings.size, image_settings.options.shortened())
        negative_prompt = getattr(image_settings.options, "negative_prompt", "")
        self.facts: WorkerFacts = {
            "worker": uuid.uuid4().hex,
            COMMIT: image_settings.commit,
            "load_s": loaded - start,
            "warmup_s": time.perf_counter() - loaded,
            "dtype": image_settings.dtype,
            "device": device_name(image_settings.device),
            "max_tokens": self.generator.max_tokens,
            "negative_prompt_is_cut": self.generator.num_tokens([negative_prompt])[0] > self.generator.max_tokens,
        }
        self.has_told = False
        self.writers = ThreadPoolExecutor(NUM_IO_THREADS)

    def generate(self, prompts: Sequence[Prompt], size: tuple[int, int], options: Any) -> np.ndarray:
        """uint8 (B, H, W, 3) of at most a batch; fewer are filled up to one, so that every image is made alike."""
        batch_size = self.settings.batch_size
        batch = [*prompts, *[prompts[-1]] * (batch_size - len(prompts))]
        texts, seeds = [each.prompt for each in batch], [each.seed for each in batch]
        try:
            return self.generator.generate(texts, seeds, options, size=size)[: len(prompts)]
        except torch.OutOfMemoryError:
            raise InputError(
                f"--batch-size {batch_size}: the GPU's memory is too small for it; give a smaller one and another --out"
            ) from None

    def __call__(self, rows: Columns) -> Generated:
        prompts = [Prompt(**dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        settings, began = self.settings, time.time()
        made: dict[int, tuple[np.ndarray, float]] = {}
        by_size: dict[tuple[int, int], list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_size.setdefault(settings.size_of(prompt), []).append(row)
        for size, of_size in by_size.items():
            for at in range(0, len(of_size), settings.batch_size):
                batch, start = of_size[at : at + settings.batch_size], time.perf_counter()
                images = self.generate([prompts[row] for row in batch], size, settings.options)
                seconds = (time.perf_counter() - start) / len(batch)
                made |= {row: (image, seconds) for row, image in zip(batch, images, strict=True)}
        images, seconds = zip(*(made[row] for row in range(len(prompts))), strict=True)
        return Generated(prompts, list(images), list(seconds), began)

    def write(self, made: Generated) -> pa.Table:
        """Write the images; returns their rows of the manifest."""
        prompts, settings = made.prompts, self.settings
        digests = list(self.writers.map(self.put, prompts, made.images))
        table = manifest_table(
            image_id=[each.image_id for each in prompts],
            key=[image_key(each) for each in prompts],
            sha256=digests,
            prompt=[each.prompt for each in prompts],
            seed=[each.seed for each in prompts],
            sizes=[image.shape[:2] for image in made.images],
            options=settings.options,
            dtype=self.facts["dtype"],
            device=self.facts["device"],
            seconds=made.seconds,
        )
        facts: BlockFacts = {
            **self.facts,
            **self._cut(prompts),
            **self._unknown(prompts),
            "began": made.began,
            "ended": time.time(),
        }
        return table.replace_schema_metadata({BLOCK: json.dumps(facts)})

    def _cut(self, prompts: list[Prompt]) -> PromptsCut:
        """How many prompts are longer than the text encoder reads, and some of them; the first of all is told."""
        most = self.generator.max_tokens
        lengths = self.generator.num_tokens([each.prompt for each in prompts])
        cut = [(each.image_id, length) for each, length in zip(prompts, lengths, strict=True) if length > most]
        if cut and not self.has_told:
            self.has_told = True
            print(
                f"generate: the prompt of {cut[0][0]} has {cut[0][1]} tokens; its end beyond {most} is not read",
                flush=True,
            )
        return {"num_prompts_cut": len(cut), "prompts_cut": [image_id for image_id, _ in cut[:_NUM_NAMED]]}

    def _unknown(self, prompts: list[Prompt]) -> UnknownWords:
        words = self.generator.unknown_words([each.prompt for each in prompts])
        return {
            "num_prompts_unknown": sum(map(bool, words)),
            "unknown_words": sorted({word for each in words for word in each})[:_NUM_NAMED],
        }

    def put(self, prompt: Prompt, image: np.ndarray) -> str:
        """Create the image's object, or adopt the one that a run before this one left there; returns its SHA-256."""
        text, key = self.settings.text(prompt), image_key(prompt)
        data = png_bytes(image, text)
        if not self.out.create(key, data):
            there = self.out.read(key)
            if there != data:
                self._check_same(f"{self.out}/{key}", there, image, text)
            data = there
        return hashlib.sha256(data).hexdigest()

    def _check_same(self, place: str, there: bytes, image: np.ndarray, text: dict[str, str]) -> None:
        """Raise InputError unless the PNG `there` has this text and nearly these pixels."""
        pixels = np.asarray(decode_image(there, name=place))
        reason = _text_difference(read_png_text(there, name=place), text) or self._pixel_difference(pixels, image)
        if reason:
            raise InputError(f"{place}: another image is there already: {reason}; remove it, or give another --out")

    def _pixel_difference(self, found: np.ndarray, made: np.ndarray) -> str | None:
        """What tells one image from the other; None where they are near enough."""
        if found.shape != made.shape:
            return f"it is {found.shape[1]} x {found.shape[0]} pixels and not {made.shape[1]} x {made.shape[0]}"
        difference = np.abs(found.astype(np.int16) - made)
        largest, mean, share = int(difference.max()), float(difference.mean()), float((difference > 1).mean())
        most = _ADOPT_PATCHES if self.generator.decides_by_code else 0.0
        if mean <= _ADOPT_MEAN and (self.settings.device == "cuda" or share <= most):
            return None
        return f"its pixels differ by {mean:.3g} of 255 in the mean and {largest} at most"


def _text_difference(found: dict[str, str], wanted: dict[str, str]) -> str | None:
    """The first text chunk that differs; the commit may."""
    for name in sorted({*found, *wanted} - {COMMIT}):
        if found.get(name) != wanted.get(name):
            return f"{name} is {found.get(name)!r} and not {wanted.get(name)!r}"
    return None


def image_key(prompt: Prompt) -> str:
    return f"{IMAGES}/{prompt.image_id}.png"
