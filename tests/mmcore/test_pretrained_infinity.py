"""Official files of Infinity as a generator: sizes, images, precision, and files that do not fit."""

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_official_infinity as tiny
import torch
from safetensors.torch import save_file

from mmcore.errors import InputError, OptionError
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_scales import BUDGETS, GRIDS, SIZES, grids_of_size
from mmcore.trained.pretrained_infinity import PretrainedInfinity, open_infinity

pytestmark = pytest.mark.usefixtures("one_thread")

# The logits of random weights are large. By this temperature the seeds decide most bits.
_WARM = InfinityOptions(temperature=8.0, top_p=1.0, num_grids=3)
_SIZE = (256, 256)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("infinity")
    return {
        "model": tiny.write_transformer(folder),
        "vae": tiny.write_vae(folder),
        "text_encoder": tiny.write_text_encoder(folder / "t5"),
    }


def opened(files: dict[str, str], **changed: Any) -> PretrainedInfinity:
    return open_infinity(**{"budget": "0.06M", **files, **changed})


# -- sizes ---------------------------------------------------------------------------------------------------------


def test_each_ratio_and_budget_has_its_own_size() -> None:
    assert len(SIZES) == len(GRIDS) * len(BUDGETS)
    assert SIZES[1024, 1024] == (1.0, "1M")
    grids, finest = grids_of_size((512, 512))
    assert (len(grids), grids[-1], finest) == (10, (32, 32), (64, 64))


def test_another_size_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"1000x1030: .* nearest is 1024x1024 \(ratio 1, 1M\)"):
        grids_of_size((1030, 1000))


@pytest.mark.parametrize(("ratio", "budget", "size"), [(1.0, "1M", (1024, 1024)), (0.5, "0.06M", (176, 352))])
def test_ratio_and_budget_are_the_default_size(
    files: dict[str, str], ratio: float, budget: str, size: tuple[int, int]
) -> None:
    assert opened(files, ratio=ratio, budget=budget).size == size


# -- images --------------------------------------------------------------------------------------------------------


def test_an_image_depends_on_prompt_and_seed_alone(files: dict[str, str]) -> None:
    generator = pickle.loads(pickle.dumps(opened(files))).load()
    steps: list[tuple[int, int]] = []
    images = generator.generate(tiny.CAPTIONS[:2], [5, 6], _WARM, on_step=lambda *step: steps.append(step))
    assert images.shape == (2, *_SIZE, 3)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    turned = generator.generate(tiny.CAPTIONS[1::-1], [6, 5], _WARM)
    assert np.array_equal(images, turned[::-1])
    others = generator.generate([tiny.CAPTIONS[0], tiny.CAPTIONS[3]], [5, 5], _WARM)
    assert np.array_equal(others[0], images[0])
    # Other words with the seed of the first image.
    assert not np.array_equal(others[1], others[0])
    # A longer prompt is cut, which `num_tokens` tells before.
    long = "a red circle a red circle a red circle"
    assert generator.num_tokens([long]) == [11]
    assert generator.max_tokens == 8
    cut = generator.generate([long, long + " a blue square"], [5, 5], _WARM)
    assert np.array_equal(cut[0], cut[1])


def test_patches_of_a_tokenizer_of_half_the_stride(files: dict[str, str], tmp_path: Path) -> None:
    generator = opened(files, vae=tiny.write_vae(tmp_path, tiny.PATCHED_VAE))
    assert generator.patch == 2
    image = generator.load().generate(["a red circle"], [0], _WARM, size=(192, 336))
    assert image.shape == (1, 192, 336, 3)


def test_half_precision_stores_and_computes_in_it(files: dict[str, str]) -> None:
    generator = opened(files).load(dtype=torch.bfloat16)
    stored = {name: value.dtype for name, value in generator.images.model.named_parameters()}
    assert stored["blocks.0.ffn.0.weight"] == torch.bfloat16
    assert stored["head.weight"] == torch.float32
    text = {name: value.dtype for name, value in generator.encoder.model.named_parameters()}
    assert {dtype for name, dtype in text.items() if ".wo." in name} == {torch.float32}
    assert {dtype for name, dtype in text.items() if ".wo." not in name} == {torch.float16}
    images = generator.generate(["a red circle", "a blue square"], [0, 1], _WARM)
    assert np.array_equal(images, generator.generate(["a red circle", "a blue square"], [0, 1], _WARM))
    greedy = dataclasses.replace(_WARM, temperature=0.0)
    near = np.abs(generator.generate(["a red circle"], [0], greedy).astype(int) - opened(files).load().generate(
        ["a red circle"], [0], greedy
    ))  # fmt: skip
    # Few bits are near enough to the border that rounding turns them.
    assert np.median(near) <= 2


def test_identity_has_the_digests_of_all_files(files: dict[str, str], tmp_path: Path) -> None:
    identity = opened(files).identity()
    assert {"model_sha256", "vae_sha256", "text_encoder_sha256"} <= identity.keys()
    other = tiny.write_transformer(tmp_path, dataclasses.replace(tiny.SETTINGS, num_layers=1))
    changed = opened(files, model=other).identity()
    assert {name for name in identity if identity[name] != changed[name]} == {"model", "model_sha256"}


# -- bad input -----------------------------------------------------------------------------------------------------


def test_files_that_do_not_belong_together_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    wide = dataclasses.replace(tiny.VAE, num_bits=5)
    with pytest.raises(InputError, match=r"^--vae .*vae-5-32.pth': 5 bits .* has 4; name the VAE"):
        opened(files, vae=tiny.write_vae(tmp_path, wide))
    fine = dataclasses.replace(tiny.VAE, factors=(1, 1, 1))
    with pytest.raises(InputError, match=r"^--vae .*: 4 bits at each 4 pixels"):
        opened(files, vae=tiny.write_vae(tmp_path, fine))
    with pytest.raises(InputError, match=r"^--text-encoder .*: gives 24 channels, and .* reads 16"):
        opened(files, text_encoder=tiny.write_text_encoder(tmp_path / "t5", width=24))
    with pytest.raises(InputError, match=r"^--model .*vae-4-32.pth'"):
        opened(files, model=files["vae"])
    with pytest.raises(InputError, match=r"^--vae .*transformer.pth'"):
        opened(files, vae=files["model"])
    with pytest.raises(InputError, match=r"^--model 'missing.pth': no such file"):
        opened(files, model="missing.pth")


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"ratio": 1.1}, "aspect ratio 1.1 .* choose one of"), ({"budget": "2M"}, "'2M' is not known; choose one of")],
)
def test_a_ratio_or_budget_without_grids_is_refused(
    files: dict[str, str], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opened(files, **changed)


def test_options_are_checked_before_weights_are_read(files: dict[str, str]) -> None:
    generator = opened(files)
    with pytest.raises(OptionError, match="--guidance-layer"):
        generator.check(InfinityOptions(guidance_layer=-2), generator.size)
    with pytest.raises(OptionError, match="--size 300x300"):
        generator.check(InfinityOptions(), (300, 300))


def test_shapes_of_safetensors_and_of_a_folder(files: dict[str, str], tmp_path: Path) -> None:
    """All forms of official files tell their sizes without their weights."""
    state = {name: value.contiguous() for name, value in torch.load(files["model"], weights_only=True).items()}
    save_file(state, tmp_path / "all.safetensors")
    assert opened(files, model=str(tmp_path / "all.safetensors")).settings == tiny.SETTINGS
    index = {"weight_map": dict.fromkeys(state, "all.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert opened(files, model=str(tmp_path)).settings == tiny.SETTINGS
