"""The decoder against PyTorch's own layers, and the searches against a decoder without a cache and brute force."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.captioners.caption_decoder import CaptionDecoder
from mmcore.captioners.decoding import beam_search, greedy
from mmcore.decoder import (
    DecoderLayer,
    DecoderLayers,
    HeadNorm,
    LayerSettings,
    Packing,
    attention,
    dropout,
    mask_to_bias,
    merge_heads,
    split_heads,
)
from mmcore.text import BOS_ID, EOS_ID, PAD_ID, UNK_ID, TokenIds

IDS = TokenIds(40, BOS_ID, EOS_ID, (PAD_ID, BOS_ID, UNK_ID))

pytestmark = pytest.mark.usefixtures("one_thread")


def decoder_of(**changes: Any) -> CaptionDecoder:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocabulary_size": 40,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_width": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "max_length": 12,
        "norm_first": False,
        "tie_embeddings": False,
    }
    decoder = CaptionDecoder(**settings | changes).eval()
    with torch.no_grad():  # spread out the logits, as untrained captions rarely end
        decoder.output.weight.mul_(4)
    return decoder


def memory_of(num_images: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_images, 5, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- the layer -----------------------------------------------------------------------------------------------------


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def torch_layer(layer: DecoderLayer) -> nn.TransformerDecoderLayer:
    """PyTorch's layer with the weights of ours."""
    settings = layer.settings
    theirs = nn.TransformerDecoderLayer(
        settings.width,
        settings.num_heads,
        settings.ffn_width,
        dropout=0.0,
        activation=F.relu if settings.activation == "relu" else tanh_gelu,
        batch_first=True,
        norm_first=settings.norm_first,
    )
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(layer.self_qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(layer.self_qkv.bias)
        theirs.multihead_attn.in_proj_weight.copy_(torch.cat([layer.cross_q.weight, layer.cross_kv.weight]))
        theirs.multihead_attn.in_proj_bias.copy_(torch.cat([layer.cross_q.bias, layer.cross_kv.bias]))
        for mine, other in (
            (layer.self_out, theirs.self_attn.out_proj),
            (layer.cross_out, theirs.multihead_attn.out_proj),
            (layer.ffn_in, theirs.linear1),
            (layer.ffn_out, theirs.linear2),
            (layer.self_norm, theirs.norm1),
            (layer.cross_norm, theirs.norm2),
            (layer.ffn_norm, theirs.norm3),
        ):
            other.load_state_dict(mine.state_dict())
    return theirs.to(layer.ffn_in.weight.dtype)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_packed_decoder_equals_padded_torch_layers(norm_first: bool, training: bool) -> None:
    """Three captions per image, of different lengths and one missing: logits and gradients of the real words."""
    decoder = decoder_of(norm_first=norm_first).double().train(training)
    ids_RT = torch.randint(4, 40, (6, 9), generator=torch.Generator().manual_seed(2))
    lengths_R = torch.tensor([9, 4, 0, 1, 7, 2])
    memory_BLD = memory_of(2, dtype=torch.float64).requires_grad_()
    packing = Packing.from_lengths(lengths_R, 9)
    logits_NV = decoder(ids_RT, packing, memory_BLD)

    layers = [torch_layer(layer).train(training) for layer in decoder.layers]
    x = decoder.embedding(ids_RT) * math.sqrt(32) + decoder.positions_TD[:9]
    causal = nn.Transformer.generate_square_subsequent_mask(9, dtype=torch.float64)
    memory_RLD = memory_BLD.repeat_interleave(3, dim=0)
    for layer in layers:
        x = layer(x, memory_RLD, tgt_mask=causal)
    expected_RTV = decoder.output(decoder.final_norm(x))
    mask_RT = torch.arange(9)[None] < lengths_R[:, None]
    assert logits_NV.shape == (23, 40)
    # measured 3.6e-15 on logits up to 7
    torch.testing.assert_close(logits_NV, expected_RTV[mask_RT], rtol=0, atol=1e-12)
    (mine,) = torch.autograd.grad(logits_NV.square().sum(), memory_BLD, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected_RTV[mask_RT].square().sum(), memory_BLD)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("is_causal", "biased"), [(False, False), (True, False), (False, True)])
def test_attention_by_products_equals_the_fused_kernel(is_causal: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 4, 7, 8, generator=generator, requires_grad=True) for _ in range(3))
    bias = mask_to_bias(torch.arange(7) < torch.tensor([7, 2, 5])[:, None])[:, None, None] if biased else None
    outputs, gradients = [], []
    for fused in (False, True):
        output = attention(q, k, v, bias, is_causal=is_causal, fused=fused)
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.square().sum(), (q, k, v)))
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6)  # measured 3.0e-7
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)  # measured 3.3e-6


