"""Pipelines of diffusers as generators: a tiny SDXL from its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmcore.errors import InputError, OptionError
from mmcore.generators.pipeline_options import PipelineOptions
from mmcore.generators.sdxl import write_tiny
from mmcore.trained.generator import open_generator
from mmcore.trained.pipeline import LORA_FILE, Lora, TrainedPipeline, parse_lora

PROMPTS, SEEDS = ["a red square", "a very long blue circle", "two dogs"], [3, 1, 2]
HOW = PipelineOptions(steps=3)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    write_tiny(str(folder))
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return open_generator(str(folder)).load()


def write_lora(folder: Path, place: Path, *, rank: int = 2, alpha: int = 2) -> Path:
    """An adapter of the attention layers with random weights, as diffusers writes it."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    unet = TrainedPipeline(str(folder)).load().pipeline.unet
    torch.manual_seed(5)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionXLPipeline.save_lora_weights(str(place), unet_lora_layers=layers, weight_name=LORA_FILE)
    return place / LORA_FILE


def test_an_image_depends_on_its_prompt_and_its_seed_alone(pipeline: Any) -> None:
    images = pipeline.generate(PROMPTS, SEEDS, HOW)
    assert images.shape == (3, 64, 64, 3)
    assert images.dtype == np.uint8
    turned = pipeline.generate(PROMPTS[::-1], SEEDS[::-1], HOW)
    assert (images == turned[::-1]).all()
    other = pipeline.generate([PROMPTS[0]] * 3, [3, 4, 5], HOW)
    assert (other[0] == images[0]).all()
    assert (other[1] != images[0]).any()
    # Alone the sums of the same numbers may round in another order.
    alone = pipeline.generate(PROMPTS[1:2], SEEDS[1:2], HOW)[0].astype(int)
    assert np.abs(alone - images[1].astype(int)).max() <= 1


@pytest.mark.parametrize("negative_prompt", ["", "blue"])
def test_images_are_those_of_diffusers_own_call(pipeline: Any, negative_prompt: str) -> None:
    options = PipelineOptions(steps=3, guidance=4.0, sampler="own", negative_prompt=negative_prompt)
    made = pipeline.generate(PROMPTS[:1], SEEDS[:1], options)[0]
    theirs = pipeline.pipeline(
        PROMPTS[0],
        negative_prompt=negative_prompt or None,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(SEEDS[0]),
        output_type="np",
    ).images[0]
    assert np.abs(made - (theirs * 255).round()).max() <= 1


def test_each_step_is_told_and_guidance_can_end_early(pipeline: Any) -> None:
    told: list[tuple[int, int]] = []
    options = PipelineOptions(steps=4, guided_share=0.5)
    rows: list[int] = []
    hook = pipeline.pipeline.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    cut = pipeline.generate(PROMPTS[:2], SEEDS[:2], options, on_step=lambda *step: told.append(step))
    hook.remove()
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert rows == [4, 4, 2, 2]
    assert (cut != pipeline.generate(PROMPTS[:2], SEEDS[:2], PipelineOptions(steps=4))).any()
    # The next call is guided again.
    assert (cut == pipeline.generate(PROMPTS[:2], SEEDS[:2], options)).all()


def test_the_identity_is_that_of_the_files(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    same, other = TrainedPipeline(str(folder)).identity(), TrainedPipeline(str(copy)).identity()
    assert same["files_sha256"] == other["files_sha256"]
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.02}))
    assert TrainedPipeline(str(copy)).identity()["files_sha256"] != same["files_sha256"]


def test_an_adapter_changes_images_by_its_scale(folder: Path, tmp_path: Path, pipeline: Any) -> None:
    file = write_lora(folder, tmp_path)
    plain = pipeline.generate(PROMPTS[:1], SEEDS[:1], HOW)[0].astype(int)

    def distance(scale: float) -> float:
        with_lora = open_generator(str(folder), loras=[f"{file}:{scale}"]).load()
        return float(np.abs(with_lora.generate(PROMPTS[:1], SEEDS[:1], HOW)[0].astype(int) - plain).mean())

    assert 0 < distance(0.05) < distance(1.0)
    identity = open_generator(str(folder), loras=[f"{file}:0.5"]).identity()
    assert json.loads(str(identity["loras"]))[0]["scale"] == 0.5


def test_adapters_are_read_as_they_are_written() -> None:
    assert parse_lora("out/lora.safetensors") == Lora("out/lora.safetensors", 1.0)
    assert parse_lora("s3://bucket/lora:0.5") == Lora("s3://bucket/lora", 0.5)
    assert parse_lora("s3://bucket/lora") == Lora("s3://bucket/lora", 1.0)
    with pytest.raises(InputError, match="the scale 0 must be above 0"):
        parse_lora("lora:0")


def test_what_is_no_pipeline_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index.json in this folder"):
        TrainedPipeline(str(tmp_path))
    with pytest.raises(InputError, match="--revision main: is for models of the hub"):
        TrainedPipeline(str(folder), "main")
    with pytest.raises(InputError, match="no adapter there; name a"):
        open_generator(str(folder), loras=["nowhere"]).identity()
    save_file({"unet.nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(InputError, match="does not fit"):
        open_generator(str(folder), loras=[str(tmp_path)]).load()
    file = write_lora(folder, tmp_path / "part")
    partly = load_file(file) | {"unet.mid_block.nothing.to_q.lora_A.weight": torch.zeros(2, 16)}
    save_file(partly | {"unet.mid_block.nothing.to_q.lora_B.weight": torch.zeros(16, 2)}, file)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for wrong, problem in ((file, "layers are in"), (tmp_path / "broken.safetensors", "does not fit")):
        with pytest.raises(InputError, match=problem):
            open_generator(str(folder), loras=[str(wrong)]).load()
    shutil.copytree(folder, tmp_path / "code")
    index = json.loads((folder / "model_index.json").read_text())
    for name in (["own", "OwnPipeline"], "StableDiffusionXLInpaintPipeline", None):
        (tmp_path / "code" / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        with pytest.raises(InputError, match="is not supported; name one of StableDiffusionPipeline"):
            TrainedPipeline(str(tmp_path / "code"))


@pytest.mark.parametrize(
    ("options", "size", "problem"),
    [
        (PipelineOptions(steps=0), (64, 64), "steps 0"),
        (PipelineOptions(steps=1001), (64, 64), "at most 1000"),
        (PipelineOptions(guidance=0.5), (64, 64), "guidance 0.5"),
        (PipelineOptions(guided_share=0), (64, 64), "guided-share 0"),
        (PipelineOptions(guidance=1, negative_prompt="x"), (64, 64), "negative-prompt has no effect"),
        (PipelineOptions(), (60, 64), "size 64x60: the sides must be multiples of 8"),
    ],
)
def test_wrong_options_are_refused(folder: Path, options: PipelineOptions, size: tuple[int, int], problem: str) -> None:
    with pytest.raises(OptionError) as error:
        TrainedPipeline(str(folder)).check(options, size)
    assert problem in str(error.value)
