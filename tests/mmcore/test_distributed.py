"""What DDP is handed, without workers."""

import torch
from torch import nn

from mmcore.distributed import align_gradients


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
