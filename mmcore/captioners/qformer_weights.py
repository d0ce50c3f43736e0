"""First weights of a Q-Former from a BERT, and BLIP-2's weights under the names of transformers and of LAVIS.

LAVIS is the code of BLIP-2's authors (https://github.com/salesforce/LAVIS). Its Q-Former is a BERT with additions, so
its names are those of BERT behind `Qformer.`. Only LAVIS has the language head, which transformers leaves out.

`retrieval_state`, `generation_state` and `lavis_state` give the weights under the names of others. They are views: what
is copied into them is in our modules. Reading and writing therefore share one table of names.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmcore.captioners.qformer import MatchingHeads, QFormer
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.checkpoint import copy_state
from mmcore.errors import InputError
from mmcore.frozen.pretrained import load_frozen, read_config, read_weights

# The parts of a layer: our name, and BERT's with the additions of LAVIS.
_LAYER = {
    "self_attention.query": "attention.self.query",
    "self_attention.key": "attention.self.key",
    "self_attention.value": "attention.self.value",
    "self_attention.out": "attention.output.dense",
    "self_attention.norm": "attention.output.LayerNorm",
    "cross_attention.query": "crossattention.self.query",
    "cross_attention.key": "crossattention.self.key",
    "cross_attention.value": "crossattention.self.value",
    "cross_attention.out": "crossattention.output.dense",
    "cross_attention.norm": "crossattention.output.LayerNorm",
    "text_ffn.inner": "intermediate.dense",
    "text_ffn.out": "output.dense",
    "text_ffn.norm": "output.LayerNorm",
    "query_ffn.inner": "intermediate_query.dense",
    "query_ffn.out": "output_query.dense",
    "query_ffn.norm": "output_query.LayerNorm",
}
# The other parts: our name, LAVIS' and transformers' (None: it has no such part).
_OTHER: dict[str, tuple[str, str | None]] = {
    "word_embeddings": ("Qformer.bert.embeddings.word_embeddings", "embeddings.word_embeddings"),
    "position_embeddings": ("Qformer.bert.embeddings.position_embeddings", "embeddings.position_embeddings"),
    "embedding_norm": ("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm"),
    "lm_head.dense": ("Qformer.cls.predictions.transform.dense", None),
    "lm_head.norm": ("Qformer.cls.predictions.transform.LayerNorm", None),
    "lm_head": ("Qformer.cls.predictions", None),
}
_QUERIES, _LM_HEAD = "query_tokens", "Qformer.cls.predictions."
_LAVIS_HEADS = {"vision_projection": "vision_proj", "text_projection": "text_proj", "itm_head": "itm_head"}
# Parts of the models around a Q-Former, which are read elsewhere or not needed.
_AROUND_IN_TRANSFORMERS = (
    "vision_model.", "language_model.", "vision_projection.", "text_projection.", "itm_head.", "language_projection.",
    "embeddings.position_ids",
)  # fmt: skip
_AROUND_IN_LAVIS = (
    "visual_encoder.", "ln_vision.", "opt_model.", "t5_model.", "llm_model.", "opt_proj.", "t5_proj.", "llm_proj.",
    "vision_proj.", "text_proj.", "itm_head.", "temp", "Qformer.bert.embeddings.position_ids", _LM_HEAD,
)  # fmt: skip
_GELU = "gelu"  # the exact one
_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def _lavis_name(name: str) -> str:
    """LAVIS' name of our weight `name`."""
    if name == "query_tokens_QD":
        return _QUERIES
    part, _, kind = name.rpartition(".")
    if part in _OTHER:
        return f"{_OTHER[part][0]}.{kind}"
    _, index, part = part.split(".", 2)
    return f"Qformer.bert.encoder.layer.{index}.{_LAYER[part]}.{kind}"


