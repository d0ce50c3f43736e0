#!/usr/bin/env python
"""Measures images per second of Infinity: a batch against one image at a time, and against the official way.

Command: python jobs/bench/infinity_batches.py --num-threads 1      (idle machine)
         python jobs/bench/infinity_batches.py --model 2b           (GPU of 80 GB)
Target: a batch of 8 on a CPU at least twice as fast as one at a time, a GPU three times as fast as the official way.

The official way is one image at a time with a cache that grows. Each grid copies the keys and values of all grids
before it. All ways have the same random weights, random text, seeds and guidance, and all decode their images.

The bits of a batch are also compared with those of one image at a time. Sums have another order there, so a bit differs
where its logits are near the border. After it, all later bits of the image may differ.

FLOPs are those of `mmcore.generators.infinity_cost`. `mfu` is their share of the peak of a known GPU.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

from jobs.bench.timing import clock, interleaved, publish, say, verdict
from jobs.runtime.commandline import run
from mmcore.device import device_name, free_memory
from mmcore.devices import known_device
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.frozen_weights import store_for_autocast
from mmcore.generators import infinity_sampling
from mmcore.generators.code_sampling import uniforms
from mmcore.generators.infinity import Cache, InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_batches import InfinityImages, half_precision
from mmcore.generators.infinity_cost import decoder_flops, transformer_flops
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_sampling import sample
from mmcore.generators.infinity_scales import Grid, grids_of, num_positions
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings
from mmcore.seeding import generator

_BATCHED, _SINGLE, _OFFICIAL = "batch", "one at a time", "official way"
# Model -> the way that the batch is compared with, and how many times as fast it shall be.
TARGETS = {"shapes": (_SINGLE, 2.0), "2b": (_OFFICIAL, 3.0)}


@dataclass(frozen=True)
class InfinityBench:
    """Settings of the benchmark."""

    model: Literal["shapes", "2b"] = "shapes"
    """Sizes: a small model of 64 pixels, or Infinity-2B with its VAE of 32 bits. The weights are random."""
    budget: str = "1M"
    """Pixels of an image of 2b: 0.06M, 0.25M, 0.60M or 1M."""
    batch_size: int = 8
    """Images per batch."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision; None is float32 on a CPU and bfloat16 on a GPU."""
    pairs: int = 5
    """Number of pairs: one batch, and as many images in the other way."""
    compared: int = 64
    """Images whose bits are compared, in batches; 0 compares none."""
    num_threads: int | None = None
    """Threads of PyTorch; None leaves it as it is."""
    smoke: bool = False
    """Use tiny sizes, to test the script. The figures then mean nothing."""


@dataclass(frozen=True)
class _Sizes:
    transformer: InfinitySettings
    vae: InfinityVaeSettings
    grids: tuple[Grid, ...]
    finest: Grid


def _sizes(bench: InfinityBench) -> _Sizes:
    if bench.smoke:
        settings = InfinitySettings(2, 64, 2, text_channels=128, max_text_tokens=4, num_bits=4)
        return _Sizes(settings, InfinityVaeSettings(4, 32, (1, 1), 1), ((1, 1), (2, 2), (4, 4)), (4, 4))
    if bench.model == "2b":
        grids = grids_of(1.0, bench.budget)
        return _Sizes(InfinitySettings(), InfinityVaeSettings(), grids, grids_of(1.0, "1M")[-1])
    grids = tuple((side, side) for side in (1, 2, 3, 4, 6, 8))
    settings = InfinitySettings(6, 256, 4, text_channels=128, max_text_tokens=32, num_bits=16)
    return _Sizes(settings, InfinityVaeSettings(16, 32, (1, 2, 2, 2), 1), grids, grids[-1])


class GrowingCache(Cache):
    """Keys and values of all positions so far, joined anew by each layer for each grid, as in the official code."""

    def __init__(self, settings: InfinitySettings, num_rows: int, length: int, like: Tensor) -> None:
        super().__init__(settings, num_rows, 0, like)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, key_RHLh: Tensor, value_RHLh: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            key, value = self.layers[layer]
            key_RHLh, value_RHLh = torch.cat([key, key_RHLh], dim=2), torch.cat([value, value_RHLh], dim=2)
        self.layers[layer] = key_RHLh, value_RHLh
        return key_RHLh, value_RHLh


def _fill(model: nn.Module) -> None:
    """Random weights under which a layer keeps the size of what it reads, so that the logits are of use."""
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        parameter.copy_(torch.randn(parameter.shape, device=parameter.device) * scale)


