"""The training of Infinity's tokenizer: its quantiser, its recipe, resume, and a trained one."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_tokenizer
import tiny_vqvae
import torch
from safetensors.torch import load_file
from tiny_tokenizer import GRIDS, NUM_BITS, recipe
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.data.pixels import to_network, to_pixels
from mmcore.errors import InputError
from mmcore.generators.bsq import quantize
from mmcore.generators.bsq_training import BitQuantizer, bit_entropy, bit_use
from mmcore.generators.facts import VQVAEFacts
from mmcore.generators.infinity_tokenizer import VARIANTS, InfinityTokenizerRecipe, InfinityTokenizerTraining
from mmcore.generators.infinity_vae import InfinityVae
from mmcore.recipe import recipe_from_json, recipe_to_json
from mmcore.run_files import RunFile, write_model
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedInfinityTokenizer, open_autoencoder, open_tokenizer, open_vqvae
from mmcore.trained.to_infinity import FILE_NAME, save_official, tokenizer_difference

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(num: int = 3, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(num, NUM_BITS, 4, 4, generator=torch.Generator().manual_seed(1))


def quantizer(mean: float = 0.5, grids: Any = GRIDS) -> BitQuantizer:
    made = BitQuantizer(NUM_BITS, grids, inverse_temperature=2.0)
    made.mean_bits_Sd.fill_(mean)
    return made


# -- the quantiser -------------------------------------------------------------------------------------------------


def test_training_quantises_as_use_does() -> None:
    total, outputs = quantizer()(latents())
    used = quantize(latents(), GRIDS)
    assert torch.equal(total, used.latents_BdHW)
    counted = torch.stack([bits.sum((0, 2, 3)) for bits in used.bits])
    assert torch.equal(outputs["ones"], counted.double())
    assert outputs["positions"].tolist() == [[3.0], [12.0], [48.0]]


def test_the_gradient_passes_straight_to_the_latents() -> None:
    z, g = latents().requires_grad_(True), latents() + 1
    total, _ = quantizer()(z)
    (gradient,) = torch.autograd.grad((g * total).sum(), z)
    assert torch.equal(gradient, g)


def test_the_commitment_is_to_the_sum_of_the_grids() -> None:
    z = latents().requires_grad_(True)
    total, outputs = quantizer()(z)
    rest = z.detach() - total.detach()
    torch.testing.assert_close(outputs["commitment_loss"], rest.square().mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(outputs["commitment_loss"].sum(), z)
    torch.testing.assert_close(gradient, 2 * rest / rest[0].numel())


def test_the_entropy_loss_has_the_gradient_of_the_whole_set() -> None:
    """With the means of the batch itself, the tangent is the entropy of the mean bit."""
    sharp = 4 * 2.0 / math.sqrt(NUM_BITS)
    z = latents(5)[:, :, :1, :1].double().requires_grad_(True)
    shares = torch.sigmoid(sharp * nn.functional.normalize(z, dim=1))
    mean = shares.mean((0, 2, 3))
    exact = bit_entropy(shares).mean() - bit_entropy(mean).mean()
    one = quantizer(grids=((1, 1),))
    one.mean_bits_Sd.copy_(mean.detach()[None])
    loss = one(z)[1]["entropy_loss"].mean()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-9)
    mine, theirs = (torch.autograd.grad(each, z)[0] for each in (loss, exact))
    torch.testing.assert_close(mine, theirs)


def test_certain_bits_have_finite_gradients() -> None:
    sharp = BitQuantizer(NUM_BITS, ((4, 4),), inverse_temperature=1e4)
    sharp.mean_bits_Sd.zero_()
    z = latents().requires_grad_(True)
    loss = sharp(z)[1]["entropy_loss"]
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_the_averages_move_to_the_share_of_the_whole_batch() -> None:
    whole, parts = quantizer(), quantizer()
    whole.after_step(whole(latents(4))[1])
    halves = [parts(part)[1] for part in latents(4).split(2)]
    parts.after_step({name: halves[0][name] + halves[1][name] for name in ("probabilities", "positions")})
    torch.testing.assert_close(parts.mean_bits_Sd, whole.mean_bits_Sd)
    for _ in range(200):
        whole.after_step(whole(latents(4))[1])
    outputs = whole(latents(4))[1]
    torch.testing.assert_close(whole.mean_bits_Sd, outputs["probabilities"] / outputs["positions"])


def test_the_use_of_bits_is_the_entropy_of_their_means() -> None:
    positions = torch.tensor([[4.0], [8.0]])
    assert bit_use(torch.tensor([[2.0, 4.0], [4.0, 0.0]]), positions) == {"bits_used": 0.5}
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert bit_use(torch.tensor([[1.0], [6.0]]), positions)["bits_used"] == pytest.approx(quarter)


# -- the recipe ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_recipe_survives_json_and_builds(name: str) -> None:
    variant = VARIANTS[name]
    assert recipe_from_json(InfinityTokenizerRecipe, recipe_to_json(variant), "here") == variant
    with torch.device("meta"):
        model = variant.build()
        encoded = model.encode(torch.empty(1, 3, variant.image_size, variant.image_size))
        assert model.decode(encoded).shape == (1, 3, variant.image_size, variant.image_size)
    assert encoded.shape[1:] == variant.latent_shape
    assert variant.perceptual is None, "it must work offline"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 40}, ["image_size 40", "32", "grids (1, 2, 4)", "--image-size", "--grids", "--factors"]),
        ({"patch_size": 3}, ["image_size 32", "48", "patch_size 3", "--patch-size"]),
        ({"patch_size": 0}, ["patch_size 0", "--patch-size"]),
        ({"grids": (1, 4, 2)}, ["grids (1, 4, 2)", "--grids"]),
        ({"grids": ()}, ["grids ()", "--grids"]),
        ({"grids": (2, 4)}, ["grids (2, 4)", "grow from 1 on", "--grids"]),
        ({"grids": (1, 2, 2, 4)}, ["grids (1, 2, 2, 4)", "--grids"]),
        ({"grids": tuple(range(1, 17))}, ["2 to 15 sides", "--grids"]),
        ({"factors": ()}, ["factors ()", "--factors"]),
        ({"width": 6}, ["width 6", "norm_groups 4", "--width"]),
        ({"num_bits": 0}, ["num_bits 0", "--num-bits"]),
        ({"inverse_temperature": 0.0}, ["inverse_temperature 0.0", "--inverse-temperature"]),
        ({"entropy_weight": -0.1}, ["entropy_weight -0.1", "--entropy-weight"]),
        ({"discriminator_channels": (6,)}, ["discriminator_channels (6,)", "--discriminator-channels"]),
        ({"vgg16": "x.pth"}, ["--vgg16", "--perceptual lpips"]),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        dataclasses.replace(VARIANTS["smoke"], **changes)
    assert all(part in str(caught.value) for part in named), caught.value
    assert "\n" not in str(caught.value)


# -- training ------------------------------------------------------------------------------------------------------


def state_of(run: tiny_vqvae.Run) -> dict[str, Tensor]:
    state = checkpoint.trainable_state(run.training.model)
    for phase in run.training.phases:
        optimizer = checkpoint.optimizer_state(phase.optimizer)
        state |= {f"{phase.group} {name}": value for name, value in optimizer.items()}
    return state


def test_a_run_resumed_at_any_checkpoint_ends_bit_identical(tmp_path: Path) -> None:
    """Before the discriminator's first step and after it."""
    ours = recipe(train={"gradient_accumulation": 2, "ema_decay": 0.9, "num_epochs": 2})
    whole = tiny_vqvae.train(ours, tmp_path / "whole")
    assert not torch.equal(whole.training.model.quantizer.mean_bits_Sd, torch.full((3, NUM_BITS), 0.5).double())
    for start in (whole.checkpoints[0], whole.checkpoints[2]):
        folder = tmp_path / start.name
        again = tiny_vqvae.train(ours, folder, resume_from=start, model=tiny_vqvae.model_of(ours, seed=9))
        mine, theirs = state_of(again), state_of(whole)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert tiny.without_times(again.training.state.history) == tiny.without_times(whole.training.state.history)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    whole, cut = (
        tiny_vqvae.train(ours, tmp_path / str(parts)).training.state.history
        for parts in (1, 4)
        for ours in [recipe(train={"precision": "fp64", "gradient_accumulation": parts, "max_steps": 6})]
    )
    for a, b in zip(whole, cut, strict=True):
        for name in ("loss", "psnr", "entropy_loss", "bits_used", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-8), (a["step"], name)


