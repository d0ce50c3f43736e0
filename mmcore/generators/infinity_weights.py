"""Infinity's weights in official files: their names, the sizes they tell, reading and writing.

Official files (https://huggingface.co/FoundationVision/Infinity) are .pth files, or folders with an index. Their layers
are grouped in chunks, or not. Reading and writing share one table of names.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmcore.checkpoint import copy_state
from mmcore.errors import InputError
from mmcore.frozen.pretrained import read_weights
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings

_OFFICIAL = "an official checkpoint of Infinity"
# The official models have their layers in this many chunks.
_NUM_CHUNKS = 8
# Official name of a tensor of a layer -> ours.
_LAYER = {
    "ada_gss": "modulation_6D",
    "sa.mat_qkv.weight": "self_attention.qkv.weight",
    "sa.q_bias": "self_attention.query_bias",
    "sa.v_bias": "self_attention.value_bias",
    "sa.scale_mul_1H11": "self_attention.log_scale_H",
    "sa.proj.weight": "self_attention.out.weight",
    "sa.proj.bias": "self_attention.out.bias",
    "ca_norm.weight": "cross_norm.weight",
    "ca_norm.bias": "cross_norm.bias",
    "ca.mat_q.weight": "cross_attention.query.weight",
    "ca.mat_q.bias": "cross_attention.query.bias",
    "ca.mat_kv.weight": "cross_attention.key_value.weight",
    "ca.v_bias": "cross_attention.value_bias",
    "ca.proj.weight": "cross_attention.out.weight",
    "ca.proj.bias": "cross_attention.out.bias",
    "ffn.fc1.weight": "ffn.0.weight",
    "ffn.fc1.bias": "ffn.0.bias",
    "ffn.fc2.weight": "ffn.2.weight",
    "ffn.fc2.bias": "ffn.2.bias",
}
# Official name of a tensor outside of the layers -> ours.
_OUTSIDE = {
    "cfg_uncond": "no_text_TC",
    "text_norm.weight": "text_norm.weight",
    "text_proj_for_sos.ca.mat_q": "text_pool.query_Hh",
    "text_proj_for_sos.ca.mat_kv.weight": "text_pool.key_value.weight",
    "text_proj_for_sos.ca.v_bias": "text_pool.value_bias",
    "text_proj_for_sos.ca.proj.weight": "text_pool.out.weight",
    "text_proj_for_sos.ca.proj.bias": "text_pool.out.bias",
    "text_proj_for_ca.0.weight": "text_projection.0.weight",
    "text_proj_for_ca.0.bias": "text_projection.0.bias",
    "text_proj_for_ca.2.weight": "text_projection.2.weight",
    "text_proj_for_ca.2.bias": "text_projection.2.bias",
    "pos_start": "first_position_D",
    "lvl_embed.weight": "grid_embedding.weight",
    "word_embed.weight": "bit_embedding.weight",
    "word_embed.bias": "bit_embedding.bias",
    "shared_ada_lin.1.weight": "modulation.1.weight",
    "shared_ada_lin.1.bias": "modulation.1.bias",
    "head_nm.ada_lin.1.weight": "head_modulation.1.weight",
    "head_nm.ada_lin.1.bias": "head_modulation.1.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
# Axes of length 1 that official tensors have and ours have not: official name -> the official shape.
_AXES = {
    "ada_gss": (1, 1, 6, -1),
    "sa.scale_mul_1H11": (1, -1, 1, 1),
    "pos_start": (1, 1, -1),
}
# Where the weights lie in a file with the state of a training.
_IN_TRAINING, _IN_VAE_FILE = ("trainer", "gpt_fsdp"), ("vae",)
_POOL_QUERY = "text_proj_for_sos.ca.mat_q"
# Constants in official files that nothing needs.
_CONSTANT = re.compile(r"(^|\.)zero_k_bias$|^quantizer?\.lfq\.mask$")
_IN_CHUNK = re.compile(r"^block_chunks\.(\d+)\.module\.(\d+)\.(.+)$")
_IN_BLOCKS = re.compile(r"^(?:unregistered_)?blocks\.(\d+)\.(.+)$")
# Some files leave out the last level of a name of the tokenizer: `conv1.conv.weight` is `conv1.weight` there.
_LAST_LEVEL = re.compile(r"\.(?:conv|norm)(\.(?:weight|bias))$")


# -- the Transformer -----------------------------------------------------------------------------------------------


def load_transformer(path: str, flag: str) -> InfinityTransformer:
    """The Transformer of an official file or folder, with the sizes that its weights tell.

    Raises InputError, naming `flag`, for weights that cannot be read, are missing or unknown.
    """
    where = f"{flag} {path!r}"
    state = transformer_state(read_weights(path, flag, inside=_IN_TRAINING, what=_OFFICIAL), where)
    with torch.device("meta"):
        model = InfinityTransformer(_transformer_settings(state, where))
    model.to_empty(device="cpu")
    own = model.state_dict()
    # An axis of length 1 more or less does not change a tensor: files have `scale_mul` in two shapes.
    shaped = {
        name: value.reshape(own[name].shape) if name in own and value.numel() == own[name].numel() else value
        for name, value in state.items()
    }
    copy_state(own, shaped, where)
    return model


def transformer_settings(path: str, flag: str) -> InfinitySettings:
    """The sizes that `load_transformer` would find. Reads no weights. Raises InputError as that does."""
    where = f"{flag} {path!r}"
    official = read_weights(path, flag, inside=_IN_TRAINING, what=_OFFICIAL, shapes_only=True)
    return _transformer_settings(transformer_state(official, where), where)


def transformer_state(official: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Official weights under the names of `InfinityTransformer`. Constants are left out.

    Raises InputError, naming the file `where`, for a name that is not known.
    """
    in_chunk = [match for match in map(_IN_CHUNK.match, official) if match]
    per_chunk = 1 + max((int(match[2]) for match in in_chunk), default=0)
    state = {}
    for name, value in official.items():
        if _CONSTANT.search(name):
            continue
        chunked, plain = _IN_CHUNK.match(name), _IN_BLOCKS.match(name)
        if chunked:
            ours, layer = _LAYER.get(chunked[3]), int(chunked[1]) * per_chunk + int(chunked[2])
        elif plain:
            ours, layer = _LAYER.get(plain[2]), int(plain[1])
        else:
            ours, layer = _OUTSIDE.get(name), None
        if ours is None:
            raise InputError(f"{where}: {name} is no weight of Infinity's Transformer; name an official checkpoint")
        state[ours if layer is None else f"blocks.{layer}.{ours}"] = value
    return state


