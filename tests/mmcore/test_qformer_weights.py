"""The Q-Former against transformers' BLIP-2 and BERT on tiny random weights, and the reading and writing of weights."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    OPTConfig,
)

from mmcore.captioners.qformer import MatchingHeads, QFormer
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.captioners.qformer_losses import itm_logits, similarities
from mmcore.captioners.qformer_weights import (
    bert_settings,
    blip2_settings,
    check_memory_width,
    generation_state,
    lavis_state,
    load_blip2,
    load_lavis,
    load_lavis_head,
    qformer_config,
    retrieval_state,
    start_from_bert,
)
from mmcore.errors import InputError

FLAG, NUM_QUERIES, FEATURES = "--qformer", 5, 8
SETTINGS = QFormerSettings(
    vocabulary_size=40, width=32, num_layers=3, num_heads=4, ffn_width=48, num_queries=NUM_QUERIES, memory_width=24,
    max_positions=16, dropout=0.2, attention_dropout=0.3, norm_epsilon=1e-11,
)  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
LANGUAGE = OPTConfig(
    vocab_size=20, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=16,
    max_position_embeddings=16,
)  # fmt: skip
# Rows of text with padding; a single row.
LENGTHS = ([6, 2, 4], [5])
# Measured: at most 4.3e-6 on values up to 4.6.
CLOSE: dict[str, float] = {"rtol": 0, "atol": 2e-5}

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def at_random(model: Any, seed: int = 0) -> Any:
    """Large random weights, also of norms and biases, so that no part of the mathematics hides."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        if "norm" in name.lower() and name.endswith("weight"):
            weight += 1
    return model.eval()


def blip2_of(kind: Any, settings: QFormerSettings = SETTINGS) -> Any:
    config = Blip2Config(
        qformer_config=qformer_config(settings).to_dict(),
        vision_config=VISION,
        text_config=LANGUAGE,
        num_query_tokens=NUM_QUERIES,
        image_text_hidden_size=FEATURES,
        image_token_index=19 if kind is Blip2ForConditionalGeneration else None,
    )
    return at_random(kind(config))


@pytest.fixture(scope="module")
def retrieval() -> Any:
    return blip2_of(Blip2ForImageTextRetrieval)


