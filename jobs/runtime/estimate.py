"""What jobs/compare.py says of a device that is not at hand: costs, bounds, predictions and the check of a claim."""

import functools
from dataclasses import dataclass

import torch

from jobs.runtime.compare_source import BYTES, Source
from mmcore.cost import REACHED, Cost, Estimate, estimate, share_of_peak
from mmcore.devices import Device
from mmcore.errors import InputError
from mmcore.frozen.published import num_parameters
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_cost import T5Sizes, text_flops, transformer_flops
from mmcore.generators.infinity_cost import decoder_flops as infinity_decoder_flops
from mmcore.generators.infinity_sampling import InfinityOptions
from mmcore.generators.infinity_scales import BUDGETS, GRIDS, STRIDE, Grid
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings
from mmcore.generators.sdxl_cost import image_cost

SDXL = "sdxl"
INFINITY = {
    "infinity-2b": InfinitySettings(),
    "infinity-8b": InfinitySettings(num_layers=40, width=3584, num_heads=28, num_bits=56),
}
# The larger model's positions are patches of 2 × 2 positions of a tokenizer with 14 bits.
_PATCH = {"infinity-2b": 1, "infinity-8b": 2}
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
    return _infinity_cost(source.model, grids_of_size(source), source.guided)


def grids_of_size(source: Source) -> tuple[Grid, ...]:
    """The grids of an image of this size. Raises InputError where no schedule ends with it."""
    height, width = source.height_width
    wanted = (height // STRIDE, width // STRIDE)
    lengths = tuple(BUDGETS.values())
    for grids in GRIDS.values():
        for length in lengths:
            if grids[length - 1] == wanted and not height % STRIDE and not width % STRIDE:
                return grids[:length]
    squares = ", ".join(
        f"{side * STRIDE}x{side * STRIDE}" for side in (GRIDS[1.0][length - 1][0] for length in lengths)
    )
    raise InputError(f"source {source}: Infinity has no grids for size {source.size}; its squares are {squares}")


@functools.cache
def _infinity_cost(model: str, grids: tuple[Grid, ...], guided: int | None) -> Cost:
    settings, patch = INFINITY[model], _PATCH[model]
    grids = tuple((height // patch, width // patch) for height, width in grids) if patch > 1 else grids
    vae = InfinityVaeSettings(num_bits=settings.num_bits // patch**2)
    latent = (grids[-1][0] * patch, grids[-1][1] * patch)
    with torch.device("meta"):
        transformer, decoder = num_parameters(InfinityTransformer(settings)), num_parameters(InfinityVae(vae).decoder)
    text = T5Sizes()
    # The table of tokens is left out, as a prompt reads a few rows of it.
    layer = 4 * text.width * text.attention_width + 3 * text.width * text.ffn_width
    return Cost(
        {
            "text": text_flops(text, settings.max_text_tokens),
            "transformer": transformer_flops(
                settings, settings.max_text_tokens, grids, InfinityOptions(guided_grids=guided)
            ),
            "vae": infinity_decoder_flops(vae, latent),
        },
        weights_read=text.num_layers * layer + len(grids) * transformer + decoder,
    )


def estimate_line(source: Source, device: Device, mfu: float) -> Line:
    """Raises InputError as `cost_of`."""
    cost = cost_of(source)
    time = estimate(cost, device, batch_size=source.batch, bytes_per_weight=BYTES[source.dtype], mfu=mfu)
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
    halves = [
        Source(SDXL, max(1, source.steps // 2), None, source.batch, source.size, source.dtype),
        Source(SDXL, source.steps, source.guided, source.batch, f"{width // 2}x{height // 2}", source.dtype),
    ]
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
    half = Source(first.model, max(1, first.steps // 2), None, first.batch, first.size, first.dtype)
    of_half = cost_of(half).total_flops / cost_of(second).total_flops
    return (
        f"Claimed: {second.model} is {first.seconds / second.seconds:.1f} times as fast as {first.model}. At equal "
        f"pixels and equal shares of the peak it is {ratio:.1f} times as fast as {first.steps} steps, "
        f"and {of_half:.1f} times as fast as {half.steps} steps."
    )


def _steps(source: Source) -> str:
    return f", {source.steps} steps," if source.model == SDXL else ""
