"""Infinity: equality with the official code, batches, official files.

`INFINITY_GOLDEN` names the common prefix of a configuration (`.json`), of official weights (`.transformer.safetensors`,
`.vae.safetensors`) and of the official code's outputs (`.tensors.safetensors`). `pytest -m golden` runs those tests.
"""

import json
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmcore.errors import InputError, OptionError
from mmcore.generators.bsq import quantize, vectors_of
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_sampling import Step, draw_bits, sample
from mmcore.generators.infinity_scales import GRIDS, STRIDE, grids_of, num_positions, rope_places
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings
from mmcore.generators.infinity_weights import load_transformer, load_vae, official_transformer

# The outputs of two machines differ by the order of sums.
_TOLERANCE = 1e-4
_GRIDS = ((1, 1), (2, 2), (4, 4))
_FINEST = (8, 8)
_SETTINGS = InfinitySettings(num_layers=2, width=64, num_heads=2, text_channels=128, max_text_tokens=6, num_bits=4)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> InfinityTransformer:
    torch.manual_seed(0)
    model = InfinityTransformer(_SETTINGS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    text_BTC = torch.randn(len(lengths), max(lengths), 128, generator=torch.Generator().manual_seed(1))
    return text_BTC, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def drawn(model: InfinityTransformer, text: Tensor, mask: Tensor, numbers: Tensor | None, **options: Any) -> list[Step]:
    return list(sample(model, text, mask, _GRIDS, _FINEST, InfinityOptions(**options), numbers))


# -- the official code ---------------------------------------------------------------------------------------------

GOLDEN = os.environ.get("INFINITY_GOLDEN", "")
golden = [
    pytest.mark.golden,
    pytest.mark.skipif(not GOLDEN, reason="INFINITY_GOLDEN names no outputs of the official code"),
]


@pytest.fixture(scope="module")
def official() -> tuple[dict[str, Any], dict[str, Tensor], InfinityTransformer, InfinityVae]:
    config = json.loads(Path(f"{GOLDEN}.json").read_text())
    transformer = load_transformer(f"{GOLDEN}.transformer.safetensors", "golden").eval()
    vae = load_vae(f"{GOLDEN}.vae.safetensors", "golden").eval()
    return config, load_file(f"{GOLDEN}.tensors.safetensors"), transformer, vae


def golden_text(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    lengths = config["text_lengths"]
    parts = tensors["text_features"].split(lengths)
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True), mask_BT


def golden_schedule(config: dict[str, Any]) -> tuple[tuple[tuple[int, int], ...], tuple[int, int]]:
    ratio, budget = config["h_div_w"], config["pixel_budget"]
    grids = grids_of(ratio, budget)
    assert [[1, *grid] for grid in grids] == config["scale_schedule"]
    return grids, grids_of(ratio, "1M")[-1]


class TestOfficialCode:
    pytestmark = golden

    @torch.inference_mode()
    def test_tokenizer_gives_the_same_bits_and_image(self, official: Any) -> None:
        config, tensors, _, vae = official
        grids, _ = golden_schedule(config)
        patch = tensors["vae.z"].shape[-1] // grids[-1][1]
        latents = vae.encoder(tensors["image"])
        quantized = quantize(latents, [(h * patch, w * patch) for h, w in grids])
        torch.testing.assert_close(latents, tensors["vae.h"], atol=_TOLERANCE, rtol=0)
        for number, bits in enumerate(quantized.bits):
            assert torch.equal(bits.permute(0, 2, 3, 1), tensors[f"vae.bits.{number}"][:, 0].bool())
        image = vae.decoder(quantized.latents_BdHW).clamp(-1, 1)
        torch.testing.assert_close(image, tensors["vae.reconstruction"], atol=_TOLERANCE, rtol=0)

    @torch.inference_mode()
    def test_teacher_forced_logits(self, official: Any) -> None:
        config, tensors, transformer, _ = official
        grids, finest = golden_schedule(config)
        parts = tensors["teacher.inputs"].split([h * w for h, w in grids[1:]], dim=1)
        inputs = [part.transpose(1, 2).unflatten(2, grid) for part, grid in zip(parts, grids[1:], strict=True)]
        text = transformer.text_state(*golden_text(config, tensors))
        logits = transformer(text, inputs, grids, finest).flatten(2)
        torch.testing.assert_close(logits, tensors["teacher.logits"], atol=_TOLERANCE, rtol=0)

    @pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 1), slice(1, 2)], ids=["both", "first", "second"])
    def test_greedy_bits_and_image(self, official: Any, rows: slice) -> None:
        """Two prompts of different length in one batch, and each alone."""
        config, tensors, transformer, vae = official
        text, mask = (each[rows] for each in golden_text(config, tensors))
        grids, finest = golden_schedule(config)
        patch = tensors["vae.z"].shape[-1] // grids[-1][1]
        options = InfinityOptions(guidance=config["cfg"])
        for step in sample(transformer, text, mask, grids, finest, options, None, patch=patch):
            expected = tensors[f"greedy.logits.{step.number}"][rows] * config["tau"]
            torch.testing.assert_close(step.logits_BLd2, expected, atol=_TOLERANCE, rtol=0)
            bits = tensors[f"greedy.bits.{step.number}"][rows].bool()
            assert torch.equal(step.bits_Bdhw.permute(0, 2, 3, 1), bits)
        with torch.inference_mode():
            image = ((vae.decoder(step.latents_BdHW).clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
        difference = image.permute(0, 2, 3, 1).int() - tensors["greedy.image_uint8_rgb"][rows].int()
        assert difference.abs().max() <= 1


# -- grids and bits ------------------------------------------------------------------------------------------------


def test_all_ratios_have_growing_grids_of_about_one_area() -> None:
    assert len(GRIDS) == 15
    for ratio, grids in GRIDS.items():
        assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(grids))
        for budget, side in {"0.06M": 256, "0.25M": 512, "0.60M": 768, "1M": 1024}.items():
            height, width = grids_of(ratio, budget)[-1]
            assert height / width == pytest.approx(ratio, abs=0.01)
            assert height * width * STRIDE**2 == pytest.approx(side**2, rel=0.25), (ratio, budget)


@pytest.mark.parametrize(("ratio", "budget"), [(1.1, "1M"), (1.0, "2M")])
def test_unknown_grids_are_refused(ratio: float, budget: str) -> None:
    with pytest.raises(InputError, match="choose one of"):
        grids_of(ratio, budget)


def test_halves_of_positions_are_rounded_to_even() -> None:
    # 5 / 2 = 2.5 -> 2, and 15 / 2 = 7.5 -> 8.
    rows = rope_places(((2, 1), (6, 1)), (5, 1))[:2, 0]
    assert rows.tolist() == [0, 2]
    assert rope_places(((2, 1),), (15, 1))[:, 0].tolist() == [0, 8]


def test_quantize_keeps_each_residual_sign() -> None:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    quantized = quantize(latents, _GRIDS)
    assert [tuple(bits.shape[1:]) for bits in quantized.bits] == [(4, 1, 1), (4, 2, 2), (4, 4, 4)]
    assert torch.equal(quantized.bits[0], latents.mean((2, 3), keepdim=True) > 0)
    assert vectors_of(quantized.bits[0]).norm(dim=1).allclose(torch.ones(2, 1, 1))
    assert (quantized.latents_BdHW - latents).norm() < latents.norm()


def test_changed_bits_are_corrected_by_later_grids() -> None:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))

    def first_wrong(number: int, bits: Tensor) -> Tensor:
        return ~bits if number == 0 else bits

    right, wrong = quantize(latents, _GRIDS), quantize(latents, _GRIDS, first_wrong)
    assert torch.equal(right.bits[0], wrong.bits[0])
    assert not torch.equal(right.inputs[0], wrong.inputs[0])
    assert not torch.equal(right.bits[1], wrong.bits[1])
    # The input of the last grid is the sum of the grids before it, at the sides of the latent image.
    assert torch.equal(wrong.bits[2], latents > wrong.inputs[1])


