"""Tokenizers of captions: words, and subword tokenizers with the special tokens of BERT and of GPT-2."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, tokenization_utils_base

from mmcore import checkpoint
from mmcore.captioners.cross_attention import VARIANTS
from mmcore.captioners.facts import CaptionerFacts
from mmcore.captioners.search_options import SearchOptions
from mmcore.errors import InputError
from mmcore.frozen.language import caption_tokenizer
from mmcore.frozen.tokenizers import PieceTokenizer, read_caption_tokenizer, words_tokenizer
from mmcore.recipe import check_effect, recipe_to_json
from mmcore.run_files import TOKENIZER_ASSET, RunFile, write_model
from mmcore.storage import Storage
from mmcore.text import BOS_ID, EOS_ID, PAD_ID, UNK_ID, CaptionTokenizer, WordVocabulary
from mmcore.trained.captioner import open_captioner

CAPTIONS = [text for row in range(20) for text in tiny.captions_of(row)]
MARKS = {
    "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
    "gpt2": {"eos_token": "<|endoftext|>"},
}


def pieces(kind: str) -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token=MARKS[kind].get("unk_token")))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = list(MARKS[kind].values())
    tokenizer.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **MARKS[kind])


def tokenizer_of(kind: str) -> CaptionTokenizer:
    return tiny.vocabulary(tiny.recipe()) if kind == "words" else PieceTokenizer(pieces(kind))


@pytest.mark.parametrize("kind", ["words", "bert", "gpt2"])
def test_captions_become_ids_and_come_back(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind)
    ids, text = tokenizer.token_ids, CAPTIONS[0]
    encoded = tokenizer.encode(text, 50)
    assert (encoded[0], encoded[-1]) == (ids.bos_id, ids.eos_id)
    assert max(encoded) < ids.size
    assert not {*ids.silent_ids, ids.eos_id} & set(encoded[1:-1])
    assert ids.eos_id not in ids.silent_ids, "a caption must be able to end"
    assert tokenizer.decode(encoded) == tokenizer.decode(encoded[1:]) == tokenizer.decode([*encoded, 5, 5]) == text
    assert tokenizer.encode(text, 4) == encoded[:4], "a longer caption is truncated"

    before, folder = tokenizer.fingerprint(), Storage(str(tmp_path))
    for name, data in tokenizer.files().items():
        folder.write(name, data)
    again = read_caption_tokenizer(folder)
    assert (type(again), again.token_ids, again.fingerprint()) == (type(tokenizer), ids, before)
    assert [again.encode(each, 50) for each in CAPTIONS] == [tokenizer.encode(each, 50) for each in CAPTIONS]


STYLES = [
    "the dog 's ball is two-thirds red , isn't it ?",
    "a man in a t-shirt with the number 3 runs , and two girls watch .",
    'three boys hold a " free hugs " sign ; they do n\'t smile !',
    "the girls ' black-and-white dogs ( 2 of them ) won 10 & more .",
]


def forgetful(kind: str) -> Any:
    """A tokenizer that puts every mark apart, as BERT's and CLIP's do."""
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=90, special_tokens=list(MARKS["bert"].values()))
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
        special = list(MARKS["bert"].values())
        trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(STYLES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=True, **MARKS["bert"])


@pytest.mark.parametrize("kind", ["wordpiece", "suffix"])
def test_captions_keep_the_spacing_of_the_references(kind: str) -> None:
    tokenizer = PieceTokenizer(forgetful(kind))
    assert [tokenizer.decode(tokenizer.encode(text, 99)) for text in STYLES] == STYLES
    assert tokenizer.decode(tokenizer.encode("two - thirds, the dog's", 99)) == "two-thirds , the dog 's"


def test_tokenizers_that_keep_spaces_give_every_text_back() -> None:
    tokenizer = caption_tokenizer("scratch")
    tokenizer.tokenizer.clean_up_tokenization_spaces = True  # as tokenizers of GPT-2 were stored once
    for text in ("the dog 's ball", "the dog's ball", "two - thirds", "two-thirds", "a ball , a dog ."):
        assert tokenizer.decode(tokenizer.encode(text, 99)) == text


@pytest.mark.parametrize("lowercase", [True, False])
def test_transformers_opens_the_words_of_a_vocabulary(lowercase: bool, tmp_path: Path) -> None:
    texts = ["A dog 's ball .", "the  dog\tthat zigzags", "", "A-dog , don't"]
    words = WordVocabulary.build(["A dog 's ball , .", "the dog that don't"], min_count=1, lowercase=lowercase)
    words_tokenizer(words, first_id=PAD_ID).save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    ours = [words.encode(text, 9) for text in texts]
    theirs = opened(texts, padding=True)
    for ids, padded, mask in zip(ours, theirs["input_ids"], theirs["attention_mask"], strict=True):
        assert padded[: sum(mask)] == [PAD_ID, *ids[1:]]
        assert mask == sorted(mask, reverse=True)
        assert opened.decode(ids, skip_special_tokens=True) == words.decode(ids)
    marks = (opened.pad_token_id, opened.bos_token_id, opened.eos_token_id, opened.unk_token_id)
    assert (len(opened), marks) == (len(words), (PAD_ID, BOS_ID, EOS_ID, UNK_ID))


def test_captions_that_are_cut_are_nothing_to_be_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers warns of more tokens than the pretrained model took."""
    tokenizer, warnings = pieces("bert"), []
    tokenizer.model_max_length = 1
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", warnings.append)
    assert len(PieceTokenizer(tokenizer).encode(" ".join(CAPTIONS), 50)) == 50
    assert warnings == []
    tokenizer(" ".join(CAPTIONS))
    assert len(warnings) == 1, "otherwise it warns in another way"


