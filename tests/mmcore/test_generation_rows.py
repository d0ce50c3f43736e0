"""Rows of generators: random choices depend on (seed, epoch, image_id) only."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny_diffusion
import torch

from mmcore.data.columns import Column
from mmcore.errors import InputError
from mmcore.generators.diffusion import NoiseSchedule
from mmcore.generators.diffusion_rows import GenerationRows, scaling_factor
from mmcore.generators.prompt_rows import PromptEmbeddings


def rows_of(**settings: Any) -> GenerationRows:
    recipe = dataclasses.replace(tiny_diffusion.recipe(), **settings)
    return tiny_diffusion.rows_of(recipe)


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_row_is_the_same_in_every_batch() -> None:
    rows = rows_of(flip=True, drop_text=0.3)
    order = np.random.default_rng(0).permutation(40)
    whole = rows.train_batch(order, 2)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in whole.items()} == {
        "x_0": (torch.float32, (40, 3, 8, 8)),
        "noise": (torch.float32, (40, 3, 8, 8)),
        "timesteps": (torch.int64, (40,)),
        "input_ids": (torch.int64, (40, 16)),
    }
    for start in range(0, 40, 5):
        part = rows.train_batch(order[start : start + 5], 2)
        assert same(part, {name: value[start : start + 5] for name, value in whole.items()})
    assert same(whole, rows_of(flip=True, drop_text=0.3).train_batch(order, 2))


def test_another_epoch_image_or_seed_draws_anew() -> None:
    rows = rows_of(flip=True, drop_text=0.3)
    everything = np.arange(40)
    first, second = rows.train_batch(everything, 0), rows.train_batch(everything, 1)
    for name in ("noise", "timesteps", "input_ids", "x_0"):
        changed = (first[name] != second[name]).flatten(1 if first[name].ndim > 1 else 0)
        assert (changed.any(1) if changed.ndim > 1 else changed).double().mean() > 0.3, name
    assert len({tuple(noise.flatten().tolist()) for noise in first["noise"]}) == 40
    assert abs(first["noise"].mean().item()) < 0.05
    assert abs(first["noise"].std().item() - 1) < 0.05
    recipe = tiny_diffusion.recipe(seed=7)
    assert not torch.equal(tiny_diffusion.rows_of(recipe).train_batch(everything, 0)["noise"], first["noise"])


def test_shares_of_flips_captions_and_dropped_texts() -> None:
    rows = rows_of(flip=True, drop_text=0.25)
    batches = [rows.train_batch(np.arange(40), epoch) for epoch in range(25)]
    null = rows.prompts.batch([0], [None])["input_ids"][0]
    dropped = torch.cat([(batch["input_ids"] == null).all(1) for batch in batches])
    # 1,000 draws: four standard deviations are 0.06.
    assert abs(dropped.double().mean().item() - 0.25) < 0.06
    firsts = rows.prompts.batch(rows.train.tolist(), [0] * 40)["input_ids"]
    first = torch.cat([(batch["input_ids"] == firsts).all(1) for batch in batches])
    assert abs(first[~dropped].double().mean().item() - 0.5) < 0.08
    plain = rows_of(flip=False, drop_text=0.25).train_batch(np.arange(40), 0)["x_0"]
    mirrored = torch.cat([(batch["x_0"] == plain.flip(-1)).flatten(1).all(1) for batch in batches])
    assert abs(mirrored.double().mean().item() - 0.5) < 0.07
    others = torch.cat([(batch["x_0"] == plain).flatten(1).all(1) for batch in batches])
    assert (others ^ mirrored).all()
    timesteps = torch.cat([batch["timesteps"] for batch in batches])
    assert (timesteps.min() >= 0, timesteps.max() < 1000) == (True, True)
    # The mean of 8 u / (1 + 7 u) is 8/7 (1 - log(8) / 7), for the smoke variant's shift. Half of the rows are not
    # shifted.
    assert abs(timesteps.double().mean().item() - (803 + 500) / 2) < 35


def test_no_setting_moves_the_other_draws() -> None:
    with_all, without = rows_of(flip=True, drop_text=0.5), rows_of(flip=False, drop_text=0.01)
    mine, theirs = (rows.train_batch(np.arange(40), 3) for rows in (with_all, without))
    assert torch.equal(mine["noise"], theirs["noise"])
    assert torch.equal(mine["timesteps"], theirs["timesteps"])
    for noise in (NoiseSchedule(), NoiseSchedule(timestep_shift=3.0, unshifted_share=0.5)):
        assert torch.equal(rows_of(noise=noise).train_batch(np.arange(40), 3)["noise"], mine["noise"])


def test_validation_rows_stand_still() -> None:
    rows = rows_of(flip=True, drop_text=0.9)
    batch = rows.validation_batch(np.arange(12))
    assert same(batch, rows.validation_batch(np.arange(12)))
    chosen = rows.validation.tolist()
    assert torch.equal(batch["input_ids"], rows.prompts.batch(chosen, [0] * 12)["input_ids"])
    pixels = torch.from_numpy(tiny_diffusion.pixels(52)[chosen]).permute(0, 3, 1, 2)
    assert torch.equal((batch["x_0"] + 1).mul(127.5).round().to(torch.uint8), pixels)
    assert len(set(batch["timesteps"].tolist())) > 6


def test_latents_are_scaled_and_have_a_view_of_their_mirror() -> None:
    facts = tiny_diffusion.table()
    random = np.random.default_rng(0)
    views = [
        Column(tuple(facts.image_ids), (random.normal(size=(52, 4, 2, 2)) * 7).astype(np.float16)) for _ in range(2)
    ]
    hidden = Column(tuple(reversed(facts.image_ids)), random.normal(size=(52, 2, 5, 6)).astype(np.float16))
    null = np.full((5, 6), 9.0)
    factor = scaling_factor(views[0].values)
    rows = GenerationRows(
        facts,
        views,
        PromptEmbeddings(hidden, null, facts.image_ids),
        captions_per_image=2,
        drop_text=0.3,
        flip=True,
        noise=NoiseSchedule(num_timesteps=10),
        scaling_factor=factor,
        seed=0,
    )
    batch = rows.train_batch(np.arange(40), 0)
    assert abs(batch["x_0"].std().item() - 1) < 0.1
    views_of = [torch.from_numpy(view.values[:40]).float() * factor for view in views]
    first, second = ((batch["x_0"] == view).flatten(1).all(1) for view in views_of)
    assert (first ^ second).all()
    assert 5 < second.sum() < 35
    assert batch["encoder_hidden_states"].shape == (40, 5, 6)
    dropped = (batch["encoder_hidden_states"] == 9).flatten(1).all(1)
    assert 3 < dropped.sum() < 25
    # The column is in another order than the dataset.
    captions = torch.from_numpy(hidden.values[::-1][:40].copy())
    found = (captions == batch["encoder_hidden_states"][:, None]).flatten(2).all(2).any(1)
    assert torch.equal(found, ~dropped)


def test_views_of_other_images_are_refused() -> None:
    recipe = tiny_diffusion.recipe()
    facts = tiny_diffusion.table()
    column = Column(tuple(facts.image_ids), tiny_diffusion.pixels(52))
    other = Column(tuple(reversed(facts.image_ids)), column.values)
    keywords: dict[str, Any] = {
        "captions_per_image": 1,
        "drop_text": 0.0,
        "noise": NoiseSchedule(num_timesteps=10),
        "scaling_factor": 1.0,
    }
    prompts = tiny_diffusion.rows_of(recipe).prompts
    with pytest.raises(InputError, match="have different images"):
        GenerationRows(facts, [column, other], prompts, flip=True, seed=0, **keywords)


def test_latents_that_do_not_vary_are_refused() -> None:
    with pytest.raises(InputError, match="collapsed"):
        scaling_factor(np.ones((3, 4, 2, 2), np.float16))
