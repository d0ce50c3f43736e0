"""A finished run generates images that depend on prompt and seed only, not on the rest of the batch."""

import dataclasses
import hashlib
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_autoregressive
import tiny_diffusion
import tiny_infinity
import torch

from mmcore.catalogue import RECIPES
from mmcore.errors import InputError, OptionError
from mmcore.generators.autoregressive import VARIANTS
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.seeding import MAX_IMAGE_SEED
from mmcore.storage import Storage
from mmcore.trained import autoencoder, captioner, generator, retriever
from mmcore.trained.autoencoder import open_autoencoder
from mmcore.trained.generator import open_generator

PROMPTS = ["a red square", "there is a blue square at the left of it", "a green square", "a yellow square"]
SEEDS = [3, MAX_IMAGE_SEED, 5, 6]
HOW = DiffusionOptions(steps=5, guidance=2.0, sampler="ddim")
BITS = InfinityOptions(guidance=2.0, temperature=1.0)
DRAWN = AutoregressiveOptions(guidance=2.0, temperature=1.0, top_p=0.9)


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
    # A run folder is self-contained.
    shutil.rmtree(vqvae.uri)
    return run


@pytest.fixture(scope="module")
def code_run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tiny_autoregressive.write_run(tmp_path_factory.mktemp("codes"))))


@pytest.fixture(scope="module")
def bit_run(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage(str(tiny_infinity.write_run(tmp_path_factory.mktemp("bits"))))


@pytest.mark.parametrize(
    ("kind", "side", "how"),
    [("pixel_run", 8, HOW), ("ldm_run", 32, HOW), ("code_run", 32, DRAWN), ("bit_run", 16, BITS)],
)
def test_an_image_is_decided_by_prompt_and_seed(kind: str, side: int, how: Any, request: pytest.FixtureRequest) -> None:
    generator = open_generator(request.getfixturevalue(kind).uri).load()
    images = generator.generate(PROMPTS, SEEDS, how)
    assert images.shape == (4, side, side, 3)
    assert images.dtype == np.uint8
    assert generator.size == (side, side)
    assert len({image.tobytes() for image in images}) == 4

    # Loaded again, as in another process.
    again = open_generator(request.getfixturevalue(kind).uri).load()
    assert np.array_equal(again.generate(PROMPTS, SEEDS, how), images)
    # In another order and in another batch.
    order = [2, 0, 3, 1]
    moved = generator.generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order], how)
    assert np.array_equal(moved, images[order])
    others = generator.generate([PROMPTS[1], *["a red square"] * 3], [SEEDS[1], 7, 8, 9], how)
    assert np.array_equal(others[0], images[1])
    # In batches of other sizes, pixels differ by at most one step of 255.
    for size in (1, 2, 3):
        parts = [generator.generate(PROMPTS[i : i + size], SEEDS[i : i + size], how) for i in range(0, 4, size)]
        assert np.abs(np.concatenate(parts).astype(int) - images).max() <= 1
    # Prompt and seed have an effect.
    assert not np.array_equal(generator.generate(PROMPTS[::-1], SEEDS, how)[1], images[1])
    assert not np.array_equal(generator.generate(PROMPTS, [1, 1, 1, 1], how), images)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_samplers_guidance_and_what_to_lead_away_from(pixel_run: Storage, sampler: str) -> None:
    generator = open_generator(pixel_run.uri).load()
    told: list[tuple[int, int]] = []
    how = DiffusionOptions(5, 2.0, sampler)
    guided = generator.generate(PROMPTS, SEEDS, how, on_step=lambda done, total: told.append((done, total)))
    assert told == [(step, 5) for step in range(1, 6)]
    assert np.array_equal(generator.generate(PROMPTS, SEEDS, how), guided)
    for change in ({"guidance": 1.0}, {"negative_prompt": PROMPTS[1]}):
        assert not np.array_equal(generator.generate(PROMPTS, SEEDS, dataclasses.replace(how, **change)), guided)


def test_codes_are_counted_and_every_option_tells(code_run: Storage) -> None:
    generator: Any = open_generator(code_run.uri).load()
    told: list[tuple[int, int]] = []
    drawn = generator.generate(PROMPTS, SEEDS, DRAWN, on_step=lambda done, total: told.append((done, total)))
    assert told == [(code, 64) for code in range(1, 65)]
    assert np.array_equal(generator.generate(PROMPTS, SEEDS, DRAWN), drawn)
    changes = (
        {"guidance": 1.0}, {"guidance_end": 1.0}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.5},
        {"negative_prompt": PROMPTS[1]},
    )  # fmt: skip
    changed = [generator.generate(PROMPTS, SEEDS, dataclasses.replace(DRAWN, **change)) for change in changes]
    assert len({images.tobytes() for images in (drawn, *changed)}) == 1 + len(changes)
    reader, read = generator.text, []
    generator.text = lambda prompts: read.append(prompts) or reader(prompts)
    unguided = generator.generate(PROMPTS, SEEDS, dataclasses.replace(DRAWN, guidance=1.0))
    assert (read, unguided.tobytes()) == ([PROMPTS], changed[0].tobytes()), "without guidance no other text is read"


