"""Tiny language models with random weights, and the bytes of texts as their tokens."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from mmcore.frozen.language import FrozenLanguageModel
from mmcore.frozen.tokenizers import LineTokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Three more tokens than the tokenizer has: they are never to be written.
VOCABULARY = 262
WIDTH = 32


def tokenizer() -> LineTokenizer:
    return FrozenLanguageModel.from_name("scratch").tokenizer


def model_of(kind: str, seed: int = 0, num_positions: int = 128) -> Any:
    """A Llama with grouped heads, an OPT with learned positions, or a GPT-NeoX. Its weights are large."""
    torch.manual_seed(seed)
    marks = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    marks |= {"max_position_embeddings": num_positions, "initializer_range": 0.2}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, **marks, intermediate_size=48, num_key_value_heads=2)).eval()
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(**SIZES, **marks, ffn_dim=48, word_embed_proj_dim=WIDTH, init_std=0.2)).eval()
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **marks, intermediate_size=48)).eval()


def language_model(kind: str, seed: int = 0, **sizes: int) -> FrozenLanguageModel:
    return FrozenLanguageModel(model_of(kind, seed, **sizes), tokenizer(), kind)


def write(kind: str, folder: Path) -> str:
    """The model and its tokenizer as a folder of Hugging Face."""
    model_of(kind).save_pretrained(folder)
    tokenizer().tokenizer.save_pretrained(folder)
    return str(folder)


def batch_of(tokenizer: LineTokenizer, captions: list[list[str]], max_length: int = 40) -> tuple[Any, Any]:
    """`input_ids` (B, C, T) and `lengths` (B, C) of the captions of each image."""
    ids = [[tokenizer.encode(text, max_length) if text else [] for text in row] for row in captions]
    lengths = torch.tensor([[len(each) for each in row] for row in ids])
    input_ids = torch.zeros(*lengths.shape, int(lengths.max()), dtype=torch.long)
    for image, row in enumerate(ids):
        for caption, each in enumerate(row):
            input_ids[image, caption, : len(each)] = torch.tensor(each)
    return input_ids, lengths
