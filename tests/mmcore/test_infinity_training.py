"""Infinity's training: rows with flips per image, the loss, initial weights, learning, drawing."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from mmcore.data.columns import Column
from mmcore.errors import InputError
from mmcore.frozen.text import TextInputs
from mmcore.generators.bsq import bits_of, quantize, shrink
from mmcore.generators.code_rows import CodeRows
from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_recipe import VARIANTS, InfinityGenerator, InfinityRecipe, InfinitySizes, grid_weights
from mmcore.generators.infinity_rows import InfinityRows
from mmcore.generators.text_context import TextSettings
from mmcore.recipe import recipe_from_json, recipe_to_json
from mmcore.training import RunHooks, Training

PAD, BOS, EOS, MAX_TOKENS = 0, 1, 2, 8
INPUTS = TextInputs(vocabulary_size=20, pad_id=PAD, bos_id=BOS, eos_id=EOS)
FACTS = InfinityFacts(INPUTS, (6, 4, 4), (1, 2, 4))
NUM_POSITIONS, NUM_BITS = 21, 6
GREEDY = InfinityOptions(guidance=1.0, temperature=0.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe_of(**changes: Any) -> InfinityRecipe:
    text = dataclasses.replace(VARIANTS["smoke"].text, max_tokens=MAX_TOKENS)
    return dataclasses.replace(VARIANTS["smoke"], **{"text": text} | changes)


def model_of(recipe: InfinityRecipe | None = None, facts: InfinityFacts = FACTS) -> InfinityGenerator:
    torch.manual_seed(0)
    return (recipe or recipe_of()).build(facts)


def random_model() -> InfinityGenerator:
    """Every weight has an effect. In an untrained model all bits are equally likely."""
    model = model_of()
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.normal_(std=0.3)
        # No bit is certain.
        model.transformer.head.weight.mul_(0.1)
    return model.eval()


def prompts_of(*lengths: int) -> dict[str, Tensor]:
    """Prompts with the given numbers of words; each prompt repeats one word."""
    rows = [[BOS, *[3 + length] * length, EOS] for length in lengths]
    return {"input_ids": torch.tensor([row + [PAD] * (MAX_TOKENS - len(row)) for row in rows])}


def latents_of(num_images: int, seed: int = 1) -> Tensor:
    return torch.randn(num_images, NUM_BITS, 4, 4, generator=torch.Generator().manual_seed(seed))


# -- rows ----------------------------------------------------------------------------------------------------------


class Prompts:
    """The number of words of a row's caption follows from its number."""

    def batch(self, rows: Any, captions: Any) -> dict[str, Tensor]:
        assert None not in captions, "a dropped caption keeps its length"
        return prompts_of(*(row % 6 for row in rows))


def rows_of(**changes: Any) -> InfinityRows:
    table = tiny.table(40, 8)
    values = latents_of(48).numpy().astype(np.float16)
    settings = {"flip_strength": 0.3, "drop_text": 0.25, "seed": 0, **changes}
    rows = CodeRows(
        table,
        [Column(tuple(table.image_ids), values)],
        Prompts(),
        captions_per_image=1,
        drop_text=0.0,
        flip=False,
        seed=settings["seed"],
        output="latents",
    )
    return InfinityRows(rows, grids=FACTS.grids, num_bits=NUM_BITS, **settings)


def test_flips_of_an_image_do_not_depend_on_its_batch_mates() -> None:
    rows, order = rows_of(), np.random.default_rng(0).permutation(40)
    whole = rows.train_batch(order, 2)
    assert {name: (value.dtype, tuple(value.shape)) for name, value in whole.items()} == {
        "latents": (torch.float32, (40, NUM_BITS, 4, 4)),
        "input_ids": (torch.int64, (40, MAX_TOKENS)),
        "flips": (torch.bool, (40, NUM_POSITIONS, NUM_BITS)),
        "dropped": (torch.bool, (40,)),
    }
    for start in range(0, 40, 8):
        part = rows.train_batch(order[start : start + 8], 2)
        assert all(torch.equal(value, whole[name][start : start + 8]) for name, value in part.items())
    other_epoch = rows.train_batch(order, 3)
    assert (other_epoch["flips"] != whole["flips"]).any((1, 2)).all()
    assert (other_epoch["dropped"] != whole["dropped"]).any()
    assert rows.validation_batch(np.arange(8)).keys() == {"latents", "input_ids"}


