"""Perceptual distance of two images: the distance of their features in a frozen network.

`LPIPS` (Zhang et al. 2018, arXiv 1801.03924, equation 1) uses VGG-16. Its published weights are read from files, as the
``lpips`` package needs torchvision. `FeatureDistance` has no learned channel weights. It uses any convolutional vision
model of Hugging Face, by name or folder.

Shapes: B images, P pixels a side, C channels, H and W sides of a feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.errors import InputError
from mmcore.frozen.pretrained import read_weights
from mmcore.frozen.vision import FrozenVisionEncoder

# The convolutions of torchvision's vgg16 by their index in `features`, and the layers that LPIPS compares (relu1_2 to
# relu5_3).
_VGG16_CHANNELS = {
    0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
    17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
_LAST_OF_STAGE = (2, 7, 14, 21, 28)
# The reference implementation's normalisation of images in [-1, 1].
_LPIPS_SHIFT, _LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Avoids a division by zero for a feature of length zero.
_EPSILON = 1e-10


def _squared_differences(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Squared differences of features, each scaled to unit length over channels: (B, C, H, W), fp32 or above."""
    real = torch.promote_types(a_BCHW.dtype, torch.float32)
    a_BCHW, b_BCHW = (F.normalize(each.to(real), dim=1, eps=_EPSILON) for each in (a_BCHW, b_BCHW))
    return (a_BCHW - b_BCHW).square()


class PerceptualDistance(nn.Module):
    """Base class of frozen networks. Weights get no gradient, and BatchNorm always uses its stored statistics."""

    # Depthwise convolutions are computed outside of autocast, and channel weights are multiplied in fp32.
    own_precision = True

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualDistance":
        return super().train(False)


class FeatureDistance(PerceptualDistance):
    """The squared distance of unit-length features in the last feature map of each resolution, averaged."""

    def __init__(self, name: str, image_size: int) -> None:
        """Raises InputError if `name` is not a convolutional vision model."""
        super().__init__()
        encoder = FrozenVisionEncoder(name, image_size, flag="--perceptual")
        self.network = encoder.model
        for what, values in (("mean", encoder.mean), ("std", encoder.std)):
            self.register_buffer(what, torch.tensor(values).view(1, 3, 1, 1))
        self.freeze()
        with torch.no_grad():
            maps = self._features(torch.zeros(1, 3, image_size, image_size))
        if not maps:
            raise InputError(f"--perceptual {name!r}: has no feature maps; name a convolutional vision model")

    def _features(self, x_B3PP: Tensor) -> list[Tensor]:
        normalised = ((x_B3PP + 1) / 2 - self.mean) / self.std  # type: ignore[operator]
        # No autocast on a CPU: depthwise convolutions are slow in bf16.
        enabled = torch.is_autocast_enabled(x_B3PP.device.type) and x_B3PP.device.type != "cpu"
        with torch.autocast(x_B3PP.device.type, enabled=enabled):
            hidden = self.network(normalised, output_hidden_states=True).hidden_states
        return list({each.shape[2:]: each for each in hidden if each.ndim == 4}.values())

    def forward(self, a_B3PP: Tensor, b_B3PP: Tensor) -> Tensor:
        """Images in [-1, 1] -> their distances (B,)."""
        pairs = zip(self._features(a_B3PP), self._features(b_B3PP), strict=True)
        return torch.stack([_squared_differences(a, b).sum(1).mean((1, 2)) for a, b in pairs]).mean(0)


class LPIPS(PerceptualDistance):
    """LPIPS 0.1 over VGG-16."""

    def __init__(self, vgg16: str, heads: str) -> None:
        """`vgg16`: file of torchvision's state dict. `heads`: ``weights/v0.1/vgg.pth`` of the ``lpips`` package.

        Both are safetensors or .pth files. Raises InputError for a missing weight.
        """
        super().__init__()
        convolutions = read_weights(vgg16, "--vgg16")
        self.convolutions = nn.ModuleDict()
        for place, (before, after) in _VGG16_CHANNELS.items():
            layer = nn.Conv2d(before, after, 3, padding=1)
            for what, parameter in layer.named_parameters():
                _fill(parameter, convolutions, f"features.{place}.{what}", vgg16, "--vgg16")
            self.convolutions[str(place)] = layer
        heads_of = read_weights(heads, "--lpips-heads")
        self.heads = nn.ModuleList()
        for stage, place in enumerate(_LAST_OF_STAGE):
            head = nn.Conv2d(_VGG16_CHANNELS[place][1], 1, 1, bias=False)
            for parameter in head.parameters():
                _fill(parameter, heads_of, f"lin{stage}.model.1.weight", heads, "--lpips-heads")
            self.heads.append(head)
        self.register_buffer("shift", torch.tensor(_LPIPS_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_LPIPS_SCALE).view(1, 3, 1, 1))
        self.freeze()

    def _features(self, x_B3PP: Tensor) -> list[Tensor]:
        x = (x_B3PP - self.shift) / self.scale  # type: ignore[operator]
        stages = []
        for place in _VGG16_CHANNELS:
            x = F.relu(self.convolutions[str(place)](x))
            if place in _LAST_OF_STAGE:
                stages.append(x)
                x = F.max_pool2d(x, 2)
        return stages

    def forward(self, a_B3PP: Tensor, b_B3PP: Tensor) -> Tensor:
        """Images in [-1, 1] -> their distances (B,)."""
        distances = []
        for a, b, head in zip(self._features(a_B3PP), self._features(b_B3PP), self.heads, strict=True):
            weights_C = head.weight.view(1, -1, 1, 1)  # type: ignore[operator]
            distances.append((_squared_differences(a, b) * weights_C).sum(1).mean((1, 2)))
        return torch.stack(distances).sum(0)


def _fill(parameter: nn.Parameter, weights: dict[str, Tensor], name: str, path: str, flag: str) -> None:
    found = weights.get(name)
    if found is None or found.shape != parameter.shape:
        has = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise InputError(f"{flag} {path!r}: {name} {has} where {tuple(parameter.shape)} is needed")
    with torch.no_grad():
        parameter.copy_(found)
