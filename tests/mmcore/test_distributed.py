"""What DDP is handed, without workers."""

import torch
from torch import nn

from mmcore.distributed import align_gradients


def test_gradients_of_channels_last_weights_keep_their_strides() -> None:
    """As those of a U-Net. `is_contiguous` is true of a 1 x 1 kernel in either layout."""
    layers = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    model = layers.to(memory_format=torch.channels_last)
    align_gradients(model)
    model(torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last)).square().sum().backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert weight.grad.stride() == weight.stride(), name


def test_gradients_of_a_1_x_1_kernel_have_the_strides_of_its_weights() -> None:
    """Where the images come as channels last, as decoded ones do. The values stay the same."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 1)
    images = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)

    def gradient() -> torch.Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            made = layer(images)
        made.float().square().sum().backward()
        assert layer.weight.grad is not None
        return layer.weight.grad

    before = gradient()
    assert before.stride() != layer.weight.stride(), "otherwise PyTorch lays them out so, and the hook can go"
    align_gradients(layer)
    # As a step of several phases does.
    layer.requires_grad_(False).requires_grad_(True)
    after = gradient()
    assert after.stride() == layer.weight.stride()
    assert torch.equal(before, after)