def _transformers_name(name: str) -> str | None:
    """transformers' name of our weight `name`; None if it has no such weight."""
    part, _, kind = name.rpartition(".")
    if part in _OTHER:
        theirs = _OTHER[part][1]
        return None if theirs is None else f"{theirs}.{kind}"
    return _lavis_name(name).replace("Qformer.bert.", "qformer.").replace("attention.self.", "attention.attention.")


def _views(qformer: QFormer, rename: Callable[[str], str | None]) -> dict[str, Tensor]:
    """The weights under the names of others. BLIP-2's queries are (1, Q, D)."""
    named = {rename(name): value for name, value in qformer.state_dict().items()}
    return {name: value[None] if name == _QUERIES else value for name, value in named.items() if name is not None}


def _is_of_text(name: str) -> bool:
    return "text_ffn." in name or name.startswith(("word_embeddings.", "position_embeddings.", "lm_head."))


def retrieval_state(qformer: QFormer, heads: MatchingHeads | None) -> dict[str, Tensor]:
    """The weights for `Blip2ForImageTextRetrieval`, without its vision model and the language head. They are views."""
    state = _views(qformer, _transformers_name)
    return state | ({} if heads is None else heads.state_dict())


def generation_state(qformer: QFormer, language_projection: nn.Linear | None) -> dict[str, Tensor]:
    """The weights for `Blip2ForConditionalGeneration`, without its vision and language model. They are views.

    The class has no text half. `language_projection`: the layer between queries and language model.
    """
    state = _views(qformer, lambda name: None if _is_of_text(name) else _transformers_name(name))
    if language_projection is not None:
        state |= {f"language_projection.{name}": value for name, value in language_projection.state_dict().items()}
    return state


def lavis_state(qformer: QFormer, heads: MatchingHeads | None) -> dict[str, Tensor]:
    """The weights under the names of LAVIS, without its vision model. They are views."""
    state = _views(qformer, _lavis_name)
    if heads is not None:
        for name, value in heads.state_dict().items():
            part, _, kind = name.rpartition(".")
            state[f"{_LAVIS_HEADS[part]}.{kind}"] = value
    return state


def language_head(qformer: QFormer) -> dict[str, Tensor]:
    """The weights of the language head under the names of LAVIS, as `load_lavis_head` reads them. They are views.

    They are without the word embeddings, which are its last layer.
    """
    return {name: value for name, value in lavis_state(qformer, None).items() if name.startswith(_LM_HEAD)}


def qformer_config(settings: QFormerSettings) -> Any:
    """transformers' `Blip2QFormerConfig` of these settings."""
    from transformers import Blip2QFormerConfig

    words: dict[str, Any] = {} if settings.vocabulary_size is None else {"vocab_size": settings.vocabulary_size}
    return Blip2QFormerConfig(
        hidden_size=settings.width,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        intermediate_size=settings.ffn_width,
        hidden_act=_GELU,
        hidden_dropout_prob=settings.dropout,
        attention_probs_dropout_prob=settings.attention_dropout,
        max_position_embeddings=settings.max_positions,
        layer_norm_eps=settings.norm_epsilon,
        cross_attention_frequency=settings.cross_every,
        encoder_hidden_size=settings.memory_width,
        use_qformer_text_input=settings.vocabulary_size is not None,
        **words,
    )


def _settings(config: Any, where: str, **ours: Any) -> QFormerSettings:
    """The sizes that a BERT and a Q-Former of transformers name alike, and `ours`."""
    if config.hidden_act != _GELU:
        raise InputError(f"{where}: its activation is {config.hidden_act}, a Q-Former has {_GELU}; name another")
    return QFormerSettings(
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        ffn_width=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        norm_epsilon=config.layer_norm_eps,
        **ours,
    )


