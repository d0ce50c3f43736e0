"""Costs counted on true architectures, against published counts and times."""

import pytest
import torch
from torch import nn

from jobs.runtime.compare_source import Source
from jobs.runtime.estimate import cost_of
from mmcore.cost import Cost, count_flops, estimate, share_of_peak
from mmcore.devices import device_of, known_device
from mmcore.errors import InputError
from mmcore.generators.sdxl import TINY
from mmcore.generators.sdxl_cost import image_cost

# Device, source, measured seconds an image, share of the peak. The times of SDXL are from the documentation of
# diffusers and its users' measurements on an A100, those of Infinity-2B from its paper and its repository.
PUBLISHED = [
    ("a100", Source("sdxl", steps=30), 3.32, 0.40),
    ("a100", Source("sdxl", steps=30), 2.54, 0.53),
    ("a100", Source("sdxl", steps=50), 5.93, 0.37),
    ("a100", Source("sdxl", steps=50), 5.13, 0.43),
    ("a100", Source("sdxl", steps=50), 4.10, 0.54),
    ("a100", Source("infinity-2b"), 1.15, 0.36),
    ("h100", Source("infinity-2b"), 0.80, 0.16),
]


@pytest.mark.parametrize(("name", "source", "seconds", "share"), PUBLISHED)
def test_published_times_lie_above_the_bound_at_the_expected_share_of_the_peak(
    name: str, source: Source, seconds: float, share: float
) -> None:
    device, cost = device_of(name), cost_of(source)
    time = estimate(cost, device, batch_size=1, bytes_per_weight=2, mfu=share)
    assert time.bound_s < seconds
    assert share_of_peak(cost, device, seconds) == pytest.approx(share, abs=0.006)
    assert time.predicted_s == pytest.approx(seconds, rel=0.03)


@pytest.mark.parametrize(
    ("source", "tera"),
    [
        (Source("sdxl", steps=30), 416),
        (Source("sdxl", steps=50), 687),
        (Source("sdxl", steps=100), 1363),
        (Source("sdxl", steps=100, size="512x512"), 320),
    ],
)
def test_an_image_of_sdxl_has_the_published_operations(source: Source, tera: float) -> None:
    assert cost_of(source).total_flops / 1e12 == pytest.approx(tera, rel=0.002)


def test_one_pass_of_the_unet_has_the_published_operations() -> None:
    assert cost_of(Source("sdxl", steps=1, guided=0)).flops["unet"] / 1e12 == pytest.approx(6.76, abs=0.005)
    small = cost_of(Source("sdxl", steps=1, guided=0, size="512x512"))
    assert small.flops["unet"] / 1e12 == pytest.approx(1.59, abs=0.005)


def test_guidance_of_fewer_steps_is_cheaper() -> None:
    size = {"height": 64, "width": 64, "steps": 10}
    all_guided, half, none = (image_cost(TINY, **size, guided_steps=steps) for steps in (None, 5, 0))
    assert all_guided.flops["unet"] == 2 * none.flops["unet"] > 0
    assert half.flops["unet"] == 1.5 * none.flops["unet"]
    assert all_guided.flops["text"] == 2 * none.flops["text"] > 0
    assert all_guided.weights_read == none.weights_read


def test_parts_are_counted_as_their_weights_say() -> None:
    # A product of T tokens with W weights has 2 T W operations, so a linear layer is counted exactly.
    layer = nn.Linear(8, 4, bias=False, device="meta")
    assert count_flops(lambda: layer(torch.empty(3, 8, device="meta"))) == 2 * 3 * 32


def test_the_bound_is_the_longer_of_compute_and_memory() -> None:
    device = device_of("a100")
    compute = estimate(Cost({"unet": 312e12}, 1e9), device, batch_size=1, bytes_per_weight=2, mfu=0.5)
    assert (compute.bound_s, compute.predicted_s, compute.limit) == (1.0, 2.0, "compute")
    memory = estimate(Cost({"unet": 312e9}, 1019.5e9), device, batch_size=1, bytes_per_weight=2, mfu=0.5)
    assert (memory.bound_s, memory.predicted_s, memory.limit) == (1.0, 1.0, "memory")
    # Eight images of a batch share the weights that are read.
    batch = estimate(Cost({"unet": 312e9}, 1019.5e9), device, batch_size=8, bytes_per_weight=2, mfu=0.5)
    assert batch.bound_s == pytest.approx(1 / 8)


def test_drivers_names_are_known() -> None:
    assert known_device("NVIDIA H200") is device_of("h200")
    assert known_device("NVIDIA A100-SXM4-80GB") is device_of("a100")
    assert known_device("NVIDIA RTX A6000") is device_of("a6000")
    assert known_device("NVIDIA GeForce RTX 3090") is device_of("rtx3090")
    for other in (
        "AMD EPYC, 2 cores",
        "NVIDIA H100 PCIe",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ):
        assert known_device(other) is None


def test_unknown_models_and_sizes_are_refused_in_one_line() -> None:
    for source, problem in [
        (Source("sd3"), "no architecture of 'sd3' is known; name sdxl or infinity-2b, infinity-8b"),
        (Source("infinity-2b", size="1000x1000"), "Infinity has no grids for size 1000x1000; its squares are 256x256"),
        (Source("sdxl", size="1020x1020"), "multiples of 8"),
    ]:
        with pytest.raises(InputError, match=problem):
            cost_of(source)
    with pytest.raises(InputError, match="device 'a7000' is not known; choose one of t4"):
        device_of("a7000")