@pytest.fixture(scope="module")
def folder(retrieval: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("blip2")
    retrieval.save_pretrained(path)
    return str(path)


def read(folder: str) -> tuple[QFormer, MatchingHeads]:
    torch.manual_seed(1)
    qformer, heads = QFormer(blip2_settings(folder, flag=FLAG)).eval(), MatchingHeads(32, FEATURES)
    load_blip2(qformer, folder, flag=FLAG, heads=heads)
    return qformer, heads


def pixels_of(num_images: int) -> Tensor:
    return torch.randn(num_images, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def text_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    mask_RT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids_RT = torch.randint(1, 40, mask_RT.shape, generator=torch.Generator().manual_seed(4))
    return ids_RT * mask_RT, mask_RT.long()


# -- the outputs of transformers' BLIP-2 ---------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS, ids=["batch 3", "batch 1"])
@torch.no_grad()
def test_outputs_equal_those_of_transformers(retrieval: Any, folder: str, lengths: list[int]) -> None:
    (qformer, _), (ids_RT, mask_RT) = read(folder), text_of(lengths)
    memory_BLE = torch.randn(len(lengths), 7, 24, generator=torch.Generator().manual_seed(5))
    queries_BQD, real_RT = retrieval.query_tokens.expand(len(lengths), -1, -1), mask_RT.bool()
    embedded_RTD = retrieval.embeddings(ids_RT)

    theirs = retrieval.qformer(query_embeds=queries_BQD, encoder_hidden_states=memory_BLE)
    state = qformer.queries(memory_BLE)
    torch.testing.assert_close(state.hidden_BQD, theirs.last_hidden_state, **CLOSE)

    theirs = retrieval.qformer(query_embeds=embedded_RTD, query_length=0, attention_mask=mask_RT)
    torch.testing.assert_close(qformer.text(ids_RT, mask_RT)[real_RT], theirs.last_hidden_state[real_RT], **CLOSE)

    joint = {
        "query_embeds": torch.cat([queries_BQD, embedded_RTD], dim=1),
        "query_length": NUM_QUERIES,
        "encoder_hidden_states": memory_BLE,
    }
    there_BS = torch.cat([torch.ones(len(lengths), NUM_QUERIES), mask_RT], dim=1)
    theirs = retrieval.qformer(**joint, attention_mask=there_BS).last_hidden_state
    queries, text = qformer.multimodal(memory_BLE, ids_RT, mask_RT)
    torch.testing.assert_close(queries, theirs[:, :NUM_QUERIES], **CLOSE)
    torch.testing.assert_close(text[real_RT], theirs[:, NUM_QUERIES:][real_RT], **CLOSE)

    # ITG in one pass: queries do not see words, words see all queries and the words before.
    visible_SS = torch.ones(there_BS.shape[1], there_BS.shape[1], dtype=torch.bool).tril()
    visible_SS[:NUM_QUERIES, :NUM_QUERIES] = True
    visible_BHSS = visible_SS.expand(len(lengths), 1, -1, -1)
    theirs = retrieval.qformer(**joint, attention_mask=visible_BHSS).last_hidden_state
    torch.testing.assert_close(
        qformer.causal(ids_RT, mask_RT, state)[real_RT], theirs[:, NUM_QUERIES:][real_RT], **CLOSE
    )
    torch.testing.assert_close(state.hidden_BQD, theirs[:, :NUM_QUERIES], **CLOSE)


def scores_of(theirs: Any, lengths: list[int]) -> list[Tensor]:
    ids_RT, mask_RT = text_of(lengths)
    both = [
        theirs(pixels_of(len(lengths)), ids_RT, mask_RT, use_image_text_matching_head=matching)
        for matching in (False, True)
    ]
    return [both[0].image_embeds, both[0].text_embeds, both[0].logits_per_image, both[1].logits_per_image]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["batch 3", "batch 1"])
@torch.no_grad()
def test_features_and_scores_equal_those_of_transformers(retrieval: Any, folder: str, lengths: list[int]) -> None:
    (qformer, heads), (ids_RT, mask_RT) = read(folder), text_of(lengths)
    memory_BLE = retrieval.vision_model(pixels_of(len(lengths))).last_hidden_state
    images_BQF = heads.image_features(qformer.queries(memory_BLE).hidden_BQD)
    texts_RF = heads.text_features(qformer.text(ids_RT, mask_RT))
    cosines = similarities(images_BQF, texts_RF, images_BQF, texts_RF)
    matching = itm_logits(heads.pair_logits(qformer.multimodal(memory_BLE, ids_RT, mask_RT)[0]))
    found = [images_BQF, texts_RF, cosines.image_to_text_BM, matching]
    for mine, other in zip(found, scores_of(retrieval, lengths), strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@torch.no_grad()
def test_exported_weights_give_the_same_scores(retrieval: Any, folder: str) -> None:
    """From a Q-Former that was not read from a folder, so that nothing of one is left."""
    qformer, heads = at_random(QFormer(SETTINGS), seed=7), at_random(MatchingHeads(32, FEATURES), seed=8)
    theirs = blip2_of(Blip2ForImageTextRetrieval)
    loaded = theirs.load_state_dict(retrieval_state(qformer, heads), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("vision_model.") for name in loaded.missing_keys)
    (ids_RT, mask_RT), memory_BLE = text_of([6, 2]), theirs.vision_model(pixels_of(2)).last_hidden_state
    images_BQF = heads.image_features(qformer.queries(memory_BLE).hidden_BQD)
    matching = itm_logits(heads.pair_logits(qformer.multimodal(memory_BLE, ids_RT, mask_RT)[0]))
    their_images, _, _, their_matching = scores_of(theirs, [6, 2])
    torch.testing.assert_close(images_BQF, their_images, **CLOSE)
    torch.testing.assert_close(matching, their_matching, **CLOSE)
    assert not torch.allclose(matching, scores_of(retrieval, [6, 2])[3], atol=1e-2)


@torch.no_grad()
def test_the_q_former_of_a_model_for_generation_goes_both_ways(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, vocabulary_size=None)
    theirs = blip2_of(Blip2ForConditionalGeneration, settings)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    # Files without weights of the Q-Former are not read.
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for weight, file in places.items() if weight.startswith(("qformer", "query", "language_projection"))}
    for file in set(places.values()) - needed:
        (tmp_path / file).unlink()
    assert set(places.values()) - needed
    name = str(tmp_path)
    assert blip2_settings(name, flag=FLAG) == settings
    qformer, projection = QFormer(settings).eval(), nn.Linear(32, 16)
    load_blip2(qformer, name, flag=FLAG, language_projection=projection)

    features = theirs.get_image_features(pixels_of(2)).pooler_output
    memory_BLE = theirs.vision_model(pixels_of(2)).last_hidden_state
    torch.testing.assert_close(projection(qformer.queries(memory_BLE).hidden_BQD), features, **CLOSE)

    # A Q-Former with a text half is exported without it.
    qformer, projection = at_random(QFormer(SETTINGS), seed=7), at_random(nn.Linear(32, 16), seed=8)
    loaded = theirs.load_state_dict(generation_state(qformer, projection), strict=False)
    assert not loaded.unexpected_keys
    assert all(missing.startswith(("vision_model.", "language_model.")) for missing in loaded.missing_keys)
    torch.testing.assert_close(
        theirs.get_image_features(pixels_of(2)).pooler_output,
        projection(qformer.queries(memory_BLE).hidden_BQD),
        **CLOSE,
    )


# -- folders of BLIP-2 ---------------------------------------------------------------------------------------------


def test_settings_are_read_from_a_folder(folder: str) -> None:
    assert blip2_settings(folder, flag=FLAG) == SETTINGS


def test_a_q_former_without_text_reads_a_folder_with_it(folder: str) -> None:
    whole, _ = read(folder)
    qformer = QFormer(dataclasses.replace(SETTINGS, vocabulary_size=None)).eval()
    load_blip2(qformer, folder, flag=FLAG)
    memory_BLE = torch.randn(2, 7, 24)
    assert torch.equal(qformer.queries(memory_BLE).hidden_BQD, whole.queries(memory_BLE).hidden_BQD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("qformer.layernorm.bias"), r"missing \['qformer.layernorm.bias'\], unknown \[\]"),
        (lambda state: state.pop("itm_head.bias"), r"missing \['itm_head.bias'\], unknown \[\]"),
        (
            lambda state: state.update({"qformer.gate": torch.zeros(1)}),
            r"missing \[\], unknown \['qformer.gate'\]",
        ),
        (
            lambda state: state.update({"query_tokens": torch.zeros(1, 6, 32)}),
            r"query_tokens has shape \(1, 6, 32\), the recipe builds \(1, 5, 32\)",
        ),
    ],
    ids=["missing", "head missing", "unknown", "shape"],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(
    folder: str, tmp_path: Path, change: Any, message: str
) -> None:
    state = load_file(f"{folder}/model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(Path(folder, "config.json").read_text())
    with pytest.raises(InputError, match=message) as caught:
        read(str(tmp_path))
    assert str(caught.value).startswith(f"{FLAG} {str(tmp_path)!r}: ")
    assert "\n" not in str(caught.value)


def test_folders_without_a_readable_blip_2_are_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--qformer 'no/such': no BLIP-2 in a folder of this name"):
        blip2_settings("no/such", flag=FLAG)
    bert = saved(BertModel, tmp_path / "bert")
    with pytest.raises(InputError, match=r"--qformer '.*bert': a bert model, not a BLIP-2; name another"):
        blip2_settings(bert, flag=FLAG)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(Path(folder, "config.json").read_text())
    with pytest.raises(InputError, match=r"no model.safetensors there; weights must be in safetensors files"):
        read(str(broken))
    (broken / "model.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match=r"its weights cannot be read \(.*\); fetch them again"):
        read(str(broken))


def test_an_encoder_of_another_width_is_refused_with_both_numbers() -> None:
    check_memory_width(SETTINGS, 24, encoder="--encoder 'a'", where="--qformer 'b'")
    message = "--encoder 'a': its image tokens have 512 channels, but --qformer 'b' takes 24; name the vision encoder"
    with pytest.raises(InputError, match=message):
        check_memory_width(SETTINGS, 512, encoder="--encoder 'a'", where="--qformer 'b'")


# -- a BERT --------------------------------------------------------------------------------------------------------


def saved(kind: Any, path: Path, **changes: Any) -> str:
    fields: dict[str, Any] = {
        "vocab_size": 39, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 16, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3,
        "layer_norm_eps": 1e-11,
    }  # fmt: skip
    at_random(kind(BertConfig(**fields | changes))).save_pretrained(path)
    return str(path)


def from_bert(name: str) -> QFormer:
    settings = bert_settings(name, flag="--text-model", memory_width=24, num_queries=NUM_QUERIES)
    assert settings == SETTINGS
    torch.manual_seed(1)
    qformer = QFormer(settings).eval()
    start_from_bert(qformer, name, flag="--text-model")
    return qformer


@torch.no_grad()
def test_first_weights_from_a_bert_give_its_hidden_states_and_logits(tmp_path: Path) -> None:
    name = saved(BertForMaskedLM, tmp_path)
    qformer, theirs = from_bert(name), BertForMaskedLM.from_pretrained(name).eval()
    mask_RT = text_of([6, 2, 4])[1]
    ids_RT, real_RT = text_of([6, 2, 4])[0].clamp(max=38), mask_RT.bool()
    made = theirs(ids_RT, attention_mask=mask_RT, output_hidden_states=True)
    hidden_RTD = qformer.text(ids_RT, mask_RT)
    torch.testing.assert_close(hidden_RTD[real_RT], made.hidden_states[-1][real_RT], **CLOSE)
    torch.testing.assert_close(qformer.logits(hidden_RTD)[real_RT][:, :39], made.logits[real_RT], **CLOSE)


@torch.no_grad()
def test_queries_start_with_the_text_s_feed_forward_layers_and_all_else_at_random(tmp_path: Path) -> None:
    qformer = from_bert(saved(BertModel, tmp_path))  # without a language head
    torch.manual_seed(1)
    fresh = QFormer(SETTINGS).state_dict()
    state = qformer.state_dict()
    for name, value in state.items():
        if "query_ffn." in name:
            assert torch.equal(value, state[name.replace("query_ffn.", "text_ffn.")])
            assert not torch.equal(value, fresh[name])
        elif "cross_attention." in name or name == "query_tokens_QD":
            assert torch.equal(value, fresh[name])
    assert torch.equal(state["word_embeddings.weight"][39:], fresh["word_embeddings.weight"][39:])
    assert state["lm_head.dense.weight"].std().item() == pytest.approx(0.02, rel=0.2)


def test_what_is_no_bert_is_refused(folder: str, tmp_path: Path) -> None:
    def settings(name: str) -> QFormerSettings:
        return bert_settings(name, flag="--text-model", memory_width=24)

    with pytest.raises(InputError, match=r"--text-model '.*': a blip-2 model; a Q-Former starts from a BERT"):
        settings(folder)
    with pytest.raises(InputError, match=r"--text-model '.*': its activation is relu, a Q-Former has gelu"):
        settings(saved(BertModel, tmp_path, hidden_act="relu"))
    with pytest.raises(InputError, match="--text-model 'no/such': no BERT in a folder of this name"):
        settings("no/such")


# -- files of LAVIS ------------------------------------------------------------------------------------------------


def lavis_file(qformer: QFormer, heads: MatchingHeads, path: Path, **changes: Tensor) -> str:
    """A file with all that LAVIS stores."""
    state = {name: value.clone() for name, value in lavis_state(qformer, heads).items()}
    state |= {
        "temp": torch.tensor(0.05),
        "visual_encoder.cls_token": torch.zeros(1),
        "ln_vision.weight": torch.zeros(1),
        "Qformer.bert.embeddings.position_ids": torch.arange(16)[None],
        "Qformer.cls.predictions.decoder.weight": state["Qformer.bert.embeddings.word_embeddings.weight"],
        "Qformer.cls.predictions.decoder.bias": state["Qformer.cls.predictions.bias"],
    }
    torch.save({"model": state | changes}, path)
    return str(path)


def test_names_of_lavis_are_those_of_bert_and_its_own() -> None:
    names = set(lavis_state(QFormer(SETTINGS), MatchingHeads(32, FEATURES)))
    bert = BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48))
    of_bert = {f"Qformer.{name}" for name in bert.state_dict() if "token_type" not in name and "decoder" not in name}
    assert of_bert < names
    kinds = ("weight", "bias")
    layer = "Qformer.bert.encoder.layer"
    own = {
        f"{layer}.{index}.{part}.{kind}"
        for index in range(3)
        for part in ("intermediate_query.dense", "output_query.dense", "output_query.LayerNorm")
        for kind in kinds
    }
    own |= {
        f"{layer}.{index}.crossattention.{part}.{kind}"
        for index in (0, 2)
        for part in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
        for kind in kinds
    }
    heads = {f"{part}.{kind}" for part in ("vision_proj", "text_proj", "itm_head") for kind in kinds}
    assert names - of_bert == own | heads | {"query_tokens"}


