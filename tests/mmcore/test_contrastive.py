"""The contrastive pair: its loss, its features, and text encoders from scratch, trained and frozen."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from mmcore.captioners.contrastive import VARIANTS, ContrastivePair, ContrastiveRecipe
from mmcore.captioners.facts import ContrastiveFacts
from mmcore.captioners.matching_rows import MatchingRows
from mmcore.captioners.temperature import temperature_of
from mmcore.data.columns import Column
from mmcore.errors import InputError
from mmcore.frozen.text import PromptTokenizer, config_to_json
from mmcore.recipe import TrainSettings, check_effect
from mmcore.text import TokenIds
from mmcore.training import RunHooks, Training

NUM_WORDS, NUM_TOKENS, WIDTH = 12, 4, 16
FACTS = ContrastiveFacts(TokenIds(NUM_WORDS, 1, 2, (0, 1, 3)), NUM_TOKENS, WIDTH)


def recipe(**changes: Any) -> ContrastiveRecipe:
    return dataclasses.replace(VARIANTS["smoke"], **{"encoder": "frozen", "max_length": 8, **changes})


def model_of(**changes: Any) -> ContrastivePair:
    torch.manual_seed(0)
    return recipe(**changes).build(FACTS).double().eval()


def batch(num_rows: int = 6) -> dict[str, Tensor]:
    """Random tokens and words; texts have three to eight tokens."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.arange(num_rows) % 6 + 3
    ids = torch.randint(4, NUM_WORDS, (num_rows, 8), generator=random)
    ids[torch.arange(8) >= lengths[:, None]] = 0
    return {
        "images": torch.randn(num_rows, NUM_TOKENS, WIDTH, generator=random, dtype=torch.float64),
        "input_ids": ids[:, None],
        "lengths": lengths[:, None],
        "image_index": torch.arange(num_rows) * 3,
    }


def features(model: ContrastivePair, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    mask = torch.arange(rows["input_ids"].shape[2]) < rows["lengths"]
    return model.image_features(rows["images"]), model.text_features(rows["input_ids"][:, 0], mask)


# -- features and loss -------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_clip() -> None:
    model, rows = model_of(), batch()
    images, texts = features(model, rows)
    outputs = model(rows)
    assert temperature_of(model.log_scale).item() == pytest.approx(0.07, abs=1e-8)
    logits = texts @ images.T / temperature_of(model.log_scale)
    # The reference is a mean; measured difference 0.
    assert outputs.losses["loss"].sum.item() == pytest.approx(6 * image_text_contrastive_loss(logits).item(), abs=1e-12)
    assert outputs.losses["loss"].count == 6
    expected = sum(int((each.argmax(dim=1) == torch.arange(6)).sum()) for each in (logits, logits.T))
    assert (outputs.metrics["correct"].sum, outputs.metrics["correct"].count) == (expected, 12)


@pytest.mark.parametrize("layers", [0, 1])
def test_features_have_length_one_and_depend_on_their_own_row_alone(layers: int) -> None:
    model, rows = model_of(image_layers=layers, text_layers=layers), batch()
    images, texts = features(model, rows)
    assert images.shape == texts.shape == (6, 16)
    for each in (images, texts):
        torch.testing.assert_close(each.norm(dim=1), torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)
    for row in range(6):
        alone = {name: value[row : row + 1] for name, value in rows.items()}
        # Other rows of the batch are longer, so this row is padded there. Measured difference at most 4e-16.
        for mine, all_rows in zip(features(model, alone), (images, texts), strict=True):
            torch.testing.assert_close(mine[0], all_rows[row], rtol=0, atol=1e-12)


def test_pooling_begins_as_the_mean_and_then_learns_which_tokens_count() -> None:
    model, rows = model_of(image_layers=0), batch()
    tower = model.image_tower
    projected = tower.norm(tower.projection(rows["images"]))
    value = tower.key_value(projected).chunk(2, dim=-1)[1]
    expected = F.normalize(tower.output(value.mean(dim=1)), dim=-1)
    torch.testing.assert_close(model.image_features(rows["images"]), expected, rtol=0, atol=1e-12)
    model(rows).losses["loss"].sum.backward()
    assert tower.query_D.grad is not None
    assert tower.query_D.grad.abs().min() > 0


def test_two_rows_of_one_image_are_no_negatives_of_each_other() -> None:
    model, rows = model_of(), batch(2)
    twice = {**rows, "image_index": torch.tensor([5, 5])}
    apart, alike = (model(each).losses["loss"].sum.item() for each in (rows, twice))
    images, texts = features(model, rows)
    logits = images @ texts.T / temperature_of(model.log_scale)
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    assert alike == pytest.approx((F.cross_entropy(logits, half) + F.cross_entropy(logits.T, half)).item(), abs=1e-12)
    assert alike != pytest.approx(apart, abs=1e-3)
    assert model(twice).metrics["correct"].sum == 4


def test_the_losses_of_two_workers_add_up_to_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = model_of(), batch()
    whole = [*features(model, rows), rows["image_index"]]
    expected = model(rows).losses["loss"].sum
    halves = [{name: value[part] for name, value in rows.items()} for part in (slice(0, 2), slice(2, 6))]
    alone = sum(model(half).losses["loss"].sum for half in halves)
    assert abs(alone - expected) > 0.1
    # What `gathered` returns on both workers: images, texts and indices of all rows, in the order of its calls.
    answers = iter(2 * whole)
    monkeypatch.setattr("mmcore.captioners.contrastive.gathered", lambda each: next(answers))
    model.train()
    both = sum(model(half).losses["loss"].sum for half in halves)
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-12)
    assert next(answers, None) is None


