#!/usr/bin/env python
"""Measures how many attributes of Shapes are left in an autoencoder's reconstructions.

Command: python jobs/bench/shapes_reconstructions.py --run STORAGE/runs/vqvae/NAME

Test scenes are rendered, encoded, quantised and decoded. The oracle reads the reconstructions, and counts the
attributes that the exhaustive captions name: colours, shapes, sizes, places and relations.

Prints one JSON object: the share of right attributes, that of each kind, and the PSNR in dB.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from jobs.bench.timing import publish
from jobs.runtime.commandline import run
from mmcore.data.pixels import to_network, to_pixels
from mmcore.data.prepared import TEST
from mmcore.data.shapes import ShapesSettings, make_scene, render_scene
from mmcore.data.shapes_captions import exhaustive_caption
from mmcore.data.shapes_oracle import AttributeScore, detect_objects, parse_caption, score_objects
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.generators.psnr import psnr
from mmcore.images import resize_image
from mmcore.trained.autoencoder import open_autoencoder

_BATCH = 25


@dataclass(frozen=True)
class ReconstructionBench:
    """Settings of the benchmark."""

    run: str
    """Finished run of an autoencoder: STORAGE/runs/vqvae/NAME or STORAGE/runs/infinity_tokenizer/NAME."""
    count: int = 300
    """Test scenes."""


def measure(bench: ReconstructionBench) -> dict[str, float]:
    """Share of right attributes, of each kind, and mean PSNR. Raises InputError for a wrong run or count."""
    if bench.count < 1:
        raise InputError(f"--count {bench.count}: must be at least 1")
    trained, settings = open_autoencoder(bench.run).load(), ShapesSettings()
    total, levels = AttributeScore(), []
    for start in range(0, bench.count, _BATCH):
        indices = range(start, min(start + _BATCH, bench.count))
        scenes = [make_scene(settings.seed, TEST, index, settings.max_objects) for index in indices]
        pixels = np.stack(
            [resize_image(render_scene(scene, settings.image_size), trained.image_size) for scene in scenes]
        )
        made_B3PP = trained.reconstruct(pixels)
        levels += psnr(to_network(torch.from_numpy(pixels)), made_B3PP.cpu()).tolist()
        for index, scene, image in zip(indices, scenes, to_pixels(made_B3PP).cpu().numpy(), strict=True):
            wanted = parse_caption(exhaustive_caption(settings.seed, TEST, index, scene))
            total = total + score_objects(detect_objects(image), wanted)
    found = total.as_dict()
    named, correct = found["named"], found["correct"]
    shares = {f"fraction_of_{kind}": correct[kind] / named[kind] for kind in named if named[kind]}
    return {"fraction_correct": found["fraction_correct"], **shares, "psnr": float(np.mean(levels))}


def main() -> None:
    bench = read_settings(ReconstructionBench, __doc__, "python jobs/bench/shapes_reconstructions.py")
    publish("shapes_reconstructions", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
