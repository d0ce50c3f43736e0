"""Frozen causal language models that write captions: by name or folder, or a tiny random one made in code.

The model reads: prompt, begin token, image tokens, caption, line break. This is the layout of the report's row 4.
Training computes the first three once per image, and packs the captions of the image behind them. A caption sees them
and itself. With SmolLM2-135M, forward and backward of 4 images with 5 captions took 2.3 s of one CPU thread. The 20
captions alone took 6.4 s. `mmcore.frozen.caption_writer` writes captions.

Shapes: B images, C captions per image, R rows (captions, beams), T positions, P tokens of prompt and begin, Q image
tokens, X packed tokens of an image's captions, N predicted tokens of the batch, W width of the model, V tokens.
"""

import inspect
import json
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from mmcore.decoder import mask_to_bias
from mmcore.errors import InputError
from mmcore.frozen.pretrained import effective_config, load_frozen, read_config, sha256_of
from mmcore.frozen.tokenizers import LineTokenizer, load_tokenizer
from mmcore.text import BOS, EOS, PAD

SCRATCH = "scratch"
FLAG = "--language-model"
# Attention that a mask can restrict to the own caption. Other layers, such as recurrent ones, mix the packed captions.
_MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def _is_causal(config: Any) -> bool:
    """Whether transformers has a decoder without encoder for `config`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked

    # BERT and its kin are in both. They are causal only if their configuration says so.
    bidirectional = config.model_type in masked and not getattr(config, "is_decoder", False)
    return config.model_type in causal and not bidirectional and not getattr(config, "is_encoder_decoder", False)


def _byte_tokenizer() -> Any:
    """A tokenizer of Hugging Face whose tokens are the 256 bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def caption_tokenizer(name: str) -> LineTokenizer:
    """The tokenizer of the language model `name`. Raises InputError if there is none that fits."""
    return LineTokenizer(_byte_tokenizer() if name == SCRATCH else load_tokenizer(name, FLAG), FLAG)


def check_causal(name: str) -> None:
    """Raise InputError if `name` is no causal language model, by its configuration alone."""
    if name != SCRATCH:
        config = read_config(name, flag=FLAG, what="language model")
        if not _is_causal(config):
            kind = config.model_type
            raise InputError(f"{FLAG} {name!r}: a {kind} model is no causal language model; name one such as a Llama")


