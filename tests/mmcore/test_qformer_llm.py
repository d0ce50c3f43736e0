"""mmcore/captioners/qformer_llm.py: a bridge and a frozen language model, as one captioner."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_language
import torch
from tiny_language import batch_of, language_model
from torch import Tensor
from transformers import BertConfig, BertModel, Blip2Config, Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from mmcore import checkpoint
from mmcore.captioners.bridge import BridgeSettings, QFormerBridge
from mmcore.captioners.caption_rows import CaptionRows
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.qformer_llm import (
    VARIANTS,
    LanguageCaptioner,
    LanguageCaptionerFacts,
    LanguageCaptionerRecipe,
)
from mmcore.captioners.qformer_weights import generation_state, qformer_config
from mmcore.captioners.search_options import LanguageSearchOptions
from mmcore.data.columns import Column
from mmcore.errors import InputError, OptionError
from mmcore.frozen.language import FrozenLanguageModel
from mmcore.frozen.text import PromptTokenizer
from mmcore.frozen_weights import digests, frozen_parts
from mmcore.recipe import TrainSettings
from mmcore.training import RunHooks, Training

CAPTIONS = [["a dog", "two dogs run"], ["a ball", ""], ["it is red.", "a"]]


def recipe(**changes: Any) -> LanguageCaptionerRecipe:
    sizes = BridgeSettings(num_queries=3, bridge_width=24, bridge_layers=2, bridge_heads=4, bridge_dropout=0.0)
    bridge = {name: changes.pop(name) for name in ("bridge", "instruct", "instruct_tokenizer") if name in changes}
    settings = dataclasses.replace(VARIANTS["smoke"], encoder="frozen", bridge=dataclasses.replace(sizes, **bridge))
    return dataclasses.replace(settings, **{"max_length": 60, **changes})


def model_of(recipe: LanguageCaptionerRecipe, lm: FrozenLanguageModel | None = None, **facts: str) -> LanguageCaptioner:
    lm = lm or language_model("llama")
    torch.manual_seed(0)
    return LanguageCaptioner(recipe, LanguageCaptionerFacts(lm.tokenizer.token_ids, 5, 16, **facts), lm)


def batch(model: LanguageCaptioner) -> dict[str, Tensor]:
    ids, lengths = batch_of(model.language_model.tokenizer, CAPTIONS)
    images = torch.randn(len(CAPTIONS), 5, 16, generator=torch.Generator().manual_seed(1))
    return {"images": images, "input_ids": ids, "lengths": lengths}


def test_the_loss_is_of_the_captions_alone() -> None:
    model = model_of(recipe(bridge="mlp"))
    rows = batch(model)
    outputs = model(rows)
    num_predicted = sum(len(text) + 1 for captions in CAPTIONS for text in captions if text)
    assert outputs.losses["loss"].count == model.counts(rows)["loss"] == num_predicted
    lm, total, correct = model.language_model, torch.zeros(()), 0
    for image, captions in enumerate(CAPTIONS):
        for text in filter(None, captions):
            ids = torch.tensor(lm.tokenizer.encode(text, 60))
            prompt = lm.embed([*lm.tokenizer.tokenizer("A picture of")["input_ids"], 1])
            tokens = model.bridge(rows["images"][image : image + 1])[0]
            together = torch.cat([prompt, tokens, lm.embed(ids[1:])])[None]
            logits = lm.model(inputs_embeds=together).logits[0, -len(ids) : -1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            correct += int((logits.argmax(-1) == ids[1:]).sum())
    # measured 0 on 245
    torch.testing.assert_close(outputs.losses["loss"].sum, total, rtol=1e-6, atol=0)
    assert int(outputs.metrics["correct"].sum) == correct


@pytest.mark.parametrize("bridge", ["linear", "qformer", "resampler"])
def test_the_bridge_alone_is_trained_and_saved(bridge: str) -> None:
    model = model_of(recipe(bridge=bridge))
    model.train()
    model(batch(model)).losses["loss"].sum.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == set(checkpoint.trainable_state(model)) == {name for name in moved if name.startswith("bridge.")}
    assert list(frozen_parts(model)) == ["language_model"]
    assert len(model.blocks()) == 2 + 2 * (bridge != "linear")


def test_adapters_are_saved_too_and_the_rest_stays_frozen() -> None:
    model = model_of(recipe(bridge="mlp", lora=2))
    names = set(checkpoint.trainable_state(model))
    assert {name.split(".")[0] for name in names} == {"bridge", "language_model"}
    assert all("lora_" in name for name in names if name.startswith("language_model"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before, rows = digests(model), batch(model)
    for _ in range(2):
        model(rows).losses["loss"].sum.backward()
        optimizer.step()
    assert digests(model) == before
    saved = {name: value.clone() for name, value in checkpoint.trainable_state(model).items()}
    again = model_of(recipe(bridge="mlp", lora=2))
    checkpoint.load_trainable(again, saved, "here")
    assert again.caption(rows["images"]) == model.caption(rows["images"])


def test_bridge_and_adapters_learn_and_resume_to_the_bit(tmp_path: Path) -> None:
    settings = TrainSettings(
        num_epochs=10, batch_size=4, lr=2e-2, precision="fp32", checkpoint_every_steps=5, log_every_steps=5
    )
    small = recipe(bridge="mlp", lora=8, captions_per_image=1, train=settings)
    table = tiny.table(4, 4)
    columns = [Column(tuple(table.image_ids), np.tile(np.eye(16, dtype=np.float16)[:4, None], (2, 5, 1)))]
    rows = CaptionRows(table, columns, tiny_language.tokenizer(), captions_per_image=1, max_length=60, seed=0)
    kept: dict[int, Path] = {}

    def trained(folder: Path, resume_from: Path | None = None) -> dict[str, Tensor]:
        def commit(checkpoint: Path | None, metrics: dict[str, Any]) -> None:
            assert checkpoint is not None
            kept.setdefault(metrics["step"], checkpoint)

        folder.mkdir()
        model = model_of(small, language_model("llama"))
        training = Training(
            model, rows, settings, RunHooks(commit=commit), workdir=folder / "work", resume_from=resume_from
        )
        training.run()
        losses = [row["loss"] for row in training.state.history if "loss" in row]
        assert losses[-1] < 0.8 * losses[0]
        return checkpoint.trainable_state(model)

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "resumed", kept[5])
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_captions_follow_prompts_and_do_not_depend_on_the_batch() -> None:
    model = model_of(recipe())
    images = batch(model)["images"].repeat(2, 1, 1)
    prompts = ["A picture of", "What is it?", "A picture of", "A picture of", "A picture of", "What is it?"]
    captions = model.caption(images, prompts=prompts)
    own = model.caption(images)
    assert captions == [model.caption(images[i : i + 1], prompts=[prompts[i]])[0] for i in range(6)]
    told: list[list[int]] = [[] for _ in images]

    def on_words(words: list[tuple[int, int]]) -> None:
        for image, token in words:
            told[image].append(token)

    model.caption(images, prompts=prompts, on_words=on_words)
    assert told == captions
    assert [captions[row] for row in (0, 2, 3, 4)] == [own[row] for row in (0, 2, 3, 4)]
    assert captions[1] != own[1]
    assert model.caption(images, LanguageSearchOptions(repetition_penalty=1.0)) != own
    assert max(map(len, model.caption(images, LanguageSearchOptions(max_length=4)))) <= 4


def test_beams_find_captions_at_least_as_probable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(recipe())
    images = batch(model)["images"]
    greedy, beams = (
        model.caption(images, LanguageSearchOptions(num, 8, length_penalty=0.0, repetition_penalty=1.0))
        for num in (1, 4)
    )
    lm, end = model.language_model, model.token_ids.eos_id

    def log_probability(image: int, ids: list[int]) -> float:
        row = torch.tensor([[[1, *ids, end]]])
        tokens = model.image_tokens(images[image : image + 1], "")
        logits, labels = lm.caption_logits(model.prefix_ids, tokens, row, torch.tensor([[row.shape[-1]]]))
        logits[:, list(model.token_ids.silent_ids)] = -torch.inf
        logits[:, model.token_ids.size :] = -torch.inf
        return -torch.nn.functional.cross_entropy(logits[: len(ids)], labels[: len(ids)], reduction="sum").item()

    scores = [[log_probability(i, each[i]) for i in range(3)] for each in (greedy, beams)]
    assert all(theirs >= mine - 1e-4 for mine, theirs in zip(*scores, strict=True))
    assert beams != greedy


def test_an_instruction_reaches_the_q_former(tmp_path: Path) -> None:
    tiny_language.tokenizer().tokenizer.save_pretrained(tmp_path)
    model = model_of(recipe(instruct=True, instruct_tokenizer=str(tmp_path)))
    images = batch(model)["images"]
    tokens = [model.image_tokens(images, prompt) for prompt in ("A picture of", "What is it?")]
    assert (tokens[0] - tokens[1]).abs().max() > 1e-4
    assert len(model.caption(images, prompts=["a", "b", "a"])) == 3


def test_smoke_needs_no_network_and_builds_from_its_facts() -> None:
    smoke = VARIANTS["smoke"]
    tokenizer = smoke.build_tokenizer(tiny.table(4, 0))
    facts = smoke.complete(CaptionerFacts(tokenizer.token_ids, 64 * 64, 3))
    model = smoke.build(facts)
    assert all(each.is_meta for each in model.language_model.parameters()), "weights are read once, later"
    model.load_pretrained()
    assert model.language_model.fingerprint() == facts.language_model_fingerprint
    images = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    assert len(model.caption(images)) == 2
    ids = [tokenizer.encode(text, smoke.max_length) for text in tiny.captions_of(0)]
    assert all(len(each) < smoke.max_length for each in ids)
    other = dataclasses.replace(facts, language_model_fingerprint="of another")
    with pytest.raises(InputError, match="--language-model 'scratch': the run was trained on another one; name that"):
        smoke.build(other).load_frozen()


def test_language_models_that_write_no_captions_are_refused_first(tmp_path: Path) -> None:
    def refused(name: str, model: Any, tokenizer: Any, match: str) -> None:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=match) as error:
            recipe(language_model=str(tmp_path / name)).build_tokenizer(tiny.table(2, 0))
        assert "\n" not in str(error.value)

    # Its tokenizer has no line break either, but no other tokenizer would help.
    words = PromptTokenizer.of_words(["a dog a dog"], 8).tokenizer
    bert = BertModel(BertConfig(**tiny_language.SIZES, intermediate_size=32, vocab_size=262))
    refused("bert", bert, words, r"^--language-model '.*bert': a bert model is no causal language model; name one such")
    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_language.tokenizer().tokenizer.backend_tokenizer)
    llama = tiny_language.model_of("llama")
    refused("endless", llama, endless, r"tokenizer '.*endless' has no end token; choose another with --language-model$")
    refused("words", llama, words, r"has no token of a line break; choose another with --language-model$")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"max_length 60: with 13 tokens of prompt and begin and 3 of the .* 76 pos"):
        model_of(recipe(), language_model("opt", num_positions=70))
    small = dataclasses.replace(recipe(), max_length=40)
    model = model_of(small, language_model("opt", num_positions=64))
    with pytest.raises(InputError, match="with 41 tokens of prompt and begin"):
        model.caption(torch.zeros(1, 5, 16), prompts=["x" * 40])
    with pytest.raises(InputError, match="max_length 2 must be at least 3"):
        recipe(max_length=2)
    with pytest.raises(InputError, match="lora -1 must be at least 0"):
        recipe(lora=-1)
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="--repetition-penalty"):
            LanguageSearchOptions(repetition_penalty=value).check()
    with pytest.raises(OptionError, match="--num-beams"):
        LanguageSearchOptions(num_beams=0).check()
    LanguageSearchOptions().check()


def test_logits_are_those_of_blip_2() -> None:
    model = model_of(recipe(), language_model("opt"))
    assert isinstance(model.bridge, QFormerBridge)
    qformer = model.bridge.qformer
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Blip2Config(
        vision_config={**vision, "image_size": 16, "patch_size": 8, "initializer_range": 0.1},
        qformer_config=qformer_config(qformer.settings).to_dict(),
        text_config=model.language_model.model.config.to_dict(),
        num_query_tokens=3,
        image_token_index=tiny_language.VOCABULARY - 1,
    )
    torch.manual_seed(0)
    reference = Blip2ForConditionalGeneration(config).eval()
    state = generation_state(qformer, model.bridge.projection)
    state |= {f"language_model.{name}": value for name, value in model.language_model.model.state_dict().items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("vision_model.") for name in missing)
    pixels = torch.randn(2, 3, 16, 16)
    texts = ["a dog", "a cat"]
    captions = torch.tensor([model.language_model.tokenizer.encode(text, 60) for text in texts])
    with torch.no_grad():
        prefix = torch.tensor([*model.prefix_ids, *[tiny_language.VOCABULARY - 1] * 3]).expand(2, -1)
        expected = reference(pixels, torch.cat([prefix, captions[:, 1:]], dim=1)).logits[:, -captions.shape[1] : -1]
        images = reference.vision_model(pixels).last_hidden_state
        image_tokens = model.eval().image_tokens(images, "")
        lengths = torch.full((2, 1), captions.shape[1])
        logits, _ = model.language_model.caption_logits(model.prefix_ids, image_tokens, captions[:, None], lengths)
    # measured 1.8e-6 on logits up to 4
    torch.testing.assert_close(logits, expected.flatten(0, 1), rtol=0, atol=1e-5)
