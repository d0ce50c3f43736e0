"""SDXL LoRA: the published loss, the rows, and adapters that diffusers opens in both layouts."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmcore.checkpoint import trainable_state
from mmcore.errors import InputError
from mmcore.generators.sdxl import write_tiny
from mmcore.generators.sdxl_frozen import (
    SdxlImageEncoder,
    SdxlTextEncoder,
    crop_centre,
    load_part,
    load_scheduler,
)
from mmcore.generators.sdxl_lora import VARIANTS, SdxlLora, SdxlLoraRecipe
from mmcore.trained.lora import diffusers_file, kohya_file, layers_of
from mmcore.trained.pipeline import LORA_FILE, Lora, TrainedPipeline

SMOKE = VARIANTS["smoke"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("sdxl"))
    write_tiny(folder)
    return folder


def model_of(folder: str, **changes: Any) -> SdxlLora:
    recipe = dataclasses.replace(SMOKE, model=folder, **changes)
    scheduler = load_scheduler(folder, None)
    torch.manual_seed(0)
    model = SdxlLora(
        load_part(folder, None, "unet", torch.float32), recipe, scheduler.alphas_cumprod, "epsilon", 0.13025
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            # As after some training: the second factor begins at zero.
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def batch_of(folder: str, num: int = 3) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    embeds, pooled = SdxlTextEncoder(folder, None, "cpu")(["a dog", "two red cats", "a house"][:num])
    return {
        "moments": torch.randn((num, 8, 8, 8), generator=random),
        "noise": torch.randn((num, 4, 8, 8), generator=random),
        "latent_noise": torch.randn((num, 4, 8, 8), generator=random),
        "channel_noise": torch.randn((num, 4, 1, 1), generator=random),
        "timesteps": torch.tensor([5, 400, 999][:num]),
        "time_ids": torch.tensor([[100, 80, 0, 10, 64, 64]] * num).float(),
        "prompt_embeds": torch.from_numpy(embeds).float(),
        "pooled": torch.from_numpy(pooled).float(),
    }


def published_loss(
    folder: str, model: SdxlLora, batch: dict[str, Tensor], gamma: float | None, offset: float
) -> Tensor:
    """The loss of diffusers' example, written with its own parts: DDPMScheduler and compute_snr."""
    from diffusers.training_utils import compute_snr

    scheduler = load_scheduler(folder, None)
    mean, log_variance = batch["moments"].chunk(2, dim=1)
    latents = (mean + torch.exp(0.5 * log_variance) * batch["latent_noise"]) * 0.13025
    noise = batch["noise"] + offset * batch["channel_noise"]
    noisy = scheduler.add_noise(latents, noise, batch["timesteps"])
    added = {"time_ids": batch["time_ids"], "text_embeds": batch["pooled"]}
    predicted = model.unet(noisy, batch["timesteps"], batch["prompt_embeds"], added_cond_kwargs=added).sample
    if gamma is None:
        return F.mse_loss(predicted, noise)
    snr = compute_snr(scheduler, batch["timesteps"])
    weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / snr
    return (F.mse_loss(predicted, noise, reduction="none").mean(dim=(1, 2, 3)) * weights).mean()


@pytest.mark.parametrize(("gamma", "offset"), [(None, 0.0), (5.0, 0.0), (None, 0.1)])
def test_loss_and_gradients_are_those_of_the_published_script(folder: str, gamma: float | None, offset: float) -> None:
    model, batch = model_of(folder, min_snr_gamma=gamma, noise_offset=offset), batch_of(folder)
    loss = model(batch).losses["loss"]
    (loss.sum / loss.count).backward()
    ours = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    theirs = published_loss(folder, model, batch, gamma, offset)
    theirs.backward()
    assert float(loss.sum / loss.count) == pytest.approx(float(theirs), abs=1e-5)
    assert ours
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert torch.allclose(ours[name], parameter.grad, atol=1e-6)