SETTINGS = LayerSettings(32, 4, 64, 24, activation="gelu", qk_norm=True)


def layers_of(**changes: Any) -> DecoderLayers:
    torch.manual_seed(0)
    return DecoderLayers(dataclasses.replace(SETTINGS, **changes), 2).eval()


def test_a_gelu_layer_that_sees_a_part_of_its_memory_equals_torch_s() -> None:
    layers = layers_of(qk_norm=False, memory_width=32).double()
    x_RTD, memory_BLD = torch.randn(3, 6, 32).double(), memory_of(3, dtype=torch.float64)
    seen_BL = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]
    packing = Packing.full(3, 6)
    made = layers(packing.pack(x_RTD), packing, memory_BLD, memory_bias=mask_to_bias(seen_BL)[:, None, None])
    expected = x_RTD
    for layer in layers.layers():
        expected = torch_layer(layer).eval()(
            expected,
            memory_BLD,
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64),
            memory_key_padding_mask=~seen_BL,
        )
    # measured 1.3e-15
    torch.testing.assert_close(packing.pad(made), expected, rtol=0, atol=1e-12)


def test_qk_norm_equals_torch_s_and_bounds_the_scores() -> None:
    norm = HeadNorm(8)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(-1, 2, 8))
    x = 100 * torch.randn(3, 4, 8)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight), rtol=0, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    layer, packing = layers_of().layers()[0], Packing.full(1, 5)
    x_ND, memory_1LM = torch.randn(5, 32), torch.randn(1, 7, 24)
    before = layer(x_ND, packing, memory_1LM)
    with torch.no_grad():
        for part in (layer.self_qkv.weight[:64], layer.self_qkv.bias[:64], layer.cross_q.weight, layer.cross_q.bias):
            part *= 100
    # Without the norm, scores ten thousand times as large would leave one position of each sum.
    torch.testing.assert_close(layer(x_ND, packing, memory_1LM), before, rtol=0, atol=5e-6)  # measured 1.1e-6


def test_layers_from_zero_add_no_more_than_a_bias() -> None:
    x_ND, packing = torch.randn(5, 32), Packing.full(1, 5)
    layers = layers_of(zero_outputs=True)
    change_ND = layers(x_ND, packing, torch.randn(1, 7, 24)) - x_ND
    torch.testing.assert_close(change_ND, change_ND[:1].expand_as(change_ND))
    assert layers.layers()[0].cross_out.weight.abs().sum() == 0


def test_packing_and_heads_round_trip() -> None:
    x = torch.randn(3, 4, 6)
    packing = Packing.from_lengths(torch.tensor([2, 0, 4]), 4)
    packed = packing.pack(x)
    assert torch.equal(packed, torch.cat([x[0, :2], x[2]]))
    padded = packing.pad(packed)
    assert torch.equal(padded[0, :2], x[0, :2])
    assert torch.equal(padded[2], x[2])
    assert not padded[1].any()
    assert not padded[0, 2:].any()
    assert torch.equal(merge_heads(split_heads(x, 3)), x)


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.1, 0.15, 0.5])
def test_dropout_zeroes_its_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 1003)
    y = dropout(x, probability, training=True)
    share = round(probability * 256) / 256
    assert share == pytest.approx(probability, abs=1 / 512)
    # 1e6 draws: the standard error of the share is below 5e-4.
    assert (y == 0).float().mean().item() == pytest.approx(share, abs=2.5e-3)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - share)])
    assert y.mean().item() == pytest.approx(1.0, abs=5e-3)
    assert y.var().item() == pytest.approx(share / (1 - share), rel=0.02)
    # Neighbours, which share a 64-bit word, are independent.
    kept = (y != 0).float().flatten()[:1_000_000].view(-1, 8)
    correlation = torch.corrcoef(kept.T)
    assert (correlation - torch.eye(8)).abs().max() < 0.02


def test_dropout_is_the_identity_in_evaluation_and_repeats_with_its_seed() -> None:
    x = torch.randn(5, 7)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5, training=True))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_dropout_passes_gradients_where_it_passed_values() -> None:
    x = torch.randn(40, 3, requires_grad=True)
    torch.manual_seed(0)
    y = dropout(x, 0.25, training=True)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, (y != 0).float() / 0.75)