def test_shares_of_flips_and_drops() -> None:
    """A share is drawn for each image and grid, uniform below the largest one."""
    batches = [rows_of().train_batch(np.arange(40), epoch) for epoch in range(10)]
    finest_NLd = torch.cat([batch["flips"] for batch in batches])[:, 5:].float()
    shares_N = finest_NLd.mean((1, 2))
    assert shares_N.mean() == pytest.approx(0.15, abs=0.02)
    assert shares_N.min() < 0.03
    assert 0.27 < shares_N.max() < 0.5
    assert torch.cat([batch["dropped"] for batch in batches]).float().mean() == pytest.approx(0.25, abs=0.06)
    changed = rows_of(flip_strength=0.0, drop_text=0.9).train_batch(np.arange(40), 0)
    assert not changed["flips"].any()
    assert torch.equal(changed["dropped"] | batches[0]["dropped"], changed["dropped"]), "no setting moves a draw"


# -- what it predicts ----------------------------------------------------------------------------------------------


def test_bits_after_a_flip_correct_it() -> None:
    model, latents = model_of(), latents_of(2)
    flips = torch.zeros(2, NUM_POSITIONS, NUM_BITS, dtype=torch.bool)
    flips[0, 0] = True
    right, inputs = model.targets(latents, None)
    corrected, flipped_inputs = model.targets(latents, flips)
    assert right.shape == (2, NUM_POSITIONS, NUM_BITS)
    assert torch.equal(right[:, 0], bits_of(shrink(latents, (1, 1)))[:, :, 0, 0])
    assert torch.equal(corrected[:, 0], right[:, 0]), "the label of a flipped bit is the right one"
    assert not torch.equal(corrected[0], right[0])
    assert torch.equal(flipped_inputs[0][0], -inputs[0][0])
    assert torch.equal(corrected[1], right[1]), "the other image has no flips"
    # The last grid's bits follow from what its input lacks, position by position.
    assert torch.equal(corrected[0, 5:].T.reshape(NUM_BITS, 4, 4), latents[0] > flipped_inputs[1][0])


def test_weights_of_grids_are_the_published_ones() -> None:
    weights = grid_weights(FACTS.grids)
    by_grid = torch.stack([part.sum() for part in weights.split([1, 4, 16])])
    torch.testing.assert_close(by_grid, torch.tensor([1.0, 2.0, 4.0]) / 7)
    assert weights[5:].unique().numel() == 1


@torch.inference_mode()
def test_loss_and_metrics() -> None:
    model, batch = random_model(), {"latents": latents_of(2), **prompts_of(3, 5)}
    outputs = model(batch)
    text, mask = model.text(batch), model.text.mask(batch)
    bits, inputs = model.targets(batch["latents"], None)
    logits = model.transformer(model.transformer.text_state(text, mask), inputs, FACTS.grids, (4, 4))
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 2), bits.flatten().long(), reduction="none")
    grids = losses.view(2, NUM_POSITIONS, NUM_BITS).split([1, 4, 16], dim=1)
    expected = sum(weight * grid.mean() for weight, grid in zip((1, 2, 4), grids, strict=True)) / 7
    torch.testing.assert_close(outputs.losses["loss"].sum / 2, expected)
    assert outputs.losses["loss"].count == 2
    right = (logits.argmax(-1) == bits).float()
    for name, part in {"": right, "_1x1": right[:, :1], "_2x2": right[:, 1:5], "_4x4": right[:, 5:]}.items():
        mean = outputs.metrics[f"bit_accuracy{name}"]
        assert float(mean.sum / mean.count) == pytest.approx(part.mean().item(), abs=1e-6)