# -- sampling ------------------------------------------------------------------------------------------------------


def test_cache_gives_the_logits_of_one_pass(model: InfinityTransformer) -> None:
    text, mask = prompts(3, 5)
    steps = drawn(model, text, mask, None, guidance=1.0)
    with torch.inference_mode():
        latents = steps[-1].latents_BdHW
        inputs = [torch.nn.functional.interpolate(step.latents_BdHW, size=grid, mode="bilinear")
                  for step, grid in zip(steps, _GRIDS[1:], strict=False)]  # fmt: skip
        assert latents.shape == (2, 4, 4, 4)
        whole = model(model.text_state(text, mask), inputs, _GRIDS, _FINEST)
    torch.testing.assert_close(torch.cat([step.logits_BLd2 for step in steps], 1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"guidance_layer": -1}, {"guided_grids": 1}], ids=str)
def test_an_image_does_not_depend_on_its_batch_mates(model: InfinityTransformer, options: dict[str, Any]) -> None:
    """Equal bits in one batch size whatever the other rows are. Padding of a shorter prompt has no effect."""
    text, mask = prompts(3, 5)
    numbers = torch.rand(2, num_positions(_GRIDS), 4, generator=torch.Generator().manual_seed(2))
    both = drawn(model, text, mask, numbers, **options)
    alone = drawn(model, text[:1, :3], mask[:1, :3], numbers[:1], **options)
    other = drawn(model, text.flip(0), mask.flip(0), numbers.flip(0), **options)
    for step, single, flipped in zip(both, alone, other, strict=True):
        assert torch.equal(step.bits_Bdhw, flipped.bits_Bdhw.flip(0))
        assert torch.equal(step.bits_Bdhw[:1], single.bits_Bdhw)


