"""Files of commit 34e6a7a: finished runs open with equal results, and half-done sweeps continue.

`tests/earlier` has the recipe.json of four runs. Their weights come from a formula with values exact in fp32, so
digests and fingerprints are the same as then.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from jobs.caption import CaptionSettings, caption
from jobs.generate import GenerateSettings, generate
from mmcore import checkpoint
from mmcore.captioners.search_options import SearchOptions
from mmcore.catalogue import read_model_file
from mmcore.data.manifest import read_manifest
from mmcore.frozen.text import PromptTokenizer
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.vqvae import VQVAETraining
from mmcore.images import png_bytes
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_autoencoder
from mmcore.trained.captioner import open_captioner
from mmcore.trained.generator import open_generator

pytest_plugins = ("sweep_fixtures",)
EARLIER = Path(__file__).parents[1] / "earlier"
PROMPTS = ["a red square", "a blue circle", "a red circle and a blue square"] * 2
# SHA-256 of the names and shapes of the earlier weights.
WEIGHTS = {
    "pixel_diffusion": "942216139a82c38ff71c608c77a9f81d40448738161d1967be9e535951fa9a30",
    "vqvae": "5a896d2cb96cf66ad56b3125aecb08adee98ae22e877f45d1539729c753bd268",
    "ldm": "e41ed288d5808a289576083e4ca284686d33124c2945eceb07120da35d3a0dcc",
    "resnet_captioner": "0b5a18c4c43990df16774594d741bd36be963252ff68d0bb8e0cf349ed26c1ed",
}
KINDS = {"vqvae": "autoencoder", "resnet_captioner": "captioner"}
CAPTIONS = ["and and and red", "and and red"]


def write_run(folder: Path, name: str) -> str:
    """Write the finished run of `name` and return its folder."""
    model_folder = folder / "model"
    model_folder.mkdir(parents=True)
    recipe_file = model_folder / "recipe.json"
    fields = json.loads((EARLIER / f"{name}.json").read_text())
    recipe_file.write_text(json.dumps(fields | {"weights_sha256": ""}))
    file = read_model_file(Storage(str(folder)), KINDS.get(name, "generator"))  # type: ignore[arg-type]
    model = VQVAETraining(file.recipe) if name == "vqvae" else file.recipe.build(file.facts)
    step = 3 if name == "resnet_captioner" else 29
    for key, value in model.state_dict().items():
        if value.dtype.is_floating_point and (value.ndim > 1 or key.endswith("bias")):
            places = torch.arange(value.numel()).reshape(value.shape)
            value.copy_(((places * step + len(key)) % 31 - 15) / 64)
    weights = {key: value.contiguous() for key, value in checkpoint.trainable_state(model).items()}
    shapes = json.dumps([[key, list(weights[key].shape)] for key in sorted(weights)])
    assert hashlib.sha256(shapes.encode()).hexdigest() == WEIGHTS[name], "weights of then have other names or shapes"
    save_file(weights, model_folder / "model.safetensors")
    digest = hashlib.sha256((model_folder / "model.safetensors").read_bytes()).hexdigest()
    recipe_file.write_text(json.dumps(fields | {"weights_sha256": digest}, indent=1))
    if name in ("pixel_diffusion", "ldm"):
        tokenizer = PromptTokenizer.of_words(PROMPTS, file.recipe.text.max_tokens)
        (model_folder / "tokenizer").mkdir()
        for file_name, data in tokenizer.files().items():
            (model_folder / "tokenizer" / file_name).write_bytes(data)
    if name == "ldm":
        write_run(model_folder / "vqvae", "vqvae")
    return str(folder)


def pictures() -> np.ndarray:
    """uint8 (2, 16, 16, 3): two greys that get brighter downwards."""
    rows = np.arange(16, dtype=np.uint8)[:, None, None]
    return np.stack([np.full((16, 16, 3), grey, np.uint8) + rows for grey in (20, 160)])


def write_part(path: Path, columns: dict[str, Any], block: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata({"block": json.dumps(block)}) if block else table, path)


@pytest.mark.usefixtures("one_thread")
def test_finished_generators_open(tmp_path: Path) -> None:
    pixel = open_generator(write_run(tmp_path / "pixel", "pixel_diffusion")).load()
    (image,) = pixel.generate(["a red square"], [7], DiffusionOptions(steps=4))
    # Means of the rows of the earlier image. On another CPU a pixel may differ by one.
    then = [88.38, 147.33, 140.21, 136.54, 139.5, 87.0, 131.75, 119.25]
    np.testing.assert_allclose(image.mean(axis=(1, 2)), then, atol=1)
    # Its VQ-VAE has the fingerprint that the latent diffusion recorded. Otherwise it would be refused.
    latent = open_generator(write_run(tmp_path / "latent", "ldm")).load()
    assert latent.generate(["a red square"], [7], DiffusionOptions(steps=4)).std() > 10
    assert latent.decides_by_code
    assert not pixel.decides_by_code


def test_a_finished_autoencoder_opens(tmp_path: Path) -> None:
    autoencoder = open_autoencoder(write_run(tmp_path / "vqvae", "vqvae")).load()
    assert autoencoder.encode(pictures()).shape == (2, *autoencoder.latent_shape)


def test_a_finished_captioner_opens(tmp_path: Path) -> None:
    captioner = open_captioner(write_run(tmp_path / "captioner", "resnet_captioner")).load()
    assert captioner.caption(pictures(), SearchOptions(max_length=6)) == CAPTIONS


def test_a_half_done_sweep_of_images_is_gone_on_with(without_ray: None, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", "pixel_diffusion"), tmp_path / "out"
    opened = open_generator(run)
    settings = {
        "batch_size": 2, "count": 6, "device": "cpu", "dtype": "float32", "guidance": 3.0, "negative_prompt": "",
        "num_threads": 1, "resolution": 8, "run": run, "sampler": "dpmsolver++", "seed": 0, "steps": 4,
        "weights_sha256": opened.identity()["weights_sha256"],
    }  # fmt: skip
    plan = {
        "commit": "34e6a7a", "num_blocks": 3, "num_rows": 6, "prompts": "p.txt", "settings": settings,
        "ids_sha256": "721e125205e945c18fef3bf7d0199c377b39c287183907905fa89234222f9447",
    }  # fmt: skip
    (out / "images").mkdir(parents=True)
    (out / "sweep.json").write_text(json.dumps(plan, indent=1, sort_keys=True) + "\n")
    seeds = [2603303887, 4205250486]
    text = {"steps": "4", "guidance": "3.0", "sampler": "dpmsolver++", "run": run, "commit": "34e6a7a"}
    digests = []
    made = opened.load().generate(PROMPTS[:2], seeds, DiffusionOptions(steps=4))
    for row, image in enumerate(made):
        data = png_bytes(image, {"prompt": PROMPTS[row], "seed": str(seeds[row]), **text})
        (out / "images" / f"{row:06d}.png").write_bytes(data)
        digests.append(hashlib.sha256(data).hexdigest())
    columns = {
        "image_id": ["000000", "000001"], "key": ["images/000000.png", "images/000001.png"], "sha256": digests,
        "prompt": PROMPTS[:2], "seed": seeds, "steps": [4, 4], "guidance": [3.0, 3.0],
        "sampler": ["dpmsolver++"] * 2, "dtype": ["float32"] * 2, "device": ["then"] * 2, "seconds": [0.5, 0.5],
    }  # fmt: skip
    block = {
        "worker": "a", "commit": "34e6a7a", "load_s": 1.0, "warmup_s": 1.0, "dtype": "float32", "device": "then",
        "began": 10.0, "ended": 11.0,
    }  # fmt: skip
    part = out / "manifest" / "part-000000.parquet"
    write_part(part, columns, block)
    before = part.read_bytes()

    (tmp_path / "p.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    again = GenerateSettings(run, str(tmp_path / "p.txt"), str(out))
    summary = generate(again, DiffusionOptions(steps=4))
    assert part.read_bytes() == before
    assert (summary["num_images"], summary["num_prompts_cut"]) == (6, 0)
    assert "34e6a7a" in summary["commits"]
    rows = read_manifest(Storage(str(out)))[0].to_pylist()
    assert [row["options"] is None for row in rows] == [True] * 2 + [False] * 4
    assert [row["steps"] for row in rows] == [4] * 6

    # Killed before its rows were written. The earlier images are adopted.
    part.unlink()
    generate(again, DiffusionOptions(steps=4))
    assert read_manifest(Storage(str(out)))[0]["sha256"].to_pylist()[:2] == digests
    # The earlier summary does not mention truncated prompts.
    then = {name: value for name, value in summary.items() if "cut" not in name and name != "max_tokens"}
    (out / "summary.json").write_text(json.dumps(then))
    assert generate(again, DiffusionOptions(steps=4)) == then


def test_a_half_done_sweep_of_captions_is_gone_on_with(
    without_ray: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, out, images = write_run(tmp_path / "run", "resnet_captioner"), tmp_path / "out", tmp_path / "images"
    images.mkdir()
    for row, image in enumerate([*pictures(), *pictures()]):
        (images / f"{row}.png").write_bytes(png_bytes(image, {}))
    settings = {
        "images": str(images), "length_penalty": 1.0, "max_length": 6, "num_beams": 3, "rows_per_block": 2,
        "run": run, "split": None, "weights_sha256": open_captioner(run).identity()["weights_sha256"],
    }  # fmt: skip
    plan = {
        "num_blocks": 2, "num_rows": 4, "settings": settings,
        "ids_sha256": "9d3d950edf1e7c7772a879becd48455ec4dc3fdfcf7dcdba916baa7b01ef1b42",
    }  # fmt: skip
    out.mkdir()
    (out / "sweep.json").write_text(json.dumps(plan, indent=1, sort_keys=True) + "\n")
    then = {"image_id": ["0", "1"], "file_name": ["0.png", "1.png"], "caption": ["of then", "of then too"]}
    write_part(out / "parts" / "part-000000.parquet", then)
    # Earlier code took neither for an image.
    (images / "below").mkdir()
    for name in ("below/4.png", "0.jfif"):
        (images / name).write_bytes(png_bytes(pictures()[0], {}))
    done = caption(CaptionSettings(run, str(images), str(out), rows_per_block=2), SearchOptions(max_length=6))
    said = capfd.readouterr().out
    assert f"left out of {images}: 2 image files, 0.jfif the first, which the sweep began without" in said
    assert (done["blocks_done_before"], done["rows_done_now"]) == (1, 2)
    made = ["2.png,and and and red", "3.png,and and red"]
    assert (out / "captions.csv").read_text().splitlines() == [
        "image,caption", "0.png,of then", "1.png,of then too", *made
    ]  # fmt: skip
