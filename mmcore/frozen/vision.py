"""Image encoders: a frozen pretrained encoder by name or folder, or a small one trained from scratch.

Shapes: B images, L image tokens, C channels of a token, P pixels a side.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.errors import InputError
from mmcore.frozen.pretrained import effective_config, load_frozen, sha256_of
from mmcore.images import decode_image, resize_image

SCRATCH = "scratch"
Tokens = Literal["patch", "pooled"]
"""What an image becomes: a token for each patch or place, or the model's one pooled vector."""
PATCH: Tokens = "patch"
_BLIP2 = "blip-2"
# Statistics of ImageNet, for models that do not state theirs.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels_from_bytes(images: Sequence[bytes | None], image_size: int, names: Sequence[str]) -> np.ndarray:
    """Decode and resize images to uint8 (B, P, P, 3). Raises InputError with the name of an image that is broken."""
    return np.stack(
        [resize_image(decode_image(data, name=name), image_size) for data, name in zip(images, names, strict=True)]
    )


def _statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    """Mean and standard deviation of the three channels for pixels in [0, 1], and their source."""
    from transformers.utils import cached_file

    for file in ("preprocessor_config.json", "processor_config.json"):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        fields = json.loads(Path(path).read_text()) if path else {}
        fields = fields.get("image_processor", fields)
        if fields.get("do_normalize") is False:
            return (0.0,) * 3, (1.0,) * 3, file
        if "image_mean" in fields and "image_std" in fields:
            return tuple(fields["image_mean"]), tuple(fields["image_std"]), file
    return _IMAGENET_MEAN, _IMAGENET_STD, "ImageNet, as the model states none"


class FrozenVisionEncoder:
    """A frozen Hugging Face vision model.

    The tokens of an image are the last hidden state, of which feature maps are flattened. With `pooled` the only token
    is the pooler's output.
    """

    def __init__(
        self, name: str, image_size: int, device: str = "cpu", *, tokens: Tokens = PATCH, flag: str = "--encoder"
    ) -> None:
        """Raises InputError, naming `flag`, if `name` is neither a folder with a vision model nor on the hub.

        Raises InputError, naming ``--tokens``, for `pooled` tokens of a model without a pooler.
        """
        from transformers import AutoModel, Blip2VisionModel, CLIPVisionModel

        # Of CLIP and BLIP-2 only the vision encoder is loaded. Other models with several parts are loaded whole.
        alone = {"clip": CLIPVisionModel, _BLIP2: Blip2VisionModel}
        model = load_frozen(
            name,
            lambda config: alone.get(config.model_type, AutoModel),
            flag=flag,
            what="vision model",
            may_miss=("pooler",) if tokens == PATCH else (),
            part_of=lambda config: "vision_model" if config.model_type == _BLIP2 else None,
        )
        model = getattr(model, "vision_model", model)
        if model.main_input_name != "pixel_values":
            kind, takes = model.config.model_type, model.main_input_name
            raise InputError(f"{flag} {name!r}: a {kind} model takes {takes}, not images; name another")
        self.name, self.image_size, self.device = name, image_size, torch.device(device)
        self.tokens = tokens
        # On a CPU, channels-last convolutions run 1.7 times as fast (MobileNetV2, one thread, fp32).
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.mean, self.std, self.statistics_from = _statistics(name)
        try:
            self.token_shape = tuple(self(np.zeros((1, image_size, image_size, 3), np.uint8)).shape[1:])
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{flag} {name!r} does not take images of {image_size} x {image_size}: {reason}; change --image-size"
            ) from None

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines the tokens: weights, configuration, normalisation and image size."""
        settings = effective_config(self.model.config)
        pooled = [] if self.tokens == PATCH else [self.tokens]
        return sha256_of(self.model, [self.image_size, self.mean, self.std, settings, *pooled])

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> fp32 tokens (B, L, C)."""
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        images = images.contiguous(memory_format=torch.channels_last)
        mean, std = (torch.tensor(each, device=self.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        outputs = self.model((images - mean) / std)
        if self.tokens != PATCH:
            if getattr(outputs, "pooler_output", None) is None:
                kind = self.model.config.model_type
                raise InputError(f"--tokens {self.tokens}: a {kind} model has no pooled output; give --tokens {PATCH}")
            return outputs.pooler_output.flatten(1)[:, None]
        hidden = outputs.last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


class ScratchEncoder(nn.Module):
    """A small encoder for synthetic images: three stride-2 convolutions and one more, with GroupNorm and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = (3, width // 4, width // 2, width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU())

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (B, P, P, 3) -> (B, (P/8)², width)."""
        images = pixels.permute(0, 3, 1, 2).to(next(self.parameters()).dtype).div(127.5).sub(1)
        return self.layers(images).flatten(2).transpose(1, 2)
