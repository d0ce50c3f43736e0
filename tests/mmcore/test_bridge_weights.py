"""mmcore/captioners/bridge_weights.py: what a bridge begins with, on tiny weights."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_language
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
)

from mmcore import checkpoint
from mmcore.captioners import qformer_captioner
from mmcore.captioners.bridge import BridgeSettings, QFormerBridge
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.qformer_captioner import QFormerCaptioner
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.captioners.qformer_llm import VARIANTS, LanguageCaptioner, LanguageCaptionerFacts, LanguageCaptionerRecipe
from mmcore.captioners.qformer_weights import qformer_config
from mmcore.errors import InputError
from mmcore.frozen.text import PromptTokenizer
from mmcore.recipe import check_effect
from mmcore.run_files import RunFile, read_fields, run_file_from_json, write_model
from mmcore.storage import Storage

WIDTH, NUM_TOKENS = 16, 5
BERT = BertConfig(
    vocab_size=39, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=16,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(weights: str, **changes: Any) -> LanguageCaptionerRecipe:
    """A Q-Former with first weights; fields of the bridge or of the recipe are changed."""
    own = {field.name for field in dataclasses.fields(BridgeSettings)}
    bridge = {name: changes.pop(name) for name in own & changes.keys()}
    settings = BridgeSettings(num_queries=3, bridge_width=24, bridge_layers=2, bridge_heads=4, bridge_dropout=0.0)
    settings = dataclasses.replace(settings, bridge_weights=weights, **bridge)
    return dataclasses.replace(VARIANTS["smoke"], **{"encoder": "frozen", "bridge": settings, **changes})


def facts_of(recipe: LanguageCaptionerRecipe, **changes: Any) -> LanguageCaptionerFacts:
    tokenizer = tiny_language.tokenizer()
    shape = (64 * 64, 3) if recipe.encoder == "scratch" else (NUM_TOKENS, WIDTH)
    return recipe.complete(dataclasses.replace(CaptionerFacts(tokenizer.token_ids, *shape, "seen"), **changes))


def begun(recipe: LanguageCaptionerRecipe) -> LanguageCaptioner:
    torch.manual_seed(9)
    model = recipe.build(facts_of(recipe))
    model.load_pretrained()
    return model.eval()


def written(folder: Path, name: str, recipe: Any, facts: Any, model: nn.Module) -> str:
    """A finished run."""
    file = RunFile(name, "smoke", recipe, facts, "")
    write_model(Storage(str(folder)), checkpoint.trainable_state(model), file)
    return str(folder)


@torch.no_grad()
def at_random(model: Any) -> Any:
    """Other weights than a new model has, also of norms and biases."""
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def first_stage(folder: Path, **changes: Any) -> tuple[str, QFormerCaptioner]:
    smoke = dataclasses.replace(
        qformer_captioner.VARIANTS["smoke"], **{"encoder": "frozen", "num_queries": 3, **changes}
    )
    tokens = smoke.build_tokenizer(tiny.table(4, 0)).token_ids
    shape = (64 * 64, 3) if smoke.encoder == "scratch" else (NUM_TOKENS, WIDTH)
    facts = smoke.complete(CaptionerFacts(tokens, *shape, "seen"))
    model = at_random(smoke.build(facts))
    return written(folder, "qformer", smoke, facts, model), model


def own_run(folder: Path, **changes: Any) -> tuple[str, LanguageCaptioner]:
    own = recipe("scratch", **changes)
    facts = facts_of(own)
    model = own.build(facts)
    model.load_frozen()
    return written(folder, "qformer_llm", own, facts, at_random(model)), model


def images(model: LanguageCaptioner) -> Tensor:
    if model.encoder is not None:
        return torch.randint(256, (2, 64, 64, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return torch.randn(2, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_every_kind_of_bridge_begins_at_random_without_them() -> None:
    facts = facts_of(recipe("scratch"))
    assert (facts.qformer, facts.image_norm) == (None, False)


@pytest.mark.parametrize("encoder", ["frozen", "scratch"])
def test_a_first_stage_gives_its_q_former_and_what_is_before_it(tmp_path: Path, encoder: str) -> None:
    run, first = first_stage(tmp_path, encoder=encoder, image_norm=True, ffn_width=48)
    model = begun(recipe(run, encoder=encoder))
    assert isinstance(model.bridge, QFormerBridge)
    assert (model.encoder is None) == (encoder == "frozen")
    pixels = images(model)
    queries = first.qformer.queries(first.memory(pixels)).hidden_BQD
    torch.testing.assert_close(model.image_tokens(pixels, ""), model.bridge.projection(queries), rtol=0, atol=1e-6)
    # What is of the text is not there, and the rest trains.
    names = {name for name, _ in model.bridge.named_parameters()}
    assert not any(part in name for name in names for part in ("text_ffn", "word_embeddings", "lm_head"))
    assert names == {name for name, each in model.bridge.named_parameters() if each.requires_grad}
    # The finished second stage opens without the first.
    file = RunFile("qformer_llm", "smoke", model.recipe, model.facts, "")
    write_model(Storage(str(tmp_path / "second")), checkpoint.trainable_state(model), file)
    fields, where = read_fields(Storage(str(tmp_path / "second")))
    again = run_file_from_json(fields, LanguageCaptionerRecipe, LanguageCaptionerFacts, where)
    assert again.facts == model.facts
    assert again.recipe.build(again.facts).bridge.state_dict().keys() == model.bridge.state_dict().keys()


@pytest.mark.parametrize(("kind", "encoder"), [("mlp", "scratch"), ("qformer", "frozen"), ("resampler", "frozen")])
def test_a_run_of_the_same_recipe_gives_its_bridge(tmp_path: Path, kind: str, encoder: str) -> None:
    run, first = own_run(tmp_path, bridge=kind, encoder=encoder)
    model = begun(recipe(run, bridge=kind, encoder=encoder, lora=2))
    pixels = images(model)
    assert torch.equal(model.image_tokens(pixels, ""), first.image_tokens(pixels, ""))
    assert model.caption(pixels) == first.caption(pixels), "adapters change nothing at first"


def test_a_q_former_goes_on_from_run_to_run(tmp_path: Path) -> None:
    run, _ = first_stage(tmp_path / "first", image_norm=True, ffn_width=48)
    second = begun(recipe(run))
    third = begun(recipe(written(tmp_path / "second", "qformer_llm", second.recipe, second.facts, second)))
    pixels = images(third)
    assert torch.equal(third.image_tokens(pixels, ""), second.image_tokens(pixels, ""))


def blip2(folder: Path, **changes: Any) -> Any:
    settings = QFormerSettings(
        vocabulary_size=None, width=24, num_layers=3, num_heads=4, ffn_width=40, num_queries=3, memory_width=WIDTH
    )
    vision = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        qformer_config=qformer_config(dataclasses.replace(settings, **changes)).to_dict(),
        text_config=OPTConfig(**language, word_embed_proj_dim=16, max_position_embeddings=16),
        num_query_tokens=3,
        image_token_index=19,
    )
    theirs = at_random(Blip2ForConditionalGeneration(config))
    theirs.save_pretrained(folder)
    return theirs


def test_a_blip_2_gives_its_q_former(tmp_path: Path) -> None:
    theirs = blip2(tmp_path)
    model = begun(recipe(str(tmp_path)))
    assert isinstance(model.bridge, QFormerBridge)
    image_BLE = images(model)
    queries_BQD = theirs.query_tokens.expand(2, -1, -1)
    expected = theirs.qformer(query_embeds=queries_BQD, encoder_hidden_states=image_BLE).last_hidden_state
    # measured 1e-6 on values up to 3
    torch.testing.assert_close(model.bridge.qformer.queries(image_BLE).hidden_BQD, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("instruct", [False, True])
def test_a_bert_gives_its_layers(tmp_path: Path, instruct: bool) -> None:
    bert = at_random(BertForMaskedLM(BERT))
    bert.save_pretrained(tmp_path)
    named = {}
    if instruct:
        PromptTokenizer.of_words(["a dog a dog"], 8).tokenizer.save_pretrained(tmp_path / "words")
        named = {"instruct_tokenizer": str(tmp_path / "words")}
    model = begun(recipe(str(tmp_path), instruct=instruct, **named))
    assert isinstance(model.bridge, QFormerBridge)
    state, theirs = model.bridge.qformer.state_dict(), bert.state_dict()
    for layer in range(2):
        inner = theirs[f"bert.encoder.layer.{layer}.intermediate.dense.weight"]
        assert torch.equal(state[f"layers.{layer}.query_ffn.inner.weight"], inner)
        assert (f"layers.{layer}.text_ffn.inner.weight" in state) == instruct
    if instruct:
        words = theirs["bert.embeddings.word_embeddings.weight"]
        assert torch.equal(state["word_embeddings.weight"][: len(words)], words)
    tokens = model.image_tokens(images(model), "a dog")
    assert tokens.shape == (2, 3, tiny_language.WIDTH)


# -- what does not fit ---------------------------------------------------------------------------------------------


def refused(match: str, recipe: LanguageCaptionerRecipe, **facts: Any) -> None:
    with pytest.raises(InputError, match=match) as error:
        recipe.build(facts_of(recipe, **facts))
    assert "\n" not in str(error.value)


def test_first_stages_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run, _ = first_stage(tmp_path / "first")
    where = rf"--bridge-weights '{run}'"
    refused(
        f"{where}: it was trained on other image tokens, those of --encoder frozen with", recipe(run), image_tokens=1
    )
    refused(f"{where}: it was trained on other image tokens", recipe(run), encoder_fingerprint="another")
    refused(f"num_queries 7: {where} has 3; give --num-queries 3", recipe(run, num_queries=7))
    refused(f"{where}: for a Q-Former, not for a bridge of kind mlp; give --bridge qformer", recipe(run, bridge="mlp"))
    tiny_language.tokenizer().tokenizer.save_pretrained(tmp_path / "bytes")
    named = {"instruct": True, "instruct_tokenizer": str(tmp_path / "bytes")}
    refused("--instruct-tokenizer .*: it has 259 tokens, the Q-Former of --bridge-weights only", recipe(run, **named))


def test_runs_of_the_same_recipe_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run, _ = own_run(tmp_path / "mlp", bridge="mlp")
    where = rf"--bridge-weights '{run}'"
    refused(f"{where}: its bridge is of kind mlp; give --bridge mlp", recipe(run, bridge="linear"))
    other = tiny_language.write("llama", tmp_path / "llama")
    named = {"bridge": "mlp", "language_model": other}
    refused(f"{where}: it was trained with another language model, --language-model scratch; n", recipe(run, **named))
    lora, _ = own_run(tmp_path / "lora", bridge="mlp", lora=2)
    refused("it trained adapters of the language model too; name a run without --lora", recipe(lora, bridge="mlp"))
    resampler, _ = own_run(tmp_path / "resampler", bridge="resampler")
    wider = recipe(resampler, bridge="resampler", bridge_width=48)
    refused("bridge_width 48: --bridge-weights .* has 24; give --bridge-width 24", wider)


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    blip2(tmp_path / "blip2")
    name = str(tmp_path / "blip2")
    wide = rf"--encoder 'frozen': its image tokens have 20 channels, but --bridge-weights '{name}' takes 16; name the v"
    refused(wide, recipe(name), encoder_width=20)
    refused("instruct: .* reads no text; name one with a text half, or leave", recipe(name, instruct=True))
    BertForMaskedLM(BERT).save_pretrained(tmp_path / "bert")
    refused("for a Q-Former, not for a bridge of kind linear", recipe(str(tmp_path / "bert"), bridge="linear"))
    gpt = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(gpt).save_pretrained(tmp_path / "gpt2")
    refused("--bridge-weights '.*gpt2': a gpt2 model; name a finished run, a BL", recipe(str(tmp_path / "gpt2")))
    refused("--bridge-weights 'no/such': no run, BLIP-2 or BERT in a folder of this name", recipe("no/such"))
    captioner, _ = own_run(tmp_path / "run", bridge="mlp")
    for path in Path(captioner).rglob("recipe.json"):
        path.write_text(path.read_text().replace('"qformer_llm"', '"resnet_captioner"'))
    refused("a run of resnet_captioner; name one of train_qformer.py or train_qformer_llm.py", recipe(captioner))


def test_the_second_stage_of_llava_needs_the_first(tmp_path: Path) -> None:
    second = VARIANTS["llava-lora"]
    assert (second.bridge.bridge, second.lora > 0) == ("mlp", True)
    tiny_second = dataclasses.replace(recipe("", bridge="mlp"), lora=2)
    refused("--bridge-weights is missing: .* run `python jobs/train_qformer_llm.py --variant llava` first", tiny_second)


def test_sizes_beside_first_weights_have_no_effect() -> None:
    given = recipe("some/run")
    with pytest.raises(InputError, match="--bridge-width 48: has no effect without --bridge-weights scratch"):
        check_effect(recipe("some/run", bridge_width=48), given)
    check_effect(recipe("some/run", num_queries=5, bridge_dropout=0.1), given)
    check_effect(recipe("some/run", bridge="resampler", bridge_width=48), given)
