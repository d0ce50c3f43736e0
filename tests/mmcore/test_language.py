"""mmcore/frozen/language.py: captions behind one prefix, in training and in writing; transformers is the reference."""

from pathlib import Path
from typing import Any

import pytest
import tiny_language
import torch
from tiny_language import WIDTH, batch_of, language_model, model_of
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from mmcore.captioners.decoding import greedy
from mmcore.errors import InputError
from mmcore.frozen.caption_writer import ByTransformers, CaptionWriter
from mmcore.frozen.language import FrozenLanguageModel
from mmcore.frozen.llama import Llama
from mmcore.frozen.tokenizers import LineTokenizer, PieceTokenizer, first_sentence, read_caption_tokenizer
from mmcore.storage import Storage

CAPTIONS = [["a dog", "two dogs run over grass", ""], ["x", "a", "it is a red ball."]]
PROMPT = "say it:"
KINDS = ["llama", "opt", "gpt_neox"]


def images(num: int, seed: int = 0, num_tokens: int = 5) -> Tensor:
    return torch.randn(num, num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


# -- training ------------------------------------------------------------------------------------------------------


def each_alone(model: Any, prefix: list[int], image_1QW: Tensor, ids: list[int]) -> Tensor:
    """Logits of the tokens after the begin token, by transformers: one row, no mask of our own."""
    embed = model.get_input_embeddings()
    embeddings = torch.cat([embed(torch.tensor([prefix])), image_1QW, embed(torch.tensor([ids[1:-1]]))], dim=1)
    return model(inputs_embeds=embeddings).logits[0, -(len(ids) - 1) :]


@pytest.mark.parametrize("kind", KINDS)
def test_captions_behind_one_prefix_equal_each_caption_alone(kind: str) -> None:
    lm = language_model(kind).double()
    reference = model_of(kind).double()
    prefix = lm.prefix_ids(PROMPT)
    ids_BCT, lengths_BC = batch_of(lm.tokenizer, CAPTIONS)
    image_BQW = images(2).double().requires_grad_()
    logits_NV, labels_N = lm.caption_logits(prefix, image_BQW, ids_BCT, lengths_BC)
    expected, labels = [], []
    for image, captions in enumerate(CAPTIONS):
        for text in filter(None, captions):
            ids = lm.tokenizer.encode(text, 40)
            expected.append(each_alone(reference, list(prefix), image_BQW[image : image + 1], ids))
            labels += ids[1:]
    assert labels_N.tolist() == labels
    # measured 1.3e-6 on logits up to 5: transformers computes softmax and RMSNorm in fp32
    torch.testing.assert_close(logits_NV, torch.cat(expected), rtol=0, atol=1e-5)
    (mine,) = torch.autograd.grad(logits_NV.square().sum(), image_BQW)
    (theirs,) = torch.autograd.grad(torch.cat(expected).square().sum(), image_BQW)
    assert theirs.abs().max() > 1
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)  # measured 1e-4 on gradients up to 114
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.parameters())


def test_only_rows_are_padded_and_the_last_token_is_not_read() -> None:
    lm = language_model("llama")
    ids_BCT, lengths_BC = batch_of(lm.tokenizer, CAPTIONS)
    seen: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda model, arguments, keywords: seen.append(keywords["inputs_embeds"].shape[1]), with_kwargs=True
    )
    prefix = lm.prefix_ids(PROMPT)
    lm.caption_logits(prefix, images(2), ids_BCT, lengths_BC)
    longest = max(sum(len(text) for text in captions) for captions in CAPTIONS)
    assert seen == [len(prefix) + 5 + longest]


def test_training_mode_leaves_the_model_as_it_is_and_blocks_can_be_recomputed() -> None:
    lm = language_model("opt")  # of a dropout of 0.1
    lm.train()
    assert not any(module.training for module in lm.modules())
    assert len(lm.blocks()) == tiny_language.SIZES["num_hidden_layers"]


def test_lora_changes_nothing_at_first_and_trains_alone() -> None:
    lm, ids = language_model("llama"), batch_of(language_model("llama").tokenizer, CAPTIONS)
    before = lm.caption_logits((5, 1), images(2), *ids)[0]
    lm.add_lora(2)
    logits_NV, labels_N = lm.caption_logits((5, 1), images(2), *ids)
    assert torch.equal(logits_NV, before)
    names = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in lm.named_parameters() if "lora_" in name}
    assert len(names) == 8  # two matrices at queries and values of two layers
    torch.nn.functional.cross_entropy(logits_NV, labels_N).backward()
    assert {name for name, parameter in lm.named_parameters() if parameter.grad is not None} == names