def test_grids_are_counted_and_every_option_tells(bit_run: Storage) -> None:
    generator: Any = open_generator(bit_run.uri).load()
    told: list[tuple[int, int]] = []
    drawn = generator.generate(PROMPTS, SEEDS, BITS, on_step=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    changes = (
        {"guidance": 1.0}, {"guided_grids": 1}, {"num_grids": 2}, {"temperature": 0.0}, {"top_p": 0.6},
    )  # fmt: skip
    changed = [generator.generate(PROMPTS, SEEDS, dataclasses.replace(BITS, **change)) for change in changes]
    assert len({images.tobytes() for images in (drawn, *changed)}) == 1 + len(changes)
    with pytest.raises(OptionError, match="--guidance-layer"):
        generator.check(dataclasses.replace(BITS, guidance_layer=-1), generator.size)
    assert generator.generate(PROMPTS, SEEDS, BITS.shortened()).shape == drawn.shape


def test_latents_become_images_through_the_vqvae(tmp_path: Path) -> None:
    run, vqvae_run = Storage(str(tmp_path / "ldm")), Storage(str(tmp_path / "vqvae"))
    tiny_diffusion.write_ldm_run(run, vqvae_run)
    generator: Any = open_generator(run.uri).load()
    latents = torch.randn(2, *generator.model.x_0_shape, generator=torch.Generator().manual_seed(0))
    expected = open_autoencoder(vqvae_run.uri).load().decode(latents)
    assert torch.equal(generator.images(latents * 0.5), expected)


@pytest.mark.parametrize("kind", ["ldm_run", "code_run"])
def test_another_vqvae_than_the_run_was_trained_on_is_refused(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = Storage(str(tmp_path / "run"))
    shutil.copytree(request.getfixturevalue(kind).uri, run.uri)
    copy = run / "model" / "vqvae"
    right = open_autoencoder(copy.uri).load().fingerprint()
    tiny_diffusion.write_vqvae_run(copy, seed=2)
    wrong = open_autoencoder(copy.uri).load().fingerprint()
    message = rf"this VQ-VAE \(fingerprint {wrong[:12]}\) is not the one .* latents or codes \({right[:12]}\)"
    with pytest.raises(InputError, match=rf"vqvae/model: {message}"):
        open_generator(run.uri).load()


def test_bfloat16_is_close(pixel_run: Storage) -> None:
    exact = open_generator(pixel_run.uri).load().generate(PROMPTS, SEEDS, HOW)
    generator = open_generator(pixel_run.uri).load(dtype=torch.bfloat16)
    assert generator.dtype == torch.bfloat16
    rounded = generator.generate(PROMPTS, SEEDS, HOW)
    difference = np.abs(rounded.astype(int) - exact)
    assert 0 < difference.mean() < 3  # measured 0.4 of 255


def test_bfloat16_draws_codes_under_autocast(code_run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code that differs by rounding changes the later codes, so images of both precisions are not compared."""
    generator: Any = open_generator(code_run.uri).load(dtype=torch.bfloat16)
    logits: list[torch.dtype] = []
    generator.model.output.register_forward_hook(lambda layer, given, made: logits.append(made.dtype))
    images = generator.generate(PROMPTS, SEEDS, DRAWN)
    assert set(logits) == {torch.bfloat16}
    assert len({image.tobytes() for image in images}) == 4


def test_options_that_cannot_be_are_named(pixel_run: Storage) -> None:
    generator = open_generator(pixel_run.uri)
    assert generator.options == DiffusionOptions()
    generator.check(DiffusionOptions(steps=5, guidance=2.0, sampler="ddim", negative_prompt="blue"), (8, 8))
    refused = [
        (DiffusionOptions(steps=3, sampler="ddim"), (8, 8), "--steps 3 sampling steps: ddim takes a divisor"),
        (DiffusionOptions(steps=0), (8, 8), "--steps 0 sampling steps: give 1 to 1000"),
        (DiffusionOptions(guidance=0.5), (8, 8), "--guidance 0.5: must be at least 1"),
        (DiffusionOptions(guidance=math.nan), (8, 8), "--guidance nan: must be at least 1"),
        (
            DiffusionOptions(guidance=1.0, negative_prompt="a"),
            (8, 8),
            "--negative-prompt has no effect without guidance",
        ),
        (DiffusionOptions(), (8, 16), "--size 16x8: this model makes images of 8x8"),
    ]
    for options, size, message in refused:
        with pytest.raises(OptionError) as raised:
            generator.check(options, size)
        assert str(raised.value).startswith(message)
        # It was pickled by another process.
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    with pytest.raises(OptionError, match="--steps 3"):
        generator.generate(PROMPTS, SEEDS, refused[0][0])


def test_what_a_transformer_over_codes_cannot_do_is_named(code_run: Storage, tmp_path: Path) -> None:
    generator = open_generator(code_run.uri)
    assert generator.options == VARIANTS["smoke"].sample
    with pytest.raises(OptionError, match="--top-p 0: must be above 0"):
        generator.check(AutoregressiveOptions(top_p=0), generator.size)
    with pytest.raises(OptionError, match="--size 32x16: this model makes images of 32x32"):
        generator.check(DRAWN, (16, 32))
    unguided = AutoregressiveOptions(guidance=1.0)
    run = tiny_autoregressive.write_run(tmp_path / "unguided", drop_text=0.0, sample=unguided)
    with pytest.raises(OptionError, match="--guidance 2: guidance is not possible"):
        open_generator(str(run)).check(DRAWN, generator.size)


def test_what_is_wrong_is_said_in_one_line(pixel_run: Storage, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 prompts, 3 seeds"):
        open_generator(pixel_run.uri).load().generate(PROMPTS, SEEDS[:3], HOW)
    with pytest.raises(InputError, match="no model/ there"):
        open_generator(str(tmp_path))
    with pytest.raises(InputError, match="--text-encoder 'x': this run trained its own"):
        open_generator(pixel_run.uri, text_encoder="x")
    folder = tmp_path / "other"
    shutil.copytree(pixel_run.uri, folder)
    path = folder / "model" / "recipe.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "recipe": "resnet_captioner"}))
    with pytest.raises(
        InputError, match="'resnet_captioner' is not of kind generator; name a run of pixel_diffusion, ldm, a"
    ):
        open_generator(str(folder))
    facts["settings"] |= {"drop_text": 0.0, "sample_guidance": 1.0}
    path.write_text(json.dumps(facts))
    generator = open_generator(str(folder))
    assert generator.options.guidance == 1
    with pytest.raises(OptionError, match="--guidance 2: guidance is not possible"):
        generator.check(HOW, generator.size)


def test_what_is_opened_is_sent_and_reads_its_weights_there(pixel_run: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pixel_run.uri, folder)
    weights = folder / "model" / "model.safetensors"
    right = weights.read_bytes()
    weights.unlink()
    opened = pickle.dumps(open_generator(str(folder)))
    weights.write_bytes(right)
    generator = pickle.loads(opened).load()
    assert np.array_equal(
        generator.generate(PROMPTS, SEEDS, HOW), open_generator(pixel_run.uri).load().generate(PROMPTS, SEEDS, HOW)
    )
    assert generator.identity() == {"run": str(folder), "weights_sha256": hashlib.sha256(right).hexdigest()}
    weights.write_bytes(right[:-1] + b"x")
    with pytest.raises(InputError, match="SHA-256 differs from the one in recipe"):
        pickle.loads(opened).load()


def test_tokens_are_counted_before_any_are_cut(pixel_run: Storage) -> None:
    generator: Any = open_generator(pixel_run.uri).load()
    long = " ".join(["red"] * 30)
    generator.text([long])
    assert generator.num_tokens(["a red square", long]) == [5, 32]
    assert generator.max_tokens == 16


def test_words_that_no_caption_held_are_told(pixel_run: Storage) -> None:
    generator: Any = open_generator(pixel_run.uri).load()
    assert generator.unknown_words(["a red square", "A Purple dog, square"]) == [[], ["Purple", "dog"]]
    assert generator.unknown_words([]) == []


def test_the_facts_type_of_a_recipe_says_what_opens_its_runs(
    pixel_run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    doors = {"captioner": captioner, "generator": generator, "autoencoder": autoencoder, "retriever": retriever}
    for name, entry in RECIPES.items():
        for kind in entry.kinds:
            assert entry.facts_type in doors[kind].BY_FACTS, name
    monkeypatch.setitem(generator.BY_FACTS, DiffusionFacts, lambda run, file, text_encoder: (run.uri, text_encoder))
    assert open_generator(pixel_run.uri, text_encoder="bert") == (pixel_run.uri, "bert")