class _Bench:
    """A model, its texts and the ways to draw their images."""

    def __init__(self, bench: InfinityBench) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        default = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype = default if bench.dtype is None else getattr(torch, bench.dtype)
        self.sizes, self.bench, self.options = _sizes(bench), bench, InfinityOptions()
        torch.manual_seed(0)
        with self.device:
            self.model = InfinityTransformer(self.sizes.transformer).eval().requires_grad_(False)
            vae = InfinityVae(self.sizes.vae).eval().requires_grad_(False)
        _fill(self.model)
        if self.dtype != torch.float32:
            store_for_autocast(self.model, self.dtype)
            store_for_autocast(vae, self.dtype)
        self.images = InfinityImages(self.model, vae, free=free_memory(self.device), dtype=self.dtype)

    def texts(self, seeds: list[int]) -> tuple[Tensor, Tensor]:
        """Random features of a text for each seed, of the longest length."""
        shape = (self.sizes.transformer.max_text_tokens, self.sizes.transformer.text_channels)
        text_BTC = torch.stack([torch.randn(shape, generator=generator(seed, "text")) for seed in seeds])
        return text_BTC.to(self.device), torch.ones(text_BTC.shape[:2], dtype=torch.bool, device=self.device)

    def draw(self, seeds: list[int], batch_size: int, cache: type[Cache] = Cache) -> float:
        """Images per second."""
        texts = self.texts(seeds)
        with mock.patch.object(infinity_sampling, "Cache", cache):
            started = clock()
            for at in range(0, len(seeds), batch_size):
                part = slice(at, at + batch_size)
                text_BTC, mask_BT = (each[part] for each in texts)
                self.images(text_BTC, mask_BT, seeds[part], self.sizes.grids, self.sizes.finest, self.options)
            return len(seeds) / (clock() - started)

    def bits(self, seeds: list[int], batch_size: int) -> Tensor:
        """All bits of the images of these seeds, bool (B, L·d)."""
        grids, num_bits = self.sizes.grids, self.sizes.transformer.num_bits
        found = []
        for at in range(0, len(seeds), batch_size):
            part = seeds[at : at + batch_size]
            numbers_BLd = uniforms(part, num_positions(grids), num_bits).to(self.device)
            with half_precision(self.device, self.dtype):
                steps = sample(self.model, *self.texts(part), grids, self.sizes.finest, self.options, numbers_BLd)
                found.append(torch.cat([step.bits_Bdhw.flatten(1).cpu() for step in steps], dim=1))
        return torch.cat(found)


def differences(bits: Tensor, others: Tensor) -> dict[str, int]:
    """How many of two sets of bits (B, N) differ, and how many images have a bit that differs."""
    differ = bits != others
    return {
        "bits": differ.numel(),
        "bits_differing": int(differ.sum()),
        "images": len(differ),
        "images_differing": int(differ.any(dim=1).sum()),
    }


def measure(bench: InfinityBench) -> dict[str, Any]:
    made = _Bench(bench)
    seeds = list(range(bench.batch_size))
    ways: dict[str, Callable[[], float]] = {
        _BATCHED: functools.partial(made.draw, seeds, bench.batch_size),
        _SINGLE: functools.partial(made.draw, seeds, 1),
        _OFFICIAL: functools.partial(made.draw, seeds, 1, GrowingCache),
    }
    say("warm-up")
    for way in ways.values():
        way()
    figures = {
        f"against {name}": interleaved("images/s", {_BATCHED: ways[_BATCHED], name: ways[name]}, bench.pairs)
        for name in (_SINGLE, _OFFICIAL)
    }
    against, least = TARGETS[bench.model]
    met = figures[f"against {against}"]["ratio"]["median"] >= least
    compared = list(range(bench.compared))
    differ = differences(made.bits(compared, bench.batch_size), made.bits(compared, 1)) if compared else {}
    sizes = made.sizes
    flops = decoder_flops(sizes.vae, sizes.grids[-1])
    flops += transformer_flops(sizes.transformer, sizes.transformer.max_text_tokens, sizes.grids, made.options)
    device = known_device(device_name(made.device.type))
    peak = None if device is None or made.dtype == torch.float32 else device.peak_tflops * 1e12
    rates = {
        name: spread["median"] * flops
        for name, spread in (
            (_BATCHED, figures[f"against {_OFFICIAL}"][_BATCHED]),
            (_OFFICIAL, figures[f"against {_OFFICIAL}"][_OFFICIAL]),
        )
    }
    return (
        verdict(f"target against {against}", met, least, bench.smoke)
        | {"dtype": str(made.dtype).removeprefix("torch."), "tflop_per_image": round(flops / 1e12, 5)}
        | {"tflops": {name: round(rate / 1e12, 4) for name, rate in rates.items()}}
        | {"mfu": None if peak is None else {name: round(rate / peak, 4) for name, rate in rates.items()}}
        | {f"batch of {bench.batch_size} against 1": differ}
        | figures
    )


def main() -> None:
    bench = read_settings(InfinityBench, __doc__, "python jobs/bench/infinity_batches.py")
    if bench.batch_size < 2:
        raise InputError(f"--batch-size {bench.batch_size}: give at least 2")
    if bench.num_threads is not None:
        torch.set_num_threads(bench.num_threads)
    publish("infinity_batches", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