# -- writing -------------------------------------------------------------------------------------------------------


def by_transformers(lm: FrozenLanguageModel, image_BQW: Tensor, penalty: float, num_tokens: int) -> list[list[int]]:
    """Greedy captions by ``generate``, up to an end token or the first token with a sentence's mark."""
    prefix_BPW = lm.embed(lm.prefix_ids(PROMPT)).expand(len(image_BQW), -1, -1)
    line_break, closing = lm.tokenizer.token_ids.eos_id, set(lm.tokenizer.sentence_end_ids())
    silent = [index for index in lm.tokenizer.token_ids.silent_ids if index not in lm.end_ids]
    made = lm.model.generate(
        inputs_embeds=torch.cat([prefix_BPW, image_BQW], dim=1),
        attention_mask=torch.ones(len(image_BQW), prefix_BPW.shape[1] + image_BQW.shape[1], dtype=torch.long),
        do_sample=False,
        max_new_tokens=num_tokens,
        repetition_penalty=penalty,
        eos_token_id=[*lm.end_ids, line_break],
        suppress_tokens=[*silent, *range(lm.tokenizer.token_ids.size, tiny_language.VOCABULARY)],
    )
    captions = []
    for row in made.tolist():
        caption: list[int] = []
        for token in row:
            if token in (*lm.end_ids, line_break):
                break
            caption.append(token)
            if token in closing:
                break
        captions.append(caption)
    return captions


def greedy_of(writer: CaptionWriter, image_BQW: Tensor, max_length: int) -> list[list[int]]:
    return greedy(writer, image_BQW, max_length, writer.model.tokenizer.token_ids, closing_V=writer.closing_V)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_captions_are_those_of_transformers(kind: str, penalty: float) -> None:
    found: list[list[int]] = []
    for seed in range(2):
        lm = language_model(kind, seed)
        image_BQW = images(4, seed)
        writer = CaptionWriter(lm, lm.prefix_ids(PROMPT), penalty)
        captions = greedy_of(writer, image_BQW, 12)
        assert captions == by_transformers(lm, image_BQW, penalty, 12)
        assert captions == [greedy_of(writer, image_BQW[i : i + 1], 12)[0] for i in range(4)], "depends on its batch"
        found += captions
    assert len({tuple(each) for each in found}) > 5
    if penalty > 1:
        assert all(len(set(each)) > len(each) / 2 for each in found)


def biased(lm: FrozenLanguageModel, token: int, by: float) -> FrozenLanguageModel:
    """`lm` with a bias for `token`."""
    lm.model.register_forward_hook(
        lambda model, arguments, made: made.logits.__setitem__((..., token), made.logits[..., token] + by)
    )
    return lm


@pytest.mark.parametrize("mark", ["\n", ".", "end"])
def test_ended_captions_leave_the_batch(mark: str) -> None:
    lm = language_model("opt", 1)  # of transformers, whose forward pass can be watched
    token = lm.end_ids[0] if mark == "end" else lm.tokenizer.tokenizer(mark)["input_ids"][0]
    lm = biased(lm, token, 1.5)
    expected = by_transformers(lm, images(12), 1.0, 10)
    rows: list[int] = []
    lm.model.register_forward_pre_hook(
        lambda model, arguments, keywords: rows.append(len(keywords["inputs_embeds"])), with_kwargs=True
    )
    captions = greedy_of(CaptionWriter(lm, lm.prefix_ids(PROMPT)), images(12), 10)
    assert captions == expected
    closing = lm.tokenizer.sentence_end_ids()
    steps = [min(10, len(each) + (not each or each[-1] not in closing)) for each in captions]
    assert len(set(steps)) > 2
    rows = rows[: 1 + max(steps)]
    # The prompt once for all, then the images, then whoever is not at its end.
    assert rows == [1, *(sum(own > step for own in steps) for step in range(max(steps)))]