def _transformer_settings(state: Mapping[str, Tensor], where: str) -> InfinitySettings:
    needed = ("no_text_TC", "bit_embedding.weight", "blocks.0.self_attention.log_scale_H")
    missing = [name for name in needed if name not in state]
    if missing:
        raise InputError(f"{where}: {missing[0]} is missing; name an official checkpoint of the Transformer")
    text_tokens, text_channels = state["no_text_TC"].shape
    width, num_bits = state["bit_embedding.weight"].shape
    return InfinitySettings(
        num_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        width=width,
        num_heads=state["blocks.0.self_attention.log_scale_H"].numel(),
        text_channels=text_channels,
        max_text_tokens=text_tokens,
        num_bits=num_bits,
    )


def official_transformer(model: InfinityTransformer, num_chunks: int = _NUM_CHUNKS) -> dict[str, Tensor]:
    """The weights under their official names and in their official shapes, constants included.

    `num_chunks` divides the number of layers; 1 writes them without chunks.
    """
    own, settings = model.state_dict(), model.settings
    per_chunk, rest = divmod(settings.num_layers, num_chunks)
    assert rest == 0, f"{num_chunks} chunks do not divide {settings.num_layers} layers"
    zeros_D = torch.zeros(settings.width, dtype=own["first_position_D"].dtype)
    state = {name: own[ours].view(_AXES.get(name, own[ours].shape)) for name, ours in _OUTSIDE.items()}
    state[_POOL_QUERY] = state[_POOL_QUERY][None]
    state["text_proj_for_sos.ca.zero_k_bias"] = zeros_D
    for layer in range(settings.num_layers):
        chunk, place = divmod(layer, per_chunk)
        prefix = f"block_chunks.{chunk}.module.{place}" if num_chunks > 1 else f"blocks.{layer}"
        for name, ours in _LAYER.items():
            value = own[f"blocks.{layer}.{ours}"]
            state[f"{prefix}.{name}"] = value.view(_AXES.get(name, value.shape))
        state |= {f"{prefix}.{part}.zero_k_bias": zeros_D.clone() for part in ("sa", "ca")}
    return state


# -- the tokenizer -------------------------------------------------------------------------------------------------


def load_vae(path: str, flag: str) -> InfinityVae:
    """The tokenizer of an official file, with the sizes that its weights tell.

    Raises InputError, naming `flag`, for weights that cannot be read, are missing or unknown.
    """
    where = f"{flag} {path!r}"
    official = read_weights(path, flag, inside=_IN_VAE_FILE, what=_OFFICIAL)
    state = {name: value for name, value in official.items() if not _CONSTANT.search(name)}
    vae = InfinityVae(_vae_settings(state, where))
    own = vae.state_dict()
    full_names = {_LAST_LEVEL.sub(r"\1", name): name for name in own}
    copy_state(own, {name if name in own else full_names.get(name, name): state[name] for name in state}, where)
    return vae


def vae_settings(path: str, flag: str) -> InfinityVaeSettings:
    """The sizes that `load_vae` would find. Reads no weights. Raises InputError as that does."""
    official = read_weights(path, flag, inside=_IN_VAE_FILE, what=_OFFICIAL, shapes_only=True)
    return _vae_settings(official, f"{flag} {path!r}")


def _vae_settings(state: Mapping[str, Tensor], where: str) -> InfinityVaeSettings:
    def shape(conv: str) -> torch.Size:
        for name in (f"{conv}.conv.weight", f"{conv}.weight"):
            if name in state:
                return state[name].shape
        raise InputError(f"{where}: {conv} is missing; name an official checkpoint of the tokenizer")

    num_bits, width = shape("decoder.conv_in")[1], shape("encoder.conv_in")[0]
    places = [name.split(".") for name in state if re.match(r"encoder\.down\.\d+\.block\.\d+\.", name)]
    levels = 1 + max((int(place[2]) for place in places), default=0)
    blocks = 1 + max((int(place[4]) for place in places), default=0)
    ends = [shape(f"encoder.down.{level}.block.{blocks - 1}.conv2")[0] for level in range(levels)]
    return InfinityVaeSettings(num_bits, width, tuple(end // width for end in ends), blocks)