@torch.inference_mode()
def test_dropped_rows_read_no_word_of_their_prompt() -> None:
    model, latents = random_model(), latents_of(3)

    def losses(dropped: list[bool], *lengths: int) -> list[float]:
        batches = [
            {"latents": latents[row : row + 1], "dropped": torch.tensor([dropped[row]]), **prompts_of(length)}
            for row, length in enumerate(lengths)
        ]
        return [model(batch).losses["loss"].sum.item() for batch in batches]

    def reworded(*lengths: int) -> dict[str, Tensor]:
        text = prompts_of(*lengths)
        return {"input_ids": torch.where(text["input_ids"] > EOS, 15, text["input_ids"])}

    plain = losses([False] * 3, 3, 4, 5)
    dropped = losses([True, False, True], 3, 4, 5)
    assert plain[1] == dropped[1]
    assert min(abs(plain[row] - dropped[row]) for row in (0, 2)) > 1e-3
    batch = {"latents": latents, "dropped": torch.ones(3, dtype=torch.bool)}
    same = [model(batch | text).losses["loss"].sum.item() for text in (prompts_of(3, 4, 5), reworded(3, 4, 5))]
    assert same[0] == same[1]


def test_what_is_trained_without_text_is_what_guidance_steers_away_from() -> None:
    """The same features of no text, of the same length, as sampling gives."""
    model, latents, text = random_model(), latents_of(2), prompts_of(3, 5)
    seen: list[Tensor] = []
    state = model.transformer.text_state
    model.transformer.text_state = lambda text, mask: seen.append(text) or state(text, mask)  # type: ignore
    model({"latents": latents, "dropped": torch.tensor([True, True]), **text})
    model.generate(text, [1, 2], InfinityOptions())
    trained, both = seen
    torch.testing.assert_close(trained, both[2:, : trained.shape[1]])


@torch.inference_mode()
def test_padding_has_no_effect() -> None:
    model, latents = random_model(), latents_of(2)
    both = model({"latents": latents, **prompts_of(3, 6)}).losses["loss"].sum
    alone = [model({"latents": latents[row : row + 1], **prompts_of(length)}) for row, length in enumerate((3, 6))]
    torch.testing.assert_close(both, sum(each.losses["loss"].sum for each in alone))


# -- initial weights and learning ----------------------------------------------------------------------------------


def test_at_first_all_bits_are_equally_likely() -> None:
    model = model_of(recipe_of(transformer=InfinitySizes(width=64, num_layers=4, num_heads=2)))
    outputs = model({"latents": latents_of(4), **prompts_of(0, 1, 3, 5)})
    assert outputs.losses["loss"].sum.item() / 4 == pytest.approx(math.log(2), abs=0.01)
    block = model.transformer.layers()[0]
    assert block.cross_attention.query.weight.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    # The projections back to the residual stream are smaller by the root of twice the number of layers.
    assert block.ffn[-1].weight.std().item() == pytest.approx((3 * 64 * 8) ** -0.5, rel=0.05)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_it_learns_images_by_heart() -> None:
    model = model_of(recipe_of(transformer=InfinitySizes(width=64, num_layers=2, num_heads=4)))
    latents, text = latents_of(4), prompts_of(0, 1, 3, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.97))
    for _ in range(120):
        optimizer.zero_grad()
        loss, count = model({"latents": latents, **text}).losses["loss"][:2]
        (loss / count).backward()
        optimizer.step()
    model.eval()
    made = model.generate(text, [1, 2, 3, 4], GREEDY)
    torch.testing.assert_close(made, quantize(latents, FACTS.grids).latents_BdHW)


def test_attention_with_a_gradient_is_that_without() -> None:
    """On a CPU a training computes it by another kernel than sampling does."""
    model, batch = random_model(), {"latents": latents_of(2), **prompts_of(3, 5)}
    trained = model(batch).losses["loss"].sum
    with torch.inference_mode():
        torch.testing.assert_close(trained.detach(), model(batch).losses["loss"].sum, rtol=1e-5, atol=0)


def test_every_weight_gets_a_gradient() -> None:
    model = model_of()
    batch = {"latents": latents_of(2), "dropped": torch.tensor([True, False]), **prompts_of(3, 5)}
    model(batch).losses["loss"].sum.backward()
    assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_fp64_is_exact() -> None:
    """Sums of two workers are compared in fp64: no part computes with less."""
    model, batch = random_model().double(), {"latents": latents_of(4).double(), **prompts_of(3, 5, 3, 2)}
    whole = model(batch).losses["loss"].sum
    halves = [model({name: value[rows] for name, value in batch.items()}) for rows in (slice(2), slice(2, 4))]
    torch.testing.assert_close(whole, sum(each.losses["loss"].sum for each in halves), rtol=1e-12, atol=0)


