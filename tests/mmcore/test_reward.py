"""Training a captioner by reward: the reward, the draws, the loss, the first weights, and that the reward grows."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from nltk.translate.bleu_score import SmoothingFunction
from nltk.translate.bleu_score import sentence_bleu as nltk_sentence_bleu
from torch import Tensor

from mmcore import checkpoint
from mmcore.captioners import cross_attention
from mmcore.captioners.cross_attention import VARIANTS, CrossAttentionCaptioner, CrossAttentionCaptionerRecipe
from mmcore.captioners.decoding import sample
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.reward import Ngrams, padded, reference_ngrams, rewards, sentence_bleu
from mmcore.errors import InputError
from mmcore.run_files import TOKENIZER_ASSET, RunFile, write_model
from mmcore.storage import Storage
from mmcore.text import TokenIds

IDS = TokenIds(12, 1, 2, (0, 1, 3))

pytestmark = pytest.mark.usefixtures("one_thread")


def by_reward(**train: Any) -> CrossAttentionCaptionerRecipe:
    return dataclasses.replace(tiny.recipe(**train), reward_samples=3, label_smoothing=0.0)


# -- reward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_reward_is_nltks_for_references_of_one_length(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    references = torch.randint(4, 8, (3, 9), generator=random).tolist()
    candidate = torch.randint(4, 8, (4 + seed % 9,), generator=random).tolist()
    expected = nltk_sentence_bleu(references, candidate, smoothing_function=SmoothingFunction().method2)
    assert sentence_bleu(Ngrams(candidate), [Ngrams(each) for each in references]) == pytest.approx(expected, abs=1e-12)


def test_brevity_is_measured_by_the_mean_length_and_strange_words_give_nothing() -> None:
    references = [Ngrams([4, 5, 6, 7]), Ngrams([4, 5, 6, 7, 8, 9, 10, 11])]
    assert sentence_bleu(Ngrams([4, 5, 6, 7]), references) == pytest.approx(torch.tensor(-0.5).exp().item(), abs=1e-6)
    assert sentence_bleu(Ngrams([4, 5, 6, 7, 8, 9, 10, 11]), references) == pytest.approx(1)
    assert sentence_bleu(Ngrams([9, 9]), [Ngrams([4, 5])]) == sentence_bleu(Ngrams([]), [Ngrams([4, 5])]) == 0.0


def test_ids_become_captions_and_captions_ids() -> None:
    captions = [[[4, 5], []], [[6, 7, 8, 9], [4]]]
    ids_BCT, lengths_BC = padded(captions, IDS, 5)
    assert ids_BCT.tolist() == [
        [[1, 4, 5, 2, 0], [1, 2, 0, 0, 0]],
        [[1, 6, 7, 8, 9], [1, 4, 2, 0, 0]],
    ], "a caption that was cut off has no end"
    assert lengths_BC.tolist() == [[4, 2], [5, 3]]
    lengths_BC[0, 1] = 0
    found = reference_ngrams(ids_BCT, lengths_BC, IDS)
    assert [[each.length for each in own] for own in found] == [[2], [4, 1]], "a caption of length 0 is missing"
    assert rewards([[[4, 5]], [[4]]], found).tolist() == [[1.0], [pytest.approx(torch.tensor(-1.5).exp().item())]]


# -- draws and loss ------------------------------------------------------------------------------------------------


def test_captions_are_drawn_by_their_probabilities() -> None:
    recipe = dataclasses.replace(tiny.recipe(), min_word_count=10)
    model = tiny.model_of(recipe).eval()
    memory_BLD = model.memory(torch.randn(2, tiny.NUM_TOKENS, tiny.ENCODER_WIDTH, generator=torch.Generator()))
    torch.manual_seed(0)
    drawn = sample(model.decoder, memory_BLD, 1_000, 3, model.token_ids)
    assert [len(each) for each in drawn] == [1_000] * 2
    assert {len(ids) for each in drawn for ids in each} == {0, 1, 2, 3}
    assert not {*model.token_ids.silent_ids, model.token_ids.eos_id} & {
        w for each in drawn for ids in each for w in ids
    }
    state = model.decoder.start(memory_BLD, 1, 3)
    logits_BV = model.decoder.step(torch.full((2,), model.token_ids.bos_id), state).detach()
    logits_BV[:, list(model.token_ids.silent_ids)] = -torch.inf
    for own, expected_V in zip(drawn, logits_BV.softmax(-1), strict=True):
        first = torch.tensor([ids[0] if ids else model.token_ids.eos_id for ids in own])
        shares_V = torch.bincount(first, minlength=len(expected_V)) / len(own)
        torch.testing.assert_close(shares_V, expected_V, rtol=0, atol=0.07)


def log_probability(model: CrossAttentionCaptioner, image_1LE: Tensor, caption: list[int]) -> Tensor:
    """Of the caption and its end, step by step."""
    state = model.decoder.start(model.memory(image_1LE), 1, 16)
    last, total = model.token_ids.bos_id, torch.zeros(())
    for word in [*caption, model.token_ids.eos_id]:
        total = total + model.decoder.step(torch.tensor([last]), state)[0].log_softmax(-1)[word]
        last = word
    return total


def test_the_loss_weighs_each_drawn_caption_by_its_advantage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model_of(by_reward()).train()
    batch = tiny.rows_of(by_reward()).train_batch(torch.arange(2).numpy(), 0)
    batch["images"] = batch["images"].float()
    drawn = [[[4, 5], [6, 7, 8], []], [[4], [9, 4], [5, 5, 5]]]
    monkeypatch.setattr(cross_attention, "sample", lambda *arguments: drawn)
    outputs = model(batch)
    assert model.training
    given = rewards(drawn, reference_ngrams(batch["input_ids"], batch["lengths"], model.token_ids))
    expected = torch.zeros(())
    for image, captions in enumerate(drawn):
        for row, caption in enumerate(captions):
            others = [float(given[image, other]) for other in range(3) if other != row]
            advantage = float(given[image, row]) - sum(others) / 2
            log_p = log_probability(model, batch["images"][image : image + 1], caption)
            expected = expected - advantage * log_p / 3
    assert given.unique().numel() > 2
    assert (outputs.losses["loss"].count, model.counts(batch)) == (2, {})
    torch.testing.assert_close(outputs.losses["loss"].sum, expected, rtol=0, atol=1e-5)
    assert outputs.metrics["reward"].sum == pytest.approx(float(given.sum()))


def test_training_by_reward_raises_it_and_resumes_bit_identical(tmp_path: Path) -> None:
    of_captions = dataclasses.replace(tiny.recipe(num_epochs=4), captions_per_image=1)
    first = tiny.train(of_captions, tmp_path / "first").training.model
    recipe = dataclasses.replace(by_reward(num_epochs=4, ema_decay=0.9), reward_samples=4, dropout=0.1)

    def model() -> CrossAttentionCaptioner:
        new = tiny.model_of(recipe)
        checkpoint.load_trainable(new, checkpoint.trainable_state(first), "first")
        return new

    whole = tiny.train(recipe, tmp_path / "whole", model=model())
    history = [row["validation_reward"] for row in whole.training.state.history if "validation_reward" in row]
    assert history[-1] > history[0] + 0.05
    assert whole.training.state.history[-1]["validation_loss"] == pytest.approx(1 - history[-1])
    resumed = tiny.train(recipe, tmp_path / "resumed", resume_from=whole.checkpoints[1], model=model())
    for name, weight in resumed.best.items():
        assert torch.equal(weight, whole.best[name]), name


# -- first weights -------------------------------------------------------------------------------------------------


def write_run(folder: Path, recipe: CrossAttentionCaptionerRecipe, facts: CaptionerFacts) -> CrossAttentionCaptioner:
    torch.manual_seed(1)
    model = recipe.build(facts)
    run = Storage(str(folder))
    for name, data in tiny.vocabulary(recipe).files().items():
        (run / "model" / TOKENIZER_ASSET).write(name, data)
    write_model(run, checkpoint.trainable_state(model), RunFile("resnet_captioner", "best", recipe, facts, ""))
    return model


def test_first_weights_are_those_of_the_run_or_refused(tmp_path: Path) -> None:
    words = tiny.vocabulary(tiny.recipe())
    facts = CaptionerFacts(words.token_ids, tiny.NUM_TOKENS, tiny.ENCODER_WIDTH, "an encoder", text_fingerprint="some")
    there = write_run(tmp_path / "run", tiny.recipe(), facts)
    recipe = dataclasses.replace(by_reward(), first_weights=str(tmp_path / "run"))
    assert recipe.complete(facts) == facts
    model = recipe.build(facts)
    model.load_pretrained()
    for name, weight in checkpoint.trainable_state(there).items():
        assert torch.equal(weight, model.state_dict()[name]), name

    other_words = dataclasses.replace(facts, text_fingerprint="others")
    other_tokens = dataclasses.replace(facts, encoder_fingerprint="another")
    for changed, facts_of, message in (
        (recipe, other_words, "trained on other words; give its --tokenizer"),
        (recipe, other_tokens, "trained on other image tokens; give its --encoder"),
        (dataclasses.replace(recipe, num_layers=3), facts, "its num_layers is 2; give --num-layers 2"),
        (dataclasses.replace(recipe, first_weights=""), facts, "--first-weights is missing"),
        (dataclasses.replace(recipe, first_weights=str(tmp_path)), facts, re.escape(str(tmp_path))),
    ):
        with pytest.raises(InputError, match=message):
            changed.complete(facts_of)


def test_one_drawn_caption_is_refused_as_it_has_nothing_to_be_compared_with() -> None:
    with pytest.raises(InputError, match="--reward-samples 2 or more"):
        dataclasses.replace(VARIANTS["reward"], reward_samples=1)