def test_guidance_changes_the_bits_and_ends_where_told(model: InfinityTransformer) -> None:
    text, mask = prompts(3, 5)
    guided, partly, plain = (
        drawn(model, text, mask, None, **options)
        for options in ({"guidance": 5.0}, {"guidance": 5.0, "guided_grids": 1}, {"guidance": 1.0})
    )
    assert not torch.equal(guided[0].logits_BLd2, plain[0].logits_BLd2)
    assert torch.equal(guided[0].logits_BLd2, partly[0].logits_BLd2)
    assert not torch.equal(guided[1].logits_BLd2, partly[1].logits_BLd2)


def test_patches_have_the_bits_of_their_positions() -> None:
    torch.manual_seed(0)
    patched = InfinityTransformer(InfinitySettings(2, 64, 2, 128, 6, num_bits=16)).eval()
    with torch.no_grad():
        for parameter in patched.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    steps = list(sample(patched, *prompts(3), _GRIDS, _FINEST, InfinityOptions(), None, patch=2))
    assert [tuple(step.bits_Bdhw.shape[1:]) for step in steps] == [(4, 2, 2), (4, 4, 4), (4, 8, 8)]
    likelier = steps[1].logits_BLd2[0, 0].diff(dim=-1)[:, 0] > 0
    # Channel c of a patch holds its four places as bits 4c to 4c + 3.
    assert torch.equal(steps[1].bits_Bdhw[0, :, :2, :2].flatten(), likelier)


@pytest.mark.parametrize(
    ("probability", "number", "bit"),
    [(0.02, 0.0, 0), (0.04, 0.0, 1), (0.98, 0.999, 1), (0.96, 0.999, 0), (0.5, 0.5, 0)],
)
def test_unlikely_bits_are_dropped(probability: float, number: float, bit: int) -> None:
    logits = torch.tensor([probability, 1 - probability]).log().flip(0) * 0.5
    assert draw_bits(logits.view(1, 1, 1, 2), torch.tensor([[[number]]]), InfinityOptions()).item() == bit


