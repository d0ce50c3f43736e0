"""What jobs/compare.py says of a device that is not at hand: costs, bounds, predictions and the check of a claim."""

import dataclasses
import functools
from dataclasses import dataclass

import torch

from jobs.runtime.compare_source import Source
from mmcore.cost import REACHED, Cost, Estimate, estimate, share_of_peak
from mmcore.devices import Device
from mmcore.errors import InputError, OptionError
from mmcore.frozen.published import num_parameters
from mmcore.generators import infinity_cost
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_scales import SIZES, STRIDE, Grid, grids_of_size
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings
from mmcore.generators.sdxl_cost import image_cost

SDXL = "sdxl"
INFINITY = {
    "infinity-2b": (InfinitySettings(), InfinityVaeSettings()),
    "infinity-8b": (
        InfinitySettings(num_layers=40, width=3584, num_heads=28, num_bits=56),
        InfinityVaeSettings(num_bits=14, factors=(1, 2, 4, 4)),
    ),
}
"""The sizes of a Transformer and of its tokenizer."""
REPORT = (
    Source(SDXL, steps=100, dtype="float16", seconds=10.8),
    Source("infinity-2b", seconds=3.0),
)
"""The report's two rows: 1,000 images in 3 h and in 50 min, one at a time, on a device of `REPORT_DEVICE`."""
REPORT_DEVICE = "a6000"
DEFAULT = (
    Source(SDXL, steps=100, dtype="float16"),
    Source(SDXL, steps=30, batch=8, dtype="float16"),
    Source("infinity-2b"),
    Source("infinity-2b", batch=8),
)
"""What is compared where no source is given."""


@dataclass(frozen=True)
class Line:
    """One source on one device."""

    source: Source
    cost: Cost
    time: Estimate


def cost_of(source: Source) -> Cost:
    """The cost of an image. Raises InputError for a model whose architecture is not known, or a size without grids."""
    if source.model == SDXL:
        height, width = source.height_width
        if height % 8 or width % 8:
            raise InputError(f"source {source}: the sides of an image must be multiples of 8")
        return image_cost(height=height, width=width, steps=source.steps, guided_steps=source.guided)
    if source.model not in INFINITY:
        raise InputError(
            f"source {source}: no architecture of {source.model!r} is known; name {SDXL} or {', '.join(INFINITY)}"
        )
    return _infinity_cost(source.model, _grids(source), source.guided)


def _grids(source: Source) -> tuple[Grid, ...]:
    """The grids of an image of this size. Raises InputError where no schedule ends with it."""
    try:
        return grids_of_size(source.height_width)[0]
    except OptionError:
        squares = ", ".join(f"{width}x{height}" for height, width in SIZES if height == width)
        raise InputError(
            f"source {source}: Infinity has no grids for size {source.size}; its squares are {squares}"
        ) from None


@functools.cache
def _infinity_cost(model: str, grids: tuple[Grid, ...], guided: int | None) -> Cost:
    settings, vae = INFINITY[model]
    # A position of the larger model is a patch of 2 × 2 positions of its tokenizer.
    flops = infinity_cost.image_cost(
        settings, vae, grids, InfinityOptions(guided_grids=guided), patch=STRIDE // vae.stride
    )
    with torch.device("meta"):
        transformer, decoder = num_parameters(InfinityTransformer(settings)), num_parameters(InfinityVae(vae).decoder)
    return Cost(
        {"text": flops.text, "transformer": flops.transformer, "vae": flops.decoder},
        weights_read=infinity_cost.T5Sizes().num_weights + len(grids) * transformer + decoder,
    )


def estimate_line(source: Source, device: Device, mfu: float) -> Line:
    """Raises InputError as `cost_of`."""
    cost = cost_of(source)
    size = getattr(torch, source.dtype).itemsize
    time = estimate(cost, device, batch_size=source.batch, bytes_per_weight=size, mfu=mfu)
    return Line(source, cost, time)


def check_claim(source: Source, device: Device) -> str:
    """What the claimed seconds of `source` need of the device, in one sentence or more."""
    assert source.seconds is not None, "a source with seconds"
    share = share_of_peak(cost_of(source), device, source.seconds)
    low, high = REACHED
    text = (
        f"{source.model} at {source.size}{_steps(source)} in {source.seconds:g} s an image needs "
        f"{cost_of(source).total_flops / source.seconds / 1e12:.0f} TFLOP/s, {share:.1%} of the peak of one "
        f"{device.name}. "
    )
    if share > 1:
        return text + "No run is that fast: the settings are not those that were timed."
    if share <= high:
        return text + "That is within what is reached."
    text += f"Published measurements of SDXL reach {low:.0%} to {high:.0%} of an A100's: the settings do not fit. "
    return text + _what_fits(source, device)


def _what_fits(source: Source, device: Device) -> str:
    """Other settings of SDXL that fit the claimed time."""
    assert source.seconds is not None
    if source.model != SDXL:
        return ""
    height, width = source.height_width
    halves = [_of_half_the_steps(source), dataclasses.replace(source, size=f"{width // 2}x{height // 2}")]
    fitting = [
        f"{each.steps} steps at {each.size} ({share:.0%})"
        for each in halves
        if (share := share_of_peak(cost_of(each), device, source.seconds)) <= REACHED[1]
    ]
    return f"In that time fit {' or '.join(fitting)}." if fitting else ""


def are_comparable(first: Source, second: Source) -> bool:
    """Whether `compare_claims` has something to say: SDXL before Infinity, with equally many pixels."""
    return first.model == SDXL and second.model in INFINITY and first.size == second.size


def compare_claims(first: Source, second: Source) -> str:
    """What the claimed ratio of two sources is, and what their operations say at equal shares of the peak."""
    assert first.seconds is not None, "a source with seconds"
    assert second.seconds is not None, "a source with seconds"
    ratio = cost_of(first).total_flops / cost_of(second).total_flops
    half = _of_half_the_steps(first)
    of_half = cost_of(half).total_flops / cost_of(second).total_flops
    return (
        f"Claimed: {second.model} is {first.seconds / second.seconds:.1f} times as fast as {first.model}. At equal "
        f"pixels and equal shares of the peak it is {ratio:.1f} times as fast as {first.steps} steps, "
        f"and {of_half:.1f} times as fast as {half.steps} steps."
    )


def _of_half_the_steps(source: Source) -> Source:
    return dataclasses.replace(source, steps=max(1, source.steps // 2), guided=None)


def _steps(source: Source) -> str:
    return f", {source.steps} steps," if source.model == SDXL else ""