def test_the_temperature_stays_at_or_above_a_hundredth_and_can_rise_again() -> None:
    model = model_of().train()
    with torch.no_grad():
        model.log_scale.fill_(7.0)
    assert temperature_of(model.log_scale).item() == pytest.approx(0.01)
    model(batch()).losses["loss"].sum.backward()
    assert temperature_of(model.log_scale).item() == pytest.approx(0.01)
    # Nothing is learned yet, so a smaller scale is better.
    assert model.log_scale.grad is not None
    assert model.log_scale.grad > 0


# -- training ----------------------------------------------------------------------------------------------------


def rows_of(settings: ContrastiveRecipe, tokenizer: Any) -> MatchingRows:
    """Twenty images, each with a caption that names it. An image's tokens are its colour and its place."""
    table = tiny.table(20, 20)
    tokens = torch.zeros(40, NUM_TOKENS, WIDTH)
    for row in range(40):
        tokens[row, 0, row % len(tiny.COLOURS)] = tokens[row, 3, 8 + row % len(tiny.PLACES)] = 1.0
    table = dataclasses.replace(table, captions=[captions[1:] for captions in table.captions])
    keywords = {"captions_per_image": 1, "max_length": settings.max_length, "seed": 0}
    return MatchingRows(table, [Column(tuple(table.image_ids), tokens.numpy())], tokenizer, **keywords)


def test_the_loop_trains_it_to_find_each_image_and_each_text(tmp_path: Path) -> None:
    train = TrainSettings(max_steps=60, num_epochs=60, batch_size=20, lr=5e-3, precision="fp32", log_every_steps=60)
    settings = recipe(max_length=16, train=dataclasses.replace(train, validate_every_epochs=60))
    words = tiny.vocabulary(tiny.recipe())
    torch.manual_seed(0)
    model = settings.build(dataclasses.replace(FACTS, token_ids=words.token_ids))
    training = Training(model, rows_of(settings, words), settings.train, RunHooks(), workdir=tmp_path)
    training.run()
    last = training.state.history[-1]
    # The 20 pairs of a colour and a place are all different. 1/20 would be found by chance.
    assert last["validation_correct"] == 1.0
    assert last["validation_loss"] < 0.5


# -- named text encoders -----------------------------------------------------------------------------------------


def write_bert(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=40, max_position_embeddings=20, **sizes)).save_pretrained(folder)
    captions = [caption for row in range(20) for caption in tiny.captions_of(row)]
    for name, data in PromptTokenizer.of_words(captions, 16).files().items():
        (folder / name).write_bytes(data)
    return str(folder)


