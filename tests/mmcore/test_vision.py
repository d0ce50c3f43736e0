"""mmcore/frozen/vision.py: a frozen encoder loads completely and quietly, or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import write_resnet
from transformers import (
    BertConfig,
    BertModel,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Model,
    Blip2VisionModel,
    CLIPConfig,
    CLIPModel,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from mmcore.errors import InputError
from mmcore.frozen.vision import FrozenVisionEncoder

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_resnet(tmp_path / "encoder")


def test_a_load_says_nothing_and_gives_tokens(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokens = FrozenVisionEncoder(str(folder), 32)(PIXELS)
    assert tokens.shape == (2, 16, 16)  # an eighth of the side with these two stages
    assert capfd.readouterr() == ("", "")


def test_missing_weights_are_an_error_and_not_random_ones(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in sorted(weights) if "convolution" in name)
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="1 weights are missing"):
        FrozenVisionEncoder(str(folder), 32)


def test_what_decides_the_tokens_decides_the_fingerprint(folder: Path) -> None:
    before = FrozenVisionEncoder(str(folder), 32).fingerprint()
    assert FrozenVisionEncoder(str(folder), 32).fingerprint() == before
    assert FrozenVisionEncoder(str(folder), 64).fingerprint() != before
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    assert FrozenVisionEncoder(str(folder), 32).fingerprint() != before
    before = FrozenVisionEncoder(str(folder), 32).fingerprint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert FrozenVisionEncoder(str(folder), 32).fingerprint() != before


def test_statistics_are_those_of_either_file(folder: Path) -> None:
    assert "ImageNet" in FrozenVisionEncoder(str(folder), 32).statistics_from
    fields = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}
    (folder / "processor_config.json").write_text(json.dumps(fields))
    encoder = FrozenVisionEncoder(str(folder), 32)
    assert (encoder.mean, encoder.statistics_from) == ((0.1, 0.2, 0.3), "processor_config.json")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}')
    assert FrozenVisionEncoder(str(folder), 32).std == (1.0, 1.0, 1.0)


def test_half_precision_weights_are_computed_in_fp32(folder: Path) -> None:
    full = FrozenVisionEncoder(str(folder), 32)(PIXELS)
    ResNetForImageClassification.from_pretrained(folder).half().save_pretrained(folder)
    encoder = FrozenVisionEncoder(str(folder), 32)
    assert len(encoder.fingerprint()) == 64
    # fp16 has 11 bits: the relative error of a weight is up to 2^-12.
    torch.testing.assert_close(encoder(PIXELS), full, rtol=1e-2, atol=1e-2)


VIT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip"])
def test_transformers_of_other_families(kind: str, tmp_path: Path) -> None:
    text = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "projection_dim": 16}  # fmt: skip
    vision = VIT | {"image_size": 32}
    if kind == "vit":
        ViTModel(ViTConfig(**vision)).save_pretrained(tmp_path)
    elif kind == "clip":
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path)
    else:
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    encoder = FrozenVisionEncoder(str(tmp_path), 32)
    num_tokens = 16 if kind == "siglip" else 17  # SigLIP has no class token
    assert encoder.token_shape == (num_tokens, 16)
    assert encoder(PIXELS).shape == (2, num_tokens, 16)
    with pytest.raises(InputError, match=r"does not take images of 64 x 64: .*; change --image-size"):
        FrozenVisionEncoder(str(tmp_path), 64)
    pooled = FrozenVisionEncoder(str(tmp_path), 32, tokens="pooled")
    assert pooled.token_shape == (1, 16)
    assert pooled.fingerprint() != encoder.fingerprint()
    if kind == "clip":
        class_token = encoder.model.post_layernorm(encoder(PIXELS)[:, 0])
        torch.testing.assert_close(pooled(PIXELS)[:, 0], class_token, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Blip2Model, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval])
def test_of_a_blip2_only_the_vision_model_is_read(kind: type, tmp_path: Path) -> None:
    small = {name: value for name, value in VIT.items() if name != "patch_size"}
    text = {"model_type": "opt", "vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "word_embed_proj_dim": 16}  # fmt: skip
    config = Blip2Config(
        # Its own initial weights are nearly zero, so all tokens would be alike.
        vision_config=VIT | {"image_size": 32, "initializer_range": 0.3},
        qformer_config=small | {"encoder_hidden_size": 16, "vocab_size": 64, "use_qformer_text_input": True},
        text_config=text,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    whole = kind(config).eval()
    whole.save_pretrained(tmp_path)
    encoder, pooled = (FrozenVisionEncoder(str(tmp_path), 32, tokens=each) for each in ("patch", "pooled"))
    assert type(encoder.model) is Blip2VisionModel
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (encoder.mean, encoder.std))
    images = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        theirs = whole.vision_model(images)
    assert theirs.last_hidden_state.std(dim=1).min() > 0.1
    # They were equal on a CPU. Elsewhere a channels-last convolution may round differently.
    torch.testing.assert_close(encoder(PIXELS), theirs.last_hidden_state, rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled(PIXELS)[:, 0], theirs.pooler_output, rtol=0, atol=1e-6)
    weights = load_file(tmp_path / "model.safetensors")
    name = "vision_model.post_layernorm.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match=r"1 weights are missing there, such as post_layernorm\.weight$"):
        FrozenVisionEncoder(str(tmp_path), 32)


def test_a_pooled_feature_map_is_its_mean(folder: Path) -> None:
    pooled = FrozenVisionEncoder(str(folder), 32, tokens="pooled")(PIXELS)
    mean = FrozenVisionEncoder(str(folder), 32)(PIXELS).mean(dim=1, keepdim=True)
    torch.testing.assert_close(pooled, mean, rtol=1e-6, atol=1e-6)


def test_pooled_tokens_need_the_weights_of_the_pooler(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**VIT, image_size=32), add_pooling_layer=False).save_pretrained(tmp_path)
    assert FrozenVisionEncoder(str(tmp_path), 32).token_shape == (17, 16)
    with pytest.raises(InputError, match=r"2 weights are missing there, such as pooler"):
        FrozenVisionEncoder(str(tmp_path), 32, tokens="pooled")


def test_a_language_model_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a bert model takes input_ids, not images"):
        FrozenVisionEncoder(str(tmp_path), 32)


def test_the_pretrained_mobilenet_of_the_results() -> None:
    folder = Path(__file__).parents[3] / "shared" / "weights" / "mobilenet_v2_1.0_224"
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    encoder = FrozenVisionEncoder(str(folder), 224)
    assert encoder.token_shape == (49, 1280)
    assert encoder.statistics_from == "preprocessor_config.json"
