"""The Q-Former as captioner and matcher: its three losses together, on one worker and two, training, and refusals."""

import dataclasses
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from mmcore import checkpoint
from mmcore.captioners import qformer_captioner
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.matching_rows import MatchingRows
from mmcore.captioners.qformer_captioner import VARIANTS, QFormerCaptioner, QFormerRecipe
from mmcore.captioners.qformer_losses import Negatives, itm_negatives
from mmcore.data.columns import Column
from mmcore.errors import InputError
from mmcore.recipe import TrainSettings, check_effect
from mmcore.training import RunHooks, Training

NUM_IMAGES, NUM_TOKENS, WIDTH = 20, 4, 16

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(**changes: Any) -> QFormerRecipe:
    return dataclasses.replace(VARIANTS["smoke"], **{"encoder": "frozen", "max_length": 16, **changes})


def model_of(settings: QFormerRecipe) -> QFormerCaptioner:
    torch.manual_seed(0)
    facts = CaptionerFacts(tiny.vocabulary(tiny.recipe()).token_ids, NUM_TOKENS, WIDTH)
    return settings.build(settings.complete(facts))


def rows_of(settings: QFormerRecipe) -> MatchingRows:
    """Images whose tokens are their colour and their place, each with one caption that names both."""
    table = tiny.table(NUM_IMAGES, NUM_IMAGES)
    tokens = np.zeros((2 * NUM_IMAGES, NUM_TOKENS, WIDTH), np.float32)
    for row in range(2 * NUM_IMAGES):
        tokens[row, 0, row % len(tiny.COLOURS)] = tokens[row, 3, 8 + row % len(tiny.PLACES)] = 1.0
    table = dataclasses.replace(table, captions=[captions[1:] for captions in table.captions])
    keywords = {"captions_per_image": 1, "max_length": settings.max_length, "seed": 0}
    words = tiny.vocabulary(tiny.recipe())
    return MatchingRows(table, [Column(tuple(table.image_ids), tokens)], words, **keywords)