def test_only_adapters_are_trained_in_fp32(folder: str) -> None:
    scheduler = load_scheduler(folder, None)
    unet = load_part(folder, None, "unet", torch.bfloat16)
    model = SdxlLora(unet, dataclasses.replace(SMOKE, model=folder), scheduler.alphas_cumprod, "epsilon", 0.13)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert trained
    assert all("lora_" in name and each.dtype == torch.float32 for name, each in trained.items())
    frozen = [each for each in model.parameters() if not each.requires_grad]
    # The frozen weights are held once, in half precision.
    assert {each.dtype for each in frozen} == {torch.bfloat16}
    assert len({each.data_ptr() for each in frozen}) == len(frozen)


def test_text_embeddings_are_those_of_the_pipeline(folder: str) -> None:
    prompts = ["a dog", "two red cats " * 12]
    embeds, pooled = SdxlTextEncoder(folder, None, "cpu")(prompts)
    pipeline = TrainedPipeline(folder).load().pipeline
    theirs, _, their_pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert np.allclose(embeds, theirs.detach().numpy(), atol=2e-3)
    assert np.allclose(pooled, their_pooled.detach().numpy(), atol=2e-3)


def test_moments_are_those_of_the_vae(folder: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    moments = SdxlImageEncoder(folder, None, "cpu")(pixels)
    vae = load_part(folder, None, "vae", torch.float32)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert np.allclose(moments[:, :4], vae.encode(images).latent_dist.mean.numpy(), atol=2e-3)


def test_the_centre_is_cropped_of_the_resized_image() -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (75, 0, 125, 100))
    pixels, size = crop_centre(image, 32)
    assert pixels.shape == (32, 32, 3)
    assert size == (100, 200, 0, 16)
    assert tuple(pixels[16, 16]) == (0, 0, 255)
    assert tuple(pixels[16, 1]) == (255, 0, 0)


@pytest.mark.parametrize("dora", [False, True])
def test_an_exported_adapter_makes_the_image_of_the_training(folder: str, tmp_path: Path, dora: bool) -> None:
    # An alpha that is not the rank: a converter that writes the rank would change the strength.
    model = model_of(folder, rank=4, alpha=10.0, dora=dora).eval()
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    layers = layers_of(trainable_state(model))
    files = {"diffusers": diffusers_file(layers, model.recipe)}
    if dora:
        with pytest.raises(InputError, match="dora: the layout of kohya is for plain LoRA"):
            kohya_file(layers, model.recipe)
    else:
        files["kohya"] = kohya_file(layers, model.recipe)

    def drawn(unet: Any) -> Tensor:
        """Decoded images in [-1, 1] of a pipeline with this U-Net."""
        pipeline.pipeline.unet = unet
        latents = pipeline.pipeline(
            ["a dog"], num_inference_steps=2, generator=torch.Generator().manual_seed(7), output_type="latent"
        ).images
        return pipeline.pipeline.vae.decode(latents / 0.13025).sample

    pipeline = TrainedPipeline(folder).load()
    with torch.inference_mode():
        plain, wanted = drawn(pipeline.pipeline.unet), drawn(model.unet)
        assert (plain - wanted).abs().max() > 0.01
        for layout, data in files.items():
            (tmp_path / layout).mkdir()
            (tmp_path / layout / LORA_FILE).write_bytes(data)
            unet = TrainedPipeline(folder, None, [Lora(str(tmp_path / layout))]).load().pipeline.unet
            assert (drawn(unet) - wanted).abs().max() <= 1e-4, layout
            assert len([name for name in unet.state_dict() if "lora_" in name]) == len(layers)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_size": 100}, "image_size 100 must be a multiple of 32"),
        ({"alpha": 0.0}, "alpha 0.0 must be above 0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma 0.0 must be above 0"),
        ({"noise_offset": -1.0}, "noise_offset -1.0 must not be negative"),
        ({"target_modules": ()}, "target_modules is empty"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        dataclasses.replace(SdxlLoraRecipe(), **changes)


def test_layers_that_are_not_there_are_refused(folder: str) -> None:
    with pytest.raises(InputError, match="--target-modules to_nothing: "):
        model_of(folder, target_modules=("to_nothing",))
