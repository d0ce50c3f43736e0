"""A generator without work, so that a sweep of 1,000 images takes seconds, and a job that sweeps with it.

`python tests/tiny_sweep.py FLAGS OF jobs/generate.py` uses two CPUs on any machine.
"""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq
import ray._private.utils
import torch
from gate import Gate

import jobs.runtime.cluster
from jobs.generate import GenerateSettings, generate
from jobs.runtime.commandline import run
from jobs.runtime.image_sweep import GenerateImages
from jobs.runtime.model_flags import parse_with_options
from mmcore.catalogue import read_model_file
from mmcore.data.prompts import Prompt
from mmcore.errors import OptionError
from mmcore.frozen.text import TextInputs
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.pixel_diffusion import VARIANTS, PixelDiffusionRecipe
from mmcore.run_files import RunFile, write_model
from mmcore.storage import Storage
from mmcore.trained.diffusion import TrainedDiffusion

SIZE = 16
# The sweep of tests/sweep_fixtures.py: number of images, and batch size.
NUM, BATCH = 10, 4


def tiny_image(prompt: str, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """Noise that depends on prompt and seed: uint8 (*size, 3)."""
    key = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "little")
    return np.random.default_rng([seed, key]).integers(0, 256, (*size, 3), np.uint8)


class TinyGenerator(TrainedDiffusion):
    """Makes images of any size up to 64 pixels a side."""

    of_codes = False

    def check(self, options: DiffusionOptions, size: tuple[int, int]) -> None:
        super().check(options, self.size)
        if max(size) > 64:
            raise OptionError("size", f"{size[1]}x{size[0]}: at most 64 a side")

    def load(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Self:
        self.decides_by_code = self.of_codes
        return self

    def num_tokens(self, prompts: Sequence[str]) -> list[int]:
        return [2 + len(prompt.split()) for prompt in prompts]

    def unknown_words(self, prompts: Sequence[str]) -> list[list[str]]:
        """It knows no word in capitals."""
        return [[word for word in prompt.split() if word.isupper()] for prompt in prompts]

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], options: Any, **how: Any) -> np.ndarray:
        return np.stack([tiny_image(prompt, seed, **how) for prompt, seed in zip(prompts, seeds, strict=True)])


def open_tiny(source: str, text_encoder: str | None = None, loras: Sequence[str] = ()) -> TinyGenerator:
    assert not loras, "a run has no adapters"
    run = Storage(source)
    return TinyGenerator(run, read_model_file(run, "generator"), text_encoder)


class TinyWorker(GenerateImages):
    """Records each batch before generating it, after waiting at the gate in the run's folder."""

    open = staticmethod(open_tiny)

    def generate(self, prompts: Sequence[Prompt], size: tuple[int, int], options: Any) -> np.ndarray:
        if prompts[0].image_id:
            Gate(self.settings.run).begin(f"{prompts[0].image_id} {len(prompts)}")
        return super().generate(prompts, size, options)


def write_run(folder: Path, recipe: PixelDiffusionRecipe | None = None) -> Path:
    """A run of the tiny generator that claims the training settings `recipe`."""
    facts = DiffusionFacts(TextInputs(width=8), (3, SIZE, SIZE), SIZE)
    file = RunFile("pixel_diffusion", "smoke", recipe or VARIANTS["smoke"], facts, "")
    write_model(Storage(str(folder)), {"nothing": torch.zeros(1)}, file)
    return folder


def calls(run_folder: Path) -> list[str]:
    """The first image of each generated block, in order."""
    return [line.split()[0] for line in Gate(run_folder).begun()]


def write_prompts(path: Path, count: int) -> Path:
    path.write_text("".join(f"picture {row} of a dog\n" for row in range(count)))
    return path


def check_complete(out: Storage, count: int) -> list[dict[str, Any]]:
    """Assert that every image is in the manifest and in the folder once, with the right pixels.

    Returns the manifest's rows.
    """
    folder = out / "manifest"
    filesystem, path = folder.arrow()
    rows = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert len(rows) == len({row["image_id"] for row in rows}) == count, "lost or doubled images"
    assert (out / "images").list() == sorted(f"{row['image_id']}.png" for row in rows)
    for row in rows:
        data = out.read(row["key"])
        assert hashlib.sha256(data).hexdigest() == row["sha256"], row["key"]
        check_image(data, row["prompt"], row["seed"])
    return rows


def check_tidy(out: Path) -> None:
    """Assert that a finished sweep has no extra files."""
    names = sorted(path.name for path in out.iterdir())
    assert names == ["images", "lease", "manifest", "summary.json", "sweep.json"]
    for folder in ("images", "manifest", "lease"):
        assert {path.suffix for path in (out / folder).iterdir()} <= {".png", ".parquet", ".json"}


def check_image(data: bytes, prompt: str, seed: int) -> None:
    from mmcore.images import decode_image, read_png_text

    assert (np.asarray(decode_image(data, name="image")) == tiny_image(prompt, seed)).all()
    text = read_png_text(data)
    assert (text["prompt"], text["seed"]) == (prompt, str(seed))


def main() -> None:
    # An interrupted job names its command, where it is a job that goes on.
    sys.argv[0] = "jobs/generate.py"
    jobs.runtime.cluster.MIN_LOCAL_CPUS = 2
    ray._private.utils.get_num_cpus = lambda *_, **__: 2
    settings, options = parse_with_options(GenerateSettings, open_tiny, {"any": DiffusionOptions()}, "", "tiny_sweep")
    generate(settings, options, TinyWorker)


if __name__ == "__main__":
    run(main)