def check_memory_width(settings: QFormerSettings, width: int, *, encoder: str, where: str) -> None:
    """Raise InputError if image tokens have another width than a pretrained Q-Former takes.

    `encoder` and `where` name the flag and the value of the vision encoder and of the Q-Former, for the message.
    """
    if width != settings.memory_width:
        raise InputError(
            f"{encoder}: its image tokens have {width} channels, but {where} takes {settings.memory_width}; name the "
            "vision encoder that it was trained with, or another Q-Former"
        )


# -- a BERT --------------------------------------------------------------------------------------------------------


def bert_settings(
    name: str, *, flag: str, memory_width: int, num_queries: int = 32, cross_every: int = 2
) -> QFormerSettings:
    """The settings of a Q-Former with the sizes of the BERT `name` and one word more, `[DEC]`. Reads no weights.

    Raises InputError, naming `flag`, if `name` is no BERT.
    """
    config = read_config(name, flag=flag, what="BERT")
    if config.model_type != "bert":
        raise InputError(f"{flag} {name!r}: a {config.model_type} model; a Q-Former starts from a BERT; name another")
    ours = {"memory_width": memory_width, "num_queries": num_queries, "cross_every": cross_every}
    return _settings(config, f"{flag} {name!r}", vocabulary_size=config.vocab_size + 1, **ours)


@torch.no_grad()
def start_from_bert(qformer: QFormer, name: str, *, flag: str) -> None:
    """Copy the weights of the BERT `name` into a Q-Former of its `bert_settings`.

    The feed-forward layers of the queries start as copies of the text's. Cross-attention, queries and the row of
    `[DEC]` stay as they are. The embedding of BERT's first token type is added to the positions, so text starts with
    BERT's hidden states; BLIP-2 leaves it out. A BERT without a language head, such as a sentence encoder, gives none:
    its hidden layer is then random, as in a new BERT.

    Raises InputError, naming `flag`, if `name` is not found or its weights are incomplete.
    """
    from transformers import BertForMaskedLM

    may_miss = ("pooler", "cls.predictions")
    bert = load_frozen(name, lambda config: BertForMaskedLM, flag=flag, what="BERT", may_miss=may_miss)
    theirs = {f"Qformer.{each}": value for each, value in bert.state_dict().items()}
    first_type_D = theirs["Qformer.bert.embeddings.token_type_embeddings.weight"][0]
    for ours, own in qformer.state_dict().items():
        if ours == "query_tokens_QD" or "cross_attention." in ours:
            continue
        value = theirs[_lavis_name(ours.replace("query_ffn.", "text_ffn."))]
        if ours == "position_embeddings.weight":
            value = value + first_type_D
        rows = own[: len(value)] if ours in ("word_embeddings.weight", "lm_head.bias") else own
        assert rows.shape == value.shape, f"{ours} is {tuple(own.shape)}, BERT's {tuple(value.shape)}"
        rows.copy_(value)


# -- BLIP-2 by transformers ----------------------------------------------------------------------------------------


def blip2_settings(name: str, *, flag: str) -> QFormerSettings:
    """The settings of the Q-Former of the BLIP-2 model `name`. Reads no weights.

    The model for retrieval has a text half, the one for generation has none.
    Raises InputError, naming `flag`, if `name` is no BLIP-2.
    """
    config = read_config(name, flag=flag, what="BLIP-2")
    if config.model_type != "blip-2":
        raise InputError(f"{flag} {name!r}: a {config.model_type} model, not a BLIP-2; name another")
    theirs = config.qformer_config
    return _settings(
        theirs,
        f"{flag} {name!r}",
        vocabulary_size=theirs.vocab_size if theirs.use_qformer_text_input else None,
        num_queries=config.num_query_tokens,
        memory_width=theirs.encoder_hidden_size,
        cross_every=theirs.cross_attention_frequency,
    )