def test_reconstructions_become_better_and_every_weight_moves(tmp_path: Path) -> None:
    ours = recipe(adversarial_weight=0.01, train={"num_epochs": 6, "validate_every_epochs": 3})
    model = tiny_vqvae.model_of(ours)
    before = {name: value.clone() for name, value in checkpoint.trainable_state(model).items()}
    history = tiny_vqvae.train(ours, tmp_path, model=model).training.state.history
    validated = [row for row in history if "validation_psnr" in row]
    assert validated[-1]["validation_psnr"] > validated[0]["validation_psnr"] > 8
    assert 0 < validated[-1]["validation_bits_used"] <= 1
    assert not history[-1].keys() & {"ones", "positions", "probabilities"}
    after = checkpoint.trainable_state(model)
    assert not [name for name, value in after.items() if torch.equal(before[name], value)]


# -- a trained one -------------------------------------------------------------------------------------------------


def finished_run(folder: Path) -> tuple[Storage, InfinityTokenizerTraining]:
    run = Storage(str(folder))
    return run, tiny_tokenizer.write_run(run)


def opened(run: Storage, fingerprint: str | None = None) -> TrainedInfinityTokenizer:
    return open_tokenizer(run.uri, fingerprint=fingerprint).load()


def test_a_trained_one_is_opened(tmp_path: Path) -> None:
    run, model = finished_run(tmp_path / "run")
    trained, pixels = opened(run), tiny_vqvae.images(2)
    assert (trained.image_size, trained.num_bits, trained.latent_shape) == (16, NUM_BITS, (NUM_BITS, 4, 4))
    assert trained.grids == GRIDS
    encoded = trained.encode(pixels)
    with torch.inference_mode():
        assert torch.equal(encoded, model.tokenizer.encode(to_network(torch.from_numpy(pixels))))
        total = quantize(encoded, GRIDS).latents_BdHW
        assert torch.equal(trained.decode(total * 0.9), model.tokenizer.decode(total * 0.9)), "not quantised again"
    made = trained.reconstruct(pixels)
    assert torch.equal(made, trained.decode(total))
    assert torch.equal(to_pixels(made), model.eval().reconstruct(torch.from_numpy(pixels)))


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path / "run")
    fingerprint = opened(run).fingerprint()
    assert opened(run, fingerprint).fingerprint() == fingerprint
    with pytest.raises(InputError, match=r"run/model: this tokenizer \(fingerprint \w+\) is not the one"):
        opened(run, "0" * 64)


