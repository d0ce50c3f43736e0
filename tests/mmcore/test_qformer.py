"""The Q-Former's masks, queries, precision and decoding; test_qformer_weights.py compares it with transformers."""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcore.captioners import qformer as module
from mmcore.captioners import qformer_layers
from mmcore.captioners.decoding import beam_search, greedy
from mmcore.captioners.qformer import MatchingHeads, QFormer
from mmcore.captioners.qformer_layers import QFormerSettings, attention_after
from mmcore.decoder import attention, mask_to_bias
from mmcore.errors import InputError
from mmcore.frozen_weights import hold_frozen
from mmcore.recomputation import recompute_blocks
from mmcore.text import TokenIds

PAD, BOS, EOS, NUM_WORDS = 0, 1, 2, 40
IDS = TokenIds(NUM_WORDS, BOS, EOS, (PAD, BOS))
SETTINGS = QFormerSettings(
    vocabulary_size=NUM_WORDS, width=32, num_layers=3, num_heads=4, ffn_width=64, num_queries=5, memory_width=24,
    max_positions=12, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def qformer_of(scale: float = 10.0, **changes: Any) -> QFormer:
    """Weights are N(0, 0.02 times `scale`): small ones hardly mix positions."""
    torch.manual_seed(0)
    qformer = QFormer(dataclasses.replace(SETTINGS, **changes)).eval()
    with torch.no_grad():
        for name, weight in qformer.named_parameters():
            if "norm" not in name:
                weight.mul_(scale if name == "query_tokens_QD" else scale * (qformer.settings.width / 768) ** 0.5)
    return qformer


def memory_of(num_images: int, seed: int = 1) -> Tensor:
    return torch.randn(num_images, 7, 24, generator=torch.Generator().manual_seed(seed))


def text_of(lengths: list[int], num_positions: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Random words, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids_RT = torch.randint(3, NUM_WORDS, (len(lengths), num_positions), generator=generator)
    mask_RT = torch.arange(num_positions) < torch.tensor(lengths)[:, None]
    return ids_RT.masked_fill(~mask_RT, PAD), mask_RT.long()


# -- masks ---------------------------------------------------------------------------------------------------------


def seen_by(output_XD: Tensor, qformer: QFormer, ids: list[int]) -> list[str]:
    """For each output position, `#` for each query and each word that it depends on."""
    weights = torch.randn(output_XD.shape[1], generator=torch.Generator().manual_seed(0))
    rows = []
    for output_D in output_XD:
        assert qformer.word_embeddings is not None
        inputs = (qformer.query_tokens_QD, qformer.word_embeddings.weight)
        loss = output_D @ weights
        to_queries, to_words = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
        rows.append(" ".join("#" if row.any() else "." for row in [*to_queries, *to_words[ids]]))
    return rows


def test_each_position_sees_what_the_docstring_draws() -> None:
    drawn = re.findall(r"^ +[qt]  ([#. ]{7}) +[qt]  ([#. ]{7}) +[qt]  ([#. ]{7})$", module.__doc__ or "", re.MULTILINE)
    assert len(drawn) == 4
    itc, itm, itg = ([row[task] for row in drawn] for task in range(3))
    qformer, memory_1LE = qformer_of(num_layers=1, num_queries=2), memory_of(1)
    ids, mask_1T = [5, 9], torch.ones(1, 2)
    ids_1T = torch.tensor([ids])
    state = qformer.queries(memory_1LE)
    of_queries = seen_by(state.hidden_BQD[0], qformer, ids)
    assert of_queries + seen_by(qformer.text(ids_1T, mask_1T)[0], qformer, ids) == itc
    queries_1QD, text_1TD = qformer.multimodal(memory_1LE, ids_1T, mask_1T)
    assert seen_by(torch.cat([queries_1QD[0], text_1TD[0]]), qformer, ids) == itm
    assert of_queries + seen_by(qformer.causal(ids_1T, mask_1T, state)[0], qformer, ids) == itg


def test_queries_alone_see_the_image_and_in_their_layers_only() -> None:
    qformer, (ids_RT, mask_RT) = qformer_of(), text_of([4, 4], 4)
    one, other = memory_of(2), memory_of(2, seed=9)
    assert [layer.cross_attention is not None for layer in qformer.layers] == [True, False, True]
    assert not torch.allclose(qformer.queries(one).hidden_BQD, qformer.queries(other).hidden_BQD, atol=1e-2)
    ones, others = (qformer.multimodal(memory, ids_RT, mask_RT) for memory in (one, other))
    assert not torch.allclose(ones[0], others[0], atol=1e-2)
    # One layer: the words see queries that have not yet seen the image.
    qformer = qformer_of(num_layers=1)
    ones, others = (qformer.multimodal(memory, ids_RT, mask_RT) for memory in (one, other))
    assert torch.equal(ones[1], others[1])
    assert not torch.allclose(ones[0], others[0], atol=1e-2)


def paths(qformer: QFormer) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Each path on words: (memory, ids, mask), one text per image -> (R, T, D)."""
    return {
        "text": lambda memory, ids, mask: qformer.text(ids, mask),
        "multimodal": lambda memory, ids, mask: qformer.multimodal(memory, ids, mask)[1],
        "causal": lambda memory, ids, mask: qformer.causal(ids, mask, qformer.queries(memory)),
    }


@pytest.mark.parametrize("path", ["text", "multimodal", "causal"])
def test_padding_changes_nothing_and_a_missing_text_gives_zeros(path: str) -> None:
    qformer, memory_BLE = qformer_of().train(), memory_of(3).requires_grad_()
    compute, lengths = paths(qformer)[path], [6, 0, 3]
    ids_RT, mask_RT = text_of(lengths, 6)
    made_RTD = compute(memory_BLE, ids_RT, mask_RT)
    assert not made_RTD[mask_RT == 0].any()
    for row, length in enumerate(lengths):
        if length:
            alone = compute(memory_BLE[[row]], ids_RT[[row], :length], mask_RT[[row], :length])
            torch.testing.assert_close(made_RTD[row, :length], alone[0], rtol=0, atol=1e-5)  # measured 1.6e-6
    with torch.autograd.set_detect_anomaly(True):  # a NaN on the way raises, also one that is dropped later
        made_RTD.square().sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in qformer.parameters())
    assert qformer.word_embeddings is not None
    assert qformer.word_embeddings.weight.grad is not None
    assert not qformer.word_embeddings.weight.grad[PAD].any()


# -- queries -------------------------------------------------------------------------------------------------------


def parted(qformer: QFormer) -> list[float]:
    """How far queries of an image differ, as a share of the largest value: in their outputs and in their gradients."""
    hidden_BQD = qformer.queries(memory_of(2)).hidden_BQD
    weights_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    (gradient_QD,) = torch.autograd.grad((hidden_BQD @ weights_D).tanh().sum(), qformer.query_tokens_QD)
    return [((each - each[..., :1, :]).abs().max() / each.abs().max()).item() for each in (hidden_BQD, gradient_QD)]


def test_queries_part_and_queries_of_zero_would_not() -> None:
    qformer = qformer_of(scale=1.0)
    assert qformer.query_tokens_QD.std().item() == pytest.approx(0.02, rel=0.2)  # 160 draws
    assert min(parted(qformer)) > 0.5
    with torch.no_grad():
        qformer.query_tokens_QD.zero_()
    assert max(parted(qformer)) < 1e-5


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (192, 0.04)])
def test_first_weights_are_those_of_bert_or_larger_if_narrower(width: int, std: float) -> None:
    torch.manual_seed(0)
    for name, weight in QFormer(dataclasses.replace(SETTINGS, width=width, num_layers=1)).named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("norm.weight")))), name
        else:
            expected = 0.02 if name == "query_tokens_QD" else std
            assert weight.std().item() == pytest.approx(expected, rel=0.1), name


# -- precision and training ----------------------------------------------------------------------------------------


def outputs_of(qformer: QFormer, heads: MatchingHeads) -> dict[str, Tensor]:
    """What each path gives, by name."""
    memory_BLE, (ids_RT, mask_RT) = memory_of(2), text_of([4, 2], 4)
    state, keys = qformer.queries(memory_BLE), qformer.memory_keys(memory_BLE)
    text_RTD, causal_RTD = qformer.text(ids_RT, mask_RT), qformer.causal(ids_RT, mask_RT, state)
    queries_BQD, words_BTD = qformer.multimodal(keys, ids_RT, mask_RT)
    return {
        "queries": state.hidden_BQD,
        "text": text_RTD,
        "causal": causal_RTD,
        "multimodal queries": queries_BQD,
        "multimodal text": words_BTD,
        "image features": heads.image_features(state.hidden_BQD),
        "text features": heads.text_features(text_RTD),
        "pair logits": heads.pair_logits(queries_BQD),
        "keys": state.kv[0][0],
        "logits": qformer.logits(causal_RTD),
        "step": qformer.step(ids_RT[:, 0], qformer.start(memory_BLE, 1, 2)),
    }


# What the last linear layer of each gives. All other outputs are in fp32.
IN_BF16 = {"keys", "logits", "step"}


@pytest.mark.parametrize("training", [False, True])
def test_only_linear_layers_and_products_are_in_bf16(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    qformer, heads = qformer_of(scale=1.0), MatchingHeads(32, 8)
    expected = outputs_of(qformer, heads)
    computed: dict[str, set[torch.dtype]] = {"norm": set(), "softmax": set(), "linear": set()}
    for part in [*qformer.modules(), *heads.modules()]:
        kind = {nn.LayerNorm: "norm", nn.Linear: "linear"}.get(type(part))
        if kind is not None:
            part.register_forward_hook(lambda m, given, made, kind=kind: computed[kind].add(made.dtype))
    softmax = Tensor.softmax

    def seen(*arguments: Any, **keywords: Any) -> Tensor:
        made = softmax(*arguments, **keywords)
        computed["softmax"].add(made.dtype)
        return made

    monkeypatch.setattr(Tensor, "softmax", seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_of(qformer.train(training), heads)
    assert {name for name, made in found.items() if made.dtype == torch.bfloat16} == IN_BF16
    # The heads' linear layers are in fp32.
    assert computed == {"norm": {torch.float32}, "softmax": {torch.float32}, "linear": {torch.bfloat16, torch.float32}}
    for name, made in found.items():
        # Measured differences: at most 0.0016.
        torch.testing.assert_close(made.float(), expected[name], rtol=0, atol=0.005)
        assert not torch.equal(made.float(), expected[name]), name


def test_all_is_fp32_under_autocast_to_fp16() -> None:
    qformer, heads = qformer_of(), MatchingHeads(32, 8)
    expected = outputs_of(qformer, heads)
    with torch.autocast("cpu", dtype=torch.float16):
        assert nn.Linear(32, 2)(torch.ones(1, 32)).dtype == torch.float16
        found = outputs_of(qformer, heads)
    for name, made in found.items():
        assert torch.equal(made, expected[name]), name


def test_features_in_bf16_are_read_as_fp32() -> None:
    qformer, memory_BLE = qformer_of(), memory_of(2).bfloat16()
    rounded = qformer.queries(memory_BLE)
    torch.testing.assert_close(rounded.hidden_BQD, qformer.queries(memory_BLE.float()).hidden_BQD, rtol=0, atol=0)


def test_frozen_ones_hold_what_autocast_would_cast() -> None:
    qformer, heads = qformer_of(), MatchingHeads(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = outputs_of(qformer, heads)
    model = nn.ModuleDict({"qformer": qformer, "heads": heads}).requires_grad_(False)
    hold_frozen(model, "auto", "bf16")
    assert {weight.dtype for weight in heads.parameters()} == {torch.float32}
    assert torch.bfloat16 in {weight.dtype for weight in qformer.parameters()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_of(qformer, heads)
    for name, made in found.items():
        assert torch.equal(made, expected[name]), name


@pytest.mark.parametrize("path", ["queries", "text", "multimodal", "causal"])
@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_both_kinds_of_dropout_act_in_training_only(kind: str, path: str) -> None:
    qformer, memory_BLE, (ids_RT, mask_RT) = qformer_of(**{kind: 0.5}), memory_of(2), text_of([4, 2], 4)
    compute = {**paths(qformer), "queries": lambda memory, ids, mask: qformer.queries(memory).hidden_BQD}[path]
    first, second = compute(memory_BLE, ids_RT, mask_RT), compute(memory_BLE, ids_RT, mask_RT)
    assert torch.equal(first, second)
    qformer.train()
    assert not torch.allclose(compute(memory_BLE, ids_RT, mask_RT), first, atol=1e-2)


@pytest.mark.parametrize("path", ["queries", "text"])
def test_dropout_acts_on_the_embeddings(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qformer_layers, "dropout", lambda x, probability, training: x)
    qformer, memory_BLE, (ids_RT, mask_RT) = qformer_of(dropout=0.5), memory_of(2), text_of([4, 2], 4)
    compute = {**paths(qformer), "queries": lambda memory, ids, mask: qformer.queries(memory).hidden_BQD}[path]
    evaluated = compute(memory_BLE, ids_RT, mask_RT)
    qformer.train()
    assert not torch.allclose(compute(memory_BLE, ids_RT, mask_RT), evaluated, atol=1e-2)


@pytest.mark.parametrize("path", ["text", "multimodal", "causal"])
def test_training_without_dropout_computes_the_same(path: str) -> None:
    """Training on a CPU uses two products in place of the fused attention."""
    qformer, memory_BLE, (ids_RT, mask_RT) = qformer_of(), memory_of(2), text_of([4, 2], 4)
    evaluated = paths(qformer)[path](memory_BLE, ids_RT, mask_RT)
    trained = paths(qformer.train())[path](memory_BLE, ids_RT, mask_RT)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-5)  # measured 1.3e-6


def test_recomputed_layers_have_the_same_gradients() -> None:
    gradients = []
    for recomputed in (False, True):
        qformer = qformer_of(dropout=0.1, attention_dropout=0.1).train()
        if recomputed:
            recompute_blocks(qformer)
        torch.manual_seed(3)
        ids_RT, mask_RT = text_of([4, 2, 3, 1], 4)
        hidden_RTD = qformer.causal(ids_RT, mask_RT, qformer.queries(memory_of(2)))
        queries_RQD, _ = qformer.multimodal(memory_of(4), ids_RT, mask_RT)
        (qformer.logits(hidden_RTD).square().sum() + queries_RQD.square().sum()).backward()
        gradients.append([weight.grad for weight in qformer.parameters()])
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


# -- what passes share ---------------------------------------------------------------------------------------------


def test_keys_of_the_memory_stand_for_the_memory() -> None:
    qformer, memory_BLE, (ids_RT, mask_RT) = qformer_of(), memory_of(3), text_of([4, 2, 3, 1], 4)
    keys, images_R = qformer.memory_keys(memory_BLE), torch.tensor([2, 0, 2, 1])
    assert torch.equal(qformer.queries(keys).hidden_BQD, qformer.queries(memory_BLE).hidden_BQD)
    for mine, other in zip(
        qformer.multimodal(keys.of(images_R), ids_RT, mask_RT),
        qformer.multimodal(memory_BLE[images_R], ids_RT, mask_RT),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)  # measured 0


def test_attention_after_a_shared_past_equals_attention_with_copies_of_it() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(rows: int, positions: int) -> Tensor:
        return torch.randn(rows, 4, positions, 8, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v, past_k, past_v = drawn(6, 3), drawn(6, 3), drawn(6, 3), drawn(2, 5), drawn(2, 5)
    bias = mask_to_bias(torch.ones(3, 3, dtype=torch.bool).tril())
    mine = attention_after(q, (k, v), (past_k, past_v), bias)
    joint_k, joint_v = (
        torch.cat([past.repeat_interleave(3, dim=0), own], dim=2) for past, own in ((past_k, k), (past_v, v))
    )
    joint_bias = torch.cat([torch.zeros(3, 5), bias], dim=1)
    theirs = attention(q, joint_k, joint_v, joint_bias, fused=False)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)  # measured 2.3e-16
    for one, other in zip(
        *(torch.autograd.grad(each.square().sum(), (q, k, v, past_k, past_v)) for each in (mine, theirs)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)  # measured 1.4e-15


def test_the_captions_of_an_image_share_its_queries() -> None:
    """Values and gradients are those of one caption at a time."""
    qformer, memory_BLE = qformer_of().double(), memory_of(2).double()
    ids_RT, mask_RT = text_of([6, 2, 4, 0, 5, 6], 6)
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(6):
        state = qformer.queries(memory_BLE[[row // 3]])
        alone = qformer.causal(ids_RT[[row]], mask_RT[[row]], state)
        loss = loss + alone.square().sum()
        if row == 0:
            first = alone[0]
    weights = list(qformer.parameters())
    expected = torch.autograd.grad(loss, weights, materialize_grads=True)
    together_RTD = qformer.causal(ids_RT, mask_RT, qformer.queries(memory_BLE))
    torch.testing.assert_close(together_RTD[0], first, rtol=0, atol=1e-12)  # measured 2.5e-15
    found = torch.autograd.grad(together_RTD.square().sum(), weights, materialize_grads=True)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


# -- decoding ------------------------------------------------------------------------------------------------------


def test_steps_equal_causal_text() -> None:
    qformer, memory_BLE = qformer_of(), memory_of(2)
    ids_RT, mask_RT = text_of([12] * 6, 12)
    state = qformer.queries(memory_BLE)
    full_RTV = qformer.logits(qformer.causal(ids_RT, mask_RT, state))
    decoding = qformer.start_after(state, 3, 12)
    for position in range(12):
        step_RV = qformer.step(ids_RT[:, position], decoding)
        torch.testing.assert_close(step_RV, full_RTV[:, position], rtol=0, atol=2e-5)  # measured 3.3e-6
    with pytest.raises(AssertionError, match="13 tokens, but this Q-Former has 12 positions"):
        qformer.step(ids_RT[:, 0], decoding)


@dataclass
class Words:
    """A decoding state without keys and values."""

    memory_BLE: Tensor
    words_RT: Tensor

    def select_rows(self, rows_R: Tensor) -> None:
        self.words_RT = self.words_RT[rows_R]

    def select_images(self, images_B: Tensor) -> None:
        self.memory_BLE = self.memory_BLE[images_B]


class WithoutCache:
    """Decodes by `QFormer.causal` from the first word each time."""

    def __init__(self, qformer: QFormer) -> None:
        self.qformer = qformer

    def start(self, memory_BLE: Tensor, rows_per_image: int, num_positions: int) -> Words:
        return Words(memory_BLE, torch.zeros(len(memory_BLE) * rows_per_image, 0, dtype=torch.long))

    def step(self, ids_R: Tensor, state: Words) -> Tensor:
        state.words_RT = torch.cat([state.words_RT, ids_R[:, None]], dim=1)
        queries = self.qformer.queries(state.memory_BLE)
        hidden_RTD = self.qformer.causal(state.words_RT, torch.ones_like(state.words_RT), queries)
        return self.qformer.logits(hidden_RTD[:, -1])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_searches_find_what_they_find_without_a_cache(num_beams: int) -> None:
    qformer, memory_BLE = qformer_of(scale=15.0), memory_of(6, seed=2)
    assert qformer.lm_head is not None
    with torch.no_grad():  # captions of different lengths
        qformer.lm_head.bias[EOS] += 2.0

    def captions(decoder: Any) -> list[list[int]]:
        if num_beams == 1:
            return greedy(decoder, memory_BLE, 10, IDS)
        return beam_search(decoder, memory_BLE, 10, IDS, num_beams)

    found = captions(qformer)
    assert found == captions(WithoutCache(qformer))
    assert len({len(caption) for caption in found}) > 2
    assert len({tuple(caption) for caption in found}) > 4


# -- settings ------------------------------------------------------------------------------------------------------


def test_without_a_vocabulary_there_is_no_text_half() -> None:
    whole, queries_only = qformer_of(), qformer_of(vocabulary_size=None)
    names = {name for name, _ in queries_only.named_parameters()}
    left_out = {name for name, _ in whole.named_parameters()} - names
    assert {name for name in left_out if "text_ffn" not in name} == {
        "word_embeddings.weight", "position_embeddings.weight",
        "lm_head.dense.weight", "lm_head.dense.bias", "lm_head.norm.weight", "lm_head.norm.bias", "lm_head.bias",
    }  # fmt: skip
    assert not any("text_ffn" in name for name in names)
    queries_only.load_state_dict({name: whole.get_parameter(name) for name in names})
    assert torch.equal(queries_only.queries(memory_of(2)).hidden_BQD, whole.queries(memory_of(2)).hidden_BQD)
    with pytest.raises(AssertionError, match="no text half"):
        queries_only.text(*text_of([2], 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 0}, "num_queries 0 must be at least 1; change --num-queries"),
        ({"attention_dropout": 1.0}, "attention_dropout 1.0 must be from 0 to below 1; change --attention-dropout"),
        ({"num_heads": 5}, "num_heads 5 does not divide width 32; change --num-heads or --width"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(SETTINGS, **changes)
    assert str(caught.value) == message


def test_features_are_of_length_one_and_text_s_of_the_first_token() -> None:
    torch.manual_seed(0)
    heads, hidden_RTD = MatchingHeads(32, 8), torch.randn(3, 4, 32)
    images_BQF, texts_RF = heads.image_features(hidden_RTD), heads.text_features(hidden_RTD)
    assert images_BQF.shape == (3, 4, 8)
    for features in (images_BQF, texts_RF):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))
    changed_RTD = torch.cat([hidden_RTD[:, :1], torch.randn(3, 3, 32)], dim=1)
    assert torch.equal(heads.text_features(changed_RTD), texts_RF)


def test_the_first_stage_of_blip_2_has_its_published_size() -> None:
    """186.7 M trainable weights in LAVIS: the Q-Former with its text half, the heads and a temperature."""
    with torch.device("meta"):
        modules = [QFormer(QFormerSettings()), MatchingHeads(768)]
    assert 1 + sum(weight.numel() for module in modules for weight in module.parameters()) == 186_702_654