def test_ended_captions_leave_the_batch_of_a_llama_too(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("llama", 1)
    line_break, logits, read = lm.tokenizer.token_ids.eos_id, Llama._logits, Llama.read_words
    lm = biased(lm, line_break, 1.5)
    rows: list[int] = []

    def biased_logits(llama: Llama, x: Tensor) -> Tensor:
        made = logits(llama, x)
        made[:, line_break] += 1.5
        return made

    def counted(llama: Llama, words_RW: Tensor, state: Any) -> Tensor:
        rows.append(len(words_RW))
        assert {len(words_RW)} == {len(state.keys[0]), *(len(key) for key, _ in state.images)}
        return read(llama, words_RW, state)

    monkeypatch.setattr(Llama, "_logits", biased_logits)
    monkeypatch.setattr(Llama, "read_words", counted)
    captions = greedy_of(CaptionWriter(lm, lm.prefix_ids(PROMPT)), images(12), 10)
    assert captions == by_transformers(lm, images(12), 1.0, 10)
    closing = lm.tokenizer.sentence_end_ids()
    steps = [min(10, len(each) + (not each or each[-1] not in closing)) for each in captions]
    assert len(set(steps)) > 2
    assert rows == [sum(own > step for own in steps) for step in range(1, max(steps))]


def test_what_is_no_plain_llama_in_fp32_is_computed_by_transformers() -> None:
    def reader(lm: FrozenLanguageModel) -> Any:
        return CaptionWriter(lm, lm.prefix_ids(PROMPT)).reader

    assert isinstance(reader(language_model("llama")), Llama)
    others = [language_model("opt"), language_model("llama").double(), language_model("llama")]
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        attention = others[2].model.model.layers[0].self_attn
        setattr(attention, name, torch.nn.Linear(*getattr(attention, name).weight.shape[::-1]))
    others[2].model.config.attention_bias = True
    assert all(isinstance(reader(lm), ByTransformers) for lm in others)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(reader(language_model("llama")), ByTransformers)


def test_a_step_after_a_sentence_ends_the_caption() -> None:
    """Beam search has no other way to end there."""
    lm = language_model("gpt_neox")
    writer = CaptionWriter(lm, lm.prefix_ids(PROMPT))
    state = writer.start(images(2), 1, 4)
    writer.step(torch.zeros(2, dtype=torch.long), state)
    dot, letter = lm.tokenizer.tokenizer(".a")["input_ids"]
    logits_RV = writer.step(torch.tensor([dot, letter]), state)
    assert logits_RV.isfinite().sum(1).tolist() == [1, 256]  # bytes, one of them the line break
    assert logits_RV[0].argmax() == lm.tokenizer.token_ids.eos_id


@torch.inference_mode()
@pytest.mark.parametrize("rows_per_image", [1, 3])
@pytest.mark.parametrize("lora", [0, 2])
def test_a_llama_of_our_own_gives_the_logits_of_transformers(rows_per_image: int, lora: int) -> None:
    lm = language_model("llama")
    if lora:
        lm.add_lora(lora)
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mine, theirs = (CaptionWriter(lm, lm.prefix_ids(PROMPT), 1.5) for _ in range(2))
    assert isinstance(mine.reader, Llama)
    theirs.reader = ByTransformers(lm)
    states = [writer.start(images(3), rows_per_image, 4) for writer in (mine, theirs)]
    num_rows, generator = 3 * rows_per_image, torch.Generator().manual_seed(2)
    for images_B in ([2, 0], [1], None):
        words_R = torch.randint(3, 200, (num_rows,), generator=generator)
        logits = [writer.step(words_R, state) for writer, state in zip((mine, theirs), states, strict=True)]
        torch.testing.assert_close(*logits, rtol=0, atol=1e-5)  # measured 3.9e-6 on logits up to 5
        if images_B is None:
            break
        rows_R = torch.tensor(
            [image * rows_per_image + rows_per_image - 1 - row for image in images_B for row in range(rows_per_image)]
        )
        for state in states:
            state.select_rows(rows_R)
            state.select_images(torch.tensor(images_B))
        num_rows = len(rows_R)


# -- tokenizers ----------------------------------------------------------------------------------------------------


def test_a_line_ends_a_caption_and_comes_back_from_the_storage(tmp_path: Path) -> None:
    tokenizer = tiny_language.tokenizer()
    encoded = tokenizer.encode("a dog", 40)
    assert (encoded[0], len(encoded)) == (1, 7)
    assert tokenizer.tokenizer.decode(encoded[-1]) == "\n"
    assert tokenizer.decode(encoded) == tokenizer.decode([*encoded, 70, 71]) == "a dog"
    assert tokenizer.decode(tokenizer.encode("a dog. It runs", 40)) == "a dog."
    assert tokenizer.prompt_ids("a") == tuple(encoded[1:2])
    folder = Storage(str(tmp_path))
    for name, data in tokenizer.files().items():
        folder.write(name, data)
    again = read_caption_tokenizer(folder)
    assert isinstance(again, LineTokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert again.encode("a dog", 40) == encoded
    assert PieceTokenizer(tokenizer.tokenizer).fingerprint() != tokenizer.fingerprint()


def test_a_real_tokenizer_gives_the_layout_of_the_report() -> None:
    folder = Path(__file__).parents[3] / "shared" / "weights" / "llama_tokenizer"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    from mmcore.frozen.tokenizers import load_tokenizer

    tokenizer = LineTokenizer(load_tokenizer(str(folder), "--language-model"))
    prompt = tokenizer.prompt_ids("Generate a simple short caption:")
    assert len(prompt) == 8  # 9 with TinyLlama's tokenizer.json, which puts a begin token in front
    text = "A child in a pink dress is climbing up stairs ."
    joint = tokenizer.tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
    assert tokenizer.encode(text, 50) == [tokenizer.token_ids.bos_id, *joint]
    assert tokenizer.decode(joint) == text


@pytest.mark.parametrize(
    ("text", "expected"), [("a! b. c", "a!"), ("a?", "a?"), ("a b", "a b"), ("", ""), (". a", "."), ("a.b?", "a.")]
)
def test_the_first_sentence_ends_at_its_mark(text: str, expected: str) -> None:
    assert first_sentence(text) == expected


# -- by name or folder ---------------------------------------------------------------------------------------------


def test_a_folder_gives_its_model_and_scratch_is_always_the_same(tmp_path: Path) -> None:
    lm = FrozenLanguageModel.from_name(tiny_language.write("llama", tmp_path))
    assert (lm.width, lm.max_positions, lm.end_ids) == (WIDTH, 128, [2])
    ids = batch_of(lm.tokenizer, CAPTIONS)
    expected = language_model("llama")
    assert torch.equal(
        lm.caption_logits((5, 1), images(2), *ids)[0], expected.caption_logits((5, 1), images(2), *ids)[0]
    )
    assert lm.fingerprint() == expected.fingerprint() != language_model("llama", 1).fingerprint()
    scratch = FrozenLanguageModel.from_name("scratch")
    assert scratch.fingerprint() == FrozenLanguageModel.from_name("scratch").fingerprint() != lm.fingerprint()


def test_models_that_write_no_captions_are_refused(tmp_path: Path) -> None:
    def refused(model: Any, match: str) -> None:
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        tiny_language.tokenizer().tokenizer.save_pretrained(folder)
        with pytest.raises(InputError, match=match) as error:
            FrozenLanguageModel.from_name(str(folder))
        assert "\n" not in str(error.value)

    bert = {**tiny_language.SIZES, "intermediate_size": 32, "vocab_size": 262}
    refused(BertModel(BertConfig(**bert)), "^--language-model '.*': a bert model is no causal language model; name")
    t5 = T5Config(vocab_size=262, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    refused(T5Model(t5), "a t5 model is no causal language model")
    mamba = MambaConfig(vocab_size=262, hidden_size=16, num_hidden_layers=1, state_size=4)
    refused(MambaForCausalLM(mamba), "a mamba model has layers of the kind linear_attention, so captions cannot")
    with pytest.raises(InputError, match=r"^--language-model 'no/such': no language model in a folder of this name"):
        FrozenLanguageModel.from_name("no/such")


def test_tokenizers_and_lengths_that_do_not_fit_are_refused() -> None:
    lm = language_model("opt", num_positions=64)
    lm.check_positions(8, 32, 24)
    with pytest.raises(InputError, match=r"^max_length 25: .* makes 65 positions, but .*'opt' has 64; lower --max-le"):
        lm.check_positions(8, 32, 25)
    backend = lm.tokenizer.tokenizer.backend_tokenizer
    with pytest.raises(InputError, match="has no end token; choose another with --language-model"):
        LineTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    from mmcore.frozen.text import PromptTokenizer

    words = PromptTokenizer.of_words(["a dog a dog"], 8).tokenizer
    with pytest.raises(InputError, match="has no token of a line break; choose another with --language-model"):
        LineTokenizer(words)
    small = model_of("llama")
    small.config.vocab_size = 200
    with pytest.raises(InputError, match="its tokenizer has 259 tokens, the model only 200"):
        FrozenLanguageModel(small, lm.tokenizer, "small")
