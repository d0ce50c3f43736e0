"""FLOPs of Infinity against PyTorch's counter, and the published sizes."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from mmcore.generators.infinity import Cache, InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_cost import (
    T5Sizes,
    cache_bytes,
    decoder_flops,
    image_cost,
    text_flops,
    transformer_flops,
)
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_sampling import sample
from mmcore.generators.infinity_scales import grids_of
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings

_SETTINGS = InfinitySettings(num_layers=3, width=256, num_heads=4, text_channels=128, max_text_tokens=6, num_bits=4)
_GRIDS = ((1, 1), (2, 3), (4, 6))


@pytest.mark.parametrize(
    "options",
    [{}, {"guidance": 1.0}, {"guided_grids": 1}, {"guidance_layer": -1}, {"guided_grids": 0}, {"num_grids": 2}],
    ids=str,
)
def test_transformer(options: dict[str, Any]) -> None:
    chosen = InfinityOptions(**options)
    # Autocast has no meta device. The counter knows the products of attention, and no fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        text, mask = torch.zeros(1, 6, 128), torch.ones(1, 6, dtype=torch.bool)
        for _ in sample(InfinityTransformer(_SETTINGS), text, mask, _GRIDS, (8, 12), chosen, None):
            pass
    assert transformer_flops(_SETTINGS, 6, _GRIDS, chosen) == counted.get_total_flops()


def test_decoder() -> None:
    settings = InfinityVaeSettings(num_bits=5, width=32, factors=(1, 2, 2), num_blocks=2)
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        InfinityVae(settings).decoder(torch.zeros(1, 5, 4, 6))
    assert decoder_flops(settings, (4, 6)) == counted.get_total_flops()


def test_text_encoder() -> None:
    config = T5Config(d_model=16, d_kv=6, num_heads=2, d_ff=20, num_layers=2, feed_forward_proj="gated-gelu")
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        T5EncoderModel(config)(input_ids=torch.zeros(1, 7, dtype=torch.long))
    assert text_flops(T5Sizes(2, 16, 12, 20), 7) == counted.get_total_flops()


def test_published_sizes() -> None:
    """Derived from the sizes: 125 TFLOP of an image of 1M pixels with guidance, and 5.5 GB of keys and values."""
    settings, grids = InfinitySettings(), grids_of(1.0, "1M")
    short_prompt = transformer_flops(settings, 32, grids, InfinityOptions())
    assert short_prompt + decoder_flops(InfinityVaeSettings(), grids[-1]) == pytest.approx(125e12, rel=0.01)
    assert cache_bytes(settings, 2, grids, torch.bfloat16) == pytest.approx(5.5e9, rel=0.01)


def test_an_image_costs_the_sum_of_its_parts() -> None:
    """A tokenizer with patches decodes a latent image of more positions than the Transformer has."""
    vae, options = InfinityVaeSettings(num_bits=1, width=32, factors=(1, 2)), InfinityOptions()
    cost = image_cost(_SETTINGS, vae, _GRIDS, options, patch=2)
    assert cost.transformer == transformer_flops(_SETTINGS, 6, _GRIDS, options)
    assert cost.decoder == decoder_flops(vae, (8, 12))
    assert cost.total - cost.transformer - cost.decoder == text_flops(T5Sizes(), 6)


def test_cache_bytes_are_those_of_the_cache() -> None:
    cache = Cache(_SETTINGS, 4, 31, torch.zeros(1, dtype=torch.float16))
    assert cache_bytes(_SETTINGS, 4, _GRIDS, torch.float16) == cache.keys_values.nbytes
