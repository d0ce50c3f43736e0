"""A finished run makes images: each decided by its prompt and its seed, whoever else is in the batch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_diffusion
import torch

from mmcore.errors import InputError
from mmcore.seeding import MAX_IMAGE_SEED
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE
from mmcore.trained.generator import TrainedGenerator

PROMPTS = ["a red square", "there is a blue square at the left of it", "a green square", "a yellow square"]
SEEDS = [3, MAX_IMAGE_SEED, 5, 6]
HOW: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pixel_run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    run = Storage(str(tmp_path_factory.mktemp("pixel")))
    tiny_diffusion.write_pixel_run(run)
    return run


@pytest.fixture(scope="module")
def ldm_run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    run = Storage(str(tmp_path_factory.mktemp("ldm")))
    vqvae = run.parent / f"{run.name}-vqvae"
    tiny_diffusion.write_ldm_run(run, vqvae)
    # A run folder is whole by itself.
    shutil.rmtree(vqvae.uri)
    return run


@pytest.mark.parametrize(("kind", "side"), [("pixel_run", 8), ("ldm_run", 32)])
def test_an_image_is_decided_by_prompt_and_seed(kind: str, side: int, request: pytest.FixtureRequest) -> None:
    generator = TrainedGenerator(request.getfixturevalue(kind))
    images = generator.generate(PROMPTS, SEEDS, **HOW)
    assert images.shape == (4, side, side, 3)
    assert images.dtype == np.uint8
    assert generator.resolution == side
    assert len({image.tobytes() for image in images}) == 4

    # In another process, as it were: loaded again.
    assert np.array_equal(TrainedGenerator(request.getfixturevalue(kind)).generate(PROMPTS, SEEDS, **HOW), images)
    # In another order, and among others.
    order = [2, 0, 3, 1]
    moved = generator.generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order], **HOW)
    assert np.array_equal(moved, images[order])
    others = generator.generate([PROMPTS[1], *["a red square"] * 3], [SEEDS[1], 7, 8, 9], **HOW)
    assert np.array_equal(others[0], images[1])
    # In batches of other sizes, at most one step of 255.
    for size in (1, 2, 3):
        parts = [generator.generate(PROMPTS[i : i + size], SEEDS[i : i + size], **HOW) for i in range(0, 4, size)]
        assert np.abs(np.concatenate(parts).astype(int) - images).max() <= 1
    # The prompt and the seed do count.
    assert not np.array_equal(generator.generate(PROMPTS[::-1], SEEDS, **HOW)[1], images[1])
    assert not np.array_equal(generator.generate(PROMPTS, [1, 1, 1, 1], **HOW), images)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_samplers_guidance_and_what_to_lead_away_from(pixel_run: Storage, sampler: str) -> None:
    generator = TrainedGenerator(pixel_run)
    told: list[tuple[int, int]] = []
    how: dict[str, Any] = {**HOW, "sampler": sampler}
    guided = generator.generate(PROMPTS, SEEDS, **how, on_step=lambda done, total: told.append((done, total)))
    assert told == [(step, 5) for step in range(1, 6)]
    assert np.array_equal(generator.generate(PROMPTS, SEEDS, **how), guided)
    for change in ({"guidance_scale": 1.0}, {"negative_prompts": PROMPTS[::-1]}):
        assert not np.array_equal(generator.generate(PROMPTS, SEEDS, **{**how, **change}), guided)
    nothing = generator.generate(PROMPTS, SEEDS, **how, negative_prompts=[""] * 4)
    assert np.array_equal(nothing, guided)


def test_latents_become_images_through_the_vqvae(tmp_path: Path) -> None:
    run, vqvae_run = Storage(str(tmp_path / "ldm")), Storage(str(tmp_path / "vqvae"))
    tiny_diffusion.write_ldm_run(run, vqvae_run)
    generator = TrainedGenerator(run)
    latents = torch.randn(2, *generator.model.x_0_shape, generator=torch.Generator().manual_seed(0))
    expected = TrainedVQVAE(vqvae_run).model.decode(latents)
    assert torch.equal(generator.images(latents * 0.5), expected)


def test_another_vqvae_than_the_latents_are_of_is_refused(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "ldm"))
    tiny_diffusion.write_ldm_run(run, Storage(str(tmp_path / "vqvae")))
    copy = run / "model" / "vqvae"
    right = TrainedVQVAE(copy).fingerprint()
    tiny_diffusion.write_vqvae_run(copy, seed=2)
    wrong = TrainedVQVAE(copy).fingerprint()
    message = rf"vqvae/model: another VQ-VAE \(fingerprint {wrong[:12]}\) than the latents are of \({right[:12]}\)"
    with pytest.raises(InputError, match=message):
        TrainedGenerator(run)


def test_bfloat16_is_close(pixel_run: Storage) -> None:
    exact = TrainedGenerator(pixel_run).generate(PROMPTS, SEEDS, **HOW)
    generator = TrainedGenerator(pixel_run, dtype=torch.bfloat16)
    assert generator.dtype == torch.bfloat16
    rounded = generator.generate(PROMPTS, SEEDS, **HOW)
    difference = np.abs(rounded.astype(int) - exact)
    assert 0 < difference.mean() < 3  # measured 0.4 of 255


def test_what_is_wrong_is_said_in_one_line(pixel_run: Storage, tmp_path: Path) -> None:
    generator = TrainedGenerator(pixel_run)
    with pytest.raises(InputError, match=r"3 sampling steps.*ddim takes a divisor"):
        generator.generate(PROMPTS, SEEDS, num_inference_steps=3, guidance_scale=1.0)
    with pytest.raises(InputError, match="negative prompts work by guidance"):
        generator.generate(PROMPTS, SEEDS, num_inference_steps=5, guidance_scale=1.0, negative_prompts=PROMPTS)
    with pytest.raises(ValueError, match="4 prompts, 3 seeds"):
        generator.generate(PROMPTS, SEEDS[:3], **HOW)
    with pytest.raises(InputError, match="no model/ there"):
        TrainedGenerator(Storage(str(tmp_path)))
    folder = tmp_path / "other"
    shutil.copytree(pixel_run.uri, folder)
    path = folder / "model" / "recipe.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "recipe": "resnet_captioner"}))
    with pytest.raises(InputError, match="'resnet_captioner' is no generator; known: pixel_diffusion, ldm"):
        TrainedGenerator(Storage(str(folder)))
    facts["settings"] |= {"drop_text": 0.0, "sample_guidance": 1.0}
    path.write_text(json.dumps(facts))
    with pytest.raises(InputError, match="never saw a prompt missing"):
        TrainedGenerator(Storage(str(folder))).generate(PROMPTS, SEEDS, **HOW)
