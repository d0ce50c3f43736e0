"""The autoregressive Transformer over codes: attention, sampling, training and golden losses."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_diffusion
import torch
from torch import Tensor

from mmcore.errors import InputError, OptionError
from mmcore.frozen.text import TextInputs
from mmcore.generators import autoregressive
from mmcore.generators.autoregressive import VARIANTS, AutoregressiveRecipe, CodeTransformer, TransformerSettings
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.code_sampling import draw_codes
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.recipe import TrainSettings, recipe_from_json, recipe_to_json
from mmcore.rows import Batch
from mmcore.training import RunHooks, Training

NUM_CODES, LENGTH, MAX_TOKENS = 11, 12, 8
PAD, BOS, EOS = 0, 1, 2
INPUTS = TextInputs(vocabulary_size=20, pad_id=PAD, bos_id=BOS, eos_id=EOS)
FACTS = AutoregressiveFacts(INPUTS, (3, 4), NUM_CODES)
PLAIN = AutoregressiveOptions(guidance=1.0, temperature=1.0)

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe_of(**changes: Any) -> AutoregressiveRecipe:
    smoke = VARIANTS["smoke"]
    small = {
        "transformer": TransformerSettings(width=32, num_layers=2, num_heads=4, ffn_width=64),
        "text": dataclasses.replace(smoke.text, max_tokens=MAX_TOKENS),
    }
    return dataclasses.replace(smoke, **small | changes)


def model_of(recipe: AutoregressiveRecipe | None = None, facts: AutoregressiveFacts = FACTS) -> CodeTransformer:
    """With weights from a formula. In an untrained model all codes would be equally likely."""
    torch.manual_seed(0)
    model = (recipe or recipe_of()).build(facts)
    tiny_diffusion.fill_by_formula(model)
    with torch.no_grad():
        model.output.weight.mul_(4)
    return model.eval()


def prompts_of(*lengths: int, padding: int = PAD) -> dict[str, Tensor]:
    """Prompts with the given numbers of words; each prompt repeats one word."""
    rows = [[BOS, *[3 + length] * length, EOS] for length in lengths]
    return {"input_ids": torch.tensor([row + [padding] * (MAX_TOKENS - len(row)) for row in rows])}


def codes_of(num_images: int) -> Tensor:
    return torch.randint(NUM_CODES, (num_images, LENGTH), generator=torch.Generator().manual_seed(1))


# -- what it sees --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_code_sees_those_before_it_and_the_words_of_its_prompt() -> None:
    model, codes_BL, text = model_of(), codes_of(2), prompts_of(3, 5)
    before = model.logits({"codes": codes_BL, **text})
    changed = codes_BL.clone()
    changed[:, 5] = (changed[:, 5] + 1) % NUM_CODES
    after = model.logits({"codes": changed, **text})
    assert torch.equal(after[:, :6], before[:, :6])
    # The next code and the last one.
    assert (after - before)[:, [6, 11]].abs().amax(-1).min() > 0.001
    padded = model.logits({"codes": codes_BL, **prompts_of(3, 5, padding=EOS)})
    assert torch.equal(padded, before), "what follows the end mark is not read"
    other = model.logits({"codes": codes_BL, **prompts_of(3, 4)})
    # The longest prompt of a batch sets how much padding is computed: measured 1.9e-6.
    torch.testing.assert_close(other[0], before[0], rtol=0, atol=1e-5)
    assert (other[1] - before[1]).abs().max() > 0.01


@torch.inference_mode()
def test_words_after_a_begin_mark_that_is_the_end_mark_are_seen() -> None:
    """As OPT's tokenizer has it."""
    model = model_of(facts=dataclasses.replace(FACTS, text_inputs=dataclasses.replace(INPUTS, bos_id=EOS)))
    prompts = torch.tensor([[EOS, word, 9, EOS, after, PAD, PAD, PAD] for word, after in ((3, PAD), (3, 7), (4, PAD))])
    logits = model.logits({"codes": codes_of(1).expand(3, -1), "input_ids": prompts})
    assert torch.equal(logits[0], logits[1]), "what follows the end mark is not read"
    assert (logits[2] - logits[0]).abs().max() > 0.01


