"""python -m mmcore.catalogue sizes: the parameters of each recipe at full size, without data and without a network."""

import dataclasses
import json

import pytest
import torch

from mmcore import catalogue
from mmcore.captioners import clip_captioner, full_size, qformer_llm
from mmcore.errors import InputError
from mmcore.frozen import published
from mmcore.frozen.published import num_parameters


def test_each_recipe_has_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["catalogue", "sizes"])
    catalogue.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in lines] == list(catalogue.RECIPES)
    for line in lines:
        assert 0 < line["trainable"] <= line["total"]
        stated = catalogue.RECIPES[line["name"]].table_1
        assert (line["report_total"] is None) == (stated is None)
        assert line.get("remark", "") == catalogue.RECIPES[line["name"]].remark


def test_rows_that_miss_table_1_say_why() -> None:
    for name in ("resnet_captioner", "clip_captioner", "qformer"):
        assert catalogue.RECIPES[name].remark.startswith("Table 1")


def test_row_1_is_what_its_training_builds() -> None:
    # Layers 25.22 M, projection 0.26 M, embeddings and output layer 2,366 * (512 + 513); ResNet-18 11.18 M.
    assert full_size.sizes(catalogue.RECIPES["resnet_captioner"].variants["report"]) == (39_088_510, 27_911_998)


def test_row_3_is_the_q_former_of_blip_2() -> None:
    total, trainable = full_size.sizes(catalogue.RECIPES["qformer"].variants["report"])
    # LAVIS prints 186.7 M for its first stage. The frozen ViT-g has 985.95 M.
    assert trainable == pytest.approx(186.7e6, rel=1e-3)
    assert total - trainable == pytest.approx(985.95e6, rel=1e-5)


def test_row_4_has_the_total_of_the_report() -> None:
    total, trainable = full_size.sizes(qformer_llm.VARIANTS["report"])
    assert total == pytest.approx(985.95e6 + 188.3e6 + 1_100.05e6, rel=1e-4)
    # What the training moves: the queries' half of the Q-Former, and a Linear from 768 to 2,048.
    assert trainable == 105_162_240 + 768 * 2048 + 2048


def test_published_models_have_their_sizes_and_no_values() -> None:
    vision = published.vision_model("Salesforce/blip2-itm-vit-g")
    assert {parameter.device.type for parameter in vision.parameters()} == {"meta"}
    assert num_parameters(vision) == pytest.approx(985.95e6, rel=1e-5)
    assert published.token_shape(vision, 224, "patch") == (257, 1408)
    clip = published.vision_model(clip_captioner.CLIP)
    assert published.token_shape(clip, 224, "patch") == (50, 768)
    assert published.token_shape(clip, 224, "pooled") == (1, 768)
    assert published.token_shape(published.vision_model("microsoft/resnet-18"), 224, "patch") == (49, 512)
    assert num_parameters(published.language_model("TinyLlama/TinyLlama-1.1B-Chat-v1.0")) == 1_100_048_384
    assert torch.empty(0).device.type == "cpu", "the device of others stays"


def test_a_model_that_is_not_there_is_named() -> None:
    recipe = dataclasses.replace(clip_captioner.VARIANTS["report"], encoder="some/model")
    with pytest.raises(InputError, match=r"^'some/model': its published sizes are not known; add them to mmcore/froz"):
        full_size.sizes(recipe)