def test_autoencoders_of_another_kind_are_refused(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path / "run")
    with pytest.raises(InputError, match="recipe 'infinity_tokenizer' is not of a VQ-VAE; name a run of vqvae"):
        open_vqvae(run.uri)
    assert isinstance(open_autoencoder(run.uri).load().model, InfinityVae)
    vqvae, model = Storage(str(tmp_path / "vqvae")), tiny_vqvae.model_of(tiny_vqvae.recipe())
    file = RunFile("vqvae", "smoke", model.recipe, VQVAEFacts(), "x")
    write_model(vqvae, checkpoint.trainable_state(model), file)
    with pytest.raises(InputError, match="recipe 'vqvae' is not of a tokenizer; name a run of infinity_tokenizer"):
        open_tokenizer(vqvae.uri)


def test_a_patch_alone_decides_its_latents() -> None:
    model = tiny_vqvae.model_of(recipe(encoder="patches")).tokenizer
    x = torch.zeros(1, 3, 16, 16)
    x[:, :, :4, :4] = x[:, :, -4:, -4:] = 0.5
    changed = x.clone()
    changed[:, :, 4:8, :4] = -1
    with torch.no_grad():
        of_x, others = model.encode(x), model.encode(changed)
    assert of_x.shape == (1, NUM_BITS, 4, 4)
    assert torch.equal(of_x[:, :, 0, 0], of_x[:, :, -1, -1])
    assert (of_x != others).any(1).nonzero().tolist() == [[0, 1, 0]]


def test_latents_of_an_image_do_not_depend_on_its_batch(tmp_path: Path) -> None:
    run, _ = finished_run(tmp_path / "run")
    trained, pixels = opened(run), tiny_vqvae.images(4)
    others = np.concatenate([pixels[:1], tiny_vqvae.images(8)[5:]])
    assert torch.equal(trained.encode(pixels)[0], trained.encode(others)[0])


# -- official files ------------------------------------------------------------------------------------------------

OFFICIAL = {"width": 32, "norm_groups": 32, "patch_size": 1, "factors": (1, 1, 1), "discriminator_channels": (32,)}


def test_an_official_file_makes_the_same_images(tmp_path: Path) -> None:
    run = Storage(str(tmp_path / "run"))
    tiny_tokenizer.write_run(run, **OFFICIAL)
    trained = opened(run)
    save_official(trained, str(tmp_path))
    assert tokenizer_difference(trained, str(tmp_path)) == 0
    mask = load_file(tmp_path / FILE_NAME)["quantizer.lfq.mask"]
    assert mask.tolist() == [32, 16, 8, 4, 2, 1]
    with torch.no_grad():
        trained.model.decoder.conv_out.conv.bias += 0.5
    assert tokenizer_difference(trained, str(tmp_path)) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_groups": 16}, "norm_groups 16: .* have 32; .*--norm-groups 32"),
        ({"patch_size": 2, "factors": (1, 1)}, "patch_size 2: .* have 1; .*--patch-size 1"),
        ({"encoder": "patches"}, "encoder patches: .* have convolutions; .*--encoder convolutions"),
    ],
)
def test_other_layers_are_not_exported(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    run = Storage(str(tmp_path / "run"))
    tiny_tokenizer.write_run(run, **OFFICIAL | changes)
    with pytest.raises(InputError, match=named):
        save_official(opened(run), str(tmp_path))
