"""The frozen parts of a pretrained SDXL, by the name or folder of its pipeline: VAE, text encoders, U-Net, schedule.

Shapes: B images, P pixels a side, h and w sides of the latents, T text tokens, C channels of a text token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.pixels import to_network
from mmcore.errors import InputError
from mmcore.frozen.hub import not_found, quiet_load
from mmcore.generators.sdxl import NUM_TOKENS

_WHAT = "part of an SDXL pipeline of diffusers"


def load_part(model: str, revision: str | None, part: str, dtype: torch.dtype) -> Any:
    """One network of the pipeline `model`, frozen and in evaluation mode. `part`: its folder, such as ``unet``.

    Raises InputError if there is none.
    """
    import diffusers
    import transformers

    classes: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    try:
        with quiet_load():
            loaded = classes[part].from_pretrained(
                model, subfolder=part, use_safetensors=True, dtype=dtype, trust_remote_code=False, **_at(revision)
            )
    except (OSError, ValueError) as error:
        raise not_found(model, "--model", f"{part}, a {_WHAT},", error) from None
    return loaded.eval().requires_grad_(False)


def load_settings(model: str, revision: str | None, part: str) -> dict[str, Any]:
    """The configuration of one network of diffusers in the pipeline `model`. Raises InputError if there is none."""
    from diffusers import UNet2DConditionModel

    try:
        # The method reads the file alone, whatever the class.
        return dict(UNet2DConditionModel.load_config(model, subfolder=part, **_at(revision)))
    except (OSError, ValueError) as error:
        raise not_found(model, "--model", f"{part}, a {_WHAT},", error) from None


def _at(revision: str | None) -> dict[str, Any]:
    return {"revision": revision} if revision else {}


def load_scheduler(model: str, revision: str | None) -> Any:
    """diffusers' DDPMScheduler of the training, by the pipeline's scheduler. Raises InputError if there is none."""
    from diffusers import DDPMScheduler

    try:
        return DDPMScheduler.from_pretrained(model, subfolder="scheduler", trust_remote_code=False, **_at(revision))
    except (OSError, ValueError) as error:
        raise not_found(model, "--model", f"scheduler, a {_WHAT},", error) from None


def crop_centre(image: Image.Image, size: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Resize the shorter side to `size` and crop the centre.

    Returns: uint8 pixels (P, P, 3), and height and width of the image before, top and left of the crop.
    """
    width, height = image.size
    scale = size / min(width, height)
    resized = image.resize((max(size, int(width * scale)), max(size, int(height * scale))), Image.Resampling.BILINEAR)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)))
    return pixels, (height, width, top, left)


class SdxlImageEncoder:
    """Images -> moments of their latents, in fp32: in fp16 this VAE overflows."""

    def __init__(self, model: str, revision: str | None, device: str) -> None:
        self.vae, self.device = load_part(model, revision, "vae", torch.float32).to(device), device

    @torch.inference_mode()
    def __call__(self, pixels_BPP3: np.ndarray) -> np.ndarray:
        """uint8 (B, P, P, 3) -> mean and logarithm of variance, fp16 (B, 8, h, w)."""
        images = to_network(torch.from_numpy(pixels_BPP3).to(self.device))
        distribution = self.vae.encode(images).latent_dist
        return torch.cat([distribution.mean, distribution.logvar], dim=1).half().cpu().numpy()


class SdxlTextEncoder:
    """Prompts -> the hidden states of both text encoders side by side, and the pooled vector of the second."""

    def __init__(self, model: str, revision: str | None, device: str) -> None:
        from transformers import CLIPTokenizer

        self.device = device
        self.encoders = [load_part(model, revision, part, torch.float32) for part in ("text_encoder", "text_encoder_2")]
        self.encoders = [encoder.to(device) for encoder in self.encoders]
        try:
            with quiet_load():
                self.tokenizers = [
                    CLIPTokenizer.from_pretrained(model, subfolder=part, trust_remote_code=False, **_at(revision))
                    for part in ("tokenizer", "tokenizer_2")
                ]
        except (OSError, ValueError) as error:
            raise not_found(model, "--model", f"tokenizer, a {_WHAT},", error) from None

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, with begin and end."""
        return [len(ids) for ids in self.tokenizers[0](list(prompts), verbose=False)["input_ids"]]

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Prompts -> fp16 (B, T, C) and fp16 (B, P). Longer prompts are cut."""
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                list(prompts), padding="max_length", max_length=NUM_TOKENS, truncation=True, return_tensors="pt"
            )["input_ids"]
            output = encoder(ids.to(self.device), output_hidden_states=True)
            # SDXL was trained on the last layer but one.
            hidden.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None, "two text encoders"
        return _fp16(torch.cat(hidden, dim=-1)), _fp16(pooled)


def _fp16(values: Tensor) -> np.ndarray:
    if not torch.isfinite(values.half()).all():
        raise InputError("a text embedding is beyond the range of fp16; use another --model")
    return values.half().cpu().numpy()
