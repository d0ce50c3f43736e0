"""First weights of a bridge: of a finished run, of a BLIP-2, or of a BERT.

* A run of ``train_qformer.py`` gives its Q-Former (BLIP-2's second stage). The Linear after it begins at random.
* A run of ``train_qformer_llm.py`` gives its bridge (LLaVA's second stage).
* A BLIP-2 of Hugging Face gives its Q-Former. The Linear after it begins at random.
* A BERT gives the layers of a Q-Former. Queries, cross-attention and the Linear begin at random.

A run that trained its own image encoder gives that too.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from mmcore.captioners.bridge import BridgeSettings, QFormerBridge, qformer_sizes
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.captioners.qformer_weights import (
    bert_settings,
    blip2_settings,
    check_memory_width,
    load_blip2,
    start_from_bert,
)
from mmcore.checkpoint import copy_state
from mmcore.errors import InputError
from mmcore.frozen.pretrained import read_config
from mmcore.run_files import RunFile, read_fields, read_weights, run_file_from_json
from mmcore.storage import Storage

FLAG = "--bridge-weights"
# The recipe of train_qformer.py.
_FIRST_STAGE = "qformer"
# Sizes that a bridge shares with the run that gives its weights.
_SIZES = ("num_queries", "bridge_width", "bridge_layers", "bridge_heads")


class FirstWeights(Protocol):
    """Where the first weights of a bridge are."""

    def sizes(self, recipe: Any, facts: CaptionerFacts, image_width: int) -> tuple[QFormerSettings | None, bool]:
        """The sizes of the Q-Former, None for another bridge, and whether a LayerNorm is before it. Reads no weights.

        Args:
            recipe: a `LanguageCaptionerRecipe`.
            facts: its facts; with those of the language model.
            image_width: channels of an image token.
        Raises InputError for weights that do not fit these.
        """

    def load(self, bridge: nn.Module, encoder: nn.Module | None) -> None:
        """Copy the weights into a bridge of these sizes, and into the encoder that is trained. None is a frozen one."""


def first_weights(name: str, run_types: Mapping[str, tuple[type[Any], type[Any]]]) -> FirstWeights:
    """The weights of `name`: the folder or URI of a run, or the folder or name of a model of Hugging Face.

    `run_types`: the types of recipe and facts, by the names of the recipes that can give weights.
    Raises InputError for anything else.
    """
    if not name:
        raise InputError(
            f"{FLAG} is missing: this variant begins with the bridge of a first stage; run `python "
            f"jobs/train_qformer_llm.py --variant llava` first, and name its run"
        )
    if "://" in name or any((Path(name) / file).is_file() for file in ("recipe.json", "model/recipe.json")):
        run = Storage(name)
        fields, where = read_fields(run)
        kind = fields["recipe"]
        if kind not in run_types:
            raise InputError(f"{FLAG} {name!r}: a run of {kind}; name one of train_qformer.py or train_qformer_llm.py")
        return _OfRun(run, run_file_from_json(fields, *run_types[kind], where))
    kind = read_config(name, flag=FLAG, what="run, BLIP-2 or BERT").model_type
    match kind:
        case "blip-2":
            return _OfBlip2(name)
        case "bert":
            return _OfBert(name)
        case _:
            raise InputError(f"{FLAG} {name!r}: a {kind} model; name a finished run, a BLIP-2 or a BERT")


def _check_is_qformer(bridge: BridgeSettings, where: str) -> None:
    if bridge.bridge != "qformer":
        raise InputError(f"{where}: for a Q-Former, not for a bridge of kind {bridge.bridge}; give --bridge qformer")


def _fitted(settings: QFormerSettings, bridge: BridgeSettings, where: str) -> QFormerSettings:
    """Pretrained sizes with what the recipe decides: dropout, and whether the text half is kept."""
    if settings.num_queries != bridge.num_queries:
        raise InputError(
            f"num_queries {bridge.num_queries}: {where} has {settings.num_queries}; give --num-queries "
            f"{settings.num_queries}"
        )
    if bridge.instruct and settings.vocabulary_size is None:
        raise InputError(f"instruct: {where} reads no text; name one with a text half, or leave --instruct out")
    return dataclasses.replace(
        settings,
        vocabulary_size=settings.vocabulary_size if bridge.instruct else None,
        dropout=bridge.bridge_dropout,
        attention_dropout=bridge.bridge_dropout,
    )


@dataclass(frozen=True)
class _OfRun:
    run: Storage
    file: RunFile[Any, Any]

    def sizes(self, recipe: Any, facts: CaptionerFacts, image_width: int) -> tuple[QFormerSettings | None, bool]:
        where, theirs, their_facts = f"{FLAG} {self.run.uri!r}", self.file.recipe, self.file.facts
        same = (facts.encoder_fingerprint, facts.image_tokens, facts.encoder_width)
        if same != (their_facts.encoder_fingerprint, their_facts.image_tokens, their_facts.encoder_width):
            raise InputError(
                f"{where}: it was trained on other image tokens, those of --encoder {theirs.encoder} with --image-size "
                f"{theirs.image_size}; give these, or name a run on the tokens of --encoder {recipe.encoder}"
            )
        if self.file.recipe_name == _FIRST_STAGE:
            _check_is_qformer(recipe.bridge, where)
            return _fitted(their_facts.qformer, recipe.bridge, where), theirs.image_norm
        self._check_own(recipe, facts, where)
        if recipe.bridge.bridge != "qformer":
            return None, False
        settings = their_facts.qformer or qformer_sizes(theirs.bridge, image_width)
        return _fitted(settings, recipe.bridge, where), their_facts.image_norm

    def _check_own(self, recipe: Any, facts: Any, where: str) -> None:
        """Raise InputError for a run of the same recipe whose bridge does not fit."""
        theirs = self.file.recipe
        if facts.language_model_fingerprint != self.file.facts.language_model_fingerprint:
            raise InputError(
                f"{where}: it was trained with another language model, --language-model {theirs.language_model}; name "
                "that one"
            )
        if theirs.lora:
            raise InputError(f"{where}: it trained adapters of the language model too; name a run without --lora")
        if theirs.bridge.instruct or recipe.bridge.instruct:
            raise InputError(f"{where}: instruct needs the first weights of a run of train_qformer.py; name one")
        if theirs.bridge.bridge != recipe.bridge.bridge:
            raise InputError(
                f"{where}: its bridge is of kind {theirs.bridge.bridge}; give --bridge {theirs.bridge.bridge}"
            )
        if recipe.bridge.bridge == "resampler":
            for name in _SIZES:
                mine, other = getattr(recipe.bridge, name), getattr(theirs.bridge, name)
                if mine != other:
                    raise InputError(f"{name} {mine}: {where} has {other}; give --{name.replace('_', '-')} {other}")

    def load(self, bridge: nn.Module, encoder: nn.Module | None) -> None:
        parts: dict[str, nn.Module] = {"bridge": bridge}
        if self.file.recipe_name == _FIRST_STAGE:
            assert isinstance(bridge, QFormerBridge)
            parts = {"qformer": bridge.qformer, "image_norm": bridge.image_norm}
        if encoder is not None:
            parts["encoder"] = encoder
        own = {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}
        weights = read_weights(self.run, self.file.weights_sha256)
        copy_state(own, {name: value for name, value in weights.items() if name in own}, f"{FLAG} {self.run.uri!r}")


@dataclass(frozen=True)
class _OfBlip2:
    name: str

    def sizes(self, recipe: Any, facts: CaptionerFacts, image_width: int) -> tuple[QFormerSettings | None, bool]:
        where = f"{FLAG} {self.name!r}"
        _check_is_qformer(recipe.bridge, where)
        settings = blip2_settings(self.name, flag=FLAG)
        check_memory_width(settings, image_width, encoder=f"--encoder {recipe.encoder!r}", where=where)
        return _fitted(settings, recipe.bridge, where), False

    def load(self, bridge: nn.Module, encoder: nn.Module | None) -> None:
        assert isinstance(bridge, QFormerBridge)
        load_blip2(bridge.qformer, self.name, flag=FLAG)


@dataclass(frozen=True)
class _OfBert:
    name: str

    def sizes(self, recipe: Any, facts: CaptionerFacts, image_width: int) -> tuple[QFormerSettings | None, bool]:
        where = f"{FLAG} {self.name!r}"
        _check_is_qformer(recipe.bridge, where)
        num_queries = recipe.bridge.num_queries
        settings = bert_settings(self.name, flag=FLAG, memory_width=image_width, num_queries=num_queries)
        return _fitted(settings, recipe.bridge, where), False

    def load(self, bridge: nn.Module, encoder: nn.Module | None) -> None:
        assert isinstance(bridge, QFormerBridge)
        start_from_bert(bridge.qformer, self.name, flag=FLAG)


def check_instruction(settings: QFormerSettings, num_words: int, tokenizer: str) -> None:
    """Raise InputError if a pretrained Q-Former has fewer words than the tokenizer of its instruction."""
    assert settings.vocabulary_size is not None, "it reads an instruction"
    if num_words > settings.vocabulary_size:
        raise InputError(
            f"--instruct-tokenizer {tokenizer!r}: it has {num_words} tokens, the Q-Former of {FLAG} only "
            f"{settings.vocabulary_size}; name the tokenizer that it was trained with"
        )