# -- one word at a time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [False, True])
def test_incremental_equals_full_decoding(norm_first: bool) -> None:
    decoder = decoder_of(norm_first=norm_first)
    ids_RT = torch.randint(4, 40, (6, 12), generator=torch.Generator().manual_seed(3))
    memory_BLD = memory_of(2)
    full_NV = decoder(ids_RT, Packing.from_lengths(torch.full((6,), 12), 12), memory_BLD).view(6, 12, -1)
    state = decoder.start(memory_BLD, 3, 12)
    for position in range(12):
        step_RV = decoder.step(ids_RT[:, position], state)
        torch.testing.assert_close(step_RV, full_NV[:, position], rtol=0, atol=1e-5)  # measured 2.4e-6


@pytest.mark.parametrize("memory_width", [24, None], ids=["cross-attention", "none"])
@pytest.mark.parametrize("fused_on_cpu", [False, True])
def test_steps_of_several_positions_equal_one_pass(memory_width: int | None, fused_on_cpu: bool) -> None:
    """A prefix with bidirectional attention and missing tokens, then single positions, then two at once.

    In between, images are re-ordered.
    """
    layers = layers_of(memory_width=memory_width, fused_on_cpu=fused_on_cpu)
    x_RTD, memory = torch.randn(4, 9, 32), {}
    if memory_width:
        seen_BL = torch.arange(5) < torch.tensor([4, 2])[:, None]
        memory = {"memory_BLM": torch.randn(2, 5, 24), "memory_bias": mask_to_bias(seen_BL)[:, None, None]}
    steps, ends = [(0, 4), (4, 5), (5, 6), (6, 8), (8, 9)], torch.tensor([4, 4, 4, 4, 5, 6, 8, 8, 9])
    there_R1S = (torch.arange(9) >= 4) | (torch.arange(9) < torch.tensor([4, 1, 3, 2])[:, None, None])
    bias = mask_to_bias((torch.arange(9) < ends[:, None]) & there_R1S)[:, None]
    packing = Packing.full(4, 9)
    expected = packing.pad(layers(packing.pack(x_RTD), packing, bias=bias, **memory))
    state = layers.start(4, 9, **memory)
    for start, end in steps:
        if start == 6:
            rows_R = torch.tensor([2, 3, 0, 1])
            state.select_rows(rows_R)
            state.select_images(torch.tensor([1, 0]))
            x_RTD, bias, expected = x_RTD[rows_R], bias[rows_R], expected[rows_R]
        made = layers.step(x_RTD[:, start:end], state, bias[:, :, start:end, :end])
        torch.testing.assert_close(made, expected[:, start:end], rtol=0, atol=3e-6)  # measured 7.2e-7
    assert state.position == 9
    with pytest.raises(AssertionError, match="more positions"):
        layers.step(x_RTD[:, :1], state)


def test_rows_can_be_reordered_and_images_dropped_on_the_way() -> None:
    decoder = decoder_of()
    generator = torch.Generator().manual_seed(4)
    ids_RT = torch.randint(4, 40, (6, 10), generator=generator)
    memory_BLD = memory_of(3)
    state = decoder.start(memory_BLD, 2, 10)
    for position in range(4):
        decoder.step(ids_RT[:, position], state)
    # Image 1 is dropped. Of image 0 the second row continues twice, and the rows of image 2 are swapped.
    rows_R = torch.tensor([1, 1, 5, 4])
    state.select_rows(rows_R)
    state.select_images(torch.tensor([0, 2]))
    tails_RT = torch.randint(4, 40, (4, 6), generator=generator)
    whole_RT = torch.cat([ids_RT[rows_R, :4], tails_RT], dim=1)
    full = decoder(whole_RT, Packing.from_lengths(torch.full((4,), 10), 10), memory_BLD[[0, 2]]).view(4, 10, -1)
    for position in range(4, 10):
        step_RV = decoder.step(whole_RT[:, position], state)
        torch.testing.assert_close(step_RV, full[:, position], rtol=0, atol=1e-5)


# -- searches ------------------------------------------------------------------------------------------------------


def log_probabilities(decoder: CaptionDecoder, memory_1LD: Tensor, words: list[int]) -> Tensor:
    """Logits (V,) of the word after `words`, from the whole prefix, without tokens that no caption contains."""
    ids = torch.tensor([[BOS_ID, *words]])
    logits = decoder(ids, Packing.from_lengths(torch.tensor([ids.shape[1]]), ids.shape[1]), memory_1LD)[-1]
    logits[[PAD_ID, BOS_ID, UNK_ID]] = -torch.inf
    return logits.log_softmax(-1)