def test_a_file_of_lavis_is_read_with_its_language_head(tmp_path: Path) -> None:
    source, heads = at_random(QFormer(SETTINGS)), at_random(MatchingHeads(32, FEATURES))
    path = lavis_file(source, heads, tmp_path / "stage1.pth")
    qformer, own_heads = QFormer(SETTINGS), MatchingHeads(32, FEATURES)
    assert load_lavis(qformer, path, flag="--lavis", heads=own_heads) == pytest.approx(0.05)
    for mine, other in ((qformer, source), (own_heads, heads)):
        for name, value in other.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), name
    without_text = QFormer(dataclasses.replace(SETTINGS, vocabulary_size=None))
    load_lavis(without_text, path, flag="--lavis")
    assert torch.equal(without_text.query_tokens_QD, source.query_tokens_QD)


def test_a_folder_s_language_head_comes_from_a_file_of_lavis(folder: str, tmp_path: Path) -> None:
    source = at_random(QFormer(SETTINGS), seed=7)
    qformer, _ = read(folder)
    before = {name: value.clone() for name, value in qformer.state_dict().items()}
    load_lavis_head(qformer, lavis_file(source, MatchingHeads(32, FEATURES), tmp_path / "a.pth"), flag="--lavis")
    for name, value in qformer.state_dict().items():
        assert torch.equal(value, source.state_dict()[name] if name.startswith("lm_head.") else before[name]), name


