"""Inputs of the benchmarks: synthetic images and captions of Flickr8k's lengths, or prepared real data.

Shapes: B images, P pixels a side, L image tokens, E channels of the encoder.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from mmcore.captioners.caption_rows import CaptionRows
from mmcore.captioners.cross_attention import CrossAttentionCaptioner, CrossAttentionCaptionerRecipe
from mmcore.captioners.facts import CaptionerFacts
from mmcore.data.columns import Column
from mmcore.data.prepared import TRAIN, VALIDATION, CaptionTable
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.text import WordVocabulary

CAPTIONS_PER_IMAGE = 5

# Number of captions with 1, 2, 3, ... words among the 40,455 captions of Flickr8k's captions.txt. Words are split at
# white space, and the final full stop is a word. The mean is 11.78.
NUM_CAPTIONS_BY_WORDS = (
    *(2, 15, 47, 238, 556, 1316, 2711, 3445, 3863, 4307, 4363, 4079, 3649, 3049, 2459, 1791, 1352, 956, 728, 496),
    *(329, 189, 178, 112, 66, 60, 30, 23, 11, 11, 9, 6, 3, 4, 1, 0, 0, 1),
)

# Vocabulary size of each variant for the prepared captions, including the four special tokens.
NUM_VOCABULARY = {"report": 2366, "best": 2764}

# Channels of the last feature map of ResNet-18, and its tokens at 224 pixels.
ENCODER_WIDTH, IMAGE_TOKENS = 512, 49


def tiny(recipe: CrossAttentionCaptionerRecipe) -> CrossAttentionCaptionerRecipe:
    """The recipe with tiny sizes, to test a benchmark."""
    return dataclasses.replace(recipe, width=32, num_layers=2, num_heads=2, ffn_width=64, image_size=64)


def synthetic_vocabulary(num_entries: int, lowercase: bool) -> WordVocabulary:
    empty = WordVocabulary((), lowercase)
    return WordVocabulary(tuple(f"w{index}" for index in range(num_entries - len(empty))), lowercase)


def caption_lengths(num_captions: int, seed: int) -> np.ndarray:
    """Random caption lengths in words, with the distribution of Flickr8k: int64 (num_captions,)."""
    counts = np.array(NUM_CAPTIONS_BY_WORDS, dtype=np.float64)
    generator = np.random.default_rng(derive_seed(seed, "lengths"))
    return generator.choice(np.arange(1, len(counts) + 1), num_captions, p=counts / counts.sum())


def caption_table(captions: list[list[str]], num_validation: int) -> CaptionTable:
    """A dataset with `captions` of each image. The last `num_validation` images are for validation."""
    names = [f"image-{index:06d}" for index in range(len(captions))]
    splits = [TRAIN] * (len(captions) - num_validation) + [VALIDATION] * num_validation
    return CaptionTable(names, names, captions, splits, {})


def synthetic_captions(vocabulary: WordVocabulary, num_images: int, seed: int) -> list[list[str]]:
    """Five captions of random words per image."""
    lengths = caption_lengths(num_images * CAPTIONS_PER_IMAGE, seed).reshape(num_images, CAPTIONS_PER_IMAGE)
    generator = np.random.default_rng(derive_seed(seed, "words"))
    words = np.array(vocabulary.words)
    return [[" ".join(generator.choice(words, length)) for length in row] for row in lengths]


def synthetic_pixels(num_images: int, image_size: int, seed: int) -> np.ndarray:
    """uint8 (B, P, P, 3)"""
    generator = np.random.default_rng(derive_seed(seed, "pixels"))
    return generator.integers(0, 256, (num_images, image_size, image_size, 3), dtype=np.uint8)


def prepared_images(storage: Storage, dataset: str, num_images: int) -> tuple[list[bytes], list[str], list[list[str]]]:
    """The first images of a prepared dataset: encoded bytes, file names, captions."""
    filesystem, path = (storage / "data" / dataset).arrow()
    data, names, captions = [], [], []
    for name in (storage / "data" / dataset).list(".parquet"):
        columns = ["image", "file_name", "captions"]
        for batch in pq.ParquetFile(f"{path}/{name}", filesystem=filesystem).iter_batches(64, columns=columns):
            data += batch["image"].to_pylist()
            names += batch["file_name"].to_pylist()
            captions += batch["captions"].to_pylist()
            if len(data) >= num_images:
                return data[:num_images], names[:num_images], captions[:num_images]
    return data, names, captions


def prepared_pixels(data: list[bytes], names: list[str], image_size: int) -> np.ndarray:
    return pixels_from_bytes(data, image_size, names)


def write_random_resnet18(folder: Path) -> None:
    """Write a Hugging Face folder of ResNet-18 with random weights, the report's encoder without a download.

    It takes the same time as the trained one.
    """
    from transformers import AutoModel, ResNetConfig

    torch.manual_seed(0)
    sizes = [64, 128, 256, ENCODER_WIDTH]
    config = ResNetConfig(embedding_size=64, hidden_sizes=sizes, depths=[2, 2, 2, 2], layer_type="basic")
    AutoModel.from_config(config, trust_remote_code=False).save_pretrained(folder)


def encode(encoder: Callable[[Any], torch.Tensor], values: Any, batch_size: int = 32) -> np.ndarray:
    """Outputs of a frozen `encoder` for pixels or ids (B, ...), in fp16 like its cache."""
    parts = [encoder(values[i : i + batch_size]).half().cpu().numpy() for i in range(0, len(values), batch_size)]
    return np.concatenate(parts)


def caption_rows(
    recipe: CrossAttentionCaptionerRecipe, vocabulary: WordVocabulary, table: CaptionTable, features: np.ndarray
) -> CaptionRows:
    """Training rows over `features` in memory. The mirrored view is the same array, as it takes the same time."""
    column = Column(tuple(table.image_ids), features)
    return CaptionRows(
        table,
        [column] * (2 if recipe.flip else 1),
        vocabulary,
        captions_per_image=recipe.captions_per_image,
        max_length=recipe.max_length,
        seed=recipe.train.seed,
    )


def synthetic_training(
    recipe: CrossAttentionCaptionerRecipe, num_train: int
) -> tuple[CrossAttentionCaptioner, CaptionRows]:
    """A model and rows in memory, equal on every worker: random image tokens of ResNet-18's shape, random captions."""
    seed = recipe.train.seed
    vocabulary = synthetic_vocabulary(NUM_VOCABULARY["best"], recipe.lowercase)
    num_images = num_train + recipe.train.batch_size
    captions = synthetic_captions(vocabulary, num_images, seed)
    num_tokens = (recipe.image_size // 32) ** 2
    generator = np.random.default_rng(derive_seed(seed, "features"))
    features = generator.standard_normal((num_images, num_tokens, ENCODER_WIDTH), dtype=np.float32).astype(np.float16)
    rows = caption_rows(recipe, vocabulary, caption_table(captions, recipe.train.batch_size), features)
    torch.manual_seed(derive_seed(seed, "weights"))
    return recipe.build(CaptionerFacts(vocabulary.token_ids, num_tokens, ENCODER_WIDTH)), rows
