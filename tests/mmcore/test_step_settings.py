"""Settings that change the cost of a step but not its result: recomputed blocks, compiled models, fused optimisers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import test_losses
import tiny
import tiny_diffusion
import tiny_vqvae
import torch
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.errors import InputError
from mmcore.recipe import recipe_from_json, recipe_to_json

SETTINGS = {"max_steps": 3, "validate_every_epochs": 9, "precision": "fp32"}

pytestmark = pytest.mark.usefixtures("one_thread")


def captioner(**train: Any) -> tuple[Any, Any]:
    return tiny, dataclasses.replace(tiny.recipe(**{**SETTINGS, **train}), dropout=0.2, attention_dropout=0.1)


def diffusion(**train: Any) -> tuple[Any, Any]:
    return tiny_diffusion, tiny_diffusion.recipe(**SETTINGS, **train)


def vqvae(**train: Any) -> tuple[Any, Any]:
    return tiny_vqvae, tiny_vqvae.recipe(discriminator_from_step=1, train={**SETTINGS, **train})


def saved_bytes(module: Any, recipe: Any, folder: Path) -> tuple[int, dict[str, Tensor]]:
    """The size of the activations that the forward passes of a run keep, and its final weights."""
    total = 0

    def keep(value: Tensor) -> Tensor:
        nonlocal total
        total += value.nbytes
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        run = module.train(recipe, folder)
    return total, checkpoint.trainable_state(run.training.model)


@pytest.mark.parametrize("make", [captioner, diffusion, vqvae])
def test_recomputed_blocks_keep_less_and_end_alike(make: Any, tmp_path: Path) -> None:
    """Bit-identical, with dropout, in both phases of a step."""
    kept, weights = saved_bytes(*make(), tmp_path / "kept")
    recomputed, others = saved_bytes(*make(activation_checkpointing=True), tmp_path / "recomputed")
    assert recomputed < 0.8 * kept
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def test_a_model_without_blocks_is_not_recomputed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="activation_checkpointing: this model does not support it"):
        test_losses.trained(test_losses.Two(), tmp_path, activation_checkpointing=True)


@pytest.mark.parametrize("make", [captioner, pytest.param(vqvae, marks=pytest.mark.nightly)])
def test_a_compiled_model_trains_alike(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced but run by PyTorch's own kernels, as a C++ compiler would take a minute."""
    compiled, plain = nn.Module.compile, make()
    if make is captioner:  # dropout draws its numbers in another order
        plain = (tiny, dataclasses.replace(plain[1], dropout=0.0, attention_dropout=0.0))
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled(model, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    module, recipe = plain
    expected = module.train(recipe, tmp_path / "plain")
    assert not torch._dynamo.utils.counters["frames"]
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, compile=True))
    run = module.train(recipe, tmp_path / "compiled")
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    mine, theirs = (each.training.state.history for each in (run, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert run.best.keys() == expected.best.keys()
    # The checkpoint is the same for a compiled model.
    module.train(
        dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, compile=False)),
        tmp_path / "again",
        resume_from=run.checkpoints[0],
    )


def test_an_optimiser_that_is_not_fused_moves_alike(tmp_path: Path) -> None:
    runs = [
        tiny.train(captioner(fused_optimizer=fused, precision="fp64")[1], tmp_path / str(fused)).training
        for fused in (True, False)
    ]
    assert [run.phases[0].optimizer.defaults["fused"] for run in runs] == [True, False]
    for name, value in checkpoint.trainable_state(runs[0].model).items():
        torch.testing.assert_close(checkpoint.trainable_state(runs[1].model)[name], value, rtol=1e-9, atol=1e-12)


def test_recipes_of_older_runs_lack_these_fields() -> None:
    recipe = tiny.recipe()
    fields = recipe_to_json(recipe)
    for name in ("compile", "activation_checkpointing", "fused_optimizer", "frozen_precision"):
        del fields["train"][name]
    assert recipe_from_json(type(recipe), fields, "here") == recipe
