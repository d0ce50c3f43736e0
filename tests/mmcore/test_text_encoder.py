"""Prompts to ids and hidden states: by tokenizers built here, pretrained encoders, and encoders from scratch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
)

from mmcore.errors import InputError
from mmcore.frozen.text import FrozenTextEncoder, PromptTokenizer, TextInputs
from mmcore.generators.text_context import TextContext, TextSettings
from mmcore.storage import Storage

CAPTIONS = ["a red circle, which is small", "a red square", "two shapes: a Circle and a square", "rare"]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "weights"
SIZES: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def words(max_tokens: int = 8) -> PromptTokenizer:
    return PromptTokenizer.of_words(CAPTIONS, max_tokens)


def write_encoder(folder: Path, kind: str) -> str:
    """A tiny encoder with random weights and the tokenizer of `words`, in the format of Hugging Face."""
    torch.manual_seed(0)
    model: Any
    if kind == "bert":
        model = BertModel(BertConfig(vocab_size=32, max_position_embeddings=32, **SIZES))
    elif kind == "clip":
        text = {**SIZES, "vocab_size": 32, "max_position_embeddings": 16}
        vision = {**SIZES, "image_size": 16, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    else:
        model = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2))
    model.save_pretrained(folder)
    for name, data in words().files().items():
        (folder / name).write_bytes(data)
    return str(folder)


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_words_of_the_captions_become_ids_of_one_length() -> None:
    tokenizer = words()
    ids, mask = tokenizer(["A RED circle!", "", "a red circle a red circle a red circle"])
    inputs = tokenizer.inputs()
    assert ids.shape == mask.shape == (3, 8)
    unknown = 3
    red, circle = ids[0, 2].item(), ids[0, 3].item()
    assert len({inputs.pad_id, inputs.bos_id, inputs.eos_id, unknown, red, circle}) == 6
    assert ids[0].tolist()[4:] == [unknown, inputs.eos_id, inputs.pad_id, inputs.pad_id]
    assert ids[1].tolist() == [inputs.bos_id, inputs.eos_id] + 6 * [inputs.pad_id]
    assert ids[2, -1].item() == inputs.eos_id
    assert mask.sum(1).tolist() == [6, 2, 8]
    # A word that occurs once is too rare for the vocabulary.
    assert tokenizer(["rare"])[0][0, 1].item() == unknown
    assert inputs.vocabulary_size == 4 + len({"a", "red", "circle", "square"})


def test_a_tokenizer_comes_back_from_the_storage(tmp_path: Path) -> None:
    tokenizer = words()
    before = tokenizer.fingerprint()
    expected = tokenizer(CAPTIONS)[0]
    assert tokenizer.fingerprint() == before, "what it was called with is no part of it"
    folder = Storage(str(tmp_path / "tokenizer"))
    for name, data in tokenizer.files().items():
        folder.write(name, data)
    again = PromptTokenizer.read(folder, 8)
    assert torch.equal(again(CAPTIONS)[0], expected)
    assert again.fingerprint() == before
    assert again.inputs() == tokenizer.inputs()
    assert PromptTokenizer.of_words(CAPTIONS[:2], 8).fingerprint() != before
    assert words(9).fingerprint() != before


@pytest.mark.parametrize("name", ["clip_tokenizer", "bert_tokenizer", "llama_tokenizer"])
def test_a_real_tokenizer_pads_at_its_end_and_comes_back(name: str, tmp_path: Path) -> None:
    if not (SHARED / name).is_dir():
        pytest.skip(f"no {name} beside the project")
    tokenizer = PromptTokenizer.from_name(str(SHARED / name), 12)
    ids, mask = tokenizer(["a girl in a pink dress", ""])
    inputs = tokenizer.inputs()
    assert ids.shape == (2, 12)
    for row, real in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
        assert row[real:] == [inputs.pad_id] * (12 - real)
    assert not torch.equal(ids[0], ids[1])
    folder = Storage(str(tmp_path))
    for file, data in tokenizer.files().items():
        folder.write(file, data)
    again = PromptTokenizer.read(folder, 12)
    assert torch.equal(again(["a girl in a pink dress"])[0][0], ids[0])
    assert again.fingerprint() == tokenizer.fingerprint()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers creates an empty tokenizer of two tokens for it."""
    CLIPTextModel(CLIPTextConfig(vocab_size=32, max_position_embeddings=8, **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^--tokenizer '.*': no tokenizer in a folder of this name.*tokenizer.json"):
        PromptTokenizer.from_name(str(tmp_path), 8)
    with pytest.raises(InputError, match=r"^--text-encoder '.*': no tokenizer"):
        FrozenTextEncoder(str(tmp_path), 8)
    with pytest.raises(InputError, match=r"^--text-encoder 'no/such/folder': no text encoder"):
        FrozenTextEncoder("no/such/folder", 8)


# -- frozen encoders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "clip", "t5"])
def test_frozen_encoders_by_folder(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = FrozenTextEncoder(write_encoder(tmp_path, kind), 8)
    capfd.readouterr()
    hidden = encoder(["a red circle", "a square", ""])
    assert hidden.shape == (3, 8, 16)
    assert hidden.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    # A prompt's hidden states do not depend on the rest of the batch.
    assert torch.allclose(encoder(["a square"])[0], hidden[1], atol=1e-6)
    ids, mask = encoder.tokenize(["a red circle"])
    real = int(mask.sum())
    # Its own words do not depend on the length of the padding either.
    longer = FrozenTextEncoder(str(tmp_path), 14)(["a red circle"])
    assert torch.allclose(longer[0, :real], hidden[0, :real], atol=1e-5)
    if kind == "clip":
        # As pipelines call it: the text encoder only, without a mask.
        reference = CLIPModel.from_pretrained(tmp_path).text_model(input_ids=ids).last_hidden_state
        assert torch.allclose(reference, hidden[:1], atol=1e-6)


def test_a_fingerprint_is_of_content(tmp_path: Path) -> None:
    first = FrozenTextEncoder(write_encoder(tmp_path / "a", "bert"), 8)
    copy = FrozenTextEncoder(write_encoder(tmp_path / "b", "bert"), 8)
    assert first.fingerprint() == copy.fingerprint()
    assert FrozenTextEncoder(str(tmp_path / "a"), 9).fingerprint() != first.fingerprint()
    with torch.no_grad():
        next(copy.model.parameters()).add_(1)
    assert first.fingerprint() != copy.fingerprint()


def test_too_many_tokens_for_the_encoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_tokens 20.*takes at most 16.*--max-tokens"):
        FrozenTextEncoder(write_encoder(tmp_path, "clip"), 20)


# -- into the network ----------------------------------------------------------------------------------------------


def test_the_encoder_from_scratch_learns_every_weight() -> None:
    tokenizer = words()
    context = TextContext(TextSettings(max_tokens=8, text_width=32, text_layers=1, text_heads=2), tokenizer.inputs())
    out = context({"input_ids": tokenizer(CAPTIONS)[0]})
    assert out.shape == (4, 8, 32)
    assert context.width == 32
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in context.parameters())


def test_a_word_is_more_like_itself_elsewhere_than_like_another_word() -> None:
    """Before training. With CLIP's initialisation both are 0.4."""
    torch.manual_seed(0)
    first, places = 3, (3, 9)
    context = TextContext(TextSettings(max_tokens=12), TextInputs(vocabulary_size=40, pad_id=0, bos_id=1, eos_id=2))
    input_ids_BT = torch.randint(first, 40, (40, 12))
    # One word at two positions, among different words.
    input_ids_BT[:, places] = torch.arange(first, 40).repeat(2)[:40, None]
    with torch.no_grad():
        here_BD, there_BD = context({"input_ids": input_ids_BT})[:, places].unbind(1)
    itself = torch.cosine_similarity(here_BD, there_BD).mean()
    others = torch.cosine_similarity(here_BD, there_BD.roll(1, 0)).mean()
    assert itself > 0.8
    assert others < 0.2


def test_frozen_hidden_states_are_projected_or_handed_on() -> None:
    hidden = torch.randn(2, 8, 16)
    handed_on = TextContext(TextSettings(text_encoder="x", max_tokens=8), TextInputs(width=16))
    assert torch.equal(handed_on({"encoder_hidden_states": hidden}), hidden)
    assert (handed_on.width, list(handed_on.parameters())) == (16, [])
    projected = TextContext(TextSettings(text_encoder="x", max_tokens=8, projection_width=32), TextInputs(width=16))
    out = projected({"encoder_hidden_states": hidden})
    assert out.shape == (2, 8, 32)
    # The LayerNorm is last.
    assert torch.allclose(out.mean(-1), torch.zeros(2, 8), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"text_width": 0}, "--text-width"),
        ({"max_tokens": 1}, "--max-tokens"),
        ({"text_heads": 3}, "--text-heads"),
        ({"projection_width": 64}, "--projection-width"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError, match=flag):
        TextSettings(**settings).check()