@torch.inference_mode()
def greedy_without_cache(decoder: CaptionDecoder, memory_1LD: Tensor, max_length: int) -> list[int]:
    words: list[int] = []
    while len(words) < max_length:
        word = int(log_probabilities(decoder, memory_1LD, words).argmax())
        if word == EOS_ID:
            break
        words.append(word)
    return words


def prone_to_end(decoder: CaptionDecoder, by: float) -> CaptionDecoder:
    with torch.no_grad():
        decoder.output.bias[EOS_ID] += by
    return decoder


def test_greedy_of_a_batch_is_greedy_of_each_image_without_a_cache() -> None:
    decoder = prone_to_end(decoder_of(), 3.5)
    memory_BLD = memory_of(12)
    together = greedy(decoder, memory_BLD, 12, IDS)
    assert together == [greedy_without_cache(decoder, memory_BLD[i : i + 1], 12) for i in range(12)]
    assert together == [greedy(decoder, memory_BLD[i : i + 1], 12, IDS)[0] for i in range(12)]
    assert len({len(words) for words in together}) > 2, "the images are to end at different lengths"
    assert not any({PAD_ID, BOS_ID, EOS_ID, UNK_ID} & set(words) for words in together)


def test_beam_search_of_a_batch_is_that_of_each_image() -> None:
    decoder = prone_to_end(decoder_of(), 3.5)
    memory_BLD = memory_of(12)
    together = beam_search(decoder, memory_BLD, 12, IDS, 3)
    assert together == [beam_search(decoder, memory_BLD[i : i + 1], 12, IDS, 3)[0] for i in range(12)]
    assert len({len(words) for words in together}) > 1
    assert together != greedy(decoder, memory_BLD, 12, IDS)


def test_one_beam_is_greedy() -> None:
    """Without a length penalty. With one, a beam may continue past the end token for a better mean."""
    decoder = prone_to_end(decoder_of(), 3.5)
    memory_BLD = memory_of(12)
    assert beam_search(decoder, memory_BLD, 12, IDS, 1, length_penalty=0.0) == greedy(decoder, memory_BLD, 12, IDS)


@torch.inference_mode()
def best_of_all(decoder: CaptionDecoder, memory_1LD: Tensor, max_length: int, length_penalty: float) -> list[int]:
    """Score every caption that ends within `max_length` words, counting the end token."""
    words = range(UNK_ID + 1, decoder.output.out_features)
    best = (-math.inf, [])
    for length in range(1, max_length + 1):
        for prefix in itertools.product(words, repeat=length - 1):
            total = 0.0
            for k in range(length):
                following = prefix[k] if k < length - 1 else EOS_ID
                total += float(log_probabilities(decoder, memory_1LD, list(prefix[:k]))[following])
            best = max(best, (total / length**length_penalty, list(prefix)))
    return best[1]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_beam_finds_the_best_of_all_captions(length_penalty: float) -> None:
    """Three words and the end token, at most four words: 3^3 unfinished prefixes fit into 40 beams."""
    decoder = decoder_of(vocabulary_size=7, max_length=4)
    memory_BLD = memory_of(6)
    found = beam_search(decoder, memory_BLD, 4, IDS, 40, length_penalty)
    assert found == [best_of_all(decoder, memory_BLD[i : i + 1], 4, length_penalty) for i in range(6)]
    assert len({tuple(words) for words in found}) > 1


def test_searches_stop_early_and_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of()
    calls: list[int] = []
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda ids_R, state: calls.append(len(ids_R)) or step(ids_R, state))
    with torch.no_grad():
        decoder.output.bias[EOS_ID] = -1e4
    assert [len(words) for words in greedy(decoder, memory_of(3), 7, IDS)] == [7, 7, 7]
    assert calls == [3] * 7
    calls.clear()
    assert [len(words) for words in beam_search(decoder, memory_of(3), 7, IDS, 2)] == [7, 7, 7]
    assert calls == [6] * 7

    with torch.no_grad():
        decoder.output.bias[EOS_ID] = 1e4
    for search, rows in ((greedy, 3), (lambda d, m, n, ids: beam_search(d, m, n, ids, 2), 6)):
        calls.clear()
        assert search(decoder, memory_of(3), 12, IDS) == [[], [], []]
        assert calls == [rows]

    with torch.no_grad():
        decoder.output.bias[EOS_ID] = 0
    prone_to_end(decoder, 3.5)
    calls.clear()
    lengths = sorted(len(words) for words in greedy(decoder, memory_of(12), 12, IDS))
    expected = [sum(length >= k for length in lengths) for k in range(min(lengths[-1] + 1, 12))]
    assert calls == expected, "each image is decoded until its own end and no further"
    assert sum(calls) < 12 * 12