def load_blip2(
    qformer: QFormer,
    name: str,
    *,
    flag: str,
    heads: MatchingHeads | None = None,
    language_projection: nn.Linear | None = None,
) -> None:
    """Copy the weights of the BLIP-2 model `name` into the modules given. The language head stays as it is.

    A Q-Former without a text half takes the weights of one with it; the text half is then left out. Only the files that
    hold these weights are read.
    Raises InputError, naming `flag`, for weights that are missing, unknown or of another shape.
    """
    own = retrieval_state(qformer, heads) | generation_state(qformer, language_projection)
    with torch.device("meta"):
        complete = QFormer(dataclasses.replace(qformer.settings, vocabulary_size=1))
    left_out = retrieval_state(complete, None).keys() - own.keys()

    def wanted(weight: str) -> bool:
        return weight in own or not (weight in left_out or weight.startswith(_AROUND_IN_TRANSFORMERS))

    copy_state(own, _stored_weights(name, wanted, flag), f"{flag} {name!r}")


def _stored_weights(name: str, wanted: Callable[[str], bool], flag: str) -> dict[str, Tensor]:
    """The wanted weights of the model `name`, a local folder or on the hub, without building the model."""
    from transformers.utils import cached_file

    try:
        index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False)
        files = {_WEIGHTS}
        if index is not None:
            places = json.loads(Path(index).read_text())["weight_map"]
            files = {file for weight, file in places.items() if wanted(weight)}
        found: dict[str, Tensor] = {}
        for file in sorted(files):
            path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
            if path is None:
                raise InputError(f"{flag} {name!r}: no {file} there; weights must be in safetensors files")
            with safe_open(path, framework="pt") as tensors:
                found |= {weight: tensors.get_tensor(weight) for weight in tensors.keys() if wanted(weight)}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{flag} {name!r}: its weights cannot be read ({reason}); fetch them again") from None
    return found


# -- BLIP-2 by LAVIS -----------------------------------------------------------------------------------------------


def load_lavis(qformer: QFormer, path: str, *, flag: str, heads: MatchingHeads | None = None) -> float | None:
    """Copy the weights of a LAVIS file (.pth or .safetensors), such as `blip2_pretrained.pth`, with the language head.

    Returns: the temperature of ITC; None if the file has none.
    Raises InputError, naming `flag`, for a file that is not readable, and for weights that are missing, unknown or of
    another shape.
    """
    state, own = _lavis_weights(path, flag), lavis_state(qformer, heads)
    temperature = state.get("temp")
    with torch.device("meta"):
        complete = QFormer(dataclasses.replace(qformer.settings, vocabulary_size=1))
    left_out = lavis_state(complete, None).keys()
    kept = {
        name: value
        for name, value in state.items()
        if name in own or not (name in left_out or name.startswith(_AROUND_IN_LAVIS))
    }
    copy_state(own, kept, f"{flag} {path!r}")
    return None if temperature is None else temperature.item()


def load_lavis_head(qformer: QFormer, path: str, *, flag: str) -> None:
    """Copy the language head (`Qformer.cls.predictions.*`) of a LAVIS file, and nothing else. Errors as `load_lavis`.

    The word embeddings, which are the head's last layer, are those of `qformer`.
    """
    state = _lavis_weights(path, flag)
    own = language_head(qformer)
    assert own, "this Q-Former has no text half"
    copy_state(own, {name: value for name, value in state.items() if name in own}, f"{flag} {path!r}")


def _lavis_weights(path: str, flag: str) -> dict[str, Tensor]:
    """The weights of a LAVIS file, alone or beside the state of a training."""
    state = read_weights(path, flag, inside=("model",), what="a checkpoint of LAVIS' BLIP-2")
    # These two are copies of others in BERT. The output layer is the word embeddings, also here.
    copies = {
        f"{_LM_HEAD}decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
        f"{_LM_HEAD}decoder.bias": f"{_LM_HEAD}bias",
    }
    for copy, original in copies.items():
        if copy in state and original in state and not torch.equal(state[copy], state[original]):
            raise InputError(f"{flag} {path!r}: {copy} differs from {original}; a Q-Former has one tensor for both")
    return state