def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    train = dataclasses.replace(
        VARIANTS["smoke"].train, num_epochs=2, max_steps=None, precision="fp32", checkpoint_every_steps=3
    )
    recipe = recipe_of(train=train)

    def commit(checkpoint: Path | None, metrics: dict[str, Any]) -> None:
        assert checkpoint is not None
        shutil.move(checkpoint, tmp_path / "kept" / checkpoint.name)

    def trained(resume_from: Path | None) -> dict[str, Tensor]:
        hooks = RunHooks(commit=commit)
        workdir = tmp_path / ("work" if resume_from is None else "resumed")
        training = Training(model_of(recipe), rows_of(), train, hooks, workdir=workdir, resume_from=resume_from)
        return training.run()

    (tmp_path / "kept").mkdir()
    unbroken = trained(None)
    kept = Path(shutil.move(tmp_path / "kept" / "step-00000006", tmp_path / "middle"))
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    resumed = trained(kept)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["step-00000009", "step-00000010"]
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


# -- drawing -------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_its_prompt_and_its_seed_alone() -> None:
    model, lengths, seeds = random_model(), [0, 2, 5, 2], [7, 8, 9, 9]
    options = InfinityOptions(guidance=2.0, temperature=1.0)

    def made(order: list[int]) -> dict[int, Tensor]:
        text = prompts_of(*(lengths[row] for row in order))
        latents = model.generate(text, [seeds[row] for row in order], options)
        return dict(zip(order, latents, strict=True))

    first = made([0, 1, 2, 3])
    for order in ([3, 0, 2, 1], [2, 2, 2, 2]):
        assert all(torch.equal(latents, first[row]) for row, latents in made(order).items())
    assert not torch.equal(first[1], first[3]), "another seed"
    torch.manual_seed(5)
    assert torch.equal(made([0, 1, 2, 3])[0], first[0]), "no draw comes from the generator of the process"


def test_progress_is_told_of_every_grid_and_may_end_the_work() -> None:
    told: list[tuple[int, int]] = []
    model, text = random_model(), prompts_of(2)
    model.generate(text, [1], GREEDY, on_step=lambda done, total: told.append((done, total)))
    model.generate(
        text, [1], dataclasses.replace(GREEDY, num_grids=2), on_step=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3), (1, 2), (2, 2)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(text, [1], GREEDY, on_step=stop)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_is_read_back_and_is_small(name: str) -> None:
    recipe = VARIANTS[name]
    with torch.device("meta"):
        model = recipe.build(dataclasses.replace(FACTS, latent_shape=(32, 8, 8), grid_sides=(1, 2, 3, 4, 6, 8)))
    assert sum(parameter.numel() for parameter in model.parameters()) < 35e6
    assert recipe_from_json(InfinityRecipe, recipe_to_json(recipe), "here") == recipe
    assert recipe.drop_text > 0


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"drop_text": 1.0}, "--drop-text"),
        ({"flip_strength": -0.1}, "--flip-strength"),
        ({"captions_per_image": 0}, "--captions-per-image"),
        ({"exhaustive_captions": 1.5}, "--exhaustive-captions"),
        ({"transformer": InfinitySizes(num_layers=0)}, "--num-layers"),
        ({"transformer": InfinitySizes(width=32, num_heads=2)}, "--width"),
        ({"transformer": InfinitySizes(num_heads=7)}, "--num-heads"),
        ({"transformer": InfinitySizes(width=72, num_heads=12)}, "--num-heads"),
        ({"sample": InfinityOptions(top_p=0.3)}, "--top-p"),
        ({"sample": InfinityOptions(guidance_layer=-9)}, "--guidance-layer"),
        ({"drop_text": 0.0}, "--guidance"),
        ({"text": TextSettings(text_width=640)}, "--text-width"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError, match=flag) as refusal:
        recipe_of(**changes)
    assert "\n" not in str(refusal.value)