def named(folder: str, trains: bool) -> tuple[ContrastiveRecipe, ContrastiveFacts, Any]:
    settings = recipe(text_encoder=folder, train_text_encoder=trains, max_length=16)
    tokenizer = settings.build_tokenizer(tiny.table(20, 0))
    config, fingerprint = settings.text_facts(tokenizer.token_ids.size)
    facts = dataclasses.replace(
        FACTS, token_ids=tokenizer.token_ids, text_config=config, text_encoder_fingerprint=fingerprint
    )
    return settings, facts, tokenizer


@pytest.mark.parametrize("trains", [True, False])
def test_a_named_text_encoder_is_trained_or_frozen(tmp_path: Path, trains: bool) -> None:
    settings, facts, tokenizer = named(write_bert(tmp_path / "bert"), trains)
    train = TrainSettings(max_steps=3, batch_size=10, lr=1e-2, precision="fp32")
    model = settings.build(facts)
    model.load_pretrained()
    reference = BertModel.from_pretrained(tmp_path / "bert", trust_remote_code=False).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in model.text_encoder.state_dict().items():
        assert torch.equal(value, reference.state_dict()[name]), name
    ids = torch.tensor([tokenizer.encode(caption, 16) for caption in tiny.captions_of(0)[:1]])
    expected = reference(input_ids=ids).last_hidden_state
    model.eval()
    text = F.normalize(model.text_tower(expected), dim=-1)
    torch.testing.assert_close(
        model.text_features(ids, torch.ones_like(ids, dtype=torch.bool)), text, rtol=0, atol=1e-6
    )
    Training(model, rows_of(settings, tokenizer), train, RunHooks(), workdir=tmp_path / "work").run()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    weights = {name for name, _ in model.named_parameters() if trains or not name.startswith("text_encoder.")}
    assert moved == weights
    assert not any("pooler" in name for name in before)


def test_a_frozen_text_encoder_must_be_the_one_of_the_facts(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    settings, facts, _ = named(folder, False)
    model = settings.build(facts)
    with pytest.raises(AssertionError, match="load_pretrained was not called"):
        model.text_features(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
    write_bert(tmp_path / "bert", seed=1)
    with pytest.raises(InputError, match="begun with another text encoder"):
        model.load_pretrained()


def test_the_configuration_says_nothing_about_the_folder(tmp_path: Path) -> None:
    _, facts, _ = named(write_bert(tmp_path / "bert"), True)
    assert str(tmp_path) not in facts.text_config
    assert json.loads(facts.text_config)["model_type"] == "bert"
    assert config_to_json(named(str(tmp_path / "bert"), True)[0].build(facts).text_encoder.config) == facts.text_config


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_width": 0}, "feature_width 0 must be at least 1; change --feature-width"),
        ({"image_layers": -1}, "image_layers -1 must be at least 0; change --image-layers"),
        ({"max_length": 1}, "max_length 1 must be at least 2"),
        ({"width": 30, "num_heads": 4}, "num_heads 4 does not divide width 30; change --num-heads or --width"),
        ({"encoder": "scratch", "width": 40, "num_heads": 2}, "takes a width divisible by 32 .* not width 40"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0 must be from 0 to below 1"),
        ({"train": TrainSettings(batch_size=1)}, "batch_size 1 must be at least 2: .* change --batch-size"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("settings", "change", "needed"),
    [
        ({"encoder": "scratch"}, {"tokens": "pooled"}, "a frozen --encoder"),
        ({}, {"train_text_encoder": False}, "--text-encoder MODEL"),
        ({"text_encoder": "bert"}, {"text_layers": 3}, "--text-encoder scratch"),
        ({"tokenizer": "bert"}, {"lowercase": False}, "--tokenizer words"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], change: dict[str, Any], needed: str) -> None:
    variant = recipe(**settings)
    check_effect(variant, variant)
    with pytest.raises(InputError, match=f"has no effect without {needed}"):
        check_effect(dataclasses.replace(variant, **change), variant)


def test_a_text_encoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert")
    with pytest.raises(InputError, match=r"max_length 21: --text-encoder .* at most 20 tokens; change --max-length"):
        recipe(text_encoder=folder, max_length=21).text_facts(40)
    with pytest.raises(InputError, match=r"its tokenizer has 41 tokens, the model only 40"):
        recipe(text_encoder=folder).text_facts(41)
    with pytest.raises(InputError, match="--text-encoder 'nowhere': no text encoder"):
        recipe(text_encoder="nowhere").text_facts(40)