def test_tokenizers_that_differ_have_other_fingerprints() -> None:
    assert len({tokenizer_of(kind).fingerprint() for kind in ("words", "bert", "gpt2")}) == 3


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_captioner_learns_to_write_pieces(kind: str, tmp_path: Path) -> None:
    pieces(kind).save_pretrained(tmp_path)
    recipe = dataclasses.replace(tiny.recipe(), tokenizer=str(tmp_path), max_length=40)
    tokenizer = recipe.build_tokenizer(tiny.table(4, 0))
    assert isinstance(tokenizer, PieceTokenizer)
    torch.manual_seed(0)
    model = recipe.build(CaptionerFacts(tokenizer.token_ids, image_tokens=1, encoder_width=4))
    wanted = [tiny.captions_of(row)[0] for row in range(4)]
    ids = [tokenizer.encode(text, 40) for text in wanted]
    input_ids = torch.zeros(4, 1, max(map(len, ids)), dtype=torch.long)
    for row, each in enumerate(ids):
        input_ids[row, 0, : len(each)] = torch.tensor(each)
    images, lengths = torch.eye(4)[:, None], torch.tensor([[len(each)] for each in ids])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model({"images": images, "input_ids": input_ids, "lengths": lengths}).losses["loss"]
        (loss.sum / loss.count).backward()
        optimizer.step()
    model.eval()
    for num_beams in (1, 2):
        captions = model.caption(images, SearchOptions(num_beams, max_length=40))
        assert [tokenizer.decode(each) for each in captions] == wanted


def test_a_tokenizer_is_refused_with_flags_of_words_and_where_it_is_none(tmp_path: Path) -> None:
    best = VARIANTS["best"]
    with pytest.raises(InputError, match="--min-word-count 9: has no effect without --tokenizer words"):
        check_effect(dataclasses.replace(best, tokenizer="gpt2", min_word_count=9), best)
    with pytest.raises(InputError, match=r"^--tokenizer .*: no tokenizer in a folder of this name"):
        dataclasses.replace(best, tokenizer=str(tmp_path)).build_tokenizer(tiny.table(4, 0))
    without_end = PreTrainedTokenizerFast(tokenizer_object=pieces("gpt2").backend_tokenizer)
    with pytest.raises(InputError, match="has no end token"):
        PieceTokenizer(without_end)


# -- finished runs -------------------------------------------------------------------------------------------------


def test_a_finished_captioner_of_34e6a7a_opens_and_says_the_same(tmp_path: Path) -> None:
    """Its recipe.json holds the words, and model/ has no tokenizer."""
    recipe = dataclasses.replace(VARIANTS["smoke"], image_size=32)
    words = tiny.vocabulary(recipe)
    facts = CaptionerFacts(words.token_ids, 32 * 32, 3, text_fingerprint=words.fingerprint())
    torch.manual_seed(0)
    weights = checkpoint.trainable_state(recipe.build(facts))
    now, then = Storage(str(tmp_path / "now")), Storage(str(tmp_path / "then"))
    for run in (now, then):
        write_model(run, weights, RunFile("resnet_captioner", "smoke", recipe, facts, "commit"))
    for name, data in words.files().items():
        (now / "model" / TOKENIZER_ASSET).write(name, data)
    settings = recipe_to_json(recipe)
    del settings["tokenizer"]
    old = {
        "recipe": "resnet_captioner",
        "variant": "smoke",
        "settings": settings,
        "encoder_fingerprint": "pixels",
        "image_tokens": 32 * 32,
        "encoder_width": 3,
        "dataset_fingerprint": "of the data",
        "columns": ["pixels"],
        "vocabulary": words.to_json(),
        "commit": "34e6a7a",
        "weights_sha256": json.loads((now / "model").read("recipe.json"))["weights_sha256"],
    }
    (then / "model").write("recipe.json", json.dumps(old).encode())
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    before, after = (open_captioner(run.uri).load() for run in (then, now))
    captions = after.caption(pixels, after.options)
    assert before.caption(pixels, before.options) == captions

    told: list[tuple[int, str]] = []
    greedy = SearchOptions(num_beams=1)
    captions = after.caption(pixels, greedy)
    assert after.caption(pixels, greedy, on_text=lambda *each: told.append(each)) == captions
    for image, caption in enumerate(captions):
        so_far = [text for index, text in told if index == image]
        assert so_far == [" ".join(caption.split()[: length + 1]) for length in range(len(caption.split()))]
    assert any(captions)
    told.clear()
    after.caption(pixels, SearchOptions(num_beams=2), on_text=lambda *each: told.append(each))
    assert not told, "several beams tell nothing before the end"

    options = object()  # of another kind of captioner; only its model reads them
    before.model.caption = lambda images, given: [words.encode("red", 9)] * (given is options)  # type: ignore[attr-defined]
    assert before.caption(pixels, options) == ["red"]