# -- one worker and two --------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Group:
    """Workers as threads of one process. Their features meet in one graph, so gradients pass between them.

    `mmcore.distributed.gathered` does this between processes; test_qformer_losses.py and test_distributed.py try it.
    """

    num_workers: int

    def __post_init__(self) -> None:
        self.barrier, self.parts = threading.Barrier(self.num_workers), [torch.empty(0)] * self.num_workers
        self.of_thread = threading.local()

    def gathered(self, features: Tensor) -> Tensor:
        self.parts[self.of_thread.rank] = features
        self.barrier.wait(60)
        joined = torch.cat(self.parts)
        self.barrier.wait(60)
        return joined

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` of all workers at once."""

        def of_worker(rank: int) -> Any:
            self.of_thread.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.num_workers) as pool:
            return list(pool.map(of_worker, range(self.num_workers)))


def distilled_model() -> QFormerCaptioner:
    """In its second epoch of momentum distillation, with a copy that predicts otherwise."""
    model = model_of(recipe(distillation=0.4))
    model.load_pretrained()
    assert model.momentum_copy is not None
    random = torch.Generator().manual_seed(1)
    for buffer in model.momentum_copy.buffers():
        buffer += torch.rand(buffer.shape, generator=random)
    model.momentum_copy.epochs.fill_(1.5)
    return model


def outputs_of(
    parts: list[list[int]], monkeypatch: pytest.MonkeyPatch, make: Callable[[], QFormerCaptioner]
) -> tuple[dict[str, float], dict[str, Tensor], dict[str, Any]]:
    """One worker for each of `parts`: the sums of the losses, the gradients of their total, the negatives by image."""
    group, drawn = Group(len(parts)), {}

    def spied(cosines: Any, temperature: Tensor, own: Tensor, everyone: Tensor, uniforms: Tensor) -> Negatives:
        found = itm_negatives(cosines, temperature, own, everyone, uniforms)
        for image, text, other in zip(own, everyone[found.text_B], everyone[found.image_B], strict=True):
            drawn[int(image)] = int(text), int(other)
        return found

    monkeypatch.setattr(qformer_captioner, "gathered", group.gathered)
    monkeypatch.setattr(qformer_captioner, "itm_negatives", spied)
    rows, models = rows_of(recipe()), [make().double().train() for _ in parts]

    def forward(rank: int) -> Any:
        batch = rows.train_batch(np.array(parts[rank]), 0)
        batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
        return models[rank](batch)

    outputs = group.run(forward)
    sums = {name: sum(each.losses[name].sum for each in outputs) for name in outputs[0].losses}
    counts = {name: sum(int(each.losses[name].count) for each in outputs) for name in sums}
    torch.stack([sums[name] / counts[name] for name in sums]).sum().backward()
    gradients = {
        name: torch.stack([model.get_parameter(name).grad for model in models]).sum(dim=0)
        for name, _ in models[0].named_parameters()
    }
    facts = {"counts": counts, "drawn": drawn}
    if outputs[0].statistics:
        facts["epochs"] = sum(each.statistics["epochs"].item() for each in outputs)
    return {name: each.item() for name, each in sums.items()}, gradients, facts


@pytest.mark.parametrize("make", [lambda: model_of(recipe()), distilled_model], ids=["plain", "distilled"])
def test_two_workers_agree_with_one_on_losses_gradients_and_negatives(
    make: Callable[[], QFormerCaptioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [3, 8, 1, 14, 19, 6, 11, 0]
    one_sums, one_gradients, one_facts = outputs_of([rows], monkeypatch, make)
    for parts in ([rows[:4], rows[4:]], [rows[1::2], rows[::2]]):
        sums, gradients, facts = outputs_of(parts, monkeypatch, make)
        # In float64; measured differences at most 6e-14.
        assert sums == pytest.approx(one_sums, abs=1e-10)
        assert facts == one_facts
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, one_gradients[name], rtol=0, atol=1e-10)
    assert one_facts["counts"] == {"itc": 8, "itm": 24, "itg": one_facts["counts"]["itg"]}
    assert all(image not in others for image, others in one_facts["drawn"].items())
    assert len({text for text, _ in one_facts["drawn"].values()}) > 3


def test_gradients_of_matching_reach_all_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """ITM trains the words, the queries, the cross-attention of each layer and the norm of the image tokens."""
    model = model_of(recipe()).train()
    model(rows_of(recipe()).train_batch(np.arange(8), 0)).losses["itm"].sum.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    of_others = ("qformer.lm_head", "heads.vision_projection", "heads.text_projection", "log_scale")
    # The last layer's words go nowhere: ITM reads the queries. A bias of all keys does not change a softmax.
    last = f"qformer.layers.{recipe().num_layers - 1}."
    for name in without - {name for name in without if name.startswith(of_others)}:
        assert name.startswith((f"{last}text_ffn",)) or "key.bias" in name, name


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[QFormerCaptioner, MatchingRows, dict[str, Any]]:
    """A model after 150 steps on all images at once."""
    train = TrainSettings(
        max_steps=150, num_epochs=150, batch_size=NUM_IMAGES, lr=5e-3, warmup_steps=20,
        precision="fp32", validate_every_epochs=150,
    )  # fmt: skip
    settings = recipe(train=train)
    rows = rows_of(settings)
    training = Training(model_of(settings), rows, train, RunHooks(), workdir=tmp_path_factory.mktemp("work"))
    training.run()
    training.model.eval()
    return training.model, rows, training.state.history[-1]


def test_contrast_matching_and_generation_learn_twenty_pairs_by_heart(trained: Any) -> None:
    """Always "no match" would be right for two thirds of the pairs.."""
    model, rows, last = trained
    for task in ("itc", "itm", "itg"):
        assert last[f"validation_{task}_correct"] > 0.95, task
    batch = rows.validation_batch(np.arange(NUM_IMAGES))
    words = tiny.vocabulary(tiny.recipe())
    captions = [words.decode(ids) for ids in model.caption(batch["images"])]
    assert captions == [tiny.captions_of(row)[1] for row in range(NUM_IMAGES)]


def test_the_match_of_an_image_s_own_caption_is_the_best(trained: Any) -> None:
    model, rows, _ = trained
    batch = rows.validation_batch(np.arange(NUM_IMAGES))
    ids_BT, lengths_B = batch["input_ids"][:, 0], batch["lengths"][:, 0]
    mask_BT = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    with torch.inference_mode():
        memory_BLE = model.memory(batch["images"])
        scores_BB = torch.stack([model.match(memory_BLE.roll(-each, 0), ids_BT, mask_BT) for each in range(NUM_IMAGES)])
    assert (scores_BB.argmax(dim=0) == 0).float().mean() > 0.9


def test_queries_part_in_training(trained: Any) -> None:
    model, rows, _ = trained
    images = rows.validation_batch(np.arange(4))["images"]
    with torch.inference_mode():
        features_BQF = model.image_features(images)
    cosines_BQQ = features_BQF @ features_BQF.transpose(1, 2)
    others = ~torch.eye(recipe().num_queries, dtype=torch.bool)
    assert cosines_BQQ[:, others].max() < 0.999
    assert cosines_BQQ[:, others].min() < 0.9


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    train = TrainSettings(num_epochs=2, batch_size=5, lr=1e-2, precision="fp32", checkpoint_every_steps=3)
    settings = recipe(dropout=0.1, label_smoothing=0.1, train=train)
    kept: dict[int, Path] = {}

    def weights(name: str, resume_from: Path | None = None) -> dict[str, Tensor]:
        def commit(folder: Path | None, metrics: dict[str, Any]) -> None:
            assert folder is not None
            kept.setdefault(metrics["step"], folder)

        training = Training(
            model_of(settings), rows_of(settings), train, RunHooks(commit=commit), workdir=tmp_path / name,
            resume_from=resume_from,
        )  # fmt: skip
        training.run()
        return checkpoint.trainable_state(training.model)

    whole, resumed = weights("whole"), weights("resumed", kept[3])
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# -- refusals ------------------------------------------------------------------------------------------------------


def write_bert(folder: Path, *, marks: dict[str, str] | None = None, **config: Any) -> str:
    """A tiny BERT with a tokenizer of words; `marks` are its special tokens, `config` replaces fields of its config."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=40, max_position_embeddings=20, **sizes)).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if marks is None else marks
    names = ["[UNK]", "[PAD]", *marks.values()]
    words = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", **marks).save_pretrained(
        folder
    )
    return str(folder)


def facts_of(settings: QFormerRecipe) -> Any:
    words = settings.build_tokenizer(tiny.table(2, 0))
    return settings.complete(CaptionerFacts(words.token_ids, NUM_TOKENS, WIDTH))


def test_a_text_model_gives_sizes_words_and_first_weights(tmp_path: Path) -> None:
    settings = recipe(text_model=write_bert(tmp_path))
    facts = facts_of(settings)
    assert (facts.qformer.width, facts.qformer.vocabulary_size, facts.first_id) == (16, 41, 2)
    assert (facts.token_ids.size, facts.token_ids.bos_id, facts.token_ids.eos_id) == (5, 4, 3)
    model = settings.build(facts)
    model.load_pretrained()
    theirs = BertForMaskedLM.from_pretrained(tmp_path, trust_remote_code=False).bert.embeddings.word_embeddings.weight
    assert torch.equal(model.qformer.word_embeddings.weight[:40], theirs)


@pytest.mark.parametrize(
    ("changes", "written", "message"),
    [
        ({"max_length": 21}, {}, r"max_length 21: --text-model '.*' has 20 positions; change --max-length"),
        ({}, {"model_type": "gpt2"}, r"--text-model '.*': a gpt2 model; a Q-Former starts from a BERT; name another"),
        ({}, {"model_type": "roberta"}, r"--text-model '.*': a roberta model; a Q-Former starts from a BERT"),
        ({}, {"hidden_act": "relu"}, r"--text-model '.*': its activation is relu, a Q-Former has gelu; name another"),
        ({}, {"marks": {"cls_token": "[CLS]"}}, r"tokenizer '.*' has no end token; choose another with --text-model"),
        ({}, {"marks": {"sep_token": "[SEP]"}}, r"--text-model '.*': its tokenizer has no token \[CLS\]; name another"),
        ({}, {"vocab_size": 3}, r"its tokenizer has 5 tokens with \[DEC\], the model only 4; name another"),
    ],
)  # fmt: skip
def test_a_text_model_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], written: dict[str, Any], message: str
) -> None:
    settings = recipe(text_model=write_bert(tmp_path, **written), **changes)
    with pytest.raises(InputError, match=message) as caught:
        facts_of(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 0}, "num_queries 0 must be at least 1; change --num-queries"),
        ({"max_length": 1}, "max_length 1 must be at least 2"),
        ({"width": 30, "num_heads": 4}, "num_heads 4 does not divide width 30; change --num-heads or --width"),
        ({"encoder": "scratch", "width": 40}, "takes a width divisible by 32 .* not width 40"),
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
        ({"text_model": "bert"}, {"num_layers": 3}, "--text-model scratch"),
        ({"text_model": "bert"}, {"width": 64}, "--text-model scratch"),
        ({}, {"distillation_momentum": 0.9}, "--distillation"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], change: dict[str, Any], needed: str) -> None:
    variant = recipe(**settings)
    check_effect(variant, variant)
    with pytest.raises(InputError, match=f"has no effect without {needed}"):
        check_effect(dataclasses.replace(variant, **change), variant)