def test_other_files_of_lavis_are_refused_in_one_line(tmp_path: Path) -> None:
    qformer, heads = at_random(QFormer(SETTINGS)), MatchingHeads(32, FEATURES)
    path = tmp_path / "a.pth"
    decoder = "Qformer.cls.predictions.decoder.weight"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({decoder: torch.zeros(40, 32)}, f"{decoder} differs from Qformer.bert.embeddings.word_embeddings.weight"),
        ({"Qformer.gate": torch.zeros(1)}, r"missing \[\], unknown \['Qformer.gate'\]"),
        ({"itm_head.bias": torch.zeros(3)}, r"itm_head.bias has shape \(3,\)"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=rf"--lavis '{path}': .*{message}") as caught:
            load_lavis(qformer, lavis_file(qformer, heads, path, **changes), flag="--lavis", heads=heads)
        assert "\n" not in str(caught.value)
    torch.save({"model": {"epoch": 3}}, path)
    with pytest.raises(InputError, match="not a file of weights by name; name a checkpoint of LAVIS' BLIP-2"):
        load_lavis(qformer, str(path), flag="--lavis")
    torch.save({"model": lavis_state(qformer, None), "config": Path}, path)  # needs a pickled class
    with pytest.raises(InputError, match="not a file of weights"):
        load_lavis_head(qformer, str(path), flag="--lavis")