class FrozenLanguageModel(nn.Module):
    """A causal language model of transformers without trainable weights, and its tokenizer."""

    def __init__(self, model: Any, tokenizer: LineTokenizer, name: str = SCRATCH) -> None:
        """Raises InputError for a model that cannot write captions behind image tokens."""
        super().__init__()
        config = model.config.get_text_config()
        takes = inspect.signature(model.forward).parameters
        mixed = sorted(set(getattr(config, "layer_types", None) or ()) - _MASKED_LAYERS)
        if mixed or not {"position_ids", "inputs_embeds", "logits_to_keep"} <= set(takes):
            why = f"has layers of the kind {mixed[0]}" if mixed else "takes no position_ids"
            raise InputError(f"{FLAG} {name!r}: a {config.model_type} model {why}, so captions cannot share a prefix")
        num_tokens = tokenizer.token_ids.size
        if num_tokens > config.vocab_size:
            raise InputError(
                f"{FLAG} {name!r}: its tokenizer has {num_tokens} tokens, the model only {config.vocab_size}"
            )
        if not torch.cuda.is_available():
            # PyTorch's fused attention took 7 % longer with packed captions (SmolLM2-135M, one thread).
            model.set_attn_implementation("eager")
        self.model, self.tokenizer, self.name = model.eval().requires_grad_(False), tokenizer, name
        self.width = model.get_input_embeddings().weight.shape[1]
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        """Positions that the model has; None if it states no limit."""
        # Tokens that end a text of the model itself; a caption ends with a line break.
        stated = getattr(model.generation_config, "eos_token_id", None)
        ends = {tokenizer.own_eos_id, *(stated if isinstance(stated, list) else [stated])} - {None}
        self.end_ids = sorted(index for index in ends if index < config.vocab_size)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """The model `name` of Hugging Face, by name or folder. `scratch` is a tiny random one, always the same.

        Raises InputError if there is none, or if it is not a causal model with a tokenizer that has an end token.
        """
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        if name == SCRATCH:
            tokenizer = caption_tokenizer(name)
            config = LlamaConfig(
                vocab_size=tokenizer.token_ids.size,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=512,
                eos_token_id=tokenizer.own_eos_id,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return cls(LlamaForCausalLM(config), tokenizer)
        check_causal(name)
        model = load_frozen(name, lambda config: AutoModelForCausalLM, flag=FLAG, what="language model")
        return cls(model, caption_tokenizer(name), name)

    @classmethod
    def without_weights(cls, config: str, name: str) -> Self:
        """The model of `config` (as `config_json` writes it) on the meta device: its sizes, without memory for weights.

        `name` is the model whose tokenizer it has. Raises InputError if there is none that fits.
        """
        from transformers import AutoConfig, AutoModelForCausalLM

        fields = json.loads(config)
        with torch.device("meta"):
            settings = AutoConfig.for_model(fields.pop("model_type"), **fields)
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False, dtype=torch.float32)
        return cls(model, caption_tokenizer(name), name)

    def config_json(self) -> str:
        """The configuration of the model, for `without_weights`."""
        return json.dumps({**effective_config(self.model.config), "model_type": self.model.config.model_type})

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the logits: weights, configuration and tokenizer."""
        return sha256_of(self.model, [self.tokenizer.fingerprint(), effective_config(self.model.config)])

    def train(self, mode: bool = True) -> Self:
        """The model stays in evaluation mode, also with trainable adapters: its dropout belongs to its pretraining."""
        return super().train(False)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [each for each in self.model.modules() if isinstance(each, GradientCheckpointingLayer)]

    def add_lora(self, rank: int) -> None:
        """Add trainable low-rank adapters, which change nothing at first (Hu et al. 2021, arXiv 2106.09685).

        They are at the layers that peft names for this kind of model: for most, queries and values.
        Raises InputError for a kind that peft does not know.
        """
        from peft import LoraConfig, inject_adapter_in_model

        try:
            # The usual scale of 2.
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank), self.model)
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"--lora {rank}: not for {FLAG} {self.name!r} ({reason}); give --lora 0") from None

    def check_positions(self, num_prompt: int, num_image_tokens: int, max_length: int) -> None:
        """Raise InputError if a caption of `max_length` tokens behind prompt and image does not fit."""
        needed = num_prompt + num_image_tokens + max_length
        if self.max_positions is not None and needed > self.max_positions:
            raise InputError(
                f"max_length {max_length}: with {num_prompt} tokens of prompt and begin and {num_image_tokens} of the "
                f"image that makes {needed} positions, but {FLAG} {self.name!r} has {self.max_positions}; lower "
                "--max-length"
            )

    def prefix_ids(self, prompt: str) -> tuple[int, ...]:
        """The ids of `prompt` and the begin token after it."""
        return (*self.tokenizer.prompt_ids(prompt), self.tokenizer.token_ids.bos_id)

    def embed(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Ids (...) -> embeddings (..., W)."""
        embedding = self.model.get_input_embeddings()
        return embedding(torch.as_tensor(ids, device=embedding.weight.device))

    def forward(
        self,
        embeddings_BTW: Tensor,
        positions_BT: Tensor,
        visible_BTT: Tensor | None = None,
        cache: Any = None,
        num_logits: int = 1,
    ) -> Tensor:
        """The logits (B, num_logits, V) after each of the last positions.

        Args:
            embeddings_BTW: of tokens or images.
            positions_BT: int64.
            visible_BTT: True where a query (second index) sees a key (third). None is causal.
            cache: a ``DynamicCache`` with the keys and values before, which is extended.
        """
        # A sum with minus infinity suits every implementation of attention. Some take no boolean mask.
        bias = None if visible_BTT is None else mask_to_bias(visible_BTT)[:, None].to(embeddings_BTW.dtype)
        return self.model(
            inputs_embeds=embeddings_BTW,
            position_ids=positions_BT,
            attention_mask=bias,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=num_logits,
        ).logits

    def caption_logits(
        self, prefix_ids: Sequence[int], image_BQW: Tensor, input_ids_BCT: Tensor, lengths_BC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The logits of each caption's tokens, as if each caption were alone behind its prefix.

        Args:
            prefix_ids: of prompt and begin, the same for all images.
            image_BQW: projected image tokens.
            input_ids_BCT: int64, begin, caption and line break. The begin token is in the prefix already.
            lengths_BC: int64, tokens of each caption with begin; 0 for a missing caption.
        Returns: logits (N, V) and the tokens (N,) that they predict, of all captions in order.
        """
        packed = PackedCaptions(input_ids_BCT, lengths_BC)
        prefix_BPW = self.embed(prefix_ids).expand(len(image_BQW), -1, -1)
        embeddings_BTW = torch.cat([prefix_BPW, image_BQW, self.embed(packed.ids_BX)], dim=1)
        num_prefix = prefix_BPW.shape[1] + image_BQW.shape[1]
        positions_BT, visible_BTT = packed.behind(num_prefix)
        # The first token of every caption is predicted by the last position of the prefix.
        logits_BXV = self(embeddings_BTW, positions_BT, visible_BTT, num_logits=1 + packed.ids_BX.shape[1])
        return logits_BXV.flatten(0, 1).index_select(0, packed.predicting_N), packed.labels_N


class PackedCaptions:
    """The captions of each image in one row, without padding between them. Only the rows are padded, at their end."""

    def __init__(self, input_ids_BCT: Tensor, lengths_BC: Tensor) -> None:
        """Arguments as in `FrozenLanguageModel.caption_logits`."""
        num_predicted_BC = lengths_BC.sub(1).clamp_min(0)
        # The last token of a caption predicts nothing, so the model does not read it.
        num_read_BC = num_predicted_BC.sub(1).clamp_min(0)
        start_BC = num_read_BC.cumsum(1) - num_read_BC
        num_captions = lengths_BC.shape[1]
        steps_T = torch.arange(input_ids_BCT.shape[2], device=input_ids_BCT.device)
        image, caption, step = (steps_T < num_read_BC[..., None]).nonzero(as_tuple=True)
        place = start_BC[image, caption] + step
        empty_BX = torch.zeros(
            len(lengths_BC), int(num_read_BC.sum(1).max()), dtype=torch.long, device=input_ids_BCT.device
        )
        at = (image, place)
        self.ids_BX = empty_BX.index_put(at, input_ids_BCT[image, caption, step + 1])
        self.caption_BX = (empty_BX + num_captions).index_put(at, caption)  # padding has a number of its own
        self.step_BX = empty_BX.index_put(at, step)
        image, caption, step = (steps_T < num_predicted_BC[..., None]).nonzero(as_tuple=True)
        self.labels_N = input_ids_BCT[image, caption, step + 1]
        # Among the last position of the prefix (0) and the packed tokens (from 1 on).
        predicting = torch.where(step == 0, 0, start_BC[image, caption] + step)
        self.predicting_N = image * (1 + self.ids_BX.shape[1]) + predicting

    def behind(self, num_prefix: int) -> tuple[Tensor, Tensor]:
        """Positions (B, T) and visible keys (B, T, T) of a prefix and the packed captions, T = `num_prefix` + X."""
        num_rows, device = len(self.ids_BX), self.ids_BX.device
        first_BP = torch.arange(num_prefix, device=device).expand(num_rows, -1)
        positions_BT = torch.cat([first_BP, num_prefix + self.step_BX], dim=1)
        caption_BT = torch.cat([torch.full_like(first_BP, -1), self.caption_BX], dim=1)
        of_prefix_or_own_BTT = (caption_BT[:, None] == -1) | (caption_BT[:, None] == caption_BT[:, :, None])
        return positions_BT, of_prefix_or_own_BTT.tril()
