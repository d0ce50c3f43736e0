"""Images of Infinity in batches that the memory holds, and in half precision."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mmcore.device import free_memory
from mmcore.errors import OptionError
from mmcore.frozen_weights import store_for_autocast
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_batches import (
    InfinityImages,
    even_parts,
    half_precision,
    image_memory,
)
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_sampling import sample
from mmcore.generators.infinity_scales import grids_of
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings

_GRIDS = ((1, 1), (2, 2), (4, 4))
_FINEST = (8, 8)
_SETTINGS = InfinitySettings(num_layers=2, width=64, num_heads=2, text_channels=128, max_text_tokens=6, num_bits=4)
_VAE = InfinityVaeSettings(num_bits=4, width=32, factors=(1, 1), num_blocks=1)
_CPU = torch.device("cpu")
# The logits of random weights are large. By this temperature the seeds decide most bits.
_WARM = InfinityOptions(temperature=8.0, top_p=1.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> InfinityTransformer:
    torch.manual_seed(0)
    model = InfinityTransformer(_SETTINGS).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def vae() -> InfinityVae:
    torch.manual_seed(1)
    return InfinityVae(_VAE).eval().requires_grad_(False)


def prompts(num: int) -> tuple[Tensor, Tensor]:
    text_BTC = torch.randn(num, 6, 128, generator=torch.Generator().manual_seed(1))
    return text_BTC, torch.arange(6) < torch.arange(1, num + 1)[:, None]


def memory_of(num: int, dtype: torch.dtype = torch.float32) -> int:
    """Free memory for so many images."""
    return int(image_memory(_SETTINGS, _VAE, _GRIDS, InfinityOptions(), dtype).sampling * (num + 0.5) / 0.9)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "most", "parts"),
    [(3, 8, [[0, 1, 2]]), (5, 2, [[0, 1], [2, 3], [4, 4]]), (4, 3, [[0, 1], [2, 3]]), (1, 1, [[0]])],
)
def test_batches_have_one_size(num: int, most: int, parts: list[list[int]]) -> None:
    assert even_parts(num, most) == parts


def test_more_memory_holds_more_images() -> None:
    """Images of 1M pixels by Infinity-2B beside 6 GB of weights: 9 on a GPU of 80 GB, and 2 on one of 24 GB."""
    memory = image_memory(
        InfinitySettings(), InfinityVaeSettings(), grids_of(1.0, "1M"), InfinityOptions(), torch.bfloat16
    )
    assert memory.keys_values == pytest.approx(5.5e9, rel=0.01)
    assert memory.images_at_once(74 * 10**9)[0] == 9
    assert memory.images_at_once(18 * 10**9)[0] == 2
    assert memory.images_at_once(5 * 10**9)[0] == 0


@pytest.mark.parametrize("options", [{"guidance": 1.0}, {"guided_grids": 0}], ids=str)
def test_without_guidance_an_image_has_one_row(options: dict[str, Any]) -> None:
    guided, plain = (
        image_memory(_SETTINGS, _VAE, _GRIDS, InfinityOptions(**each), torch.float32) for each in ({}, options)
    )
    assert guided.sampling == 2 * plain.sampling
    assert guided.decoding == plain.decoding


def test_a_machine_has_free_memory() -> None:
    assert free_memory(_CPU) > 2**20


def test_a_cap_changes_no_image(model: InfinityTransformer, vae: InfinityVae, capsys: Any) -> None:
    """Three images at once, and in batches of two, the last one filled up."""
    text, mask = prompts(3)
    steps: list[tuple[int, int]] = []
    at_once = InfinityImages(model, vae, free=memory_of(3))
    capped = InfinityImages(model, vae, free=memory_of(2))
    images = at_once(text, mask, [5, 6, 7], _GRIDS, _FINEST, _WARM)
    assert images.shape == (3, 8, 8, 3)
    again = capped(text, mask, [5, 6, 7], _GRIDS, _FINEST, _WARM, lambda done, total: steps.append((done, total)))
    assert (images.int() - again.int()).abs().max() <= 1
    assert steps == [(done, 6) for done in range(1, 7)]
    # The seed of an image decides it: the same prompts with other seeds differ.
    assert not torch.equal(images, at_once(text, mask, [7, 6, 5], _GRIDS, _FINEST, _WARM))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2, "each answer is printed once"
    assert "8x8 in float32" in lines[1]
    assert "at most 2 images at once" in lines[1]


def test_an_image_that_does_not_fit_is_refused(model: InfinityTransformer, vae: InfinityVae) -> None:
    with pytest.raises(OptionError, match=r"8x8: an image needs .* GB of memory"):
        InfinityImages(model, vae, free=memory_of(0))(*prompts(1), [0], _GRIDS, _FINEST, _WARM)


# -- half precision ------------------------------------------------------------------------------------------------


def logits_in(dtype: torch.dtype, model: InfinityTransformer) -> Tensor:
    """Logits of the last grid where the bits of the others are given, so that rounding alone differs."""
    text, mask = prompts(3)
    given = [torch.full((3, 4, *grid), 0.2) for grid in _GRIDS[1:]]
    with torch.inference_mode(), half_precision(_CPU, dtype):
        return model(model.text_state(text, mask), given, _GRIDS, _FINEST)


def test_half_precision_is_near_and_finer_in_fp16(model: InfinityTransformer) -> None:
    exact, bf16, fp16 = (logits_in(dtype, model) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert exact.dtype == bf16.dtype == fp16.dtype == torch.float32
    far_bf16, far_fp16 = ((each - exact).norm() / exact.norm() for each in (bf16, fp16))
    # Measured: 0.7 % and 0.07 %. They round to 8 and to 11 binary digits.
    assert 0 < far_fp16 < 0.25 * far_bf16
    assert far_bf16 < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_in_half_it_computes_the_same(model: InfinityTransformer, dtype: torch.dtype) -> None:
    stored = copy.deepcopy(model)
    store_for_autocast(stored, dtype)
    kept = {name.rsplit(".", 1)[0] for name, value in stored.named_parameters() if value.dtype == torch.float32}
    # What is computed in fp32 is stored in it.
    assert {"head", "modulation.1", "head_modulation.1", "text_norm", "blocks.0.cross_norm"} <= kept
    assert stored.blocks[0].ffn[0].weight.dtype == dtype  # type: ignore[index,union-attr]
    assert torch.equal(logits_in(dtype, stored), logits_in(dtype, model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_no_image_depends_on_its_batch_mates(
    model: InfinityTransformer, vae: InfinityVae, dtype: torch.dtype
) -> None:
    images = InfinityImages(model, vae, free=memory_of(3, dtype), dtype=dtype)
    text, mask = prompts(3)
    made = images(text, mask, [5, 6, 7], _GRIDS, _FINEST, _WARM)
    turned = images(text.flip(0), mask.flip(0), [7, 6, 5], _GRIDS, _FINEST, _WARM)
    assert torch.equal(made, turned.flip(0))
    with half_precision(_CPU, dtype):
        last = list(sample(model, text, mask, _GRIDS, _FINEST, _WARM, None))[-1]
    assert last.logits_BLd2.dtype == last.latents_BdHW.dtype == torch.float32
