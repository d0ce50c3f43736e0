"""mmcore/captioners/bridge.py: image tokens to tokens of a language model's width; transformers is the reference."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mmcore.captioners.bridge import BridgeSettings, Resampler, build_bridge
from mmcore.errors import InputError
from mmcore.recipe import check_effect

TINY = BridgeSettings(num_queries=3, bridge_width=24, bridge_layers=2, bridge_heads=4, bridge_dropout=0.0)


@pytest.mark.parametrize("kind", ["linear", "mlp", "qformer", "resampler"])
def test_all_bridges_have_one_call_and_train_every_weight(kind: Any) -> None:
    settings = dataclasses.replace(TINY, bridge=kind)
    torch.manual_seed(0)
    bridge = build_bridge(settings, 16, 40)
    image_BLE = torch.randn(2, 7, 16)
    tokens_BQW = bridge(image_BLE)
    assert tokens_BQW.shape == (2, settings.num_tokens(7), 40)
    # An image's tokens do not depend on the other images.
    torch.testing.assert_close(bridge(image_BLE[1:]), tokens_BQW[1:], rtol=0, atol=1e-6)
    assert (tokens_BQW[0] - tokens_BQW[1]).abs().max() > 1e-3
    assert (tokens_BQW[:, 0] - tokens_BQW[:, 1]).abs().max() > 1e-4, "tokens of one image differ"
    tokens_BQW.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in bridge.parameters())
    assert len(bridge.blocks()) == (2 if kind in ("qformer", "resampler") else 0)


def test_an_instruction_changes_what_the_queries_tell() -> None:
    settings = dataclasses.replace(TINY, instruct=True)
    torch.manual_seed(0)
    bridge, image_BLE = build_bridge(settings, 16, 40, vocabulary_size=30), torch.randn(2, 7, 16)
    ids_BT = torch.tensor([[4, 5, 6], [4, 5, 6]])
    mask_BT = torch.ones_like(ids_BT)
    read = bridge(image_BLE, (ids_BT, mask_BT))
    assert read.shape == (2, 3, 40)
    assert (bridge(image_BLE, (ids_BT + 1, mask_BT)) - read).abs().max() > 1e-4
    without = build_bridge(TINY, 16, 40)
    assert {name for name, _ in without.named_parameters()} < {name for name, _ in bridge.named_parameters()}
    with pytest.raises(AssertionError, match="reads no instruction"):
        build_bridge(dataclasses.replace(TINY, bridge="mlp"), 16, 40)(image_BLE, (ids_BT, mask_BT))


def test_the_resampler_is_that_of_idefics_with_flamingo_s_activation() -> None:
    config: Any = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False), vision_config=SimpleNamespace(embed_dim=24)
    )
    torch.manual_seed(0)
    reference = IdeficsPerceiverResampler(config, embed_dim=24, depth=2, n_heads=4, head_dim=6, n_latents=3)
    resampler = Resampler(dataclasses.replace(TINY, bridge="resampler"), 24, 24)
    resampler.input, resampler.projection = nn.Identity(), nn.Identity()
    names = {"latents": "latents_QD", "layer_norm.weight": "norm.weight", "layer_norm.bias": "norm.bias"}
    state = {ours: reference.state_dict()[theirs] for theirs, ours in names.items()}
    for index, (attention, ffn) in enumerate(reference.blocks):
        ffn.act = ACT2FN["relu2"]
        parts = {
            "image_norm": attention.context_layer_norm,
            "latent_norm": attention.latents_layer_norm,
            "q": attention.q_proj,
            "out": attention.output_proj,
            "ffn_norm": ffn.ln,
            "ffn_in": ffn.fc,
            "ffn_out": ffn.c_proj,
        }
        for ours, module in parts.items():
            nn.init.normal_(module.weight)
            state |= {f"layers.{index}.{ours}.{name}": value for name, value in module.state_dict().items()}
        state[f"layers.{index}.kv.weight"] = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
    resampler.load_state_dict(state)
    image_BLE = torch.randn(2, 7, 24)
    # measured 0 on values up to 2
    torch.testing.assert_close(resampler(image_BLE), reference(image_BLE), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_queries": 0}, "num_queries 0 must be at least 1; change --num-queries"),
        ({"bridge_heads": 5}, "bridge_heads 5 does not divide bridge_width 24"),
        ({"bridge": "mlp", "instruct": True}, "a bridge of kind mlp reads no prompt; give --bridge qformer"),
        ({"bridge_dropout": 1.0}, "bridge_dropout 1.0 must be from 0 to below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        dataclasses.replace(TINY, **changes).check()


@pytest.mark.parametrize(
    ("bridge", "changes", "match"),
    [
        ("linear", {"num_queries": 4}, "--num-queries 4: has no effect without --bridge qformer"),
        ("resampler", {"bridge_dropout": 0.2}, "--bridge-dropout 0.2: has no effect without --bridge qformer"),
        ("qformer", {"instruct_tokenizer": "x"}, "--instruct-tokenizer x: has no effect without --instruct"),
    ],
)
def test_settings_without_effect_are_refused(bridge: Any, changes: dict[str, Any], match: str) -> None:
    variant = dataclasses.replace(TINY, bridge=bridge)
    with pytest.raises(InputError, match=match):
        check_effect(dataclasses.replace(variant, **changes), variant)
