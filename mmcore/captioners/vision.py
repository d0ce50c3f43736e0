"""Images to image tokens: a frozen pretrained encoder by name or folder, or a small one trained from scratch.

Shapes: B images, L image tokens, C channels of a token, P pixels a side.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmcore.images import decode_image, resize_image
from mmcore.pretrained import load_frozen, sha256_of

SCRATCH = "scratch"
# Where a model has no preprocessor_config.json: the statistics of ImageNet.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels_from_bytes(images: Sequence[bytes], image_size: int, names: Sequence[str]) -> np.ndarray:
    """Decode and squash to uint8 (B, P, P, 3). Raises InputError that names the image that does not decode."""
    return np.stack(
        [resize_image(decode_image(data, name=name), image_size) for data, name in zip(images, names, strict=True)]
    )


class FrozenVisionEncoder:
    """A Hugging Face vision model whose last hidden state becomes tokens: a feature map is flattened row by row."""

    def __init__(self, name: str, image_size: int, device: str = "cpu", *, flag: str = "--encoder") -> None:
        """Raises InputError, naming `flag`, where `name` is neither a folder with a vision model nor on the hub."""
        from transformers import AutoModel, CLIPVisionModel

        # A two-tower model such as CLIP: its vision half alone.
        choose = lambda config: CLIPVisionModel if hasattr(config, "vision_config") else AutoModel
        model = load_frozen(name, choose, flag=flag, what="vision model")
        self.name, self.image_size, self.device = name, image_size, torch.device(device)
        # On a CPU convolutions run 1.7 times as fast with the channels last (MobileNetV2, one thread, fp32).
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.mean, self.std = self._statistics(name)

    @staticmethod
    def _statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        from transformers.utils import cached_file

        path = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
        fields = json.loads(Path(path).read_text()) if path else {}
        return tuple(fields.get("image_mean", _IMAGENET_MEAN)), tuple(fields.get("image_std", _IMAGENET_STD))

    def fingerprint(self) -> str:
        """SHA-256 over all that decides the tokens: weights, normalisation and image size."""
        return sha256_of(self.model, [self.image_size, self.mean, self.std])

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> fp32 tokens (B, L, C)."""
        images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float().div_(255)
        images = images.contiguous(memory_format=torch.channels_last)
        mean, std = (torch.tensor(each, device=self.device).view(1, 3, 1, 1) for each in (self.mean, self.std))
        hidden = self.model((images - mean) / std).last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


class ScratchEncoder(nn.Module):
    """Three stride-2 convolutions and one more, with GroupNorm (no batch statistics), for small synthetic images."""

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