def test_fewer_grids_are_the_first_ones(model: InfinityTransformer) -> None:
    text, mask = prompts(3, 5)
    all_grids, two = drawn(model, text, mask, None), drawn(model, text, mask, None, num_grids=2)
    assert len(two) == 2
    for step, same_step in zip(two, all_grids, strict=False):
        assert torch.equal(step.latents_BdHW, same_step.latents_BdHW), "at the sides of the last of all grids"


@pytest.mark.parametrize(
    "options",
    [
        *({"guidance": scale} for scale in (0.5, 1e38, math.nan)),
        *({"temperature": temperature} for temperature in (-1.0, 1e-40, math.inf, math.nan)),
        *({"top_p": share} for share in (0.5, 1.1, math.nan)),
        {"guidance_layer": -2},
        {"guided_grids": -1},
        {"num_grids": 0},
    ],
)
def test_bad_options_are_refused(model: InfinityTransformer, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=f"^--{name.replace('_', '-')} .*must be") as refusal:
        drawn(model, *prompts(2), None, **options)
    assert refusal.value.option == name


def test_guidance_is_refused_where_no_prompt_was_ever_missing() -> None:
    InfinityOptions(guidance=1.0).check(2, guides=False)
    with pytest.raises(OptionError, match=r"--guidance 3: .*drop_text 0"):
        InfinityOptions().check(2, guides=False)


# -- official files ------------------------------------------------------------------------------------------------


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_official_file_of_the_transformer(model: InfinityTransformer, num_chunks: int, tmp_path: Path) -> None:
    state = official_transformer(model, num_chunks)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "safe.safetensors")
    # A whole training, and `scale_mul` in its other shape.
    turned = {name: value.transpose(1, 2) if "scale_mul" in name else value for name, value in state.items()}
    torch.save({"trainer": {"gpt_fsdp": turned}}, tmp_path / "training.pth")
    for file in ("safe.safetensors", "training.pth"):
        loaded = load_transformer(str(tmp_path / file), "--model")
        assert loaded.settings == _SETTINGS
        assert same(model, loaded)


def test_official_folder_of_parts(model: InfinityTransformer, tmp_path: Path) -> None:
    names = sorted(state := official_transformer(model, 2))
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: state[name].clone() for name in part}, tmp_path / file)
    places = {name: file for file, part in halves.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert same(model, load_transformer(str(tmp_path), "--model"))


def test_official_file_of_the_tokenizer(tmp_path: Path) -> None:
    vae = InfinityVae(InfinityVaeSettings(num_bits=14, width=32, factors=(1, 2), num_blocks=1))
    state = vae.state_dict()
    shallow = {name.replace(".conv.", ".").replace(".norm.", "."): value for name, value in state.items()}
    assert len(shallow) == len(state)
    for number, content in enumerate([state, shallow, {"vae": state | {"quantizer.lfq.mask": torch.arange(14)}}]):
        torch.save(content, tmp_path / f"{number}.pth")
        loaded = load_vae(str(tmp_path / f"{number}.pth"), "--vae")
        assert loaded.settings == vae.settings
        assert same(vae, loaded)


def removed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "head.bias"}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return removed(state) | {"heads.bias": state["head.bias"]}


def other_shape(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"head.bias": torch.zeros(3)}


@pytest.mark.parametrize("damage", [removed, renamed, other_shape])
def test_damaged_files_are_refused(
    model: InfinityTransformer, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.save(damage(official_transformer(model, 1)), tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"bad.pth.*heads?.bias"):
        load_transformer(str(tmp_path / "bad.pth"), "--model")


def test_a_tokenizer_is_no_transformer(tmp_path: Path) -> None:
    torch.save({"decoder.conv_in.conv.weight": torch.zeros(1)}, tmp_path / "vae.pth")
    with pytest.raises(InputError, match=r"--model .*vae.pth"):
        load_transformer(str(tmp_path / "vae.pth"), "--model")


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="is no index of weights"):
        load_transformer(str(tmp_path), "--model")