@torch.inference_mode()
def test_places_are_told_apart_by_row_and_column() -> None:
    model = model_of()
    batch = {"codes": torch.full((1, LENGTH), 3), **prompts_of(3)}
    before = model.logits(batch)
    model.columns_wD[2, 0] += 1
    moved = (model.logits(batch) - before)[0].abs().amax(-1) > 1e-4
    # The first code of column 2; all later codes attend to it.
    assert moved.tolist() == [False] * 2 + [True] * 10


@pytest.mark.parametrize("guidance", [(1.0, None), (3.0, None), (3.0, 1.0), (1.0, 2.5)])
def test_drawing_with_a_cache_sees_the_logits_of_one_pass(
    guidance: tuple[float, float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guidance steers away from the null prompt. Its scale is linear from the first code to the last."""
    model, codes_BL, text, null = model_of(), codes_of(3), prompts_of(3, 1, 5), prompts_of(0, 0, 0)
    seen, rows = [], []

    def draw(logits_BV: Tensor, uniform_B: Tensor, options: AutoregressiveOptions) -> Tensor:
        seen.append(logits_BV)
        return codes_BL[:, len(seen) - 1]

    step = model.layers.step
    monkeypatch.setattr(model.layers, "step", lambda x, state: rows.append(len(x)) or step(x, state))
    monkeypatch.setattr(autoregressive, "draw_codes", draw)
    first, last = guidance
    options = AutoregressiveOptions(guidance=first, guidance_end=last)
    made = model.generate(text, null, [1, 2, 3], options)
    assert torch.equal(made, codes_BL.view(3, 3, 4))
    assert rows == [6 if options.guides else 3] * LENGTH
    with torch.inference_mode():
        conditional, unguided = (model.logits({"codes": codes_BL, **each}) for each in (text, null))
    scale_L1 = torch.linspace(first, first if last is None else last, LENGTH)[:, None]
    expected = unguided + scale_L1 * (conditional - unguided)
    assert (conditional - unguided).abs().max() > 0.1
    torch.testing.assert_close(torch.stack(seen, 1), expected, rtol=0, atol=5e-5)  # measured 9.3e-6, on logits up to 14


# -- drawing -------------------------------------------------------------------------------------------------------


def plain_draw(logits: list[float], uniform: float, options: AutoregressiveOptions) -> int:
    weights = np.exp((np.array(logits) - max(logits)) / options.temperature)
    likeliest = sorted(range(len(weights)), key=lambda code: -weights[code])[: options.top_k or None]
    whole, held, kept = sum(weights[code] for code in likeliest), 0.0, []
    for code in likeliest:
        kept.append(code)
        held += weights[code] / whole
        if held >= options.top_p:
            break
    rest, below = uniform * sum(weights[code] for code in kept), 0.0
    for code in sorted(kept):
        below += weights[code]
        if below > rest:
            return code
    raise AssertionError("a uniform number below 1 finds a code")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_p": 0.05},
        {"top_k": 4, "top_p": 0.8, "temperature": 1.5},
        {"top_k": 100},
    ],
)
def test_codes_are_drawn_as_a_plain_reference_draws_them(changes: dict[str, Any]) -> None:
    options, random = dataclasses.replace(PLAIN, **changes), torch.Generator().manual_seed(3)
    logits_BV = 2 * torch.randn(400, NUM_CODES, generator=random)
    uniform_B = torch.rand(400, generator=random)
    uniform_B[:2] = torch.tensor([0.0, 1 - 2**-24])
    drawn = draw_codes(logits_BV, uniform_B, options).tolist()
    pairs = zip(logits_BV.double().tolist(), uniform_B.tolist(), strict=True)
    assert drawn == [plain_draw(row, uniform, options) for row, uniform in pairs]


def test_the_lowest_temperature_and_the_smallest_nucleus_take_the_likeliest() -> None:
    logits_BV = torch.tensor([[0.0, 300.0, 299.0, -torch.inf], [5.0, 1.0, 5.0, 4.0]])
    uniform_B = torch.tensor([0.999, 0.999])
    for changes in ({"temperature": 0.01}, {"top_p": 1e-9}, {"top_k": 1}):
        drawn = draw_codes(logits_BV, uniform_B, dataclasses.replace(PLAIN, **changes)).tolist()
        # Of two equal logits, top-k and top-p keep the first one; a temperature keeps both.
        assert drawn == [1, 2 if "temperature" in changes else 0]


def test_an_image_depends_on_its_prompt_and_its_seed_alone() -> None:
    model, lengths, seeds = model_of(), [0, 2, 5, 2], [7, 8, 9, 9]
    options = AutoregressiveOptions(guidance=2.0, guidance_end=1.0, temperature=1.0, top_p=0.95)

    def made(order: list[int]) -> dict[int, list[int]]:
        text = prompts_of(*(lengths[row] for row in order))
        null = prompts_of(*[0] * len(order))
        codes = model.generate(text, null, [seeds[row] for row in order], options)
        return dict(zip(order, codes.flatten(1).tolist(), strict=True))

    first = made([0, 1, 2, 3])
    assert made([3, 0, 2, 1]) == first
    assert made([2, 2, 2, 2])[2] == first[2]
    assert len({tuple(codes) for codes in first.values()}) == 4
    assert made([1, 1, 1, 1])[1] != first[3], "another seed"
    torch.manual_seed(5)
    assert made([0, 1, 2, 3]) == first, "no draw comes from the generator of the process"


def test_progress_is_told_of_every_code_and_may_end_the_work() -> None:
    told: list[tuple[int, int]] = []
    model, text = model_of(), prompts_of(2)
    model.generate(text, text, [1], PLAIN, on_step=lambda done, total: told.append((done, total)))
    assert told == [(done, LENGTH) for done in range(1, LENGTH + 1)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(text, text, [1], PLAIN, on_step=stop)


# -- learning ------------------------------------------------------------------------------------------------------


def test_it_learns_images_by_heart() -> None:
    torch.manual_seed(0)
    model = recipe_of().build(FACTS)
    codes_BL, text = codes_of(4), prompts_of(0, 1, 3, 5)
    outputs = model({"codes": codes_BL, **text})
    assert outputs.losses["loss"].sum.item() / 4 == pytest.approx(np.log(NUM_CODES), abs=0.1), "all codes alike"
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
    for _ in range(80):
        optimizer.zero_grad()
        loss, count = model({"codes": codes_BL, **text}).losses["loss"][:2]
        (loss / count).backward()
        optimizer.step()
    model.eval()
    assert torch.equal(model.generate(text, text, [1, 2, 3, 4], PLAIN).flatten(1), codes_BL)


def test_hidden_states_of_a_frozen_encoder_are_all_seen() -> None:
    frozen = dataclasses.replace(recipe_of().text, text_encoder="frozen")
    model = model_of(recipe_of(text=frozen), dataclasses.replace(FACTS, text_inputs=TextInputs(width=24)))
    text = {"encoder_hidden_states": torch.randn(2, MAX_TOKENS, 24)}
    before = model.logits({"codes": codes_of(2), **text})
    text["encoder_hidden_states"][:, -1] += 1
    assert (model.logits({"codes": codes_of(2), **text}) - before).abs().amax((1, 2)).min() > 1e-3
    assert model.generate(text, text, [1, 2], PLAIN).shape == (2, 3, 4)


class FormulaRows:
    """Codes and prompts of images from a formula. Every epoch has another prompt per image."""

    num_train, num_validation = 40, 8

    def _batch(self, indices: np.ndarray, epoch: int) -> Batch:
        codes = (indices[:, None] * np.arange(LENGTH) + indices[:, None] ** 2) % NUM_CODES
        return {"codes": torch.from_numpy(codes), **prompts_of(*((indices + epoch) % 6).tolist())}

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        return self._batch(indices, epoch)

    def validation_batch(self, indices: np.ndarray) -> Batch:
        return self._batch(indices + self.num_train, 0)

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        return None


GOLDEN_LOSSES = [
    6.092209993248552,
    4.12507173717447,
    2.9550398733560397,
    3.1233861499008273,
    3.0537611167405156,
    2.699306612290052,
    2.5727411620570058,
    2.506257099038038,
    2.424329265773861,
    2.427177522324923,
]


def test_golden_losses(tmp_path: Path) -> None:
    """Ten steps with weights from a formula: a refactoring changes no loss."""
    # Not a variant: settings of variants change with measurements.
    train = TrainSettings(
        num_epochs=2,
        batch_size=8,
        lr=1e-3,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        schedule="linear_tail",
        warmup_steps=2,
        ema_decay=0.998,
        precision="fp64",
        seed=2024,
        log_every_steps=1,
    )
    model = model_of(recipe_of(train=train))
    training = Training(model, FormulaRows(), train, RunHooks(), workdir=tmp_path)
    training.run()
    losses = [row["loss"] for row in training.state.history if "validation_loss" not in row]
    # In fp64: with default, avx2 and avx512 kernels they differed by 3.0e-7 at most, in fp32 by 3e-4.
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=3e-6)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_is_read_back_and_is_small(name: str) -> None:
    recipe = VARIANTS[name]
    with torch.device("meta"):
        model = recipe.build(dataclasses.replace(FACTS, code_shape=(16, 16), num_codes=4096))
    assert sum(parameter.numel() for parameter in model.parameters()) < 25e6
    assert recipe_from_json(AutoregressiveRecipe, recipe_to_json(recipe), "here") == recipe
    assert recipe.drop_text > 0


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"drop_text": 1.0}, "--drop-text"),
        ({"captions_per_image": 0}, "--captions-per-image"),
        ({"exhaustive_captions": 1.5}, "--exhaustive-captions"),
        ({"transformer": TransformerSettings(num_layers=0)}, "--num-layers"),
        ({"transformer": TransformerSettings(num_heads=7)}, "--num-heads"),
        ({"transformer": TransformerSettings(dropout=1.0)}, "--dropout"),
        ({"sample": AutoregressiveOptions(top_p=0)}, "--top-p"),
        ({"sample": AutoregressiveOptions(negative_prompt="a dog")}, "--negative-prompt"),
        ({"drop_text": 0.0}, "--guidance"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(InputError, match=flag) as refusal:
        recipe_of(**changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        *({"guidance": scale} for scale in (0.5, 1e38, float("inf"), float("nan"))),
        {"guidance": 2.0, "guidance_end": 0.0},
        *({"temperature": temperature} for temperature in (0.0, -1.0, float("nan"), float("inf"))),
        {"top_k": -1},
        *({"top_p": share} for share in (0.0, 1.1, float("nan"))),
        {"negative_prompt": "a dog"},
    ],
)
def test_options_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    *_, name = changes
    PLAIN.check(guides=True)
    with pytest.raises(OptionError, match=f"^--{re.escape(name.replace('_', '-'))} ") as refusal:
        dataclasses.replace(PLAIN, **changes).check(guides=True)
    assert refusal.value.option == name
    assert "\n" not in str(refusal.value)


def test_guidance_is_refused_where_no_prompt_was_ever_missing() -> None:
    PLAIN.check(guides=False)
    with pytest.raises(OptionError, match=r"--guidance-end .*drop_text 0"):
        dataclasses.replace(PLAIN, guidance_end=2.0).check(guides=False)
    guided = dataclasses.replace(PLAIN, guidance_end=2.0, negative_prompt="a dog")
    guided.check(guides=True)
    assert guided.shortened() == guided
